"""Causal attention: plain JAX against NumPy, how it is split over devices, and the libraries'."""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as library
from jax.experimental.pallas import tpu as pltpu
from jaxprs import HIGHEST, equations, products

from mlra_jax import sharding
from mlra_jax.attention import sharded
from mlra_jax.execution import ATTENTION_KERNELS
from mlra_jax.kernels import target
from mlra_jax.kernels.causal_attention import api, causal_attention, reference

SCALE = 0.21


def arguments(B=2, T=19, H=6, J=3, K=10, V=6, dtype=jnp.float32):
    random = np.random.default_rng(T)
    shapes = (B, T, H, K), (B, T, J, K), (B, T, J, V)
    return [jnp.asarray(random.standard_normal(s, np.float32), dtype) for s in shapes]


def attend(q, k, v):
    """By the definition, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    B, T, H, _ = q.shape
    out = np.zeros((B, T, H, v.shape[3]))
    for b, t, h in np.ndindex(B, T, H):
        j = h // (H // k.shape[2])
        scores = SCALE * k[b, : t + 1, j] @ q[b, t, h]
        weights = np.exp(scores - scores.max())
        out[b, t, h] = weights @ v[b, : t + 1, j] / weights.sum()
    return out


def assert_near(out, wanted, tolerance):
    out, wanted = np.asarray(out, np.float64), np.asarray(wanted, np.float64)
    assert out.shape == wanted.shape
    # Every position by itself: an error in one block must not hide among the others.
    norm = lambda x: np.sqrt((x**2).sum(axis=(0, 2, 3)))
    assert (norm(out - wanted) <= tolerance * norm(wanted)).all()


@pytest.mark.parametrize("block", [1, 8, 18, 19, 20])
def test_blocks_of_queries_see_up_to_themselves(block):
    q, k, v = arguments()
    q = q.at[:, :, 0].multiply(300)  # Scores beyond the range of exp.
    call = functools.partial(reference.causal_attention, scale=SCALE, block=block)
    out = jax.jit(call)(q, k, v)
    assert_near(out[:, :, 1:], attend(q, k, v)[:, :, 1:], 2e-6)
    assert_near(out, attend(q, k, v), 1e-3)


def test_longer_than_one_block_of_the_default_size():
    q, k, v = arguments(B=1, T=1100, H=1, J=1, K=4, V=4)
    out = jax.jit(functools.partial(reference.causal_attention, scale=SCALE))(q, k, v)
    assert_near(out, attend(q, k, v), 1e-5)


def test_gradients_are_those_of_the_whole_at_once():
    args = arguments()
    weights = jnp.asarray(np.random.default_rng(1).standard_normal((2, 19, 6, 6)), jnp.float32)

    def plain(q, k, v):
        k, v = (jnp.repeat(x, 2, axis=2) for x in (k, v))
        scores = SCALE * jnp.einsum("bthk,bshk->bhts", q, k)
        scores = jnp.where(jnp.tri(19, dtype=bool), scores, -jnp.inf)
        return jnp.einsum("bhts,bshv->bthv", jax.nn.softmax(scores), v)

    blocks = functools.partial(reference.causal_attention, scale=SCALE, block=8)
    gradients = [
        jax.jit(jax.grad(lambda *x, f=f: (f(*x) * weights).sum(), (0, 1, 2)))(*args)
        for f in (blocks, plain)
    ]
    for got, wanted in zip(*gradients, strict=True):
        np.testing.assert_allclose(got, wanted, atol=2e-5)


def test_memory_is_that_of_one_block_backward_too():
    B, T, H = 1, 2048, 4
    args = [jax.ShapeDtypeStruct((B, T, H, 8), jnp.bfloat16)] * 3
    total = lambda *x: reference.causal_attention(*x, scale=SCALE).sum()
    largest = max(
        np.prod(value.aval.shape)
        for equation in equations(jax.grad(total, (0, 1, 2)), *args)
        for value in equation.outvars
    )
    assert largest == B * H * 512 * T


def test_narrow_in_and_out_with_a_float32_softmax():
    args = arguments(dtype=jnp.bfloat16)
    out = reference.causal_attention(*args, scale=SCALE, block=8)
    assert out.dtype == jnp.bfloat16
    assert_near(out, attend(*args), 1e-2)
    exps = [e for e in equations(functools.partial(reference.causal_attention, scale=1.0), *args)
            if e.primitive.name == "exp"]  # fmt: skip
    assert {e.outvars[0].aval.dtype.name for e in exps} == {"float32"}


def test_float32_products_are_not_rounded():
    call = functools.partial(reference.causal_attention, scale=SCALE)
    assert products(call, *arguments()) == {(HIGHEST, "float32")}
    narrow = products(call, *arguments(dtype=jnp.bfloat16))
    assert narrow == {(None, "float32"), (None, "bfloat16")}


@pytest.mark.parametrize(
    "sizes", [dict(), dict(tensor=3), dict(data=2, context=3), dict(fsdp=2, tensor=3)]
)
def test_batch_and_heads_over_a_mesh(sizes):
    devices = jax.devices()[: np.prod(list(sizes.values()), dtype=int)]
    mesh = sharding.make_mesh(**sizes, devices=devices)
    args = arguments()
    call = jax.jit(functools.partial(sharded.whole_sequence, scale=SCALE, mesh=mesh))
    out = call(*args)
    assert_near(out, attend(*args), 2e-6)
    rows, heads = (
        mesh.shape["data"] * mesh.shape["fsdp"],
        mesh.shape["tensor"] * mesh.shape["context"],
    )
    assert out.addressable_shards[0].data.shape == (2 // rows, 19, 6 // heads, 6)


H100, A100 = (
    types.SimpleNamespace(platform="gpu", device_kind=f"NVIDIA {chip}") for chip in ("H100", "A100")
)


@pytest.fixture
def cudnn(monkeypatch):
    """cuDNN's version and the GPU, where there are none."""
    monkeypatch.setattr(library, "check_cudnn_version", lambda: 91900)
    monkeypatch.setattr(library, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(library, "is_cuda_compute_capability_equal", lambda _: False)


@pytest.mark.parametrize(
    "device, dtype, chosen",
    [
        (H100, jnp.bfloat16, "cudnn"),
        (A100, jnp.bfloat16, "cudnn_padded"),
        (types.SimpleNamespace(platform="cuda", device_kind="NVIDIA H200"), jnp.float16, "cudnn"),
        (H100, jnp.float32, "reference"),
        (types.SimpleNamespace(platform="tpu"), jnp.bfloat16, "splash"),
        (types.SimpleNamespace(platform="tpu"), jnp.float32, "splash"),
        (types.SimpleNamespace(platform="cpu"), jnp.bfloat16, "reference"),
    ],
)
def test_the_platform_chooses(monkeypatch, cudnn, device, dtype, chosen):
    for name in api._ATTEND:
        monkeypatch.setitem(
            api._ATTEND, name, lambda q, *_, scale, name, of=name: q[..., :6] * 0 + len(of) * scale
        )
    mesh = types.SimpleNamespace(size=1, devices=np.array([device]))
    args = arguments(dtype=dtype)
    # Of a mesh its own devices count, not the host's.
    is_of = lambda out, name: bool((out == len(name) * 0.5).all())
    assert is_of(sharded.whole_sequence(*args, scale=0.5, mesh=mesh), chosen)
    monkeypatch.setattr(target, "device", lambda: device)
    assert is_of(causal_attention(*args, scale=0.5), chosen)
    assert is_of(causal_attention(*args, scale=0.5, implementation="splash"), "splash")
    given = sharded.whole_sequence(*args, scale=0.5, mesh=mesh, implementation="splash")
    assert is_of(given, "splash")


def test_unequal_widths_need_a_cudnn_without_the_fault_and_a_function_as_it_is_known(
    monkeypatch, cudnn
):
    chosen = lambda K, V: api.implementation_for(H100, *arguments(K=K, V=V, dtype=jnp.bfloat16))
    assert chosen(192, 128) == "cudnn"
    with monkeypatch.context() as patch:
        patch.setattr(library, "check_cudnn_version", lambda: 91200)
        assert chosen(192, 128) == "cudnn_padded"
        assert chosen(128, 128) == "cudnn"
    with monkeypatch.context() as patch:
        patch.setattr(library, "dot_product_attention", lambda q, k, v, *, scale: q)
        assert chosen(192, 128) == "cudnn_padded"
    monkeypatch.delattr(library, "check_cudnn_version")
    assert chosen(192, 128) == "cudnn_padded"


def test_the_names_of_the_settings_are_those_of_the_op():
    assert {"auto", api.MOSAIC_GPU, *api._ATTEND} == set(ATTENTION_KERNELS)


def test_lowered_for_cuda_with_unequal_widths_and_grouped_heads(cudnn):
    """Forward and backward are one call each, of the sizes given and nothing wider."""
    q, k, v = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        for shape in ((2, 64, 12, 192), (2, 64, 4, 192), (2, 64, 4, 128))
    )
    attend = functools.partial(causal_attention, scale=SCALE, implementation="cudnn")
    total = lambda *args: attend(*args).astype(jnp.float32).sum()
    traced = jax.jit(jax.grad(total, (0, 1, 2))).trace(q, k, v)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    given = {"2x64x12x192", "2x64x4x192", "2x64x4x128"}
    made = {"__cudnn$fmhaSoftmax": {"2x12x64x128"}}
    made["__cudnn$fmhaSoftmaxBackward"] = {
        "2x64x12x128",  # of the output, and the output itself
        *("2x12x64x192", "2x4x64x192", "2x4x64x128"),
    }
    for name, sizes in made.items():
        (line,) = (x for x in text.splitlines() if f"custom_call @{name}(" in x)
        assert set(re.findall(r"tensor<([\dx]+)xbf16>", line)) == given | sizes


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(q=(2, 19, 60)), "expected q"),
        (dict(k=(2, 18, 3, 10)), "do not fit"),
        (dict(k=(2, 19, 3, 9)), "do not fit"),
        (dict(v=(1, 19, 3, 6)), "do not fit"),
        (dict(v=(2, 19, 2, 6)), "do not fit"),
        (dict(k=(2, 19, 4, 10), v=(2, 19, 4, 6)), "do not fit"),
        (
            dict(implementation="fastest"),
            "implementation is 'fastest', expected one of auto, cudnn, ",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused_in_one_line(changes, words):
    implementation = changes.pop("implementation", "auto")
    arrays = dict(zip("qkv", arguments(), strict=True))
    arrays |= {name: jnp.zeros(shape) for name, shape in changes.items()}
    with pytest.raises(ValueError, match=words) as raised:
        causal_attention(*arrays.values(), scale=SCALE, implementation=implementation)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("V", [6, 10])
def test_values_padded_to_the_width_of_keys(monkeypatch, V):
    def in_jax(q, k, v, *, scale, is_causal, implementation):
        assert is_causal and implementation == "cudnn" and v.shape == k.shape
        return original(q, k, v, scale=scale, is_causal=True, implementation="xla")

    original = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", in_jax)
    args = arguments(V=V)
    call = functools.partial(causal_attention, scale=SCALE, implementation="cudnn_padded")
    assert_near(jax.jit(call)(*args), attend(*args), 2e-6)


@pytest.mark.parametrize("T, block, K", [(130, 128, 192), (128, 512, 128)])
def test_splash_interpreted(monkeypatch, T, block, K):
    """The TPU's kernel, whose length is a multiple of its block."""
    monkeypatch.setattr(api, "_SPLASH_BLOCK", block)
    args = arguments(B=1, T=T, H=4, J=2, K=K, V=128)
    with pltpu.force_tpu_interpret_mode():
        out = jax.jit(functools.partial(causal_attention, scale=SCALE, implementation="splash"))(
            *args
        )
    assert_near(out, attend(*args), 1e-5)


def test_splash_gradients_interpreted():
    args = arguments(B=1, T=128, H=4, J=2, K=192, V=128)
    weights = jnp.asarray(np.random.default_rng(1).standard_normal((1, 128, 4, 128)), jnp.float32)
    gradients = []
    for name in ("splash", "reference"):
        attend = functools.partial(causal_attention, scale=0.05, implementation=name)
        total = lambda *x, attend=attend: (attend(*x) * weights).sum()
        with pltpu.force_tpu_interpret_mode():
            gradients.append(jax.jit(jax.grad(total, (0, 1, 2)))(*args))
    for got, wanted in zip(*gradients, strict=True):
        np.testing.assert_allclose(got, wanted, atol=2e-5)
