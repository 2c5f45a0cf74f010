"""Products of a few rows: the reference against NumPy's float64, weights, arguments, the choice."""

import dataclasses
import functools
import secrets
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from mlra_jax.kernels.decode_projections import (
    Heads,
    Step,
    api,
    chain,
    has_kernel,
    prepare,
    prepare_gated,
    prepare_heads,
    product,
)

EPS = 1e-3


def draw(*shape, dtype="float32"):
    seed = secrets.randbits(32)
    print("seed", seed)
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32), dtype)


def wide(x):
    return np.asarray(x.astype(jnp.float32)).astype(np.float64)


def normed(x):
    return x / np.sqrt((x**2).mean(axis=1, keepdims=True) + EPS)


def close(found, wanted, tolerance=1e-5):
    assert np.linalg.norm(wide(found) - wanted) <= tolerance * np.linalg.norm(wanted)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 4e-3)])
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_product(rows, dtype, tolerance):
    x, w, h = (draw(*s, dtype=dtype) for s in ((rows, 192), (192, 128), (rows, 128)))
    found = product(x, prepare(w), norm=EPS, add_MN=h)
    assert found.dtype == dtype
    close(found, wide(h) + normed(wide(x)) @ wide(w), tolerance)


def test_gated_product_takes_the_scale_of_its_norm():
    x, gate, up, scale = draw(3, 128), draw(128, 192), draw(128, 192), draw(128)
    found = product(x, prepare_gated(gate, up, scale), norm=EPS)
    x = normed(wide(x)) * wide(scale)
    gate = x @ wide(gate)
    close(found, gate / (1 + np.exp(-gate)) * (x @ wide(up)))


def test_values_of_branches_are_summed_and_queries_absorbed_by_head():
    """The two products with a weight per head, as a latent model with branches has them."""
    M, H, branches, latent, nope, query = 2, 3, 2, 64, 64, 128
    weight_RHKN = draw(branches, H, nope, latent)
    attended, queries = draw(M, branches, H, latent), draw(M, H, query)
    values = draw(H, branches, latent, nope)  # Value up-projections.
    steps = [
        Step("o", "v", "values", heads=Heads(nope, H, latent, latent, H * latent)),
        Step("q", "k", "absorbed", heads=Heads(latent, H, query, nope)),
    ]
    found = chain(
        dict(o=attended.reshape(M, -1), q=queries.reshape(M, -1)),
        dict(
            v=prepare_heads(values.reshape(H, branches * latent, nope)),
            k=prepare_heads(weight_RHKN.reshape(-1, nope, latent)),
        ),
        steps,
    )
    wanted = np.einsum("mrhk,hrkn->mhn", wide(attended), wide(values))
    close(found["values"], wanted.reshape(M, -1))
    wanted = np.einsum("mhk,rhkn->mrhn", wide(queries[..., :nope]), wide(weight_RHKN))
    close(found["absorbed"], wanted.reshape(M, -1))


def test_a_chain_is_its_products_and_a_step_may_read_a_part():
    x, h, a, b = draw(5, 64), draw(5, 192), draw(64, 192), draw(128, 64)
    steps = [
        Step("x", "a", "middle", add="h"),
        Step("middle", "b", "last", norm=EPS, start=64),
    ]
    found = chain(dict(x=x, h=h), dict(a=prepare(a), b=prepare(b)), steps)
    middle = wide(h) + wide(x) @ wide(a)
    close(found["middle"], middle)
    close(found["last"], normed(middle[:, 64:]) @ wide(b))


def test_prepared_weights_are_padded_with_zeros():
    w = draw(100, 72)
    prepared = prepare(w)
    assert prepared.shape == (128, 128)
    np.testing.assert_array_equal(prepared[:72, :100], w.T)
    assert not prepared[72:].any() and not prepared[:, 100:].any()
    gated = prepare_gated(w, 2 * w)
    np.testing.assert_array_equal(gated, jnp.stack([prepared, 2 * prepared]))
    # What a SwiGLU of padded width gives is zero beyond it, as the next weight's rows are.
    out = product(draw(2, 128), gated)
    assert out.shape == (2, 128) and not out[:, 72:].any()


def test_results_are_rounded_once():
    # 1 + 2^-8 lies between two numbers of bfloat16 and would become 1 before 2^-9 is added.
    x = jnp.zeros((1, 64), jnp.bfloat16).at[0, :2].set(jnp.array([1, 2.0**-8], jnp.bfloat16))
    found = product(x, jnp.ones((64, 64), jnp.bfloat16), add_MN=jnp.full_like(x, 2.0**-9))
    assert (found == 1 + 2.0**-7).all()


def test_under_jit_and_inside_shard_map():
    mesh = Mesh(np.array(jax.devices()[:4]), ("tensor",))
    x, w = draw(2, 64), draw(64, 256)
    on_mesh = functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("tensor")),
        out_specs=PartitionSpec(None, "tensor"),
    )
    found = jax.jit(on_mesh(product))(x, jax.jit(prepare)(w))
    close(found, wide(x) @ wide(w))


ROWS = dict(x=jax.ShapeDtypeStruct((2, 128), "bfloat16"))
WEIGHTS = dict(
    w=jax.ShapeDtypeStruct((64, 128), "bfloat16"), g=jax.ShapeDtypeStruct((2, 64, 128), "bfloat16")
)


@pytest.mark.parametrize(
    "steps, changes, words",
    [
        ([], {}, "at least one step"),
        ([Step("y", "w", "out")], {}, "no rows 'y'"),
        ([Step("x", "v", "out")], {}, "no weight 'v'"),
        ([Step("x", "w", "x")], {}, "taken"),
        ([Step("x", "w", "out", add="x")], {}, "adds 128 columns to 64"),
        ([Step("x", "w", "out", start=64)], {}, "up to column 192 of 'x', which has 128"),
        ([Step("x", "w", "a"), Step("a", "w", "b")], {}, "up to column 128 of 'a'"),
        ([Step("x", "g", "out", heads=Heads(64, 1, 64, 128))], {}, "neither norm nor gate"),
        ([Step("x", "w", "out", heads=Heads(64, 2, 64, 64))], {}, "no multiple of 2 heads"),
        ([Step("x", "w", "out", heads=Heads(64, 1, 0, 96))], {}, "no multiple of runs of 96"),
        ([Step("x", "w", "out", heads=Heads(64, 1, 0, 64, 128))], {}, "up to column 192"),
        ([Step("x", "w", "out")], dict(dtype="float32"), "cast one of them"),
        ([Step("x", "w", "out")], dict(shape=(2, 2, 128)), "expected \\[2, N\\]"),
    ],
)
def test_says_what_is_wrong(steps, changes, words):
    x = ROWS["x"]
    rows = ROWS | dict(h=jax.ShapeDtypeStruct(**(dict(shape=x.shape, dtype=x.dtype) | changes)))
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(lambda r, w: chain(r, w, steps), rows, WEIGHTS)


def test_an_implementation_asked_for_by_name_must_serve():
    x, w = draw(2, 64), draw(64, 64)
    with pytest.raises(ValueError, match="expected one of reference, mosaic_gpu"):
        product(x, prepare(w), implementation="cuda")
    if api._why_not(problem_for("NVIDIA H100 80GB HBM3")) is None:
        with pytest.raises(ValueError, match="cannot serve this call: dtype float32"):
            product(x, prepare(w), implementation="mosaic_gpu")


def problem_for(kind, steps=2, **changes):
    """A chain of equal steps, as it would be compiled for a device."""
    names = "xabc"
    steps = [Step(names[k], "w", names[k + 1]) for k in range(steps)]
    rows = dict(x=jax.ShapeDtypeStruct((2, 64), "bfloat16"))
    weights = dict(w=jax.ShapeDtypeStruct((64, 64), "bfloat16"))
    device = types.SimpleNamespace(device_kind=kind)
    return dataclasses.replace(api._problem(device, rows, weights, tuple(steps)), **changes)


def test_the_kernel_is_chosen_for_chains_on_hopper():
    pytest.importorskip(
        "mlra_jax.kernels.decode_projections.mosaic_gpu",
        reason="this jaxlib has no Mosaic GPU dialect",
    )
    for kind in ("NVIDIA H100 80GB HBM3", "NVIDIA H200"):
        assert api._choose(None, problem_for(kind)) == "mosaic_gpu"
        assert api._choose(None, problem_for(kind, steps=1)) == "reference"
        assert api._choose(None, problem_for(kind, count=65)) == "reference"
        assert api._choose("mosaic_gpu", problem_for(kind, steps=1)) == "mosaic_gpu"
    for kind in ("NVIDIA A100-SXM4-80GB", "TPU v5 lite", "cpu"):
        assert api._choose(None, problem_for(kind)) == "reference"
    assert not has_kernel(ROWS, WEIGHTS, [Step("x", "w", "out")])


def test_xla_never_sees_fewer_than_8_rows_on_a_gpu(monkeypatch):
    seen = []

    def recorded(rows, weights, *, problem):
        seen.append(rows["x"].shape)
        return dict(out=rows["x"])

    gpu = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(api, "_target_device", lambda: gpu)
    monkeypatch.setattr(api.reference, "chain", recorded)
    for rows in (1, 8, 9):
        x = draw(rows, 64)
        np.testing.assert_array_equal(product(x, prepare(draw(64, 64))), x)
    assert seen == [(8, 64), (8, 64), (9, 64)]
