"""A cache whose rows are whole: `[B, S, ...]`, row `b`'s slots one after the other."""

import jax
import jax.numpy as jnp

from mlra_jax.cache.layout import slots


def write(
    cache_BS: jax.Array,
    new_BT: jax.Array,
    lengths_B: jax.Array,
    num_shares: int,
    share: jax.Array | int,
) -> jax.Array:
    """One device's part of the cache with its share of the T slots from `lengths[b]` on replaced.

    What is beyond the last slot is dropped.
    """
    B, T = new_BT.shape[:2]
    slots_BT = slots(lengths_B, T, cache_BS.shape[1], num_shares, share)
    return cache_BS.at[jnp.arange(B, dtype=jnp.int32)[:, None], slots_BT].set(
        new_BT.astype(cache_BS.dtype), mode="drop", unique_indices=True
    )


def from_prompt(entry_BT: jax.Array, capacity: int, num_shares: int) -> jax.Array:
    """`[B, capacity, ...]` from a prefill's `[B, T, ...]`: dealt to the shares, the rest zero.

    Rows shorter than T have entries of their padding in slots from their length on. No query sees
    them before they are written.
    """
    B, T = entry_BT.shape[:2]
    padded = jnp.pad(entry_BT, ((0, 0), (0, capacity - T)) + ((0, 0),) * (entry_BT.ndim - 2))
    if num_shares == 1:
        return padded
    dealt = padded.reshape(B, capacity // num_shares, num_shares, *entry_BT.shape[2:])
    return jnp.swapaxes(dealt, 1, 2).reshape(padded.shape)
