"""The one entry to grouped decode: checks the arguments and picks the implementation."""

import jax
import jax.numpy as jnp

from mlra_jax.kernels.absorbed_decode import absorbed_decode, has_kernel
from mlra_jax.kernels.grouped_decode import reference


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
    positions `starts[b] <= s < lengths[b, t]`.

    Args:
      q_BTJGK: queries; bfloat16, float16 or float32.
      k_BSJK: the cached keys. Same dtype. Finite everywhere, also where nothing was written yet.
      v_BSJV: the cached values, of any width. Same dtype, finite everywhere.
      lengths: int32 `[B]`, the cache length including all T queries (query t sees
        `lengths - T + 1 + t` positions), or `[B, T]`, the end of what each query sees. Any value is
        legal; those outside 0..S are clipped.
      starts_B: int32, first position that is not left padding; default 0. Clipped likewise.
      scale: what scores are multiplied by before the softmax, a Python number.
      implementation: "reference", plain JAX, or "absorbed", for one key/value head: the kernels
        of absorbed decode, with the keys as rotary keys and the values as latents; default: the
        latter where such a kernel serves the call.

    Returns:
      out_BTJGV in the dtype of `q_BTJGK`, and lse_BTJG float32, the natural logarithm of the
      softmax denominator. A query that sees nothing gets 0 and -inf.

    Raises:
      ValueError: shapes or dtypes that do not fit together, or an unknown implementation.
    """
    _check(q_BTJGK, k_BSJK, v_BSJV, lengths, starts_B)
    implement = _IMPLEMENTATIONS[_choose(implementation, q_BTJGK, v_BSJV)]
    (B, T), S = q_BTJGK.shape[:2], k_BSJK.shape[1]
    lengths_BT = lengths.astype(jnp.int32)
    if lengths.ndim == 1:
        # Clipped first so that the subtraction cannot wrap around; beyond S + T - 1 all is visible.
        ends_B = jnp.clip(lengths_BT, 0, S + T)
        lengths_BT = ends_B[:, None] - (T - 1) + jnp.arange(T, dtype=jnp.int32)
    starts_B = jnp.zeros([B], jnp.int32) if starts_B is None else starts_B.astype(jnp.int32)
    return implement(
        q_BTJGK,
        k_BSJK,
        v_BSJV,
        jnp.clip(lengths_BT, 0, S),
        jnp.clip(starts_B, 0, S),
        scale=float(scale),
    )


def _absorbed(q_BTJGK, k_BSJK, v_BSJV, lengths_BT, starts_B, *, scale):
    return absorbed_decode(
        _latent_queries(q_BTJGK, v_BSJV),
        q_BTJGK[:, :, 0],
        v_BSJV,
        k_BSJK[:, :, 0],
        lengths_BT,
        starts_B,
        scale=scale,
    )


def _latent_queries(q_BTJGK, v_BSJV):
    """Queries that ask nothing of the latents, which are values only; zeros `[B, T, J, G, V]`."""
    return jnp.zeros((*q_BTJGK.shape[:4], v_BSJV.shape[3]), q_BTJGK.dtype)


_IMPLEMENTATIONS = {"reference": reference.grouped_decode, "absorbed": _absorbed}


def _choose(name, q_BTJGK, v_BSJV) -> str:
    if name is not None and name not in _IMPLEMENTATIONS:
        raise ValueError(
            f"implementation is {name!r}, expected one of {', '.join(_IMPLEMENTATIONS)}"
        )
    one_head = q_BTJGK.shape[2] == 1
    if name == "absorbed" and not one_head:
        raise ValueError(
            f"implementation=absorbed serves one key/value head, got {q_BTJGK.shape[2]}"
        )
    if name is not None or not one_head:
        return name or "reference"
    latent_queries = jax.eval_shape(_latent_queries, q_BTJGK, v_BSJV)
    return "absorbed" if has_kernel(latent_queries, q_BTJGK, v_BSJV) else "reference"


def _check(q_BTJGK, k_BSJK, v_BSJV, lengths, starts_B) -> None:
    if q_BTJGK.ndim != 5 or k_BSJK.ndim != 4 or v_BSJV.ndim != 4:
        raise ValueError(
            "expected q [B, T, J, G, K], k [B, S, J, K] and v [B, S, J, V], got "
            f"{q_BTJGK.shape}, {k_BSJK.shape} and {v_BSJV.shape}"
        )
    B, T, J, _, K = q_BTJGK.shape
    S, V = k_BSJK.shape[1], v_BSJV.shape[3]
    if 0 in (*q_BTJGK.shape, S, V):
        raise ValueError(f"no dimension may be 0: q {q_BTJGK.shape}, k {k_BSJK.shape}, v width {V}")
    for name, array, shapes in (
        ("k", k_BSJK, [(B, S, J, K)]),
        ("v", v_BSJV, [(B, S, J, V)]),
        ("lengths", lengths, [(B,), (B, T)]),
        ("starts", starts_B, [(B,)]),
    ):
        if array is not None and array.shape not in shapes:
            expected = " or ".join(map(str, shapes))
            raise ValueError(
                f"{name} has shape {array.shape}, expected {expected} beside q {q_BTJGK.shape}"
            )
    if q_BTJGK.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ValueError(f"q is {q_BTJGK.dtype}, expected bfloat16, float16 or float32")
    for name, array in (("k", k_BSJK), ("v", v_BSJV)):
        if array.dtype != q_BTJGK.dtype:
            raise ValueError(f"{name} is {array.dtype} but q is {q_BTJGK.dtype}: cast one of them")
    for name, array in (("lengths", lengths), ("starts", starts_B)):
        if array is not None and not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(f"{name} is {array.dtype}, expected int32")
