"""Absorbed decode in plain JAX: the truth the kernels are held to, and the fallback."""

import jax
import jax.numpy as jnp


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
    product = dict(
        preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None,
    )
    scores_BTLHS = jnp.einsum("BTLHC,BSLC->BTLHS", q_BTLHC, latents_BSLC, **product)
    rope_BTGHS = jnp.einsum("BTGHR,BSR->BTGHS", q_rope_BTGHR, k_rope_BSR, **product)
    # Latent l = r*G + g, so the group is the fast part of the latent axis.
    scores_BTLHS = scores_BTLHS.reshape(B, T, L // G, G, H, S) + rope_BTGHS[:, :, None]
    scores_BTLHS = scores_BTLHS.reshape(B, T, L, H, S) * scale

    position_S = jnp.arange(S, dtype=jnp.int32)
    visible_BTS = (position_S >= starts_B[:, None, None]) & (position_S < lengths_BT[:, :, None])
    visible_BT11S = visible_BTS[:, :, None, None, :]
    scores_BTLHS = jnp.where(visible_BT11S, scores_BTLHS, -jnp.inf)
    top_BTLH = scores_BTLHS.max(axis=-1)
    # An empty row has top -inf; -inf - 0 keeps its weights at exp(-inf) = 0 without a NaN.
    top_BTLH = jnp.where(top_BTLH == -jnp.inf, 0.0, top_BTLH)
    weights_BTLHS = jnp.exp(scores_BTLHS - top_BTLH[..., None])
    total_BTLH = weights_BTLHS.sum(axis=-1)
    out_BTLHC = jnp.einsum(
        "BTLHS,BSLC->BTLHC", weights_BTLHS.astype(dtype), latents_BSLC, **product
    )
    out_BTLHC = out_BTLHC / jnp.where(total_BTLH == 0, 1.0, total_BTLH)[..., None]
    return out_BTLHC.astype(q_BTLHC.dtype), top_BTLH + jnp.log(total_BTLH)


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
    top = lse.max(axis=0)
    top = jnp.where(top == -jnp.inf, 0.0, top)
    weight = jnp.exp(lse - top)
    total = weight.sum(axis=0)
    merged = (weight[..., None] * out.astype(jnp.float32)).sum(axis=0)
    merged = merged / jnp.where(total == 0, 1.0, total)[..., None]
    return merged.astype(out.dtype), top + jnp.log(total)
