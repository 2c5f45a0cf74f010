"""Absorbed decode in plain JAX: the truth the kernels are held to, and the fallback."""

import jax
import jax.numpy as jnp

from mlra_jax.kernels.softmax import precision, visible_softmax


def absorbed_decode(
    q_BTLHC: jax.Array | None,
    q_rope_BTGHR: jax.Array,
    latents_BSLC: jax.Array,
    k_rope: jax.Array,
    lengths_BT: jax.Array,
    starts_B: jax.Array,
    *,
    scale: float,
    config: None = None,
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention over the latents; arguments as `api.absorbed_decode` normalises them.

    Products accumulate in float32 and the softmax is float32. The cache is read in its own
    dtype: a bfloat16 cache is never widened, the unnormalised probabilities are narrowed instead.

    Returns:
      out_BTLHC in the dtype of the queries, and lse_BTLH in float32 (natural logarithm).
    """
    del config
    dtype = latents_BSLC.dtype
    product = dict(preferred_element_type=jnp.float32, precision=precision(dtype))
    # Latent l = r*G + g, so the group is the fast part of the latent axis.
    times = latents_BSLC.shape[2] // q_rope_BTGHR.shape[2]
    by_latent = lambda x_BTGHx: jnp.tile(x_BTGHx, (1, 1, times, 1, 1))
    if k_rope.ndim == 4:
        q_rope_BTLHR = by_latent(q_rope_BTGHR)
        scores_BTLHS = jnp.einsum("BTLHR,BSLR->BTLHS", q_rope_BTLHR, k_rope, **product)
    else:
        scores_BTLHS = by_latent(jnp.einsum("BTGHR,BSR->BTGHS", q_rope_BTGHR, k_rope, **product))
    if q_BTLHC is not None:
        scores_BTLHS += jnp.einsum("BTLHC,BSLC->BTLHS", q_BTLHC, latents_BSLC, **product)

    weights_BTLHS, total_BTLH, lse_BTLH = visible_softmax(
        scores_BTLHS * scale, lengths_BT, starts_B
    )
    out_BTLHC = jnp.einsum(
        "BTLHS,BSLC->BTLHC", weights_BTLHS.astype(dtype), latents_BSLC, **product
    )
    return (out_BTLHC / total_BTLH[..., None]).astype(dtype), lse_BTLH
