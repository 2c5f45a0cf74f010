"""What is kept between decode steps, and how many bytes that is per device.

A batch of prompts is left-padded: every row writes its next token to the same slot, and row `b`
owns slots `starts[b] ... length - 1`. Slots are dealt to the devices of the context axis in turn
(slot `s` lives on device `s % n`), so that each reads its share whatever the fill. In the arrays
the dealt slots of one device lie together.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mlra_jax import sharding
from mlra_jax.config import ConfigError


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Cache:
    """One dict of `[B, S, ...]` arrays per layer; `length` int32 scalar; `starts` int32 [B]."""

    layers: tuple[dict[str, jax.Array], ...]
    length: jax.Array
    starts: jax.Array

    @property
    def nbytes(self) -> int:
        """Bytes of all devices together."""
        return sum(x.nbytes for x in jax.tree.leaves(self.layers))

    @property
    def nbytes_per_device(self) -> int:
        """Bytes that the fullest device holds."""
        return sum(
            math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
            for x in jax.tree.leaves(self.layers)
        )


def round_capacity(slots: int, mesh: Mesh) -> int:
    """`slots` rounded up so that each device of the context axis holds as many, a multiple of 8."""
    # The Hopper kernel copies whole pieces of 8 positions.
    step = 8 * sharding.size(mesh, sharding.CONTEXT)
    return -(-slots // step) * step


def shares(slots: jax.Array, num_shares: int, share: jax.Array | int) -> jax.Array:
    """How many of the slots `0 ... slots - 1` are dealt to `share`."""
    return (slots - share + num_shares - 1) // num_shares


def write(
    cache_BS: jax.Array, new_BT: jax.Array, length: jax.Array, num_shares: int, share: jax.Array
) -> jax.Array:
    """One device's part of the cache with its share of the slots from `length` on replaced."""
    new_BT = new_BT.astype(cache_BS.dtype)
    at = lambda slot: (0, slot) + (0,) * (cache_BS.ndim - 2)
    if num_shares == 1:
        return jax.lax.dynamic_update_slice(cache_BS, new_BT, at(length))
    for t in range(new_BT.shape[1]):
        slot = (length + t) // num_shares
        new = new_BT[:, t : t + 1]
        old = jax.lax.dynamic_slice(cache_BS, at(slot), new.shape)
        mine = (length + t) % num_shares == share
        cache_BS = jax.lax.dynamic_update_slice(cache_BS, jnp.where(mine, new, old), at(slot))
    return cache_BS


def from_prompt(
    entry_BT: jax.Array, starts_B: jax.Array, capacity: int, num_shares: int
) -> jax.Array:
    """`[B, capacity, ...]` from a prefill's `[B, T, ...]`: left-padded, dealt, the rest zero.

    Rows of the prefill begin at slot 0 (right-padded), as a causal pass wants them; here each moves
    right by `starts[b]`.
    """
    B, T = entry_BT.shape[:2]
    moved = jax.vmap(lambda row, start: jnp.roll(row, start, axis=0))(entry_BT, starts_B)
    padded = jnp.pad(moved, ((0, 0), (0, capacity - T)) + ((0, 0),) * (entry_BT.ndim - 2))
    if num_shares == 1:
        return padded
    dealt = padded.reshape(B, capacity // num_shares, num_shares, *entry_BT.shape[2:])
    return jnp.swapaxes(dealt, 1, 2).reshape(padded.shape)


def bounds(
    length: jax.Array, starts_B: jax.Array, T: int, num_shares: int, share: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(lengths_BT, starts_B) within one device's share for `T` queries in slots `length ...`."""
    ends_T = shares(length + 1 + jnp.arange(T, dtype=jnp.int32), num_shares, share)
    lengths_BT = jnp.broadcast_to(ends_T, (starts_B.shape[0], T))
    return lengths_BT, shares(starts_B, num_shares, share)


def merge(z: jax.Array, lse: jax.Array, axis_name: str | tuple[str, ...], dim: int) -> jax.Array:
    """The whole softmax's output from the parts that the devices of an axis computed.

    `z [..., C]` and `lse [...]` are one device's output and log-sum-exp over its share of the
    positions (0 and -inf where it saw none). The result is split over the axis along `dim`.
    """
    top = jax.lax.pmax(lse, axis_name)
    weight = jnp.exp(lse - jnp.where(jnp.isfinite(top), top, 0.0))[..., None]
    scatter = lambda x: jax.lax.psum_scatter(x, axis_name, scatter_dimension=dim, tiled=True)
    total = scatter(weight)
    merged = scatter(z.astype(jnp.float32) * weight) / jnp.where(total > 0, total, 1.0)
    return merged.astype(z.dtype)


def held_copies(heads: int, tensor: int) -> int:
    """Cached heads stored when `heads` of them are split over `tensor` devices.

    Where there are fewer heads than devices several hold each head, and the array repeats it.
    Raises ConfigError when neither number divides the other.
    """
    if heads % tensor and tensor % heads:
        raise ConfigError(
            f"{heads} latent heads and tensor={tensor} devices: one must divide the other; "
            f"use tensor={math.gcd(heads, tensor)} and put the rest on the context axis"
        )
    return max(heads, tensor)
