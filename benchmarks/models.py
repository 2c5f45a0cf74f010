"""Published models with random weights, whole or one device's share of them, for benchmarks."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mlra_jax.attention.heads import HeldHeads
from mlra_jax.config import (
    ConfigError,
    GroupedConfig,
    LatentConfig,
    ModelConfig,
    TiedConfig,
    preset,
)

_K = 1024
_TINY = dict(num_layers=1, embed_dim=128, mlp_dim=256, vocab_size=512)


def model_config(name: str, share: str = "", tiny: bool = False) -> ModelConfig:
    """The published model, one device's share of it, or one narrow layer to try a command with."""
    config = dataclasses.replace(preset(name), **_TINY if tiny else {})
    return share_of(config, *_ways(share)) if share else config


def share_of(config: ModelConfig, tensor: int, context: int = 1) -> ModelConfig:
    """What one device of a mesh holds, as a model of its own.

    It has the latents (or key heads, with their weights) of its tensor share, and its parts of the
    other weights, which both axes split. What devices exchange is left out, and so are the queries
    of other devices' heads: those that attend to this one's positions where `context` is not 1, and
    what a latent model has on several devices, its queries' projections and what makes its latents
    (on eight devices up to a sixth of the weights of one layer and the vocabulary).
    """
    a, ways = config.attention, tensor * context
    part = lambda n: -(-n // ways)
    if isinstance(a, LatentConfig):
        if a.base_dim or a.num_kv_heads:
            raise ConfigError("no share of a model with base_dim or num_kv_heads is made")
        branch_heads, latents = a.branches * a.num_heads // ways, max(1, a.num_latents // tensor)
        branches = max(1, branch_heads // a.num_heads)
        share = dict(
            num_heads=branch_heads // branches,
            branches=branches,
            groups=latents // branches,
            latent_dim=latents * a.latent_head_dim,
        )
    else:
        share = dict(num_heads=part(a.num_heads))
        if isinstance(a, GroupedConfig | TiedConfig):
            held = HeldHeads(a.num_heads, a.num_kv_heads, tensor).each
            # Where neighbours read a head in common, some have a query head less than this.
            share = dict(num_heads=-(-share["num_heads"] // held) * held, num_kv_heads=held)
    return dataclasses.replace(
        config,
        attention=dataclasses.replace(a, **share),
        mlp_dim=part(config.mlp_dim),
        vocab_size=part(config.vocab_size),
    )


def positions_of(share: str, context: int) -> int:
    """The positions of a context that a device of this share (`4`, `4x2`) keeps."""
    return -(-context // _ways(share)[1])


def _ways(share: str) -> tuple[int, int]:
    tensor, _, context = share.partition("x")
    return int(tensor or 1), int(context or 1)


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "where"))
def _random(seed, shape, dtype, where):
    # A hash of each element's place: each device makes its own part and holds nothing beside it.
    n = jnp.full(shape, seed, jnp.uint32)
    for axis in range(len(shape)):
        n = (n ^ lax.broadcasted_iota(jnp.uint32, shape, axis)) * jnp.uint32(0x9E3779B1)
        n ^= n >> 15
    x = (0.07 * (n.astype(jnp.float32) * 2.0**-32 - 0.5)).astype(dtype)
    return lax.with_sharding_constraint(x, where)


@functools.cache
def _maker(shape, dtype, where):
    return _random.lower(np.uint32(0), shape=shape, dtype=dtype, where=where).compile()


def compile_random(shapes) -> None:
    """Compiles what `random_tree` calls for these shapes, so that it takes no time there."""
    for x in jax.tree.leaves(shapes):
        _maker(x.shape, x.dtype, x.sharding)


def random_tree(shapes):
    """Random numbers in the shapes and places of a tree of `jax.ShapeDtypeStruct`s."""
    leaves, tree = jax.tree.flatten(shapes)
    seeds = np.random.default_rng().integers(0, 2**32, len(leaves), np.uint32)
    made = [_maker(x.shape, x.dtype, x.sharding)(s) for x, s in zip(leaves, seeds, strict=True)]
    return jax.block_until_ready(jax.tree.unflatten(tree, made))


def bytes_per_device(tree) -> int:
    """Bytes that one device holds of a tree of arrays or shapes."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def peak_gigabytes(compiled) -> float:
    """What one device holds while a compiled program runs: arguments, results, what is between."""
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return (held - memory.alias_size_in_bytes + memory.temp_size_in_bytes) / 1e9


def require_fit(gigabytes: float) -> None:
    """Raises MemoryError where a device gives less; to be asked before arrays are made: an
    allocator waits long before it gives up."""
    if gigabytes > (gives := device_gigabytes()):
        raise MemoryError(f"needs {gigabytes:.1f} GB of the device, which gives {gives:.1f}")


def device_gigabytes() -> float:
    """What a device gives; infinite where it does not say."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", float("inf")) / 1e9


def parse_size(text: str) -> int:
    """2048 of `2K`, 131072 of `128K` or `131072`."""
    return int(text.rstrip("KM")) * {"K": _K, "M": _K * _K}.get(text[-1], 1)


def in_words(number: int) -> str:
    """2048 as 2K, as `parse_size` reads it."""
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if number % size == 0:
            return f"{number // size}{unit}"
    return str(number)


def parse_points(text: str) -> list[tuple[int, int]]:
    """(batch, context) pairs of `1x2K,8x128K`, none of an empty text.

    Raises ValueError naming what is no such pair.
    """
    points = []
    for point in text.split(",") if text else ():
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*[KM]?", point):
            raise ValueError(f"{point!r} is no batch x context, as in 8x128K")
        batch, _, context = point.partition("x")
        points.append((int(batch), parse_size(context)))
    return points
