"""A row of numbers held by one warpgroup of a Mosaic GPU kernel, and its norm."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

THREADS = 128
"""Of a warpgroup; widths of rows are multiples."""


def layout(width: int) -> plgpu.Layout:
    """Up to four neighbours a thread at a time."""
    neighbours = next(n for n in (4, 2, 1) if width % (n * THREADS) == 0)
    return plgpu.Layout.WG_STRIDED((width,), vec_size=neighbours)


def normed(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """RMSNorm of a float32 row."""
    return x * lax.rsqrt(jnp.sum(x * x) / x.size + eps) * scale
