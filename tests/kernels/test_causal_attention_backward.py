"""The backward pass on Hopper GPUs: its numbers in JAX's interpreter, and what is lowered."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as library
from jax.experimental.pallas import mosaic_gpu as plgpu

from mlra_jax import remat, sharding
from mlra_jax.attention import sharded
from mlra_jax.kernels.causal_attention import causal_attention, reference

grouped = pytest.importorskip(
    "mlra_jax.kernels.causal_attention.grouped", reason="this jaxlib has no Mosaic GPU dialect"
)
hopper = grouped.hopper
interpreter = pytest.importorskip("interpreter")

SCALE = 0.11


def arguments(B, T, H, J, dtype=jnp.bfloat16):
    random = np.random.default_rng(T + H)
    shapes = (B, T, H, 192), (B, T, J, 192), (B, T, J, 128), (B, T, H, 128)
    return [jnp.asarray(random.standard_normal(s, np.float32), dtype) for s in shapes]


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
    monkeypatch.setattr(plgpu, "layout_cast", lambda x, layout: x)
    monkeypatch.setattr(plgpu, "wgmma_wait", lambda n: None)
    # The race detector takes all parts of a union of references for one place.
    monkeypatch.setattr(plgpu, "RefUnion", lambda *refs: refs)
    monkeypatch.setattr(hopper, "zero", lambda n: n * 0)
    monkeypatch.setattr(hopper, "hide_later", lower_triangle)
    kernel = jax.jit(functools.partial(grouped._backward_rule, SCALE, None))

    def interpreted(*arrays, detect_races):
        params = plgpu.InterpretGPUParams(detect_races=detect_races)
        with plgpu.force_gpu_interpret_mode(params):
            return kernel(*arrays)

    return interpreted


@pytest.mark.parametrize("B, T, H, J", [(1, 256, 2, 1), (2, 128, 4, 2), (1, 128, 4, 1)])
def test_gradients_interpreted(gradients, B, T, H, J):
    """Blocks on and off the diagonal; rows, shared heads and heads of a program each by itself."""
    q, k, v, do = arguments(B, T, H, J)
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    attend = functools.partial(reference.causal_attention, scale=SCALE)
    out, pull = jax.vjp(attend, *wide)
    scores = SCALE * jnp.einsum("bthk,bshk->bhts", wide[0], jnp.repeat(wide[1], H // J, axis=2))
    seen = jnp.tril(jnp.ones((T, T), bool))
    lse = jax.nn.logsumexp(jnp.where(seen, scores, -jnp.inf), axis=-1)
    wanted = pull(do.astype(jnp.float32))
    norm = lambda x: np.sqrt((np.asarray(x, np.float64) ** 2).sum(axis=-1))
    # Programs that add to the same place, which the copy engine may, would be a race.
    found = gradients((q, k, v, out, lse), do, detect_races=B == 2)
    for got, want in zip(found, wanted, strict=True):
        assert got.shape == want.shape and got.dtype == jnp.bfloat16
        # Every vector by itself, beside the largest: some are zero but for rounding.
        assert (norm(got - want) <= 6e-3 * norm(want) + 1e-3 * norm(want).max()).all()


@pytest.fixture
def cudnn(monkeypatch):
    monkeypatch.setattr(library, "check_cudnn_version", lambda: 91900)
    monkeypatch.setattr(library, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(library, "is_cuda_compute_capability_equal", lambda _: False)


def lowered(attend, *args):
    total = lambda *args: (attend(*args).astype(jnp.float32) ** 2).sum()
    return jax.jit(jax.grad(total, (0, 1, 2))).trace(*args).lower(lowering_platforms=("cuda",))


CALLS = r"custom_call @(__cudnn\$fmhaSoftmax\w*|mosaic_gpu_v2)\("


@pytest.mark.parametrize("policy", ["none", "attention", "block"])
def test_cudnn_forward_and_one_kernel_backward(cudnn, policy):
    """By the names that `remat` knows the forward pass is computed again or not."""
    attend = functools.partial(
        causal_attention, scale=SCALE, implementation="cudnn_grouped", name=remat.ATTENTION
    )
    again = remat.checkpointed(attend, policy, in_loop=False)
    found = re.findall(CALLS, lowered(again, *arguments(1, 128, 4, 2)[:3]).as_text())
    forward = ["__cudnn$fmhaSoftmax"]
    assert sorted(found) == forward * (1 + (policy == "block")) + ["mosaic_gpu_v2"]


def test_each_device_has_its_own_heads(cudnn):
    mesh = sharding.make_mesh(data=2, tensor=2, devices=jax.devices()[:4])
    split = functools.partial(
        sharded.whole_sequence, scale=SCALE, mesh=mesh, implementation="cudnn_grouped"
    )
    text = lowered(split, *arguments(2, 128, 8, 2)[:3]).as_text()
    (kernel,) = (line for line in text.splitlines() if "@mosaic_gpu_v2(" in line)
    assert "tensor<4x1x128x1x192xf32>" in kernel


@pytest.mark.parametrize(
    "sizes, dtype",
    [((1, 100, 4, 2), jnp.bfloat16), ((1, 128, 3, 1), jnp.bfloat16), ((1, 128, 4, 2), jnp.float16)],
)
def test_what_it_does_not_serve_is_refused_in_one_line(sizes, dtype):
    with pytest.raises(ValueError, match="cudnn_grouped takes bfloat16, ") as raised:
        q, k, v, _ = arguments(*sizes, dtype)
        causal_attention(q, k, v, scale=SCALE, implementation="cudnn_grouped")
    assert "\n" not in str(raised.value)
