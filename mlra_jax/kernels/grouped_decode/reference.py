"""Grouped decode in plain JAX."""

import jax
import jax.numpy as jnp

from mlra_jax.layers import precision


def grouped_decode(
    q_BTJGK: jax.Array,
    k_BSJK: jax.Array,
    v_BSJV: jax.Array,
    lengths_BT: jax.Array,
    starts_B: jax.Array,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention; arguments as `api.grouped_decode` normalises them.

    Products accumulate in float32 and the softmax is float32. The cache is read in its own dtype:
    a bfloat16 cache is never widened, the unnormalised probabilities are narrowed instead.

    Returns:
      out_BTJGV in the dtype of `q_BTJGK`, and lse_BTJG float32 (natural logarithm).
    """
    product = dict(preferred_element_type=jnp.float32, precision=precision(k_BSJK.dtype))
    scores_BTJGS = jnp.einsum("BTJGK,BSJK->BTJGS", q_BTJGK, k_BSJK, **product) * scale
    weights_BTJGS, total_BTJG, lse_BTJG = visible_softmax(scores_BTJGS, lengths_BT, starts_B)
    out_BTJGV = jnp.einsum(
        "BTJGS,BSJV->BTJGV", weights_BTJGS.astype(v_BSJV.dtype), v_BSJV, **product
    )
    return (out_BTJGV / total_BTJG[..., None]).astype(q_BTJGK.dtype), lse_BTJG


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
    top_BTx = scores_BTxS.max(axis=-1)
    # With nothing visible -inf - 0 gives weights of exactly 0, where -inf - -inf would give NaN.
    top_BTx = jnp.where(top_BTx == -jnp.inf, 0.0, top_BTx)
    weights_BTxS = jnp.exp(scores_BTxS - top_BTx[..., None])
    total_BTx = weights_BTxS.sum(axis=-1)
    lse_BTx = top_BTx + jnp.log(total_BTx)
    return weights_BTxS, jnp.where(total_BTx == 0, 1.0, total_BTx), lse_BTx
