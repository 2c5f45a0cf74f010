"""Arrays that are never whole in memory, and how Orbax writes and reads them.

A converted model's largest leaf is gigabytes (24 layers stacked), its largest released tensor a
few hundred megabytes. `LazyArray` is a shape, a dtype and a way to get any part; `ChunkHandler` is
the Orbax type handler that writes it one chunk at a time, in the ordinary Orbax layout: whoever
restores the checkpoint needs nothing of this file.
"""

import dataclasses
import itertools
import zlib
from collections.abc import Callable, Sequence

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from mlra_jax import checksums
from mlra_jax.convert.errors import CheckpointFileError
from mlra_jax.files import reason
from mlra_jax.settings_tree import flatten
from mlra_jax.storage.paths import AnyPath

Slices = tuple[slice, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class LazyArray:
    """An array by chunks.

    Attributes:
      shape, dtype: of the whole array.
      chunk: shape of the chunks it is written in; each entry divides that of `shape`.
      read: from a tuple of slices to that part of the array.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]
    read: Callable[[Slices], np.ndarray]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    def chunks(self) -> list[Slices]:
        """The slices of every chunk, in row-major order."""
        starts = [range(0, n, b) for n, b in zip(self.shape, self.chunk, strict=True)]
        return [
            tuple(slice(s, s + b) for s, b in zip(start, self.chunk, strict=True))
            for start in itertools.product(*starts)
        ]


class ChunkHandler(ocp.type_handlers.TypeHandler):
    """Writes `LazyArray` leaves chunk by chunk and restores them as `LazyArray` again.

    Args:
      progress: told the bytes written after each chunk.

    Attributes:
      checksums: leaf name to the CRC-32 of each chunk in the order of `LazyArray.chunks`, filled
        by writing, for `_verify`.
    """

    def __init__(self, progress: Callable[[int], object] = lambda n: None):
        self.progress = progress
        self.checksums: dict[str, list[int]] = {}

    def typestr(self) -> str:
        # What an ordinary reader takes the leaves for.
        return "np.ndarray"

    async def metadata(self, infos: Sequence[ocp.type_handlers.ParamInfo]) -> Sequence:
        return await ocp.type_handlers.NumpyHandler().metadata(infos)

    async def serialize(self, values, infos, args=None) -> Sequence:
        args = args or [ocp.SaveArgs()] * len(values)
        for value, info, arg in zip(values, infos, args, strict=True):
            array = await checksums.create_array(info, arg, value.shape, value.chunk, value.dtype)
            self.checksums[info.name] = sums = []
            # The next chunk is read while the last one is on its way to the disk.
            pending: ts.WriteFutures | None = None
            try:
                for chunk in value.chunks():
                    part = np.ascontiguousarray(value.read(chunk), value.dtype)
                    sums.append(zlib.crc32(part.reshape(-1).view(np.uint8)))
                    if pending is not None:
                        await pending
                    pending = array[chunk].write(part, can_reference_source_data_indefinitely=True)
                    self.progress(part.nbytes)
            finally:
                # Also after an error: nothing may be written any more when the caller cleans up.
                if pending is not None:
                    pending.result()
        return []

    async def deserialize(self, infos, args=None) -> Sequence[LazyArray]:
        arrays = []
        for info in infos:
            if hasattr(info, "await_path_creation"):
                await info.await_path_creation()
            spec = ocp.type_handlers.get_json_tspec_read(info, use_ocdbt=info.is_ocdbt_checkpoint)
            array = await ts.open(ts.Spec(spec), open=True, read=True, context=info.ts_context)
            arrays.append(
                LazyArray(
                    tuple(array.shape),
                    array.dtype.numpy_dtype,
                    tuple(array.chunk_layout.read_chunk.shape),
                    lambda slices, array=array: array[slices].read().result(),
                )
            )
        return arrays


def open_arrays(folder: AnyPath) -> dict[str, LazyArray]:
    """The arrays of an Orbax item folder by dotted path, none of them read yet.

    Raises:
      CheckpointFileError: the folder is damaged.
    """
    lazily = lambda _: ocp.RestoreArgs(restore_type=LazyArray)
    handler = ocp.PyTreeCheckpointHandler(
        type_handler_registry=ocp.type_handlers.create_type_handler_registry(
            (LazyArray, ChunkHandler())
        )
    )
    try:
        tree = ocp.StandardCheckpointer().metadata(folder).item_metadata.tree
        args = ocp.args.PyTreeRestore(restore_args=jax.tree.map(lazily, tree))
        restored = ocp.Checkpointer(handler).restore(folder, args=args)
    # Missing and damaged files end in many kinds of exceptions there.
    except Exception as error:
        raise CheckpointFileError(f"{folder}: damaged, copy it again ({reason(error)})") from error
    return flatten(restored)


def cast(values: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """The values in `dtype`, contiguous; `name` is for the message.

    Raises:
      CheckpointFileError: a finite number would become infinite.
    """
    values = np.ascontiguousarray(values)
    if values.dtype == dtype:
        return values
    with np.errstate(over="ignore"):
        cast = values.astype(dtype)
    if not np.array_equal(np.isfinite(cast), np.isfinite(values)):
        raise CheckpointFileError(
            f"tensor {name} has numbers too large for {dtype}; give another --dtype"
        )
    return cast
