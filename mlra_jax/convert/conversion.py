"""From a released folder to an Orbax checkpoint, a chunk at a time."""

import dataclasses
import zlib
from collections.abc import Callable, Mapping

import ml_dtypes
import numpy as np

from mlra_jax import checkpoints
from mlra_jax.command import progress_bar
from mlra_jax.config import ConfigError, ModelConfig
from mlra_jax.convert import chunks, lazy
from mlra_jax.convert.errors import CheckpointFileError, in_one_line
from mlra_jax.convert.expected import check_logits, read_expected
from mlra_jax.convert.hub import find_source
from mlra_jax.convert.lazy import cast
from mlra_jax.convert.recognise import check_tensors, recognise
from mlra_jax.convert.released import (
    COMPUTE_DTYPE,
    EMBEDDING,
    HEAD,
    LAYER,
    TOKENIZER,
    Leaf,
    layout,
    usual_tokenizer,
)
from mlra_jax.convert.weights import Weights
from mlra_jax.data.tokenizers import RANKS_FILE, is_tokenizer_name, keep_ranks, meet_ranks
from mlra_jax.execution import DTYPES, DTypeLike, Execution, dtype_name
from mlra_jax.files import check_absent, whole_folder
from mlra_jax.storage import paths
from mlra_jax.storage.paths import AnyPath, PathLike

_ROWS_AT_ONCE = 4 << 20


def convert(
    source: PathLike,
    destination: PathLike,
    *,
    variant: str | None = None,
    dtype: DTypeLike | None = None,
    mesh: Mapping[str, int] | None = None,
    expected: PathLike | None = None,
    allow_nonfinite: bool = False,
    note: Callable[[str], object] = print,
    quiet: bool = False,
) -> ModelConfig:
    """Converts a released checkpoint to `<destination>/checkpoints/0`, for `mlra_jax.load_model`.

    All checks come before the first byte is written, and the destination appears whole or not at
    all. No more than one released tensor is in memory at a time.

    Args:
      source: a folder with config.json and .bin or .safetensors files, or `owner/name/subfolder`
        on the Hugging Face hub.
      destination: must not exist.
      variant: released name of the model where weights cannot tell, as in `mlra_2_no_scale`.
      dtype: of the stored parameters, float32, bfloat16 or float16; by default that of the files.
      mesh: axis name to size: chunks on disk will be what one device of such a mesh holds.
      expected: .npz file with `tokens` [B, T] and the `logits` [B, T, V] that the weights should
        give: they are computed in float32 and compared before the destination appears.
      allow_nonfinite: converts infinities and NaN, too.
      note: told what the user should know, a line each.
      quiet: no progress bars.

    Returns:
      The model's config.

    Raises:
      CheckpointFileError, CheckpointError, ConfigError: one line naming the fault and the file.
    """
    dtype = None if dtype is None else dtype_name(dtype)
    destination = paths.path(destination)
    checkpoints.writable_path(destination)
    with in_one_line(destination):
        check_absent(destination)
    folder = find_source(source)
    with Weights(folder) as weights:
        shapes = {name: spec.shape for name, spec in weights.specs.items()}
        try:
            config, notes = recognise(shapes, weights.config, variant, folder.name)
            stored, more = check_tensors(config, weights.specs)
            compute = _compute_dtype(weights.config)
            tokenizer = _tokenizer(weights.config, config)
            meet_ranks(tokenizer, folder / RANKS_FILE)
        except (CheckpointFileError, ConfigError) as error:
            raise CheckpointFileError(f"{folder}: {error}") from None
        config = dataclasses.replace(
            config, param_dtype=dtype or stored.name, execution=Execution(compute)
        )
        arrays = _arrays(weights, config, chunks.chunk_shapes(config, mesh), allow_nonfinite)
        wanted = None if expected is None else read_expected(expected, config)
        for line in (*weights.notes, *notes, *more):
            note(line)
        with progress_bar("checking", weights.size, quiet) as progress:
            weights.verify(progress)
        _check_tied(weights, _dtype(config.param_dtype))
        total = sum(array.nbytes for array in arrays.values())
        with (
            in_one_line(destination),
            whole_folder(destination, total + (64 << 20)) as partial,
        ):
            described = checkpoints.describe(config, tokenizer)
            keep_ranks(tokenizer, partial / RANKS_FILE)
            with progress_bar("writing", total, quiet) as progress:
                sums = _write(partial, arrays, described, progress)
            with progress_bar("reading back", total, quiet) as progress:
                _verify(partial, sums, progress)
            if wanted is not None:
                error = check_logits(partial, wanted)
                note(f"logits agree with {expected}: {error:.1e} of their norm in float32")
    return config


def _compute_dtype(values: Mapping) -> str:
    found = values.get(COMPUTE_DTYPE, Execution().dtype)
    if found not in DTYPES:
        raise CheckpointFileError(
            f"config.json: {COMPUTE_DTYPE}={found!r:.40} is none of {', '.join(DTYPES)}"
        )
    return found


def _tokenizer(values: Mapping, config: ModelConfig) -> str | None:
    found = values.get(TOKENIZER, usual_tokenizer(config))
    if found is not None and not is_tokenizer_name(found):
        raise CheckpointFileError(
            f"config.json: {TOKENIZER}={found!r:.40} is no tokenizer's name (bytes, gpt2 or "
            "tiktoken:CHECKSUM); take the line out if the weights came without it"
        )
    return found


def _dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))


def _arrays(
    weights: Weights,
    config: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    allow_nonfinite: bool,
) -> dict[str, lazy.LazyArray]:
    dtype = _dtype(config.param_dtype)
    return {
        path: lazy.LazyArray(
            leaf.shape, dtype, shapes[path], _reader(weights, leaf, dtype, allow_nonfinite)
        )
        for path, leaf in layout(config).leaves.items()
    }


def _reader(
    weights: Weights, leaf: Leaf, dtype: np.dtype, allow_nonfinite: bool
) -> Callable[[lazy.Slices], np.ndarray]:
    """A function from slices of a leaf to its values, which reads no more than they need."""

    def read(slices: lazy.Slices) -> np.ndarray:
        prefix = LAYER.format(slices[0].start) if leaf.stacked else ""
        first, *rest = slices[1:] if leaf.stacked else slices
        pieces, start = [], 0
        for part in leaf.parts:
            stop = start + part.shape[0]
            low, high = max(first.start, start), min(first.stop, stop)
            if low < high:
                name = prefix + part.name
                if name == EMBEDDING and name not in weights.specs:
                    name = HEAD
                view = part.view(weights.read(name))
                piece = view[(slice(low - start, high - start), *rest)]
                if not (allow_nonfinite or np.isfinite(piece).all()):
                    raise _not_finite(weights, name)
                pieces.append(cast(piece, dtype, name))
            start = stop
        values = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        weights.release()
        return values[None] if leaf.stacked else values

    return read


def _not_finite(weights: Weights, name: str) -> CheckpointFileError:
    values = weights.read(name)
    return CheckpointFileError(
        f"{weights.folder}: tensor {name} has {np.count_nonzero(~np.isfinite(values))} of "
        f"{values.size} numbers that are not finite; give --allow_nonfinite to take them"
    )


def _check_tied(weights: Weights, dtype: np.dtype) -> None:
    """The embedding and the output head are one tensor; it is stored once, so it must be one."""
    if not {EMBEDDING, HEAD} <= weights.specs.keys() or weights.same_bytes(EMBEDDING, HEAD):
        return
    rows, width = weights.specs[EMBEDDING].shape
    step = max(1, _ROWS_AT_ONCE // width)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        a, b = (cast(weights.read(name)[part], dtype, name) for name in (EMBEDDING, HEAD))
        if a.tobytes() != b.tobytes():
            row, column = np.argwhere(a.view(f"u{dtype.itemsize}") != b.view(f"u{dtype.itemsize}"))[
                0
            ]
            raise CheckpointFileError(
                f"{weights.folder}: {EMBEDDING} and {HEAD} differ, first in row {start + row}, "
                f"column {column} ({a[row, column]} and {b[row, column]}); a model has one tensor "
                "for both: was this one trained with a head of its own?"
            )
        weights.release()


def _write(
    folder: AnyPath,
    arrays: Mapping[str, lazy.LazyArray],
    described: Mapping,
    progress: Callable[[int], object],
) -> dict[str, list[int]]:
    """Writes step 0 and returns the CRC-32 of each chunk by leaf."""
    handler = lazy.ChunkHandler(progress)
    with checkpoints.Manager(folder, handlers={lazy.LazyArray: handler}) as manager:
        checkpoints.save(manager, 0, params=chunks.nested(arrays), model=described)
    return handler.checksums


def _verify(
    folder: AnyPath, sums: Mapping[str, list[int]], progress: Callable[[int], object]
) -> None:
    """Reads everything back from disk and compares it with what was to be written."""
    arrays = lazy.open_arrays(checkpoints.open_checkpoint(folder).folder / "params")
    for path, expected in sums.items():
        array = arrays[path]
        for chunk, crc in zip(array.chunks(), expected, strict=True):
            values = array.read(chunk)
            if zlib.crc32(values.reshape(-1).view(np.uint8)) != crc:
                raise CheckpointFileError(f"{path} reads back differently; is the disk sound?")
            progress(values.nbytes)
