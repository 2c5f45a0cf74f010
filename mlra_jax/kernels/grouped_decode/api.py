"""The one entry to grouped decode: the kernels of absorbed decode, by other names."""

import jax

from mlra_jax.kernels.absorbed_decode import absorbed_decode


def grouped_decode(
    q_BTJGK: jax.Array,
    k_BSJK: jax.Array,
    v_BSJV: jax.Array,
    lengths: jax.Array,
    starts_B: jax.Array | None = None,
    *,
    scale: float,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attends from the G query heads of each of J key/value heads to a cache.

    Score = scale * q . k, one softmax per query and query head. Query t of row b sees the cache
    positions `starts[b] <= s < lengths[b, t]`. This is absorbed decode: its latents are the values,
    which no query asks, and its rotary keys are the keys, one of each latent.

    Args:
      q_BTJGK: queries; bfloat16, float16 or float32.
      k_BSJK: the cached keys. Same dtype. Finite everywhere, also where nothing was written yet.
      v_BSJV: the cached values, of any width. Same dtype, finite everywhere.
      lengths: int32 `[B]`, the cache length including all T queries (query t sees
        `lengths - T + 1 + t` positions), or `[B, T]`, the end of what each query sees. Any value is
        legal; those outside 0..S are clipped.
      starts_B: int32, first position that is not left padding; default 0. Clipped likewise.
      scale: what scores are multiplied by before the softmax, a Python number.
      implementation: as in `absorbed_decode`.

    Returns:
      out_BTJGV in the dtype of `q_BTJGK`, and lse_BTJG float32, the natural logarithm of the
      softmax denominator. A query that sees nothing gets 0 and -inf.

    Raises:
      ValueError: shapes or dtypes that do not fit together, an unknown implementation, or one asked
        for by name that cannot serve the call.
    """
    _check(q_BTJGK, k_BSJK, v_BSJV)
    return absorbed_decode(
        None,
        q_BTJGK,
        v_BSJV,
        k_BSJK,
        lengths,
        starts_B,
        scale=scale,
        implementation=implementation,
    )


def _check(q_BTJGK, k_BSJK, v_BSJV) -> None:
    """By this op's own names, before absorbed decode checks the rest by its own."""
    if q_BTJGK.ndim != 5 or k_BSJK.ndim != 4 or v_BSJV.ndim != 4:
        raise ValueError(
            "expected q [B, T, J, G, K], k [B, S, J, K] and v [B, S, J, V], got "
            f"{q_BTJGK.shape}, {k_BSJK.shape} and {v_BSJV.shape}"
        )
    B, _, J, _, K = q_BTJGK.shape
    S, V = k_BSJK.shape[1], v_BSJV.shape[3]
    for name, array, shape in (("k", k_BSJK, (B, S, J, K)), ("v", v_BSJV, (B, S, J, V))):
        if array.shape != shape:
            raise ValueError(
                f"{name} has shape {array.shape}, expected {shape} beside q {q_BTJGK.shape}"
            )
        if array.dtype != q_BTJGK.dtype:
            raise ValueError(f"{name} is {array.dtype} but q is {q_BTJGK.dtype}: cast one of them")
