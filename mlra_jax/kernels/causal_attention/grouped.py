"""Causal attention of grouped heads on Hopper GPUs: forward by cuDNN, backward by `mosaic_gpu`.

cuDNN's own backward pass takes the heads of a group one by one and then adds up what they make of
the keys and values that they share.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mlra_jax.kernels import target
from mlra_jax.kernels.causal_attention import cudnn, hopper, mosaic_gpu

# Query heads to a key/value head from which on it is chosen; 24 were measured.
_GROUP = 4


def supports(device: Any, q_BTHK: Any, k_BTJK: Any, v_BTJV: Any) -> bool:
    """Whether these shapes are served, and faster than by cuDNN alone, on a device."""
    grouped = q_BTHK.shape[2] >= _GROUP * k_BTJK.shape[2]
    return target.is_hopper(device) and grouped and mosaic_gpu.serves(q_BTHK, k_BTJK, v_BTJV)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def causal_attention(
    q_BTHK: jax.Array, k_BTJK: jax.Array, v_BTJV: jax.Array, scale: float, name: str | None
) -> jax.Array:
    """As `api.causal_attention`.

    Raises:
      ValueError: shapes that it does not serve.
    """
    return _forward(q_BTHK, k_BTJK, v_BTJV, scale=scale)


def _forward(q_BTHK, k_BTJK, v_BTJV, *, scale, **how):
    if not mosaic_gpu.serves(q_BTHK, k_BTJK, v_BTJV):
        shapes = f"{q_BTHK.dtype} {q_BTHK.shape}, {k_BTJK.shape} and {v_BTJV.shape}"
        raise ValueError(
            f"cudnn_grouped takes {mosaic_gpu.SERVED}, got {shapes}; cudnn takes others"
        )
    return cudnn.attend(q_BTHK, k_BTJK, v_BTJV, scale=scale, **how)


def _forward_rule(q_BTHK, k_BTJK, v_BTJV, scale, name):
    out_BTHV, lse_BHT = _forward(q_BTHK, k_BTJK, v_BTJV, scale=scale, return_residual=True)
    if name:
        out_BTHV, lse_BHT = (checkpoint_name(x, name) for x in (out_BTHV, lse_BHT))
    return out_BTHV, (q_BTHK, k_BTJK, v_BTJV, out_BTHV, lse_BHT)


def _backward_rule(scale, name, kept, do_BTHV):
    q_BTHK, k_BTJK, v_BTJV, out_BTHV, lse_BHT = kept
    products_BTHV = out_BTHV.astype(jnp.float32) * do_BTHV.astype(jnp.float32)
    delta_BHT = jnp.swapaxes(products_BTHV.sum(axis=-1), 1, 2)
    arrays = q_BTHK, k_BTJK, v_BTJV, do_BTHV, lse_BHT * hopper.LOG2E, delta_BHT
    gradients = mosaic_gpu.backward(*arrays, scale=scale)
    return tuple(x.astype(q_BTHK.dtype) for x in gradients)


causal_attention.defvjp(_forward_rule, _backward_rule)
