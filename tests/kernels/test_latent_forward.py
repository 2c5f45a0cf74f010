"""The forward pass of attention to latents on Hopper GPUs, in JAX's interpreter."""

import functools

import jax
import jax.numpy as jnp
import latents
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

latent_forward = pytest.importorskip(
    "mlra_jax.kernels.causal_attention.latent_forward",
    reason="this jaxlib has no Mosaic GPU dialect",
)
interpreter = pytest.importorskip("interpreter")

SCALE = 0.11


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
    arrays = latents.drawn(latents.shapes(H, B, T, b, N))
    z_HBTbC, lse_BPT = latents.attended(*(x.astype(jnp.float32) for x in arrays), scale=SCALE)
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
        traced = kernel.trace(*latents.shapes(24, 4, 2048, 4, 1))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    (call,) = (line for line in text.splitlines() if "@mosaic_gpu_v2(" in line)
    assert "(tensor<24x4x2048x4x128xbf16>, tensor<4x96x2048xf32>)" in call


def test_what_it_serves():
    serves = lambda *sizes, **dtype: latent_forward.serves(*latents.shapes(*sizes, **dtype)[:3])
    assert serves(3, 1, 128, 2, 1) and serves(4, 1, 256, 1, 4)
    assert not serves(4, 1, 192, 1, 4)
    assert not serves(4, 1, 128, 1, 4, dtype=jnp.float16)
