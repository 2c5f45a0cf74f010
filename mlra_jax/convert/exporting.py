"""From a checkpoint to files as the released ones are named: `.safetensors`, `config.json`."""

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import BinaryIO

import ml_dtypes
import numpy as np

from mlra_jax import checkpoints
from mlra_jax.command import progress_bar
from mlra_jax.config import LatentConfig, ModelConfig
from mlra_jax.convert import lazy
from mlra_jax.convert.errors import CheckpointFileError, in_one_line
from mlra_jax.convert.released import (
    COMPUTE_DTYPE,
    EMBEDDING,
    HEAD,
    LAYER,
    TOKENIZER,
    Layout,
    Part,
    Shape,
    base_name,
    layout,
    released_values,
    usual_tokenizer,
)
from mlra_jax.convert.weights import SAFETENSORS_DTYPES
from mlra_jax.data.tokenizers import RANKS_FILE, keep_ranks
from mlra_jax.execution import DTypeLike, Execution, dtype_name
from mlra_jax.files import check_absent, whole_folder
from mlra_jax.storage import paths
from mlra_jax.storage.paths import AnyPath, PathLike

SHARD_BYTES = 5_000_000_000


def export(
    checkpoint: PathLike,
    destination: PathLike,
    *,
    step: int | None = None,
    dtype: DTypeLike | None = None,
    shard_bytes: int = SHARD_BYTES,
    note: Callable[[str], object] = print,
    quiet: bool = False,
) -> None:
    """Writes the parameters of a checkpoint with the released names, one tensor at a time.

    Args:
      checkpoint: folder of a training run or a conversion.
      destination: must not exist; appears whole or not at all.
      step: of the checkpoint, by default the latest.
      dtype: of the written tensors, float32, bfloat16 or float16; by default as stored.
      shard_bytes: more than this is written as several files and an index.
      note: told what the user should know, a line each.
      quiet: no progress bar.

    Raises:
      CheckpointError, CheckpointFileError, ConfigError: one line naming the fault and the file.
    """
    dtype = None if dtype is None else dtype_name(dtype)
    destination = paths.path(destination)
    with in_one_line(destination):
        check_absent(destination)
    opened = checkpoints.open_checkpoint(checkpoint, step)
    base = base_name(opened.model)
    arrays = lazy.open_arrays(opened.folder / "params")
    released = layout(opened.model)
    _check_arrays(opened.folder, arrays, released)
    dtype = dtype or arrays["embed.embedding"].dtype.name
    for line in _notes(opened.model, base):
        note(line)

    width = np.dtype(getattr(ml_dtypes, dtype, dtype)).itemsize
    shards = _shards({n: math.prod(s) * width for n, s in released.tensors.items()}, shard_bytes)
    total = sum(sum(sizes.values()) for sizes in shards)
    sources = _sources(opened.model, released)
    with (
        in_one_line(destination),
        whole_folder(destination, total + (1 << 20)) as partial,
        progress_bar("writing", total, quiet) as progress,
    ):
        weight_map = {}
        for number, sizes in enumerate(shards, 1):
            name = "model.safetensors"
            if len(shards) > 1:
                name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            weight_map |= dict.fromkeys(sizes, name)
            shapes = {tensor: released.tensors[tensor] for tensor in sizes}
            with (partial / name).open("wb") as file:
                _write_header(file, shapes, sizes, dtype)
                for tensor, shape in shapes.items():
                    values = _gather(arrays, tensor, sources[tensor], shape, dtype)
                    file.write(memoryview(values.reshape(-1).view(np.uint8)))
                    progress(values.nbytes)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            _write_json(partial / "model.safetensors.index.json", index)
        values = released_values(opened.model, dtype)
        # Of the products, as torch_dtype is of the tensors; the released code knows one only.
        if opened.model.execution.dtype != Execution().dtype:
            values[COMPUTE_DTYPE] = opened.model.execution.dtype
        if opened.tokenizer not in (None, usual_tokenizer(opened.model)):
            values[TOKENIZER] = opened.tokenizer
        keep_ranks(opened.tokenizer, partial / RANKS_FILE)
        _write_json(partial / "config.json", values)


Source = tuple[str, lazy.Slices, Part]
"""A leaf's path, where in the leaf, and how that lies in the released tensor."""


def _sources(config: ModelConfig, released: Layout) -> dict[str, list[Source]]:
    """For every released tensor, the parts of our leaves that fill it."""
    sources: dict[str, list[Source]] = {name: [] for name in released.tensors}
    for path, leaf in released.leaves.items():
        for layer in range(config.num_layers) if leaf.stacked else (None,):
            start = 0
            for part in leaf.parts:
                where = (slice(start, start + part.shape[0]),)
                start += part.shape[0]
                prefix = ""
                if layer is not None:
                    where, prefix = (slice(layer, layer + 1), *where), LAYER.format(layer)
                sources[prefix + part.name].append((path, where, part))
    sources[HEAD] = sources[EMBEDDING]
    return sources


def _gather(
    arrays: Mapping[str, lazy.LazyArray], name: str, sources: list[Source], shape: Shape, dtype: str
) -> np.ndarray:
    """The released tensor `name`; our leaves are read a chunk at a time."""
    values = np.empty(shape, getattr(ml_dtypes, dtype, dtype))
    for path, where, part in sources:
        array, view = arrays[path], part.view(values)
        for slices, inside in _chunks(array, where):
            stacked = len(slices) - view.ndim
            chunk = array.read(slices)[(0,) * stacked]
            view[inside[stacked:]] = lazy.cast(chunk, values.dtype, name)
    return values


def _chunks(array: lazy.LazyArray, where: lazy.Slices) -> Iterator[tuple[lazy.Slices, lazy.Slices]]:
    """Cuts a part of an array at its chunks: (slices of the array, slices of the part)."""
    where = where + tuple(slice(0, n) for n in array.shape[len(where) :])
    axes = []
    for wanted, chunk in zip(where, array.chunk, strict=True):
        first = wanted.start - wanted.start % chunk
        starts = range(first, wanted.stop, chunk)
        axes.append([slice(max(s, wanted.start), min(s + chunk, wanted.stop)) for s in starts])
    for numbers in np.ndindex(*map(len, axes)):
        slices = tuple(axis[i] for axis, i in zip(axes, numbers, strict=True))
        inside = tuple(
            slice(s.start - w.start, s.stop - w.start) for s, w in zip(slices, where, strict=True)
        )
        yield slices, inside


def _check_arrays(folder: AnyPath, arrays: Mapping[str, lazy.LazyArray], released: Layout) -> None:
    for path, leaf in released.leaves.items():
        shape = arrays[path].shape if path in arrays else None
        if shape != leaf.shape:
            found = "missing" if shape is None else f"of shape {list(shape)}"
            raise CheckpointFileError(f"{folder}: {path} is {found}, not of {list(leaf.shape)}")
    for path in arrays:
        if path not in released.leaves:
            raise CheckpointFileError(f"{folder}: {path} has no place in a released checkpoint")


def _notes(config: ModelConfig, base: str) -> list[str]:
    notes = []
    if isinstance(config.attention, LatentConfig) and not config.attention.scaled:
        notes.append(
            f"written as {base}; nothing in the files says that it has no calibration factors, "
            "its name should end in _no_scale"
        )
    for name, value in (("norm_eps", 1e-6), ("rope_base", 10000.0)):
        if getattr(config, name) != value:
            notes.append(f"{name}={getattr(config, name)}, and the released code has {value}")
    return notes


def _shards(sizes: Mapping[str, int], limit: int) -> list[dict[str, int]]:
    """Cuts the tensors, in their order, into files of at most `limit` bytes or one tensor."""
    shards: list[dict[str, int]] = [{}]
    for name, size in sizes.items():
        if shards[-1] and sum(shards[-1].values()) + size > limit:
            shards.append({})
        shards[-1][name] = size
    return shards


def _write_header(
    file: BinaryIO, shapes: Mapping[str, Shape], sizes: Mapping[str, int], dtype: str
) -> None:
    """The head of a .safetensors file whose tensors follow in this order.

    The library's own writer wants all tensors of a file in memory; this one streams.
    """
    codes = {str(value): code for code, value in SAFETENSORS_DTYPES.items()}
    header: dict = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in shapes.items():
        stop = start + sizes[name]
        header[name] = {"dtype": codes[dtype], "shape": shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)


def _write_json(path: AnyPath, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
