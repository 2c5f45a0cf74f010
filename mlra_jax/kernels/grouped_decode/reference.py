"""Grouped decode in plain JAX."""

import jax
import jax.numpy as jnp

from mlra_jax.kernels.softmax import precision, visible_softmax


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
