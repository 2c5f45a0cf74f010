"""All-reduce for the few rows of a decoding step: every device reads the others' parts itself.

XLA runs its all-reduces between CUDA graphs, so that they cut a step into two graphs a layer, which
the host launches one by one. A custom call is a node of the graph.
"""

import functools
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import Mesh

from mlra_jax.kernels import target

# What a CTA sums: eight numbers a thread.
_TILE = 1024
# Beyond, what the devices send each other takes longer than starting NCCL.
_MOST_TILES = 512


def supports(mesh: Mesh, axis_names: Sequence[str], size: int) -> str | None:
    """None if `all_reduce` can sum `size` numbers, otherwise why not, in one phrase."""
    devices = mesh.devices.ravel()
    if len(devices) == 1:
        return "there is one device"
    if not all(map(target.is_hopper, devices)):
        return "the devices are no Hopper GPUs"
    # All devices of the mesh take part, and one process knows all their addresses.
    if math.prod(mesh.shape[a] for a in axis_names) != mesh.size:
        return "the mesh has more axes"
    if len({d.process_index for d in devices}) > 1 or len(devices) != jax.local_device_count():
        return "the mesh is not all devices of one process"
    if size % _TILE or size > _TILE * _MOST_TILES:
        return f"{size} numbers are no multiple of {_TILE}, or more than {_MOST_TILES} times that"
    return None


# A function of its own in a program, so that all layers compile one.
@functools.partial(jax.jit, static_argnames=("mesh", "axis_names", "dtype"))
@target.int32_indices
def all_reduce(
    x: jax.Array, *, mesh: Mesh, axis_names: tuple[str, ...], dtype: jnp.dtype
) -> jax.Array:
    """The sum of `x`, float32 of any shape, over all devices of `mesh`; within its `shard_map`.

    Args:
      x: each device's part.
      axis_names: the mesh axes of more than one device, and others.
      dtype: of the result. The sum is taken in float32, on all devices in the same order.
    """
    axes = [a for a in axis_names if mesh.shape[a] > 1]
    places = list(itertools.product(*(range(mesh.shape[a]) for a in axes)))
    layout = plgpu.Layout.WG_STRIDED((_TILE,), vec_size=4)

    def body(x_ref, sum_ref, read):
        # Every device has come this far before any kernel begins: XLA's part of the bargain.
        tile = pl.ds(pl.multiple_of(lax.axis_index("tile") * _TILE, _TILE), _TILE)
        devices = [dict(zip(axes, map(jnp.int32, place), strict=True)) for place in places]
        parts = [
            plgpu.load(plgpu.remote_ref(x_ref, device).at[tile], layout=layout)
            for device in devices
        ]
        # No device may go on, and write over its part, before all have read it.
        for device in devices:
            pl.semaphore_signal(read, device_id=device)
        sum_ref[tile] = sum(parts[1:], parts[0]).astype(dtype)
        pl.semaphore_wait(read, len(places), decrement=False)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((x.size,), dtype),
        grid=(x.size // _TILE,),
        grid_names=("tile",),
        scratch_types=[plgpu.SemaphoreType.REGULAR],
        kernel_name="all_reduce",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(x.ravel()).reshape(x.shape)
