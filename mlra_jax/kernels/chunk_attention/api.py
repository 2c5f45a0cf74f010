"""A chunk's queries over one run of keys: all of a prefix, or causally the chunk's own."""

import jax
import jax.numpy as jnp

from mlra_jax.kernels.grouped_decode import grouped_decode

WIDEST = 256
"""Keys and values that cuDNN takes."""


def chunk_attention(
    q_BTJGK: jax.Array,
    k_BSJK: jax.Array,
    v_BSJV: jax.Array,
    lengths_B: jax.Array | None = None,
    *,
    scale: float,
    implementation: str = "cudnn",
) -> tuple[jax.Array, jax.Array]:
    """softmax(scale q kᵀ) v of G query heads for each of J key/value heads.

    Args:
      q_BTJGK: queries, 16 bits for cuDNN.
      k_BSJK, v_BSJV: keys and values, finite everywhere; cuDNN takes widths up to `WIDEST`.
      lengths_B: int32, every query of row `b` sees the first `lengths[b]` positions, at most S.
        Without it query `t` sees the positions `0 ... t`.
      scale: what scores are multiplied by before the softmax, a Python number.
      implementation: "cudnn", or "reference", plain JAX with all scores in memory.

    Returns:
      out_BTJGV in the dtype of `q_BTJGK`, and lse_BTJG float32, the natural logarithm of the
      softmax denominator; 0 and -inf where nothing is visible.

    Raises:
      ValueError: an unknown implementation.
    """
    if implementation not in _ATTEND:
        raise ValueError(
            f"implementation is {implementation!r}, expected one of {', '.join(_ATTEND)}"
        )
    if lengths_B is not None:
        lengths_B = jnp.clip(lengths_B.astype(jnp.int32), 0, k_BSJK.shape[1])
    return _ATTEND[implementation](q_BTJGK, k_BSJK, v_BSJV, lengths_B, scale)


def _reference(q_BTJGK, k_BSJK, v_BSJV, lengths_B, scale):
    (B, T), seen_T = q_BTJGK.shape[:2], jnp.arange(1, q_BTJGK.shape[1] + 1, dtype=jnp.int32)
    ends_BT = jnp.broadcast_to(seen_T if lengths_B is None else lengths_B[:, None], (B, T))
    return grouped_decode(q_BTJGK, k_BSJK, v_BSJV, ends_BT, scale=scale, implementation="reference")


def _cudnn(q_BTJGK, k_BSJK, v_BSJV, lengths_B, scale):
    # The public function rounds the logarithms of the denominators to the dtype of the result.
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    B, T, J, G, K = q_BTJGK.shape
    # Values as wide as keys serve every version of the library.
    values = jnp.pad(v_BSJV, ((0, 0), (0, 0), (0, 0), (0, K - v_BSJV.shape[3])))
    causal = lengths_B is None
    out, lse_BHT = dot_product_attention(
        q_BTJGK.reshape(B, T, J * G, K),
        k_BSJK,
        values,
        q_seqlen=None if causal else jnp.full(B, T, jnp.int32),
        kv_seqlen=lengths_B,
        scale=scale,
        mask_type=MaskType.CAUSAL if causal else MaskType.PADDING,
        return_residual=True,
    )
    out_BTJGV = out[..., : v_BSJV.shape[3]].reshape(B, T, J, G, -1)
    lse_BTJG = jnp.swapaxes(lse_BHT, 1, 2).reshape(B, T, J, G).astype(jnp.float32)
    if causal:
        return out_BTJGV, lse_BTJG
    seen = (lengths_B > 0)[:, None, None, None]
    return jnp.where(seen[..., None], out_BTJGV, 0), jnp.where(seen, lse_BTJG, -jnp.inf)


_ATTEND = {"cudnn": _cudnn, "reference": _reference}
