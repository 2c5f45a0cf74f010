"""What the devices of a mesh add up in a decoding step: parts, residual and norm in one go."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from mlra_jax.kernels import target
from mlra_jax.kernels.exchange import mosaic_gpu, reference
from mlra_jax.kernels.rows import THREADS
from mlra_jax.kernels.words import EMPTY

# Beyond, what the devices send each other takes longer than starting NCCL.
_MOST_NUMBERS = 2**19


def supports(mesh: Mesh, axis_names: Sequence[str], rows: int, width: int) -> str | None:
    """None if an `Exchange` serves rows of this width, otherwise why not, in one phrase."""
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
    if width % THREADS or width > mosaic_gpu.WIDEST:
        return f"width {width} is no multiple of {THREADS} up to {mosaic_gpu.WIDEST}"
    if rows * width > _MOST_NUMBERS:
        return f"{rows} rows of {width} are more than {_MOST_NUMBERS} numbers"
    return None


class Exchange:
    """The exchanges of one decoding step, made while it is traced and called once for each.

    All devices of `mesh` take part, over those of `axis_names` that it has more than one of. On
    Hopper GPUs each device has inboxes, which the others write into (see `mosaic_gpu`); on others
    JAX gathers the parts.

    Attributes:
      inbox: of all devices, int32 `[N, ...]`; None where JAX gathers.
      far: int32 `[N, N + 1, 2]` once the first exchange is made, as of `mosaic_gpu.add`. Launches
        that write others' inboxes by it spare XLA a copy of their addresses for each launch.

    Args:
      gathered: columns that `gather` will be asked for, 0 if it will not.
    """

    def __init__(
        self, mesh: Mesh, axis_names: Sequence[str], rows: int, width: int, gathered: int = 0
    ):
        self.mesh, self.axes = mesh, tuple(a for a in axis_names if mesh.shape[a] > 1)
        self.turn, self.inbox, self.far = 0, None, None
        served = gathered % (4 * mesh.size) == 0 and rows * gathered <= _MOST_NUMBERS
        self.gathered = gathered if served else 0
        if target.is_hopper(mesh.devices.flat[0]):
            count = mosaic_gpu.inbox_words(mesh.size, rows, width, self.gathered)
            there = jax.NamedSharding(mesh, PartitionSpec(self.axes))
            inbox = jnp.full((mesh.size, count), EMPTY, jnp.int32)
            self.inbox = jax.lax.with_sharding_constraint(inbox, there)

    def __call__(
        self,
        summands_NRD: jax.Array,
        x_RD: jax.Array,
        scale_D: jax.Array,
        *,
        factor: float,
        eps: float,
        dtype: str,
    ) -> tuple[jax.Array, jax.Array]:
        """The stream with what the summands add up to, and its RMSNorm.

        Args:
          summands_NRD: float32, as many of each device, split over them.
          x_RD: the stream, on every device.
          scale_D: of the norm, which multiplies by it and by `factor`.
          eps: of the norm, added to the mean square.
          dtype: of the normed rows. The stream keeps its own; the sum is taken in float32, on all
            devices in the same order, and rounded once.
        """
        how = dict(mesh=self.mesh, axes=self.axes)
        how |= dict(factor=factor, eps=eps, dtype=jnp.dtype(dtype))
        if self.inbox is None:
            return _in_plain(summands_NRD, x_RD, scale_D, **how)
        turn = np.array([self.turn % mosaic_gpu.INBOXES], np.int32)
        x_RD, normed_RD, self.inbox, *far = _by_kernel(
            summands_NRD, x_RD, scale_D, self.inbox, turn, first=self.turn == 0, **how
        )
        if far:
            [self.far] = far
        self.turn += 1
        return x_RD, normed_RD

    def gather(self, x_RV: jax.Array) -> jax.Array:
        """The float32 rows whole on every device, their columns split over them; once in a step.

        As it is where no kernel serves.
        """
        if self.inbox is None or not self.gathered:
            return x_RV
        return _gathered(x_RV, self.inbox, self.far, mesh=self.mesh, axes=self.axes)


def _in_plain(summands_NRD, x_RD, scale_D, *, mesh, axes, dtype, **how):
    def local(*arrays):
        x_RD, normed_RD = reference.add(*arrays, axes=axes, **how)
        return x_RD, normed_RD.astype(dtype)

    split, whole = PartitionSpec(axes), PartitionSpec()
    return jax.shard_map(
        local, mesh=mesh, in_specs=(split, whole, whole), out_specs=whole, check_vma=False
    )(summands_NRD, x_RD, scale_D)


# A function of its own in a program, so that all layers compile one.
@functools.partial(jax.jit, static_argnames=("mesh", "axes", "factor", "eps", "dtype", "first"))
@target.int32_indices
def _by_kernel(summands_NRD, x_RD, scale_D, inbox, turn, *, mesh, axes, first, **how):
    def local(summands_NRD, x_RD, scale_D, inbox_1, turn):
        arrays = summands_NRD, x_RD, scale_D, inbox_1[0], turn
        x_RD, normed_RD, *own = mosaic_gpu.add(*arrays, mesh=mesh, axes=axes, first=first, **how)
        return x_RD, normed_RD, *(x[None] for x in own)

    split, whole = PartitionSpec(axes), PartitionSpec()
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(split, whole, whole, split, whole),
        out_specs=(whole, whole, split, *([split] if first else [])),
        check_vma=False,
    )(summands_NRD, x_RD, scale_D, inbox, turn)


@functools.partial(jax.jit, static_argnames=("mesh", "axes"))
@target.int32_indices
def _gathered(x_RV, inbox, far, *, mesh, axes):
    def local(x_RV, inbox_1, far_1):
        return mosaic_gpu.gather(x_RV, inbox_1[0], far_1[0])

    split = PartitionSpec(axes)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(PartitionSpec(None, axes), split, split),
        out_specs=PartitionSpec(),
        check_vma=False,
    )(x_RV, inbox, far)
