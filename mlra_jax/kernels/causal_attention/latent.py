"""Causal attention to latents, each of which is a key and, without the rotary key, the value.

On Hopper GPUs kernels of our own read a latent once for both, and take and give the arrays as the
absorbed projections make and want them. Elsewhere keys and values are given to `api` as such.
"""

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mlra_jax.kernels import target
from mlra_jax.kernels.causal_attention import api
from mlra_jax.kernels.causal_attention.shared import with_shared

SERVED = (
    "bfloat16, latents of 128 and rotary keys of 64, lengths that 128 divides, and an even number "
    "of heads to a latent"
)


def latent_attention(
    q_BTPC: jax.Array,
    q_rope_BTPR: jax.Array,
    c_BTLC: jax.Array,
    k_rope_BTR: jax.Array,
    *,
    heads: int,
    scale: float,
    implementation: str = "auto",
    name: str | None = None,
) -> jax.Array:
    """softmax(scale (q cᵀ + q_rope k_ropeᵀ)) c, query `t` seeing positions `0 ... t`.

    Latent `l` serves branch heads `l*P/L ... (l+1)*P/L - 1` (paper, section 3.3).

    Args:
      q_BTPC: queries by branch head, the keys' up-projections in them.
      q_rope_BTPR: rotary queries; those of branch heads p and p + `heads` are the same.
      c_BTLC: latents; L divides P.
      k_rope_BTR: the rotary key, which all share.
      heads: of a branch.
      scale: what scores are multiplied by before the softmax, a Python number.
      implementation: "mosaic_gpu", kernels for Hopper GPUs, or one of `api.causal_attention`.
      name: as there.

    Returns:
      `[B, T, P, C]` in the dtype of `q_BTPC`.

    Raises:
      ValueError: shapes that the implementation does not serve.
    """
    if implementation == "auto":
        arrays = q_BTPC, q_rope_BTPR, c_BTLC, k_rope_BTR
        implementation = implementation_for(target.device(), *arrays, heads=heads)
    if implementation == api.MOSAIC_GPU:
        return _by_our_kernels(q_BTPC, q_rope_BTPR, c_BTLC, k_rope_BTR, heads, scale, name)
    q_BTPX = jnp.concatenate([q_BTPC, q_rope_BTPR], axis=-1)
    how = dict(scale=scale, implementation=implementation, name=name)
    return api.causal_attention(q_BTPX, with_shared(c_BTLC, k_rope_BTR), c_BTLC, **how)


def implementation_for(
    device: Any, q_BTPC: Any, q_rope_BTPR: Any, c_BTLC: Any, k_rope_BTR: Any, *, heads: int
) -> str:
    """As `api.implementation_for`, of what `latent_attention` takes."""
    width = c_BTLC.shape[-1] + k_rope_BTR.shape[-1]
    if target.is_hopper(device) and _serve(q_BTPC, q_rope_BTPR, c_BTLC, heads):
        api.say(api.MOSAIC_GPU, device, width, c_BTLC.shape[-1])
        return api.MOSAIC_GPU
    with_rope = lambda x: jax.ShapeDtypeStruct((*x.shape[:3], width), x.dtype)
    return api.implementation_for(device, with_rope(q_BTPC), with_rope(c_BTLC), c_BTLC)


def _serve(q_BTPC: Any, q_rope_BTPR: Any, c_BTLC: Any, heads: int) -> bool:
    """Whether our kernels are there and take these shapes."""
    try:
        kernels = _kernels()
    except ImportError:  # A jaxlib without the Mosaic GPU dialect.
        return False
    arrays = jax.eval_shape(lambda *x: _by_head(*x, heads), q_BTPC, q_rope_BTPR)
    return all(kernel.serves(*arrays, c_BTLC) for kernel in kernels)


def _kernels():
    of = "mlra_jax.kernels.causal_attention.latent_{}".format
    return importlib.import_module(of("forward")), importlib.import_module(of("backward"))


def _by_our_kernels(q_BTPC, q_rope_BTPR, c_BTLC, k_rope_BTR, heads, scale, name):
    if not _serve(q_BTPC, q_rope_BTPR, c_BTLC, heads):
        shapes = ", ".join(f"{x.dtype} {x.shape}" for x in (q_BTPC, q_rope_BTPR, c_BTLC))
        raise ValueError(f"mosaic_gpu takes {SERVED}, got {shapes}; auto takes others")
    arrays = *_by_head(q_BTPC, q_rope_BTPR, heads), c_BTLC, k_rope_BTR
    z_HBTbC = _attend(*arrays, scale, name)
    return z_HBTbC.transpose(1, 2, 3, 0, 4).reshape(q_BTPC.shape)


def _by_head(q_BTPC, q_rope_BTPR, heads):
    """(q_HBTbC, q_rope_BTHR), the order in which absorbed projections make queries."""
    B, T, P, C = q_BTPC.shape
    # Of branches that are not whole on a device each head counts as one of its own.
    H = heads if P % heads == 0 else P
    q_HBTbC = q_BTPC.reshape(B, T, -1, H, C).transpose(3, 0, 1, 2, 4)
    return q_HBTbC, q_rope_BTPR[:, :, :H]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q_HBTbC, q_rope_BTHR, c_BTLC, k_rope_BTR, scale, name):
    forward, _ = _kernels()
    return forward.forward(q_HBTbC, q_rope_BTHR, c_BTLC, k_rope_BTR, scale=scale)[0]


def _forward_rule(q_HBTbC, q_rope_BTHR, c_BTLC, k_rope_BTR, scale, name):
    forward, _ = _kernels()
    given = q_HBTbC, q_rope_BTHR, c_BTLC, k_rope_BTR
    results = forward.forward(*given, scale=scale)
    z_HBTbC, lse_BPT = (checkpoint_name(x, name) if name else x for x in results)
    return z_HBTbC, (*given, z_HBTbC, lse_BPT)


def _backward_rule(scale, name, kept, dz_HBTbC):
    *given, z_HBTbC, lse_BPT = kept
    _, backward = _kernels()
    products_HBTbC = z_HBTbC.astype(jnp.float32) * dz_HBTbC.astype(jnp.float32)
    delta_BPT = jnp.transpose(products_HBTbC.sum(axis=-1), (1, 3, 0, 2)).reshape(lse_BPT.shape)
    gradients = backward.backward(*given, dz_HBTbC, lse_BPT, delta_BPT, scale=scale)
    return tuple(x.astype(y.dtype) for x, y in zip(gradients, given, strict=True))


_attend.defvjp(_forward_rule, _backward_rule)
