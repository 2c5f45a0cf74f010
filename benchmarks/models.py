"""Published models with random weights, whole or one device's share of them, for benchmarks."""

import dataclasses
import functools
import time

import jax
import numpy as np

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
def _random(key, shape, dtype, where):
    x = 0.02 * jax.random.normal(key, shape, dtype)
    return jax.lax.with_sharding_constraint(x, where)


def random_tree(shapes):
    """Random numbers in the shapes and places of a tree of `jax.ShapeDtypeStruct`s."""
    leaves, tree = jax.tree.flatten(shapes)
    seed = time.time_ns() % 2**31
    keys = (jax.random.key(seed + i, impl="unsafe_rbg") for i in range(len(leaves)))
    made = [_random(k, x.shape, x.dtype, x.sharding) for k, x in zip(keys, leaves, strict=True)]
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


def require_fit(compiled) -> None:
    """Raises MemoryError where the device has less for a compiled program than that holds.

    To be asked before its arrays are made: an allocator waits long before it gives up.
    """
    has = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", float("inf")) / 1e9
    if (needs := peak_gigabytes(compiled)) > has:
        raise MemoryError(f"needs {needs:.1f} GB of the device, which gives {has:.1f}")


def parse_size(text: str) -> int:
    """2048 of `2K`, 131072 of `128K` or `131072`."""
    return int(text.rstrip("KM")) * {"K": _K, "M": _K * _K}.get(text[-1], 1)


def parse_points(text: str) -> list[tuple[int, int]]:
    """(batch, context) pairs of `1x2K,8x128K`."""
    pairs = (point.partition("x")[::2] for point in text.split(","))
    return [(int(batch), parse_size(context)) for batch, context in pairs]
