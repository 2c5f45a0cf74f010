"""The backward pass of latent attention on Hopper GPUs: its numbers in JAX's interpreter."""

import functools

import jax
import jax.numpy as jnp
import latents
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

latent_backward = pytest.importorskip(
    "mlra_jax.kernels.causal_attention.latent_backward",
    reason="this jaxlib has no Mosaic GPU dialect",
)
interpreter = pytest.importorskip("interpreter")

SCALE = 0.11


def shapes(*sizes):
    """The gradient of the result behind the others."""
    given = latents.shapes(*sizes)
    return [*given, given[0]]


def lower_triangle(x, ahead):
    later = jnp.arange(x.shape[0])[:, None] > jnp.arange(x.shape[1]) + ahead
    return jnp.where(later, -jnp.inf, x)


def add(source, to, reduction_op, copy=plgpu.copy_smem_to_gmem):
    """The interpreter has no copies that add; here no two add to the same place at a time."""
    assert reduction_op == "add"
    source[...] += to[...]
    plgpu.commit_smem()
    copy(source, to)
    plgpu.wait_smem_to_gmem(0)


@pytest.fixture
def gradients(monkeypatch):
    interpreter.stand_in(monkeypatch)
    monkeypatch.setattr(plgpu, "copy_smem_to_gmem", add)
    # The race detector takes all parts of a union of references for one place.
    monkeypatch.setattr(plgpu, "RefUnion", lambda *refs: refs)
    monkeypatch.setattr(latent_backward.hopper, "zero", lambda n: n * 0)
    monkeypatch.setattr(latent_backward.hopper, "hide_later", lower_triangle)
    kernel = jax.jit(functools.partial(latent_backward.backward, scale=SCALE))

    def interpreted(*arrays, detect_races):
        params = plgpu.InterpretGPUParams(detect_races=detect_races)
        with plgpu.force_gpu_interpret_mode(params):
            return kernel(*arrays)

    return interpreted


@pytest.mark.parametrize("H, B, T, b, N", [(2, 1, 256, 1, 1), (4, 2, 128, 2, 2), (2, 1, 128, 1, 1)])
def test_gradients_interpreted(gradients, H, B, T, b, N):
    """Blocks on and off the diagonal; rows, latents, branches and heads each by itself."""
    *given, dz = latents.drawn(shapes(H, B, T, b, N))
    wide = [x.astype(jnp.float32) for x in given]
    z, pull, lse = jax.vjp(functools.partial(latents.attended, scale=SCALE), *wide, has_aux=True)
    wanted = pull(dz.astype(jnp.float32))
    delta_HBTb = (z * dz).sum(-1)
    delta_BPT = delta_HBTb.transpose(1, 3, 0, 2).reshape(lse.shape)
    norm = lambda x: np.sqrt((np.asarray(x, np.float64) ** 2).sum(axis=-1))
    # Programs that add to the same place, which the copy engine may, would be a race.
    found = gradients(*given, dz, lse, delta_BPT, detect_races=(T, b) == (128, 1))
    for got, want in zip(found, wanted, strict=True):
        assert got.shape == want.shape and got.dtype == jnp.float32
        # Every vector by itself, beside the largest: some are zero but for rounding.
        assert (norm(got - want) <= 6e-3 * norm(want) + 2e-3 * norm(want).max()).all()


@pytest.mark.parametrize(
    "sizes, served",
    [
        ((24, 3, 384, 4, 1), True),
        ((24, 1, 128, 1, 4), True),
        ((24, 1, 128, 2, 8), False),
        ((24, 1, 192, 4, 1), False),
    ],
)
def test_what_it_serves(sizes, served):
    """Whole blocks of keys; pairs of heads of one latent, which groups of 3 are not."""
    assert latent_backward.serves(*shapes(*sizes)[:3]) == served


@pytest.mark.parametrize("x64", [False, True])
def test_lowered_for_hopper(x64):
    """By one kernel, of the model's own size."""
    with jax.enable_x64(x64):
        sums = [jax.ShapeDtypeStruct((4, 96, 2048), jnp.float32)] * 2
        kernel = jax.jit(functools.partial(latent_backward.backward, scale=SCALE))
        text = (
            kernel.trace(*shapes(24, 4, 2048, 4, 1), *sums)
            .lower(lowering_platforms=("cuda",))
            .as_text()
        )
    (call,) = (line for line in text.splitlines() if "@mosaic_gpu_v2(" in line)
    assert "tensor<24x4x2048x4x128xf32>, tensor<4x2048x24x64xf32>" in call
