"""Softmax attention's numerics: over what a query sees, and joined from parts."""

from typing import Any

import jax
import jax.numpy as jnp


def precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """float32 means float32: TPUs and recent GPUs would otherwise round its operands."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def visible_softmax(
    scores_BTxS: jax.Array, lengths_BT: jax.Array, starts_B: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Softmax over the positions `starts[b] <= s < lengths[b, t]`, its division left to the caller.

    Args:
      scores_BTxS: float32 `[B, T, ..., S]`.
      lengths_BT, starts_B: int32.

    Returns:
      weights `[B, T, ..., S]`, at most 1; total `[B, T, ...]`, what they are to be divided by (1
      where nothing is visible, so that 0 stays 0); lse `[B, T, ...]`, -inf there. All float32.
    """
    position_S = jnp.arange(scores_BTxS.shape[-1], dtype=jnp.int32)
    visible_BTS = (position_S >= starts_B[:, None, None]) & (position_S < lengths_BT[:, :, None])
    visible_BTxS = jnp.expand_dims(visible_BTS, tuple(range(2, scores_BTxS.ndim - 1)))
    scores_BTxS = jnp.where(visible_BTxS, scores_BTxS, -jnp.inf)
    top_BTx = _finite(scores_BTxS.max(axis=-1))
    weights_BTxS = jnp.exp(scores_BTxS - top_BTx[..., None])
    total_BTx = weights_BTxS.sum(axis=-1)
    return weights_BTxS, _divisor(total_BTx), top_BTx + jnp.log(total_BTx)


def merge_partials(out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Joins attention over disjoint parts of a cache into attention over the whole.

    Each part weighs as much as its softmax denominator, `exp(lse)`.

    Args:
      out: `[parts, ..., C]`, the normalised outputs of the parts, any float dtype.
      lse: `[parts, ...]` float32, their log-sum-exp; -inf marks a part that saw nothing, whose
        `out` is ignored unless it is NaN.

    Returns:
      `[..., C]` in the dtype of `out`, and `[...]` float32; 0 and -inf where no part saw anything.
    """
    lse = lse.astype(jnp.float32)
    top = _finite(lse.max(axis=0))
    weight = jnp.exp(lse - top)
    total = weight.sum(axis=0)
    merged = (weight[..., None] * out.astype(jnp.float32)).sum(axis=0)
    merged = merged / _divisor(total)[..., None]
    return merged.astype(out.dtype), top + jnp.log(total)


def join(these: tuple[Any, Any], those: tuple[Any, Any]) -> tuple[Any, Any]:
    """`merge_partials` of two parts `(out, lse)`, of arrays or of alike trees of them."""
    structure = jax.tree.structure(these[0])
    leaves = zip(*map(jax.tree.leaves, (*these, *those)), strict=True)
    joined = [
        merge_partials(jnp.stack([out, other]), jnp.stack([lse, other_lse]))
        for out, lse, other, other_lse in leaves
    ]
    out, lse = (structure.unflatten(x) for x in zip(*joined, strict=True))
    return out, lse


def merge(out: jax.Array, lse: jax.Array, axis_name: str | tuple[str, ...], dim: int) -> jax.Array:
    """As `merge_partials`, from the parts that the devices of an axis computed.

    Args:
      out: `[..., C]`, one device's output over its share of the positions.
      lse: `[...]` float32, its log-sum-exp; 0 and -inf where it saw nothing.
      axis_name: of the mesh, inside shard_map.
      dim: the dimension of `out` along which the result is split over the axis.

    Returns:
      The device's piece of the whole softmax's output, in the dtype of `out`.
    """
    packed = jnp.concatenate([out.astype(jnp.float32), lse[..., None]], axis=-1)
    # One exchange: each device gets all parts of its piece.
    parts = jax.lax.all_to_all(packed[None], axis_name, dim + 1, 0, tiled=True)
    merged, _ = merge_partials(parts[..., :-1], parts[..., -1])
    return merged.astype(out.dtype)


def _finite(top: jax.Array) -> jax.Array:
    """A maximum to subtract: with nothing visible -inf - 0 weighs 0, where -inf - -inf is NaN."""
    return jnp.where(top == -jnp.inf, 0.0, top)


def _divisor(total: jax.Array) -> jax.Array:
    return jnp.where(total == 0, 1.0, total)
