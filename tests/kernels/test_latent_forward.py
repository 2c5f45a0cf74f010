"""The forward pass of attention to latents on Hopper GPUs, in JAX's interpreter."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from mlra_jax.kernels.causal_attention import reference

latent_forward = pytest.importorskip(
    "mlra_jax.kernels.causal_attention.latent_forward",
    reason="this jaxlib has no Mosaic GPU dialect",
)
interpreter = pytest.importorskip("interpreter")

SCALE = 0.11


def shapes(H, B, T, b, N, dtype=jnp.bfloat16):
    sizes = (H, B, T, b, 128), (B, T, H, 64), (B, T, b * N, 128), (B, T, 64)
    return [jax.ShapeDtypeStruct(size, dtype) for size in sizes]


def arguments(*sizes):
    random = np.random.default_rng(sum(sizes))
    draw = lambda x: jnp.asarray(random.standard_normal(x.shape, np.float32), x.dtype)
    return [draw(x) for x in shapes(*sizes)]


def attended(q_HBTbC, q_rope_BTHR, c_BTLC, k_rope_BTR):
    """The same by plain JAX, and the binary logarithms of the sums."""
    (H, B, T, b, C), L = q_HBTbC.shape, c_BTLC.shape[2]
    q_BTbHC = jnp.moveaxis(q_HBTbC, 0, 3)
    rope_BTbHR = jnp.broadcast_to(q_rope_BTHR[:, :, None], (B, T, b, H, 64))
    q_BTPX = jnp.concatenate([q_BTbHC, rope_BTbHR], axis=-1).reshape(B, T, b * H, -1)
    rope_BTLR = jnp.broadcast_to(k_rope_BTR[:, :, None], (B, T, L, 64))
    k_BTLX = jnp.concatenate([c_BTLC, rope_BTLR], axis=-1)
    z_BTPC = reference.causal_attention(q_BTPX, k_BTLX, c_BTLC, scale=SCALE)
    k_BTPX = jnp.repeat(k_BTLX, b * H // L, axis=2)
    scores = SCALE * jnp.einsum("btpk,bspk->bpts", q_BTPX, k_BTPX)
    seen = jnp.tril(jnp.ones((T, T), bool))
    lse_BPT = jax.nn.logsumexp(jnp.where(seen, scores, -jnp.inf), axis=-1)
    return jnp.moveaxis(z_BTPC.reshape(B, T, b, H, C), 3, 0), lse_BPT / math.log(2)


def lower_triangle(x, ahead, *, keys):
    assert keys == 1
    later = jnp.arange(x.shape[1]) > jnp.arange(x.shape[0])[:, None] + ahead
    return jnp.where(later, -jnp.inf, x)


@pytest.fixture
def forward(monkeypatch):
    interpreter.stand_in(monkeypatch)
    monkeypatch.setattr(latent_forward.hopper, "hide_later", lower_triangle)
    # So that each takes several blocks of queries, not all as many.
    monkeypatch.setattr(latent_forward, "_PROGRAMS", 3)

    def interpreted(*arrays):
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
            return latent_forward.forward(*arrays, scale=SCALE)

    return interpreted


@pytest.mark.parametrize("H, B, T, b, N", [(2, 1, 384, 1, 1), (2, 2, 128, 2, 2)])
def test_forward_interpreted(forward, H, B, T, b, N):
    """Blocks on and off the diagonal; rows, branches, and heads that share a latent or do not."""
    arrays = arguments(H, B, T, b, N)
    z_HBTbC, lse_BPT = attended(*(x.astype(jnp.float32) for x in arrays))
    found_HBTbC, found_BPT = forward(*arrays)
    assert found_HBTbC.shape == z_HBTbC.shape and found_HBTbC.dtype == jnp.bfloat16
    norm = lambda x: np.sqrt((np.asarray(x, np.float64) ** 2).sum(axis=-1))
    assert (norm(found_HBTbC - z_HBTbC) <= 5e-3 * norm(z_HBTbC)).all()
    np.testing.assert_allclose(found_BPT, lse_BPT, atol=1e-4)


@pytest.mark.parametrize("x64", [False, True])
def test_lowered_for_hopper(x64):
    """Bfloat16 in, bfloat16 and float32 out, by one kernel, of the model's own size."""
    with jax.enable_x64(x64):
        kernel = jax.jit(functools.partial(latent_forward.forward, scale=SCALE))
        traced = kernel.trace(*shapes(24, 4, 2048, 4, 1))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    (call,) = (line for line in text.splitlines() if "@mosaic_gpu_v2(" in line)
    assert "(tensor<24x4x2048x4x128xbf16>, tensor<4x96x2048xf32>)" in call


def test_what_it_serves():
    serves = lambda *sizes, **dtype: latent_forward.serves(*shapes(*sizes, **dtype)[:3])
    assert serves(3, 1, 128, 2, 1) and serves(4, 1, 256, 1, 4)
    assert not serves(4, 1, 192, 1, 4)
    assert not serves(4, 1, 128, 1, 4, dtype=jnp.float16)
