"""One launch between two products: its numbers, in JAX's interpreter of Mosaic GPU, beside XLA's.

What the interpreter does not model (registers, layouts) is checked by lowering for a GPU.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlra_jax import cache as kv
from mlra_jax.layers import angles, rotate

between = pytest.importorskip(
    "mlra_jax.kernels.between_products.mosaic_gpu", reason="this jaxlib has no Mosaic GPU dialect"
)
EPS = 1e-6


def interpreted(function, *arrays, **how):
    if jax.__version_info__ < (0, 12):
        pytest.skip("the interpreter of JAX before 0.12 wants all barriers waited for")
    with between.plgpu.force_gpu_interpret_mode(between.plgpu.InterpretGPUParams()):
        return jax.jit(functools.partial(function, **how))(*arrays)


def normal(seed, *shape, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def norm(x, scale, factor):
    x = x.astype(jnp.float32)
    return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + EPS) * scale * factor


@pytest.mark.parametrize("dtype, near", [("float32", 1e-6), ("bfloat16", 8e-3)])
def test_sum_and_norm(dtype, near):
    summands, x, scale = normal(0, 3, 5, 384), normal(1, 5, 384, dtype=dtype), normal(2, 384)
    how = dict(factor=1.5, eps=EPS, dtype=dtype)
    total, normed = interpreted(between.sum_and_norm, summands, x, scale, **how)
    expected = (x.astype(jnp.float32) + summands.sum(0)).astype(dtype)
    assert total.dtype == normed.dtype == dtype
    np.testing.assert_allclose(total, expected, rtol=near, atol=near)
    np.testing.assert_allclose(normed, norm(expected, scale, 1.5), rtol=near, atol=4 * near)


@pytest.mark.parametrize(
    "T, L, C, lengths",
    [(1, 3, 128, [0, 6, 15, 16, 40]), (2, 1, 256, [14, 15, 3])],
    ids=["full_rows", "two_tokens"],
)
def test_enter(T, L, C, lengths):
    B, S, Q, R = len(lengths), 16, 128, 64
    rows, lengths = B + 2, jnp.asarray(lengths, jnp.int32)
    latents, k_rope = normal(0, B, S, L, C), normal(1, B, S, R)
    summands = normal(2, 2, rows, T, Q + L * C + R)
    scales, factors = (normal(3, Q), normal(4, L * C)), (0.5, 2.0)
    at = 2**20 + 7 * jnp.arange(rows, dtype=jnp.int32)[:, None] + jnp.arange(T)
    found = interpreted(
        between.enter, summands, angles(at, R, 1e4), scales, lengths, latents, k_rope,
        factors=factors, eps=EPS,
    )  # fmt: skip
    x = summands.sum(0)
    q, kept, rope = jnp.split(x, [Q, Q + L * C], -1)
    kept = norm(kept.reshape(rows, T, L, C), scales[1].reshape(L, C), factors[1])[:B]
    rope = rotate(rope[:, :, None], at, 1e4)[:B, :, 0]
    expected = (
        norm(q, scales[0], factors[0]),
        kv.write(latents, kept, lengths, 1, 0),
        kv.write(k_rope, rope, lengths, 1, 0),
    )
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, expected
    )
