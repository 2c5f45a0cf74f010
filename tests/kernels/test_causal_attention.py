"""Causal attention: plain JAX against NumPy, how it is split over devices, and the libraries'."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jaxprs import HIGHEST, equations, products

from mlra_jax import sharding
from mlra_jax.attention import sharded
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


@pytest.mark.parametrize(
    "platform, dtype, chosen",
    [
        ("gpu", jnp.bfloat16, "cudnn"),
        ("cuda", jnp.float16, "cudnn"),
        ("gpu", jnp.float32, "reference"),
        ("tpu", jnp.bfloat16, "splash"),
        ("tpu", jnp.float32, "splash"),
        ("cpu", jnp.bfloat16, "reference"),
    ],
)
def test_the_platform_chooses(monkeypatch, platform, dtype, chosen):
    device = types.SimpleNamespace(platform=platform)
    for name in api._ATTEND:
        monkeypatch.setitem(api._ATTEND, name, lambda *_, scale, name=name: (name, scale))
    mesh = types.SimpleNamespace(size=1, devices=np.array([device]))
    args = arguments(dtype=dtype)
    # Of a mesh its own devices count, not the host's.
    assert sharded.whole_sequence(*args, scale=0.5, mesh=mesh) == (chosen, 0.5)
    monkeypatch.setattr(target, "device", lambda: device)
    assert causal_attention(*args, scale=0.5) == (chosen, 0.5)
    assert causal_attention(*args, scale=0.5, implementation="splash") == ("splash", 0.5)


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
            "implementation is 'fastest', expected one of reference, ",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused_in_one_line(changes, words):
    implementation = changes.pop("implementation", None)
    arrays = dict(zip("qkv", arguments(), strict=True))
    arrays |= {name: jnp.zeros(shape) for name, shape in changes.items()}
    with pytest.raises(ValueError, match=words) as raised:
        causal_attention(*arrays.values(), scale=SCALE, implementation=implementation)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("V", [6, 10])
def test_cudnn_takes_values_as_wide_as_keys(monkeypatch, V):
    def library(q, k, v, *, scale, is_causal, implementation):
        assert is_causal and implementation == "cudnn" and v.shape == k.shape
        return original(q, k, v, scale=scale, is_causal=True, implementation="xla")

    original = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", library)
    args = arguments(V=V)
    call = jax.jit(functools.partial(api._cudnn, scale=SCALE))
    assert_near(call(*args), attend(*args), 2e-6)


@pytest.mark.parametrize("T, block", [(130, 128), (128, 512)])
def test_splash_interpreted(monkeypatch, T, block):
    """The TPU's kernel, whose length is a multiple of its block."""
    monkeypatch.setattr(api, "_SPLASH_BLOCK", block)
    args = arguments(B=1, T=T, H=4, J=2, K=128, V=128)
    with pltpu.force_tpu_interpret_mode():
        out = jax.jit(functools.partial(api._splash, scale=SCALE))(*args)
    assert_near(out, attend(*args), 1e-5)
