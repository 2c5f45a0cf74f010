"""Grouped decode against softmax attention in NumPy's float64, row by row."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxprs import HIGHEST, products

from mlra_jax.kernels import target
from mlra_jax.kernels.grouped_decode import grouped_decode

B, T, J, G, K, V, S = 3, 2, 3, 4, 10, 6, 21
SCALE = 0.37


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    shapes = ((B, T, J, G, K), (B, S, J, K), (B, S, J, V))
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def attend(q, k, v, ends_BT, starts_B):
    """(out, lse) by the definition, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out, lse = np.zeros((B, T, J, G, V)), np.full((B, T, J, G), -np.inf)
    for b, t, j, g in np.ndindex(B, T, J, G):
        seen = slice(max(starts_B[b], 0), max(ends_BT[b][t], 0))
        weights = np.exp(SCALE * k[b, seen, j] @ q[b, t, j, g])
        if weights.size:
            out[b, t, j, g] = weights @ v[b, seen, j] / weights.sum()
            lse[b, t, j, g] = np.log(weights.sum())
    return out, lse


def error(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def test_each_query_sees_up_to_itself_and_not_the_padding(arrays):
    lengths, starts = [21, 9, 2], [0, 4, 1]
    out, lse = grouped_decode(*arrays, jnp.array(lengths), jnp.array(starts), scale=SCALE)
    wanted, wanted_lse = attend(*arrays, [[n - 1, n] for n in lengths], starts)
    assert error(out, wanted) < 1e-6
    # The third row's first query sees nothing: its only position is padding.
    assert np.isneginf(lse[2, 0]).all() and (np.asarray(out)[2, 0] == 0).all()
    seen = np.isfinite(wanted_lse)
    assert error(lse[seen], wanted_lse[seen]) < 1e-6


def test_ends_of_their_own_for_each_query_and_any_integer(arrays):
    ends, starts = [[3, 17], [99, -5], [2**31 - 1, -(2**31)]], [-7, 5, 30]
    out, lse = grouped_decode(*arrays, jnp.array(ends), jnp.array(starts), scale=SCALE)
    wanted, wanted_lse = attend(*arrays, np.clip(ends, 0, S).tolist(), starts)
    assert error(out, wanted) < 1e-6
    assert (np.isneginf(lse) == np.isneginf(wanted_lse)).all()
    extreme = jnp.array([2**31 - 1, -(2**31), 0])
    out, lse = grouped_decode(*arrays, extreme, scale=SCALE)
    assert error(out, attend(*arrays, [[S, S], [0, 0], [0, 0]], [0] * B)[0]) < 1e-6


def test_ends_and_starts_at_the_edges_of_the_cache(arrays):
    for lengths, starts in (
        ([S + 1, S, S - 1], [S - 1, S, S - 2]),
        ([S + 2, 1, 2], [0, 0, 1]),
        ([T - 1, 0, -1], [1, 0, 0]),
    ):
        out, lse = grouped_decode(*arrays, jnp.array(lengths), jnp.array(starts), scale=SCALE)
        ends = [[min(n - 1, S), min(n, S)] for n in lengths]
        wanted, wanted_lse = attend(*arrays, ends, starts)
        assert np.abs(out - wanted).max() < 1e-5
        np.testing.assert_allclose(lse, wanted_lse, rtol=1e-5, atol=1e-5)


def test_float32_products_are_not_rounded(arrays):
    call = functools.partial(grouped_decode, scale=SCALE)
    lengths = jnp.full(B, S)
    assert products(call, *arrays, lengths) == {(HIGHEST, "float32")}
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
    assert products(call, *narrow, lengths) == {(None, "float32")}


def test_scores_beyond_the_range_of_exp(arrays):
    q, k, v = arrays
    out, lse = grouped_decode(1000 * q, k, v, jnp.full(B, S), scale=SCALE)
    scores = SCALE * np.einsum("btjgk,bsjk->btjgs", np.float64(1000 * q[:, 1:]), np.float64(k))
    assert error(lse[:, 1:], scores.max(-1)) < 1e-5
    assert np.isfinite(out).all()


@pytest.mark.parametrize("dtype, bound", [(jnp.bfloat16, 8e-3), (jnp.float16, 1e-3)])
def test_sixteen_bits(arrays, dtype, bound):
    narrow = [jnp.asarray(x, dtype) for x in arrays]
    out, lse = grouped_decode(*narrow, jnp.full(B, S), scale=SCALE)
    wanted, wanted_lse = attend(*narrow, [[S - 1, S]] * B, [0] * B)
    assert out.dtype == dtype and lse.dtype == jnp.float32
    assert error(out, wanted) < bound
    assert error(lse, wanted_lse) < 1e-5


@pytest.mark.parametrize(
    "heads, width, kernels",
    [(1, 128, 2), (6, 128, 2), (24, 64, 2), (1, 256, 2), (1, 96, 0)],
    ids=["one head", "several", "many, narrow", "wide", "no kernel for the width"],
)
def test_kernels_serve_any_number_of_heads(monkeypatch, heads, width, kernels):
    hopper = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(target, "device", lambda: hopper)
    shapes = (2, 1, heads, 8, width), (2, 4096, heads, width), (2, 4096, heads, width)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    call = jax.jit(functools.partial(grouped_decode, scale=SCALE))
    lengths = jax.ShapeDtypeStruct((2,), jnp.int32)
    text = call.trace(*arrays, lengths).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == kernels


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(k=np.zeros((B, S, J, K + 1), np.float32)), "k has shape"),
        (dict(k=np.zeros((B, S, J - 1, K), np.float32)), "k has shape"),
        (dict(k=np.zeros((B, S, J, K), np.float16)), "k is float16 but q is float32"),
        (dict(q=np.zeros((B, T, J, G, K), np.int8)), "k is float32 but q is int8"),
        (dict(q=np.zeros((B, T, J, 0, K), np.float32)), "no dimension may be 0"),
        (dict(v=np.zeros((B, S, J, 0), np.float32)), "no dimension may be 0"),
        (dict(v=np.zeros((B, S - 1, J, V), np.float32)), "v has shape"),
        (dict(v=np.zeros((B, S, J + 1, V), np.float32)), "v has shape"),
        (dict(lengths=np.zeros((B, T + 1), np.int32)), "lengths has shape"),
        (dict(starts_B=np.zeros(B, np.float32)), "starts is float32, expected int32"),
        (dict(q=np.zeros((B, T, J * G, K), np.float32)), "expected q"),
        (dict(v=np.zeros((B, S, J, V), np.float16)), "v is float16 but q is float32"),
        (dict(lengths=np.zeros(B + 1, np.int32)), "lengths has shape"),
        (dict(lengths=np.zeros(B, np.float32)), "lengths is float32"),
        (dict(starts_B=np.zeros((B, T), np.int32)), "starts needs 1 dimensions"),
        (dict(implementation="fastest"), "expected one of reference"),
        (dict(implementation="mosaic_gpu"), "mosaic_gpu cannot serve this call: dtype float32"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_in_one_line(arrays, changes, words):
    arguments = dict(zip(("q", "k", "v"), arrays, strict=True)) | {
        "lengths": np.full(B, S, np.int32)
    }
    arguments |= changes
    q, k, v, lengths = (jnp.asarray(arguments.pop(n)) for n in ("q", "k", "v", "lengths"))
    with pytest.raises(ValueError, match=words) as raised:
        grouped_decode(q, k, v, lengths, scale=SCALE, **arguments)
    assert "\n" not in str(raised.value)
