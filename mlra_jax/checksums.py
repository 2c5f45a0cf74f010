"""Checkpoint folders in which a flipped bit is noticed.

Arrays are stored as Zarr 3 whose chunks end with their CRC-32C: whoever reads a chunk verifies it,
on each device for its own part. OCDBT, the library's store for the chunks, has checksums in its
tables already. The other files of a step, all of them small, are listed with their CRC-32 in one
file, which is written last and read first.
"""

import asyncio
import json
import math
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from mlra_jax import snapshots
from mlra_jax.storage.paths import AnyPath, files_below, kvstore

CHECKSUMS_FILE = "checksums.json"
# Holds the chunks and tables of OCDBT, with checksums of their own.
_CHECKED_FOLDER = "d"
# A chunk is read and verified in a thread of its own, best while it is in the processor's cache.
_CHUNK_BYTES = 1 << 24


class DamageError(ValueError):
    """What a checkpoint folder should hold is not there or has changed; one line, no remedy."""


class ArrayHandler(ocp.type_handlers.NumpyHandler):
    """Writes `jax.Array` and `np.ndarray` leaves with checksums; each process what it holds.

    Readers take the leaves for NumPy arrays where no target says otherwise.

    Attributes:
      failure: what a write in the background failed with.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failure: Exception | None = None

    async def serialize(self, values, infos, args=None) -> Sequence[ocp.future.Future]:
        """Copies the values to the host; the future that comes back writes them."""
        values = [x if isinstance(x, jax.Array) else np.array(x) for x in values]
        parts = _parts(values)
        args = args or [ocp.SaveArgs()] * len(values)

        async def write():
            try:
                await _all(*map(_write, values, parts, infos, args))
            except Exception as error:
                self.failure = error
                raise
            finally:  # The next save copies to the same memory.
                parts.clear()

        return [ocp.future.CommitFutureAwaitingContractedSignals(write(), name="arrays")]


async def create_array(
    info: Any, arg: Any, shape: tuple[int, ...], chunk: tuple[int, ...], dtype: np.dtype
) -> ts.TensorStore:
    """Makes an array in an Orbax item, or opens it where process 0 makes it.

    Args:
      info, arg: as a type handler gets them.
      shape, chunk, dtype: of the whole array, and a shape that its chunks divide.
    """
    if hasattr(info, "await_path_creation"):
        await info.await_path_creation()
    process = jax.process_index()
    spec = ocp.type_handlers.get_json_tspec_write(
        info,
        use_ocdbt=info.is_ocdbt_checkpoint,
        global_shape=shape,
        local_shape=_divided(chunk, dtype.itemsize),
        dtype=dtype,
        process_index=process,
        arg=arg,
    )
    # Trained weights hardly compress; without it writing and loading run at disk speed.
    spec["metadata"]["codecs"] = [
        {"name": "bytes", "configuration": {"endian": "little"}},
        {"name": "crc32c"},
    ]
    spec["dtype"] = np.dtype(dtype).name
    # Zeros are written, too: what is not there is missing.
    spec["store_data_equal_to_fill_value"] = True
    if process == 0:
        return await ts.open(ts.Spec(spec), create=True, open=True, context=info.ts_context)
    return await ts.open(ts.Spec(spec), open=True, assume_metadata=True, context=info.ts_context)


def _divided(shape: tuple[int, ...], item_bytes: int) -> tuple[int, ...]:
    """A shape of at most `_CHUNK_BYTES` that divides another, cut along the first axes."""
    divided = list(shape)
    for axis, size in enumerate(shape):
        most = _CHUNK_BYTES // (math.prod(divided) // size * item_bytes)
        if size <= most:
            break
        divided[axis] = max(n for n in range(1, size + 1) if size % n == 0 and n <= max(most, 1))
    return tuple(divided)


def seal(step: AnyPath) -> None:
    """Checks that the arrays of a step can be read, and writes the checksums of its other files.

    Raises:
      DamageError: an array or a part of it is missing.
      OSError: as writing files does.
    """
    for item in sorted(step.iterdir()):
        if (item / "manifest.ocdbt").exists():
            _check_stored(item)
    # Of the items; those beside them are times and marks, which Orbax writes last.
    small = (
        file
        for file in files_below(step)
        if file.parent != step and file.parent.name != _CHECKED_FOLDER
    )
    sums = {str(file.relative_to(step)): zlib.crc32(file.read_bytes()) for file in small}
    text = json.dumps(sums, indent=1, sort_keys=True) + "\n"
    (step / CHECKSUMS_FILE).write_text(text)


def verify(step: AnyPath) -> None:
    """Compares the small files of a step with their checksums.

    Steps of earlier versions have none and pass; so do items that were deleted as a whole.

    Raises:
      DamageError: naming the first file that differs.
      OSError: a file cannot be read.
    """
    path = step / CHECKSUMS_FILE
    if not path.exists():
        return
    try:
        sums = dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError):
        raise DamageError(f"{CHECKSUMS_FILE} is damaged") from None
    for name, crc in sums.items():
        file, item = step / name, step / name.partition("/")[0]
        if item.exists() and not file.exists():
            raise DamageError(f"{name} is missing")
        if item.exists() and zlib.crc32(file.read_bytes()) != crc:
            raise DamageError(f"{name} has changed since it was written")


def _check_stored(item: AnyPath) -> None:
    """That every chunk of every array is in the store, down to its last byte."""
    store = {"driver": "ocdbt", "base": kvstore(item).to_json()}
    context = ts.Context()
    for leaf in jax.tree.leaves(ocp.PyTreeCheckpointHandler().metadata(item).tree):
        spec = {"driver": "zarr3", "kvstore": store | {"path": f"{leaf.name}/"}}
        array = ts.open(spec, open=True, read=True, context=context).result()
        if not array.storage_statistics(query_fully_stored=True).result().fully_stored:
            raise DamageError(f"{item.name}: a part of {leaf.name} is missing")
    chunks = ts.KvStore.open(store, context=context).result()
    ends = [chunks.read(key, byte_range=slice(-1, None)) for key in chunks.list().result()]
    for end in ends:
        end.result()


def _parts(values: Sequence[jax.Array | np.ndarray]) -> list[list[snapshots.Part]]:
    """What this process writes of each value; arrays may be donated when this returns."""
    taken = iter(snapshots.take([x for x in values if isinstance(x, jax.Array)]))
    first = jax.process_index() == 0
    whole = lambda x: [(..., x)] if first else []
    return [next(taken) if isinstance(x, jax.Array) else whole(x) for x in values]


async def _write(value, parts: list[snapshots.Part], info: Any, arg: Any) -> None:
    shape = value.shape
    chunk = value.sharding.shard_shape(shape) if isinstance(value, jax.Array) else shape
    array = await create_array(info, arg, shape, chunk, value.dtype)
    await _all(
        *(
            array[where].write(np.asarray(part), can_reference_source_data_indefinitely=True)
            for where, part in parts
        )
    )


async def _all(*tasks: Any) -> None:
    """Waits for all, also where one fails: none may report later, when nobody listens."""
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result
