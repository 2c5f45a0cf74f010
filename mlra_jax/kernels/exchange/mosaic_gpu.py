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
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import Mesh

from mlra_jax.kernels import words
from mlra_jax.kernels.rows import layout, normed

INBOXES = 3
WIDEST = 8192
"""Beyond, a row does not fit the registers of the one warpgroup that takes it."""


def inbox_shape(devices: int, rows: int, width: int) -> tuple[int, ...]:
    """Of a device's int32 inboxes: by turn and by sender."""
    return INBOXES, devices, rows, width


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
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(the stream, its norm in `dtype`, the inboxes) of one device, within `shard_map`.

    Args:
      summands_NRD: float32, which add up to this device's part.
      x_RD: the stream; scale_D: of the norm, which multiplies by it and by `factor`.
      inbox: int32 of `inbox_shape`, from the exchange before; changed in place.
      turn: int32 `[1]`, the number of this exchange in its step modulo `INBOXES`.
      axes: the mesh axes of more than one device.
      first: whether it is the first of its step, before which inboxes are new.
    """
    N, R, D = summands_NRD.shape
    lying = layout(D)

    def body(summands_ref, x_ref, scale_ref, turn_ref, inbox_ref, out_ref, normed_ref):
        row, turn = lax.axis_index("row"), turn_ref[0]
        me, devices = everyone(mesh, axes)
        load = functools.partial(plgpu.load, layout=lying)
        part_D = sum(load(summands_ref.at[n, row]) for n in range(N))
        for device in devices:
            _send(part_D, plgpu.remote_ref(inbox_ref, device).at[turn, me, row], lying)
        x_D = load(x_ref.at[row]).astype(jnp.float32)
        scale_D = load(scale_ref).astype(jnp.float32) * factor
        before = lax.rem(turn + jnp.int32(INBOXES - 1), jnp.int32(INBOXES))
        for n in range(len(devices)):
            _empty(inbox_ref.at[before, n, row], lying)
        parts = [_receive(inbox_ref.at[turn, n, row], D, lying) for n in range(len(devices))]
        x_D = (x_D + sum(parts[1:], parts[0])).astype(out_ref.dtype)
        out_ref[row] = x_D
        x_D = x_D.astype(jnp.float32)
        normed_ref[row] = normed(x_D, scale_D, eps).astype(dtype)

    kernel = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((R, D), x_RD.dtype),
            jax.ShapeDtypeStruct((R, D), dtype),
        ),
        grid=(R,),
        grid_names=("row",),
        kernel_name="exchange",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, skip_device_barrier=not first
        ),
    )
    inbox_ref = jax.new_ref(inbox)
    x_RD, normed_RD = kernel(summands_NRD, x_RD, scale_D, turn, inbox_ref)
    return x_RD, normed_RD, jax.freeze(inbox_ref)


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
