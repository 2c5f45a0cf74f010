"""What the kernels of attention to latents are given, and what they are to give."""

import jax
import jax.numpy as jnp
import numpy as np


def shapes(H, B, T, b, N, dtype=jnp.bfloat16):
    """Of queries, rotary queries, latents and the rotary key."""
    sizes = (H, B, T, b, 128), (B, T, H, 64), (B, T, b * N, 128), (B, T, 64)
    return [jax.ShapeDtypeStruct(size, dtype) for size in sizes]


def drawn(shapes):
    random = np.random.default_rng(shapes[0].size)
    return [jnp.asarray(random.standard_normal(x.shape, np.float32), x.dtype) for x in shapes]


def attended(q_HBTbC, q_rope_BTHR, c_BTLC, k_rope_BTR, *, scale):
    """(z_HBTbC, lse_BPT in binary logarithms) of float32 arrays, by the definition."""
    H, B, T, b, C = q_HBTbC.shape
    G = H * b // c_BTLC.shape[2]
    q_BTPC = q_HBTbC.transpose(1, 2, 3, 0, 4).reshape(B, T, b * H, C)
    q_BTPX = jnp.concatenate([q_BTPC, jnp.tile(q_rope_BTHR, (1, 1, b, 1))], axis=-1)
    rope = jnp.broadcast_to(k_rope_BTR[:, :, None], (*c_BTLC.shape[:3], k_rope_BTR.shape[-1]))
    k_BTPX = jnp.repeat(jnp.concatenate([c_BTLC, rope], axis=-1), G, axis=2)
    scores = scale * jnp.einsum("btpx,bspx->bpts", q_BTPX, k_BTPX, precision="highest")
    scores = jnp.where(jnp.tril(jnp.ones((T, T), bool)), scores, -jnp.inf)
    lse_BPT = jax.nn.logsumexp(scores, axis=-1)
    c_BTPC = jnp.repeat(c_BTLC, G, axis=2)
    weights = jnp.exp(scores - lse_BPT[..., None])
    z_BTPC = jnp.einsum("bpts,bspc->btpc", weights, c_BTPC, precision="highest")
    return z_BTPC.reshape(B, T, b, H, C).transpose(3, 0, 1, 2, 4), lse_BPT * np.log2(np.e)
