"""Chooses how a whole sequence attends to itself: cuDNN, splash attention, or plain JAX."""

from typing import Any

import jax
import jax.numpy as jnp

from mlra_jax.kernels import target
from mlra_jax.kernels.causal_attention import reference

_SPLASH_BLOCK = 512


def causal_attention(
    q_BTHK: jax.Array,
    k_BTJK: jax.Array,
    v_BTJV: jax.Array,
    *,
    scale: float,
    implementation: str | None = None,
) -> jax.Array:
    """softmax(scale q kᵀ) v, query `t` seeing keys `0 ... t`.

    Key and value head `j` serves query heads `j*H/J ... (j+1)*H/J - 1`.

    Args:
      q_BTHK: queries.
      k_BTJK: keys. Same dtype; J divides H.
      v_BTJV: values, of any width (cuDNN: at most that of the keys). Same dtype.
      scale: what scores are multiplied by before the softmax, a Python number.
      implementation: "reference", plain JAX in blocks of queries; "cudnn", flash attention for
        GPUs and 16 bits; or "splash", splash attention for TPUs; default: what
        `implementation_for` says of the device that is compiled for (that of the mesh inside
        shard_map, otherwise JAX's default backend).

    Returns:
      `[B, T, H, V]` in the dtype of `q_BTHK`.

    Raises:
      ValueError: shapes that do not fit together, or an unknown implementation.
    """
    _check(q_BTHK, k_BTJK, v_BTJV)
    name = implementation or implementation_for(target.device(), q_BTHK.dtype)
    if name not in _ATTEND:
        raise ValueError(f"implementation is {name!r}, expected one of {', '.join(_ATTEND)}")
    return _ATTEND[name](q_BTHK, k_BTJK, v_BTJV, scale=scale)


def implementation_for(device: Any, dtype: jnp.dtype) -> str:
    """What serves a device (anything with a `platform`) fastest."""
    if target.is_gpu(device) and dtype != jnp.float32:
        return "cudnn"
    # The library's indices are of the program's own type, and TPUs have no int64.
    splash = device.platform == "tpu" and not jax.config.jax_enable_x64
    return "splash" if splash else "reference"


def _check(q_BTHK, k_BTJK, v_BTJV) -> None:
    shapes = f"{q_BTHK.shape}, {k_BTJK.shape} and {v_BTJV.shape}"
    if {x.ndim for x in (q_BTHK, k_BTJK, v_BTJV)} != {4}:
        raise ValueError(
            f"expected q [B, T, H, K], k [B, T, J, K] and v [B, T, J, V], got {shapes}"
        )
    B, T, H, K = q_BTHK.shape
    J = k_BTJK.shape[2]
    if k_BTJK.shape != (B, T, J, K) or v_BTJV.shape[:3] != (B, T, J) or H % J:
        raise ValueError(f"q, k and v of {shapes} do not fit: k and v need q's B and T, k its K, "
                         "and their heads must divide q's")  # fmt: skip


def _cudnn(q_BTHK, k_BTJK, v_BTJV, *, scale):
    # The library takes values as wide as keys.
    narrower = k_BTJK.shape[-1] - v_BTJV.shape[-1]
    padded = jnp.pad(v_BTJV, ((0, 0), (0, 0), (0, 0), (0, narrower)))
    out = jax.nn.dot_product_attention(
        q_BTHK, k_BTJK, padded, scale=scale, is_causal=True, implementation="cudnn"
    )
    return out[..., : v_BTJV.shape[-1]]


def _splash(q_BTHK, k_BTJK, v_BTJV, *, scale):
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as splash,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    T, H = q_BTHK.shape[1:3]
    block = min(_SPLASH_BLOCK, -(-T // 128) * 128)
    length = -(-T // block) * block
    heads_first = lambda x: jnp.pad(
        jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, length - T), (0, 0))
    )
    with jax.ensure_compile_time_eval():
        kernel = splash.make_splash_mha(
            masks.MultiHeadMask([masks.CausalMask((length, length))] * H),
            head_shards=1,
            q_seq_shards=1,
            block_sizes=splash.BlockSizes(
                block_q=block,
                block_kv=block,
                block_kv_compute=block,
                block_q_dkv=block,
                block_kv_dkv=block,
                block_kv_dkv_compute=block,
                block_q_dq=block,
                block_kv_dq=block,
            ),
        )
    q, k, v = heads_first(q_BTHK * scale), heads_first(k_BTJK), heads_first(v_BTJV)
    return jnp.swapaxes(jax.vmap(kernel)(q, k, v), 1, 2)[:, :T]


_ATTEND = {"reference": reference.causal_attention, "cudnn": _cudnn, "splash": _splash}
