"""Where a row's tokens lie, and what each query sees.

Every row has its own length: token `s` of row `b` is in slot `s`, and the row owns the slots
`0 ... lengths[b] - 1`. Slots are dealt to the devices of the context axis in turn (slot `s` lives
on device `s % n`), so that each reads its share whatever the fill. In the arrays the dealt slots of
one device lie together.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mlra_jax import sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """One dict of `[B, S, ...]` arrays per layer, and the slots that each row fills, int32 [B].

    A full row stays as it is: entries beyond its last slot are dropped. Its length goes on
    counting, so that `lengths > capacity` says of a row that some were.
    """

    layers: tuple[dict[str, jax.Array], ...]
    lengths: jax.Array

    @property
    def capacity(self) -> int:
        """S, the slots of each row."""
        return next(iter(self.layers[0].values())).shape[1]


def round_capacity(slots: int, mesh: Mesh) -> int:
    """`slots` rounded up so that each device of the context axis holds as many, a multiple of 8."""
    # The Hopper kernel copies whole pieces of 8 positions.
    step = 8 * sharding.size(mesh, sharding.CONTEXT)
    return -(-slots // step) * step


def shares(slots: jax.Array, num_shares: int, share: jax.Array | int) -> jax.Array:
    """How many of the slots `0 ... slots - 1` are dealt to `share`."""
    return (slots - share + num_shares - 1) // num_shares


def slots(
    lengths_B: jax.Array, T: int, capacity: int, num_shares: int, share: jax.Array | int
) -> jax.Array:
    """int32 `[B, T]`: where T new tokens of each row lie in one device's `capacity` slots.

    Tokens of other shares are beyond the last one, where nothing is written, each by itself.
    """
    offset_T = jnp.arange(T, dtype=jnp.int32)
    slots_BT = lengths_B[:, None] + offset_T
    return jnp.where(slots_BT % num_shares == share, slots_BT // num_shares, capacity + offset_T)


def bounds(lengths_B: jax.Array, T: int, num_shares: int, share: jax.Array | int) -> jax.Array:
    """int32 `[B, T]`: the end, within one device's share, of what each of T new queries sees.

    Query `t` of row `b` is in slot `lengths[b] + t` and sees the slots up to its own.
    """
    ends_BT = lengths_B[:, None] + 1 + jnp.arange(T, dtype=jnp.int32)
    return shares(ends_BT, num_shares, share)
