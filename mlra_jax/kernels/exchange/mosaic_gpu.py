"""An exchange on Hopper GPUs: every device writes its part into all others' inboxes.

XLA runs its all-reduces between CUDA graphs, so that they cut a step into two graphs a layer, which
the host launches one by one. A custom call is a node of the graph. XLA puts a barrier of all
devices in front of one that reads or writes other devices' memory; it is left out of all exchanges
of a step but the first, as devices share nothing but inboxes, and these need none:

- A word of an inbox is `EMPTY` until it is written, and no part has such a word. Who reads waits
  for each word by itself, so that nothing else tells of its arrival, and no order matters.
- There are three inboxes, by turns. Exchange k writes the others' inbox k % 3, reads its own, and
  empties its own of exchange k - 1, for exchange k + 2. No device is in k + 2 before this one is in
  k + 1, as it needs this one's part of that; and launches on a device follow each other, so that
  the inbox is empty by then.
- All inboxes are emptied when a step begins; the barrier in front of its first exchange says that
  all devices have done so. After its last nothing more arrives.

A step ends with logits, of which every device has some of the vocabulary. They are gathered
likewise (`gather`), once a step, through a place of their own behind the inboxes.

For each launch that asks XLA for other devices' addresses it copies them to the device, 4 us in
front of every program. So only the first exchange of a step with `kernels.after_attention` does;
others add to their own inboxes' address how `far` those are.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import Mesh
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from mlra_jax.kernels import words
from mlra_jax.kernels.rows import THREADS, layout, normed

INBOXES = 3
_TOGETHER = 4
"""Words of a thread where devices gather."""
WIDEST = 8192
"""Beyond, a row does not fit the registers of the one warpgroup that takes it."""


def inbox_words(devices: int, rows: int, width: int, gathered: int) -> int:
    """Of a device's inboxes: by turn, by sender, by row; then of what is gathered, by sender."""
    return INBOXES * devices * rows * width + rows * gathered


def add(
    summands_NRD: jax.Array,
    x_RD: jax.Array,
    scale_D: jax.Array,
    inbox: jax.Array,
    turn: jax.Array,
    *,
    mesh: Mesh,
    axes: tuple[str, ...],
    factor: float,
    eps: float,
    dtype: jnp.dtype,
    first: bool,
) -> tuple[jax.Array, ...]:
    """(the stream, its norm in `dtype`, the inboxes) of one device, within `shard_map`.

    Args:
      summands_NRD: float32, which add up to this device's part.
      x_RD: the stream; scale_D: of the norm, which multiplies by it and by `factor`.
      inbox: int32 `[inbox_words]`, from the exchange before; changed in place.
      turn: int32 `[1]`, the number of this exchange in its step modulo `INBOXES`.
      axes: the mesh axes of more than one device.
      first: whether it is the first of its step, before which inboxes are new. It has a fourth
        result, how far it is to each device's inboxes, in bytes from this one's, and then where
        these are: int32 `[devices + 1, 2]`, halves of 64 bits.
    """
    N, R, D = summands_NRD.shape
    lying = layout(D)

    def body(summands_ref, x_ref, scale_ref, turn_ref, inbox_ref, out_ref, normed_ref, *far_ref):
        row, turn = lax.axis_index("row"), turn_ref[0]
        me, devices = everyone(mesh, axes)
        load = functools.partial(plgpu.load, layout=lying)
        part_D = sum(load(summands_ref.at[n, row]) for n in range(N))
        inboxes = [plgpu.remote_ref(inbox_ref, device) for device in devices]

        def place(turn, sender):
            return pl.ds(((turn * len(devices) + sender) * R + row) * D, D)

        for remote in inboxes:
            _send(part_D, remote.at[place(turn, me)], lying)
        if first:
            pl.when(row == 0)(lambda: _measure(far_ref[0], inbox_ref, inboxes))
        x_D = load(x_ref.at[row]).astype(jnp.float32)
        scale_D = load(scale_ref).astype(jnp.float32) * factor
        before = lax.rem(turn + jnp.int32(INBOXES - 1), jnp.int32(INBOXES))
        for n in range(len(devices)):
            _empty(inbox_ref.at[place(before, n)], lying)
        parts = [_receive(inbox_ref.at[place(turn, n)], D, lying) for n in range(len(devices))]
        x_D = (x_D + sum(parts[1:], parts[0])).astype(out_ref.dtype)
        out_ref[row] = x_D
        x_D = x_D.astype(jnp.float32)
        normed_ref[row] = normed(x_D, scale_D, eps).astype(dtype)

    out = [jax.ShapeDtypeStruct((R, D), x_RD.dtype), jax.ShapeDtypeStruct((R, D), dtype)]
    if first:
        out.append(jax.ShapeDtypeStruct((mesh.size + 1, 2), jnp.int32))
    kernel = plgpu.kernel(
        body,
        out_type=tuple(out),
        grid=(R,),
        grid_names=("row",),
        kernel_name="exchange",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, skip_device_barrier=not first
        ),
    )
    inbox_ref = jax.new_ref(inbox)
    x_RD, normed_RD, *far = kernel(summands_NRD, x_RD, scale_D, turn, inbox_ref)
    return x_RD, normed_RD, jax.freeze(inbox_ref), *far


def gather(x_RV: jax.Array, inbox: jax.Array, far: jax.Array) -> jax.Array:
    """What all devices have beside each other, on one of them, within `shard_map`.

    Args:
      x_RV: float32, this device's columns, of which 4 divide the number.
      inbox, far: of `add`; not changed where more exchanges would look.
    """
    (R, V), N = x_RV.shape, len(far) - 1
    begin = inbox.size - R * N * V

    def body(x_ref, far_ref, inbox_ref, out_ref):
        ways, here = far_from(far_ref, N)
        require_at(inbox_ref, here)
        _pass_on(
            lax.axis_index("cta"),
            own_number(ways),
            x_ref,
            inbox_ref.at[pl.ds(begin, N * R * V)],
            out_ref,
            ways,
        )

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((R, N * V), jnp.float32),
        grid=(-(-R * V // (THREADS * _TOGETHER)),),
        grid_names=("cta",),
        kernel_name="gather",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, skip_device_barrier=True
        ),
    )
    return kernel(x_RV, far, jax.new_ref(inbox))


def _pass_on(cta, me, x_ref, inbox_ref, out_ref, ways) -> None:
    """Sends `_TOGETHER` numbers of each thread to all devices, and writes what they all sent."""
    number = plgpu.Layout.WG_SPLAT(())

    @plgpu.inline_mgpu(
        arg_types=(number, number, *[plgpu.RefType()] * 3, *[number] * 2 * len(ways))
    )
    def send_and_receive(ctx, cta, me, x, inbox, out, *halves):
        i64, constant = ir.IntegerType.get_signless(64), functools.partial(arith.constant, _i32())
        (R, V), f32, N = ir.MemRefType(x.type).shape, ir.F32Type.get(), len(ways)

        def at(ref, offset):
            base = mgpu.utils.memref_ptr(ref)
            return mgpu.utils.getelementptr(base, [arith.extui(i64, offset)], f32)

        cta, me = (x.registers.flat[0] for x in (cta, me))
        thread = arith.addi(arith.muli(cta, constant(THREADS)), mgpu.thread_idx())
        place = arith.muli(thread, constant(_TOGETHER))
        there = arith.cmpi(arith.CmpIPredicate.ult, place, constant(R * V))
        place = arith.minui(place, constant(R * V - _TOGETHER))
        with mgpu.when(there):
            held = llvm.load(ir.VectorType.get((_TOGETHER,), f32), at(x, place))
            mine = at(inbox, arith.addi(arith.muli(me, constant(R * V)), place))
            for n in range(N):
                words.send(words.beyond(mine, halves[2 * n : 2 * n + 2]), held)
        row, column = arith.divui(place, constant(V)), arith.remui(place, constant(V))
        sent = [at(inbox, arith.addi(place, constant(n * R * V))) for n in range(N)]
        received = words.receive(sent, _TOGETHER, [there] * N)
        for n, held in enumerate(received):
            with mgpu.when(there):
                line = arith.muli(row, constant(N * V))
                llvm.store(held, at(out, arith.addi(line, arith.addi(column, constant(n * V)))))

    send_and_receive(cta, me, x_ref, inbox_ref, out_ref, *(half for way in ways for half in way))


# --- Other devices' inboxes without their addresses ---


def _measure(far_ref, inbox_ref, inboxes) -> None:
    """Writes how far it is to each of the inboxes, and where this device's is."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * (2 + len(inboxes)))
    def measure(ctx, far, here, *inboxes):
        i64, number = ir.IntegerType.get_signless(64), functools.partial(arith.constant, _i32())
        address = lambda ref: llvm.ptrtoint(i64, mgpu.utils.memref_ptr(ref))
        own = address(here)
        with mgpu.single_thread(scope=mgpu.ThreadSubset.WARPGROUP):
            found = [arith.subi(address(ref), own) for ref in inboxes]
            for n, value in enumerate((*found, own)):
                place = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(far), [number(n)], i64)
                llvm.store(value, place)

    measure(far_ref, inbox_ref, *inboxes)


def far_from(far_ref, devices: int):
    """(how far it is to each device's inboxes, where this one's are), each in halves."""
    *ways, here = ((far_ref[n, 0], far_ref[n, 1]) for n in range(devices + 1))
    return ways, here


def own_number(ways) -> jax.Array:
    """This device's among those of `far_from`."""
    return sum(jnp.where((low | high) == 0, n, 0) for n, (low, high) in enumerate(ways))


def require_at(inbox_ref, here) -> None:
    """Stops the program with an error of the device if the inboxes are elsewhere.

    XLA leaves them where they are, as they are changed in place: `far` counts on that.
    """
    number = plgpu.Layout.WG_SPLAT(())

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), number, number))
    def require(ctx, ref, *halves):
        i64, void = ir.IntegerType.get_signless(64), ir.Type.parse("!llvm.void")
        found = llvm.ptrtoint(i64, mgpu.utils.memref_ptr(ref))
        with mgpu.when(arith.cmpi(arith.CmpIPredicate.ne, found, words.joint(halves))):
            llvm.inline_asm(void, [], "trap;", "", has_side_effects=True)

    require(inbox_ref, *here)


# --- Rows ---


def _i32():
    return ir.IntegerType.get_signless(32)


def everyone(mesh: Mesh, axes: tuple[str, ...]) -> tuple[jax.Array, list[dict[str, jax.Array]]]:
    """(this device's number among those of `axes`, the places of all of them), in a kernel."""
    me = jnp.int32(0)
    for a in axes:
        me = me * mesh.shape[a] + lax.axis_index(a)
    places = itertools.product(*(range(mesh.shape[a]) for a in axes))
    return me, [dict(zip(axes, map(jnp.int32, place), strict=True)) for place in places]


def _send(row_D: jax.Array, ref, layout) -> None:
    """Writes a row of float32 into an inbox, perhaps another device's."""

    @plgpu.inline_mgpu(arg_types=(layout, plgpu.RefType()))
    def send(ctx, row, ref):
        for pointer, value in zip(_places(ref, row.layout), row.registers.flat, strict=True):
            words.send(pointer, value)

    send(row_D, ref)


def _empty(ref, layout) -> None:
    """Makes a row of an inbox of this device ready to be written again."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def empty(ctx, ref):
        strided = layout.to_mgpu()
        nothing = words.filled(words.kind(strided.vec_size), words.EMPTY)
        for pointer in _places(ref, strided):
            words.write(pointer, nothing)

    empty(ref)


def _receive(ref, width: int, layout) -> jax.Array:
    """The row of float32 in an inbox of this device, when all of it has arrived."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=plgpu.ShapeDtypeStruct((width,), jnp.float32, layout=layout),
    )
    def receive(ctx, ref):
        strided = layout.to_mgpu()
        registers = np.empty(strided.registers_shape((width,)), dtype=object)
        registers.flat = words.receive(list(_places(ref, strided)), strided.vec_size)
        return mgpu.FragmentedArray(_registers=registers, _layout=strided, _is_signed=None)

    return receive(ref)


def _places(ref, layout):
    """Pointers to what of a row a thread holds, in the order of its registers."""
    return words.pointers(ref, layout.linear_thread_idxs())
