"""Chooses how a whole sequence attends to itself: cuDNN, splash attention, or plain JAX."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mlra_jax import sharding
from mlra_jax.kernels.causal_attention import reference

_SPLASH_BLOCK = 512


def causal_attention(
    q_BTHK: jax.Array, k_BTJK: jax.Array, v_BTJV: jax.Array, *, scale: float, mesh: Mesh
) -> jax.Array:
    """softmax(scale q kᵀ) v, query `t` seeing keys `0 ... t`; returns `[B, T, H, V]` in q's dtype.

    Key and value head `j` serves query heads `j*H/J ... (j+1)*H/J - 1`. Key and value widths may
    differ. The batch and the heads are split over the mesh as the table in `sharding` says; H and J
    must divide. On GPUs with 16-bit inputs this is cuDNN's flash attention, on TPUs splash
    attention, elsewhere plain JAX in blocks of queries.
    """
    local = functools.partial(_ATTEND[_implementation(q_BTHK, mesh)], scale=scale)
    if mesh.size == 1:
        return local(q_BTHK, k_BTJK, v_BTJV)
    split = sharding.spec("batch", "length", "heads", "head_dim")
    return jax.shard_map(
        local, mesh=mesh, in_specs=(split, split, split), out_specs=split, check_vma=False
    )(q_BTHK, k_BTJK, v_BTJV)


def _implementation(q: jax.Array, mesh: Mesh) -> str:
    platform = sharding.platform(mesh)
    if platform == "gpu" and q.dtype != jnp.float32:
        return "cudnn"
    return "splash" if platform == "tpu" else "reference"


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
