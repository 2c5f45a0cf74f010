"""Chooses how a whole sequence attends to itself: cuDNN, splash attention, or plain JAX."""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from jax.ad_checkpoint import checkpoint_name

from mlra_jax.kernels import target
from mlra_jax.kernels.causal_attention import reference

MOSAIC_GPU = "mosaic_gpu"
"""Of `latent_attention` only."""
_SPLASH_BLOCK = 512
_UNEQUAL_WIDTHS = 91300
"""The cuDNN from which on values may have another width than keys: 9.13. Earlier ones that take it
give wrong gradients for some pairs of widths on Hopper."""


def causal_attention(
    q_BTHK: jax.Array,
    k_BTJK: jax.Array,
    v_BTJV: jax.Array,
    *,
    scale: float,
    implementation: str = "auto",
    name: str | None = None,
) -> jax.Array:
    """softmax(scale q kᵀ) v, query `t` seeing keys `0 ... t`.

    Key and value head `j` serves query heads `j*H/J ... (j+1)*H/J - 1`.

    Args:
      q_BTHK: queries.
      k_BTJK: keys. Same dtype; J divides H.
      v_BTJV: values, of any width ("cudnn_padded": at most that of the keys). Same dtype.
      scale: what scores are multiplied by before the softmax, a Python number.
      implementation: "reference", plain JAX in blocks of queries; "cudnn", flash attention for
        GPUs and 16 bits, "cudnn_padded" the same with values padded to the width of keys;
        "splash", splash attention for TPUs; or "auto", what `implementation_for` says of the device
        that is compiled for (that of the mesh inside shard_map, otherwise JAX's default backend).
      name: by which `jax.checkpoint` policies know the result and, where the implementation allows
        it, what the backward pass needs beside the result.

    Returns:
      `[B, T, H, V]` in the dtype of `q_BTHK`.

    Raises:
      ValueError: shapes that do not fit together, or an unknown implementation.
    """
    _check(q_BTHK, k_BTJK, v_BTJV)
    if implementation == "auto":
        implementation = implementation_for(target.device(), q_BTHK, k_BTJK, v_BTJV)
    if implementation == MOSAIC_GPU:
        raise ValueError(
            "mosaic_gpu attends to latents no wider than a head's key (MLRA-4); auto takes others"
        )
    if implementation not in _ATTEND:
        known = ", ".join(["auto", *_ATTEND])
        raise ValueError(f"implementation is {implementation!r}, expected one of {known}")
    out_BTHV = _ATTEND[implementation](q_BTHK, k_BTJK, v_BTJV, scale=scale, name=name)
    return checkpoint_name(out_BTHV, name) if name else out_BTHV


def implementation_for(device: Any, q_BTHK: Any, k_BTJK: Any, v_BTJV: Any) -> str:
    """What serves a device (anything with a `platform`) fastest; the log says it once.

    Of the arrays shapes and the dtype count, whole or a device's part of the batch and the heads.
    """
    chosen, dtype = "reference", q_BTHK.dtype
    key_width, value_width = q_BTHK.shape[-1], v_BTJV.shape[-1]
    if target.is_gpu(device) and dtype != jnp.float32:
        unequal = key_width != value_width
        chosen = "cudnn_padded" if unequal and not _unequal_widths(device) else "cudnn"
    # The library's indices are of the program's own type, and TPUs have no int64.
    elif device.platform == "tpu" and not jax.config.jax_enable_x64:
        chosen = "splash"
    say(chosen, device, key_width, value_width)
    return chosen


def say(chosen: str, device: Any, key_width: int, value_width: int) -> None:
    """Logs it once."""
    _say(chosen, str(getattr(device, "device_kind", device.platform)), key_width, value_width)


@functools.cache
def _say(chosen: str, device: str, key_width: int, value_width: int) -> None:
    widths = f"keys of {key_width}, values of {value_width}"
    logging.info("causal attention on %s, %s: %s", device, widths, chosen)


def _unequal_widths(device: Any) -> bool:
    """Whether cuDNN takes values of another width than keys there, by way of JAX's own function."""
    try:
        from jax._src.cudnn import fused_attention_stablehlo as library

        known = inspect.signature(library.dot_product_attention).parameters
        version = library.check_cudnn_version()
    except (ImportError, AttributeError, RuntimeError):  # Private, or no cuDNN here.
        return False
    wanted = {"query", "key", "value", "scale", "mask_type"}
    return target.is_hopper(device) and wanted <= known.keys() and version >= _UNEQUAL_WIDTHS


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


def _reference(q_BTHK, k_BTJK, v_BTJV, *, scale, name):
    return reference.causal_attention(q_BTHK, k_BTJK, v_BTJV, scale=scale)


def _cudnn(q_BTHK, k_BTJK, v_BTJV, *, scale, name):
    if k_BTJK.shape == v_BTJV.shape:
        return jax.nn.dot_product_attention(
            q_BTHK, k_BTJK, v_BTJV, scale=scale, is_causal=True, implementation="cudnn"
        )
    # The function above refuses unequal widths; what it calls takes them.
    from jax._src.cudnn import fused_attention_stablehlo as library

    causal = library.MaskType.CAUSAL
    return library.dot_product_attention(q_BTHK, k_BTJK, v_BTJV, scale=scale, mask_type=causal)


def _cudnn_padded(q_BTHK, k_BTJK, v_BTJV, *, scale, name):
    narrower = k_BTJK.shape[-1] - v_BTJV.shape[-1]
    padded = jnp.pad(v_BTJV, ((0, 0), (0, 0), (0, 0), (0, narrower)))
    return _cudnn(q_BTHK, k_BTJK, padded, scale=scale, name=name)[..., : v_BTJV.shape[-1]]


def _splash(q_BTHK, k_BTJK, v_BTJV, *, scale, name):
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
            residual_checkpoint_name=name,
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


_ATTEND = {
    "cudnn": _cudnn,
    "cudnn_padded": _cudnn_padded,
    "splash": _splash,
    "reference": _reference,
}
