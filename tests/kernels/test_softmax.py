"""Joining parts of a softmax by their log-sum-exp, in one array and over devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from mlra_jax.kernels.softmax import merge, merge_partials

INF = np.inf
# Parts x rows: differences beyond the range of exp either way, parts and whole rows that saw
# nothing, and sums beyond float32.
LSE = np.array(
    [
        [200, -200, 200, -200, -INF, -INF, 3, 88.7],
        [-200, 200, 200, -200.5, 200, -INF, -INF, 88.9],
        [199, 199.5, 200, -INF, -INF, -INF, 3, 89.0],
        [-INF, -200, -200, -201, 200, -INF, -INF, 90.0],
    ],
    np.float32,
)


def parts(dtype):
    out = np.random.default_rng(0).standard_normal((*LSE.shape, 4)).astype(dtype)
    top = np.float64(LSE).max(axis=0)
    weights = np.exp(LSE - np.where(np.isfinite(top), top, 0))
    total = weights.sum(axis=0)
    wanted = (weights[..., None] * out.astype(np.float64)).sum(0)
    seen = total > 0
    wanted[seen] /= total[seen][:, None]
    lse = np.where(seen, top + np.log(np.where(seen, total, 1)), -INF)
    return jnp.asarray(out), wanted, lse


@pytest.mark.parametrize("dtype, tolerance", [(jnp.bfloat16, 1e-2), (jnp.float32, 1e-6)])
def test_parts_in_one_array(dtype, tolerance):
    out, wanted, wanted_lse = parts(dtype)
    merged, lse = jax.jit(merge_partials)(out, jnp.asarray(LSE))
    assert merged.dtype == dtype and lse.dtype == jnp.float32
    np.testing.assert_allclose(np.float64(merged), wanted, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(lse, wanted_lse, rtol=1e-6)
    assert not np.asarray(merged)[np.isneginf(wanted_lse)].any()


@pytest.mark.parametrize("axes", [("x",), ("x", "y")])
def test_parts_on_devices(axes):
    """Each device has one part and keeps its share of the merged rows."""
    out, wanted, _ = parts(np.float32)
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(4 if len(axes) == 1 else (2, 2)), axes)

    def local(out, lse):
        return merge(out[0], lse[0], axes if len(axes) > 1 else axes[0], 0)

    call = jax.shard_map(
        local, mesh=mesh, in_specs=(P(axes), P(axes)), out_specs=P(axes), check_vma=False
    )
    merged = jax.jit(call)(out, jnp.asarray(LSE))
    assert merged.addressable_shards[0].data.shape == (2, 4)
    np.testing.assert_allclose(merged, wanted, rtol=1e-6, atol=1e-6)
    narrow = jax.jit(call)(out.astype(jnp.bfloat16), jnp.asarray(LSE))
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(narrow), wanted, rtol=2e-2, atol=2e-2)


def test_merging_over_devices_is_differentiable():
    """The weights of a part that saw nothing are 0, not NaN."""
    mesh = Mesh(np.array(jax.devices()[:4]), ("x",))
    local = lambda out, lse: merge(out[0], lse[0], "x", 0)
    specs = dict(in_specs=(P("x"), P("x")), out_specs=P("x"), check_vma=False)
    call = functools.partial(jax.shard_map, mesh=mesh, **specs)(local)
    gradient = jax.jit(jax.grad(lambda out: call(out, jnp.asarray(LSE)).sum()))(
        parts(np.float32)[0]
    )
    np.testing.assert_allclose(gradient.sum(0)[:, 0], np.isfinite(LSE).any(0), atol=1e-5)
