"""Absorbed decode in plain JAX: the truth the kernels are held to, and the fallback."""

import jax
import jax.numpy as jnp

from mlra_jax.kernels.softmax import precision, visible_softmax


def absorbed_decode(
    q_BTLHC: jax.Array,
    q_rope_BTGHR: jax.Array,
    latents_BSLC: jax.Array,
    k_rope_BSR: jax.Array,
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
      out_BTLHC in the dtype of `q_BTLHC`, and lse_BTLH in float32 (natural logarithm).
    """
    del config
    B, T, L, H, _ = q_BTLHC.shape
    G = q_rope_BTGHR.shape[2]
    S = latents_BSLC.shape[1]
    dtype = latents_BSLC.dtype
    product = dict(preferred_element_type=jnp.float32, precision=precision(dtype))
    scores_BTLHS = jnp.einsum("BTLHC,BSLC->BTLHS", q_BTLHC, latents_BSLC, **product)
    rope_BTGHS = jnp.einsum("BTGHR,BSR->BTGHS", q_rope_BTGHR, k_rope_BSR, **product)
    # Latent l = r*G + g, so the group is the fast part of the latent axis.
    scores_BTLHS = scores_BTLHS.reshape(B, T, L // G, G, H, S) + rope_BTGHS[:, :, None]
    scores_BTLHS = scores_BTLHS.reshape(B, T, L, H, S) * scale

    weights_BTLHS, total_BTLH, lse_BTLH = visible_softmax(scores_BTLHS, lengths_BT, starts_B)
    out_BTLHC = jnp.einsum(
        "BTLHS,BSLC->BTLHC", weights_BTLHS.astype(dtype), latents_BSLC, **product
    )
    return (out_BTLHC / total_BTLH[..., None]).astype(q_BTLHC.dtype), lse_BTLH
