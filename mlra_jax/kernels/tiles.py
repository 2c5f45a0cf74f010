"""Tiles of products on Hopper GPUs, in the registers of a warpgroup and in shared memory."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

TILE = plgpu.Layout.WGMMA
ROW, COLUMN = TILE.reduce(1), TILE.reduce(0)
"""A number for each row of a tile, and for each column."""
REDUCTION = 2 * 128
"""Numbers through which a warpgroup reduces over the rows of a tile: 2 of each thread."""


def swizzled(shape: tuple[int, ...], dtype, swizzle: int | None = None):
    """Shared memory for operands of products and for copies, in lines of `swizzle` bytes.

    By default the last dimension decides: as many as divide it, up to 128.
    """
    size = jnp.dtype(dtype).itemsize
    swizzle = swizzle or next(s for s in (128, 64, 32) if shape[-1] * size % s == 0)
    tiling = plgpu.TilingTransform((8, swizzle // size))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))


def load(ref, layout) -> jax.Array:
    """In float32."""
    return plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)


def store(ref, value) -> None:
    """In the dtype of `ref`, and where it lies, which JAX from 0.12 on wants to be told."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value.astype(ref.dtype), optimized=False)
    else:
        ref[...] = value.astype(ref.dtype)


def wide(x, like):
    """A number for each row as one for each element."""
    return lax.broadcast_in_dim(x, like.shape, [0])


def tall(x, like):
    """A number for each column as one for each element."""
    return lax.broadcast_in_dim(x, like.shape, [1])


def over_rows(op: str, x, scratch_ref):
    """The sum ("add") or maximum ("max") over the rows of a tile.

    Mosaic GPU reduces through shared memory that all warpgroups of a CTA have in common; here each
    has its own, of `REDUCTION` float32.
    """
    result = plgpu.ShapeDtypeStruct(x.shape[1:], jnp.float32, layout=COLUMN)

    @plgpu.inline_mgpu(arg_types=(TILE, plgpu.RefType()), return_type=result)
    def reduce(_, x, scratch):
        return x.reduce(op, 0, scratch)

    return reduce(x, scratch_ref)
