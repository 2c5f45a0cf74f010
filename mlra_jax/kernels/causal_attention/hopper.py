"""What the kernels of attention on Hopper GPUs share."""

import functools
import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

LOG2E = math.log2(math.e)
WGMMA, _SCALAR = plgpu.Layout.WGMMA, plgpu.Layout.WG_SPLAT(())


def divide(x, by: int):
    """(quotient, rest) of two numbers that are not negative."""
    return lax.div(x, jnp.int32(by)), lax.rem(x, jnp.int32(by))


def zero(n):
    """0, of which the compiler does not know it: addresses are computed anew and take no registers.

    n is less than 2**24.
    """
    result = plgpu.ShapeDtypeStruct((), jnp.int32, layout=_SCALAR)

    @plgpu.inline_mgpu(arg_types=(_SCALAR,), return_type=result)
    def shift(_, n):
        [value] = n.registers.flat
        i32 = ir.IntegerType.get_signless(32)
        value = llvm.inline_asm(i32, [value], "shr.u32 $0, $1, 24;", "=r,r")
        return mgpu.FragmentedArray.splat(value, (), is_signed=True)

    return shift(n)


def hide_later(x, ahead, *, keys: int = 0):
    """-inf where a key comes after the query; queries begin `ahead` of the keys.

    `keys` is their axis: 0 where they are the rows. Of a thread's elements all but one number are
    constants, which take no registers.
    """
    sign = 1 - 2 * keys
    result = plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=WGMMA)

    @plgpu.inline_mgpu(arg_types=(WGMMA, _SCALAR), return_type=result)
    def hide(_, x, ahead):
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        constant = functools.partial(arith.constant, i32)
        thread = mgpu.utils.thread_idx()
        lane = arith.andi(thread, constant(31))
        warp = arith.andi(arith.shrui(thread, constant(5)), constant(3))
        row = arith.addi(arith.muli(warp, constant(16)), arith.shrui(lane, constant(2)))
        column = arith.muli(arith.andi(lane, constant(3)), constant(2))
        [ahead] = ahead.registers.flat
        ahead = arith.addi(arith.muli(arith.subi(column, row), constant(sign)), ahead)
        lowest = arith.constant(f32, float("-inf"))
        strides = x.layout.tiling.tile_strides((x.shape[1], 1))
        registers = np.empty_like(x.registers)
        for index in np.ndindex(x.registers.shape):
            offset = sum(i * stride for i, stride in zip(index, strides, strict=True))
            row, column = divmod(offset, x.shape[1])
            pair = x.registers[index]
            for k in range(2):
                least = constant(sign * (row - column - k))
                seen = arith.cmpi(arith.CmpIPredicate.sge, ahead, least)
                value = arith.select(seen, vector.extract(pair, [], [k]), lowest)
                pair = vector.insert(value, pair, [], [k])
            registers[index] = pair
        return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)

    return hide(x, ahead)
