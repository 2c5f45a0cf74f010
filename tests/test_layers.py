"""Layers against NumPy, and what fresh weights look like, every kind of tensor."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from tiny import relative_error

from mlra_jax import layers, sharding
from mlra_jax import model as models
from mlra_jax.layers import Projection, RMSNorm, SwiGLU, gated, rotate, weigh
from mlra_jax.sharding import make_mesh

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("blocks, factor, eps", [(1, 1.0, 1e-6), (3, 2.5, 1e-2), (2, 1.0, 0.3)])
def test_rms_norm(blocks, factor, eps):
    wide, narrow = (
        RMSNorm(
            8,
            config=tiny.config("mla", norm_eps=eps, dtype=dtype),
            rngs=nnx.Rngs(0),
            blocks=blocks,
            factor=factor,
        )
        for dtype in ("float32", "bfloat16")
    )
    assert wide.scale.shape == (8 * blocks,)
    scale = RNG.normal(size=8 * blocks)
    wide.scale[...] = narrow.scale[...] = jnp.asarray(scale, jnp.float32)
    # Rows of very different sizes, so that eps decides some and not others.
    x = RNG.normal(size=(4, 5, 8 * blocks)) * np.array([1e-4, 0.1, 1, 30])[:, None, None]
    parts = x.reshape(4, 5, blocks, 8)
    want = parts / np.sqrt((parts**2).mean(-1, keepdims=True) + eps)
    want = want.reshape(x.shape) * scale * factor
    for row in range(4):
        got = wide(jnp.asarray(x[row], jnp.float32))
        assert relative_error(got, want[row]) < 1e-6
    # Statistics in float32, whatever the activations are; the result in the compute dtype.
    rounded = jnp.asarray(x, jnp.bfloat16)
    exact = np.asarray(wide(rounded.astype(jnp.float32)).astype(jnp.bfloat16), np.float32)
    for given in (rounded, rounded.astype(jnp.float32)):
        got = narrow(given)
        assert got.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(got, np.float32), exact)


@pytest.mark.parametrize("base, width", [(10000.0, 64), (500.0, 6), (1e6, 4)])
def test_rotation(base, width):
    """Half-split pairs turn by `position * base^(-2j/width)`, in the millions too."""
    positions = np.array([[0, 5, 1023, 1024, 131071, 2_000_003], [1, 2, 3, 2047, 2048, 4096]])
    x = RNG.normal(size=(2, 6, 3, width)).astype(np.float32)
    half = width // 2
    angle = positions[..., None] * base ** (-np.arange(half) / half)
    cos, sin = np.cos(angle)[:, :, None], np.sin(angle)[:, :, None]
    x1, x2 = x[..., :half], x[..., half:]
    want = np.concatenate([x1 * cos - x2 * sin, x1 * sin + x2 * cos], -1)
    got = rotate(jnp.asarray(x), jnp.asarray(positions, jnp.int32), base)
    assert got.dtype == jnp.float32 and relative_error(got, want) < 2e-4
    # Position by position: the small ones are exact to float32.
    assert relative_error(got[:, :2], want[:, :2]) < 1e-6
    narrow = rotate(jnp.asarray(x, jnp.bfloat16), jnp.asarray(positions, jnp.int32), base)
    assert narrow.dtype == jnp.bfloat16 and relative_error(narrow, want) < 5e-3


def test_projections_contract_the_dimensions_they_should():
    config = tiny.config("mla")
    project = Projection((3, 4, 5), (None,) * 3, config=config, rngs=nnx.Rngs(0), num_in=2)
    x, w = RNG.normal(size=(2, 7, 3, 4)), RNG.normal(size=(3, 4, 5))
    project.kernel[...] = jnp.asarray(w, jnp.float32)
    want = np.einsum("bthk,hkd->btd", x, w)
    assert relative_error(project(jnp.asarray(x, jnp.float32)), want) < 1e-6
    assert project(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16
    wide = Projection((6, 2, 5), (None,) * 3, config=config, rngs=nnx.Rngs(0))
    x, w = RNG.normal(size=(2, 7, 6)), RNG.normal(size=(6, 2, 5))
    wide.kernel[...] = jnp.asarray(w, jnp.float32)
    want = np.einsum("btd,dhk->bthk", x, w)
    assert relative_error(wide(jnp.asarray(x, jnp.float32)), want) < 1e-6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_a_product_and_what_dtype_they_are_summed_in(dtype):
    """8,192 tokens that all add a little: a gradient rounded on its way would stop growing."""
    x, w = RNG.normal(size=(4, 2048, 6)), RNG.normal(size=(6, 2, 5))
    slope = RNG.normal(size=(4, 2048, 2, 5))
    x, slope = (jnp.asarray(a, dtype) for a in (x, slope))
    w = jnp.asarray(jnp.asarray(w, dtype), jnp.float32)
    out, back = jax.vjp(lambda *a: weigh(*a, "btd,dhk->bthk"), x, w)
    x_slope, w_slope = back(slope)
    assert (out.dtype, x_slope.dtype, w_slope.dtype) == (x.dtype, x.dtype, jnp.float32)
    exact = [np.asarray(a, np.float64) for a in (x, w, slope)]
    rounding = 1e-6 if dtype == "float32" else 5e-3
    assert relative_error(out, np.einsum("btd,dhk->bthk", exact[0], exact[1])) < rounding
    assert relative_error(x_slope, np.einsum("bthk,dhk->btd", exact[2], exact[1])) < rounding
    # Not rounded to bfloat16, neither in the sum nor at its end.
    assert relative_error(w_slope, np.einsum("btd,bthk->dhk", exact[0], exact[2])) < 1e-5


def test_swiglu():
    mlp = SwiGLU(tiny.config("mla"), mesh=make_mesh(), rngs=nnx.Rngs(0))
    gate, up, down = (RNG.normal(size=s) / 6 for s in ((40, 56), (40, 56), (56, 40)))
    for projection, w in ((mlp.gate, gate), (mlp.up, up), (mlp.down, down)):
        projection.kernel[...] = jnp.asarray(w, jnp.float32)
    x = RNG.normal(size=(2, 3, 40))
    gated = x @ gate
    want = (gated / (1 + np.exp(-gated)) * (x @ up)) @ down
    assert relative_error(mlp(jnp.asarray(x, jnp.float32)), want) < 1e-6


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("dtype, rounding", [("float32", 1e-6), ("bfloat16", 4e-3)])
def test_gradients_of_what_is_gated(dtype, rounding, together):
    gate, up, slope = (jnp.asarray(RNG.normal(size=(7, 33)) * 3, dtype) for _ in range(3))
    out, back = jax.vjp(lambda gate, up: gated(gate, up, together), gate, up)
    got = back(slope)
    exact = [np.asarray(x, np.float64) for x in (gate, up, slope)]
    sigmoid = 1 / (1 + np.exp(-exact[0]))
    slopes = exact[2] * exact[1] * (sigmoid + exact[0] * sigmoid * (1 - sigmoid))
    assert relative_error(out, exact[0] * sigmoid * exact[1]) < 2 * rounding
    assert relative_error(got[0], slopes) < rounding
    assert relative_error(got[1], exact[2] * exact[0] * sigmoid) < rounding
    assert [x.dtype for x in got] == [dtype, dtype]
    # What is not finite stays so, or a step could not be told to be skipped.
    for x in back(slope.at[0, 0].set(jnp.nan)):
        assert np.isnan(np.asarray(x, np.float64)).sum() == 1


def kurtosis(x):
    """3 for a normal distribution, 1.8 for a uniform one."""
    return ((x - x.mean()) ** 4).mean() / x.var() ** 2


def expected_uniform(config, name):
    """TPA's Xavier bound of a factor, `q_a` to `v_b`; None of anything else."""
    a, D = config.attention, config.embed_dim
    if config.attention.kind != "tensor_product" or name == "out":
        return None
    rank = a.q_rank if name[0] == "q" else a.rank
    fan = (a.num_heads + D) * rank if name.endswith("a") else (rank + D) * a.head_dim
    return (6 / fan) ** 0.5


@pytest.mark.parametrize("zero_init", [True, False], ids=["zero", "normal"])
@pytest.mark.parametrize("name", ["mlra_2_gated", "gqa_gated", "gta", "mfa", "tpa"])
def test_fresh_weights(name, zero_init):
    """Every kind of attention, every tensor: deviation, shape of the distribution, zeros, ones."""
    config = tiny.config(name, num_layers=12, zero_init=zero_init)
    model = models.Model(config, rngs=nnx.Rngs(0))
    tensors = {path: np.asarray(x[...]) for path, x in nnx.to_flat_state(nnx.state(model))}
    seen = set()
    for path, x in tensors.items():
        kind = path[-2]
        seen.add(kind)
        bound = expected_uniform(config, kind) if "attention" in path else None
        if path[-1] == "scale":
            assert (x == 1).all(), path
        elif kind in ("out", "down") and zero_init:
            assert (x == 0).all(), path
        else:
            deviation = bound / 3**0.5 if bound else 0.02
            # Four standard errors of a deviation and of a mean.
            assert abs(x.std() / deviation - 1) < 4 / (2 * x.size) ** 0.5, path
            assert abs(x.mean()) < 4 * deviation / x.size**0.5, path
            assert abs(kurtosis(x) - (1.8 if bound else 3)) < 0.3, path
            if bound:
                assert 0.99 * bound < np.abs(x).max() <= bound, path
            if path[0] == "layers":
                assert abs(np.corrcoef(x[0].ravel(), x[1].ravel())[0, 1]) < 0.2, path
    assert {"embed", "final_norm", "attention_norm", "mlp_norm", "gate", "up", "down"} <= seen
    values = [x.ravel()[:50] for path, x in tensors.items() if x.std() > 0 and x.size > 50]
    assert len({v.tobytes() for v in values}) == len(values), "two tensors are the same"


def test_parameters_have_the_dtype_of_the_config_and_another_seed_is_another_model():
    config = tiny.config("mqa", param_dtype="bfloat16")
    leaves = lambda seed: jax.tree.leaves(nnx.state(models.Model(config, rngs=nnx.Rngs(seed))))
    one, other = leaves(0), leaves(1)
    assert all(x.dtype == jnp.bfloat16 for x in one)
    assert all((x == 1).all() or not (x == y).all() for x, y in zip(one, other, strict=True))


DOWN, UP = ("mlp", "embed"), ("embed", "mlp")


def test_gradients_are_made_in_the_parts_that_devices_have(monkeypatch):
    """The same gradient; where the batch is split, its parts one behind the other in memory."""
    x, w, slope = (
        jax.random.normal(jax.random.key(i), s) for i, s in enumerate(((5, 6), (6, 8), (5, 8)))
    )
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    gradient = lambda: jax.vjp(lambda w: weigh(x, w, "ab,bc->ac", None, (mesh, DOWN)), w)[1](slope)
    assert layers.gradient_parts(mesh, DOWN) == 1
    monkeypatch.setattr(layers, "on_gpus", lambda mesh: True)
    assert [layers.gradient_parts(mesh, axes) for axes in (DOWN, UP)] == [2, 1]
    np.testing.assert_allclose(gradient()[0], x.T @ slope, rtol=1e-5, atol=1e-5)
    assert "f32[6,2,4]" in str(jax.make_jaxpr(gradient)())


@pytest.mark.parametrize("positions", [3, 70])
@pytest.mark.parametrize("axes", [UP, DOWN, ("q_latent", "heads", "head_dim")])
def test_gradients_are_summed_in_turn_where_gpus_copy(monkeypatch, axes, positions):
    """Each device's part, in float32 also where products are not, and nothing but copies.

    Of few positions the activations are cut, of many the gradient, which is then the smaller.
    """
    mesh, outer = make_mesh(fsdp=4, tensor=2), "cde"[: len(axes) - 1]
    x, w, slope = (8, positions, 16), (16, 8, 4)[: len(axes)], (8, positions, 8, 4)[: len(axes) + 1]
    x, w, slope = (RNG.normal(size=shape) for shape in (x, w, slope))
    monkeypatch.setattr(sharding, "copies", lambda mesh, axes: True)

    @jax.jit
    def gradient(x, w, slope):
        product = lambda w: weigh(x, w, f"abz,z{outer}->ab{outer}", None, (mesh, axes))
        return jax.vjp(product, w)[1](slope)[0]

    batch = sharding.named(mesh, "batch")
    x, slope = (jax.device_put(jnp.asarray(y, jnp.bfloat16), batch) for y in (x, slope))
    w = jax.device_put(jnp.asarray(w, jnp.float32), sharding.named(mesh, *axes))
    program = gradient.lower(x, w, slope).compile()
    assert not re.search("all-gather|all-reduce|reduce-scatter|all-to-all", program.as_text())
    assert len(re.findall(r" dot\(", program.as_text())) == (4 if positions == 3 else 1)
    got = program(x, w, slope)
    assert got.sharding.is_equivalent_to(w.sharding, w.ndim)
    exact = np.einsum(f"abz,ab{outer}->z{outer}", *(np.asarray(y, np.float64) for y in (x, slope)))
    assert relative_error(got, exact) < 1e-6
