"""Attention of many queries to a cache, a block of positions at a time: no `[T, S]` matrix."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mlra_jax.kernels.softmax import join

_SCORES = 1 << 26
"""Of one block, as far as a block has at least 64 positions and at most 512."""
_KEYS = 1 << 14
"""Positions of all rows of one segment, as far as a segment has at least 256."""

Attend = Callable[..., tuple[jax.Array, jax.Array]]


def in_blocks(attend: Attend, positions: Callable[[Any], int]) -> Attend:
    """As `attend`, called with some positions at a time, up to the last that a query sees.

    `attend` is `(queries, cache, lengths_BT, *weights) -> (o_BThV, lse_BTh)`, where query `t` of
    row `b` sees the positions before `lengths[b, t]`; ends beyond the positions that it is given
    mean all. `positions(queries)` is how many it is given, `of_scores` or `of_keys`.
    """

    def attend_in_blocks(queries, cache, lengths_BT, *weights):
        slots = jax.tree.leaves(cache)[0].shape[1]
        size = min(positions(queries), slots)
        if size == slots:
            return attend(queries, cache, lengths_BT, *weights)
        # What is left over comes first, so that all others are whole blocks.
        first = slots % size or size

        def attend_to(start, count):
            part = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, count, 1), cache)
            o_BThV, lse_BTh = attend(queries, part, lengths_BT - start, *weights)
            return jax.tree.map(lambda x: x.astype(jnp.float32), o_BThV), lse_BTh

        def join_next(n, joined):
            return join(joined, attend_to(first + n * size, size))

        # Rows that are already full count on beyond the last slot.
        seen = jnp.minimum(jnp.max(lengths_BT), slots)
        blocks = jnp.maximum(-(-(seen - first) // size), 0)
        o_BThV, lse_BTh = jax.lax.fori_loop(0, blocks, join_next, attend_to(0, first))
        dtype = jax.tree.leaves(queries)[0].dtype
        return jax.tree.map(lambda x: x.astype(dtype), o_BThV), lse_BTh

    return attend_in_blocks


def of_scores(queries: Any) -> int:
    """Positions of a block whose scores are in memory."""
    rows = math.prod(jax.tree.leaves(queries)[0].shape[:-1])
    return max(64, min(512, _SCORES // rows // 64 * 64))


def of_keys(queries: Any) -> int:
    """Positions of a segment whose keys and values are, made of what is cached."""
    return max(256, _KEYS // jax.tree.leaves(queries)[0].shape[0])
