"""A folder of weights: config.json and one or several files, found, indexed and checked."""

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from mlra_jax.convert import foreign
from mlra_jax.convert.errors import CheckpointFileError
from mlra_jax.convert.torch_format.archive import map_file
from mlra_jax.convert.torch_format.reader import TensorSpec, TorchFile
from mlra_jax.data.file_kinds import HEAD_BYTES, kind
from mlra_jax.storage import paths
from mlra_jax.storage.blocks import RemoteBytes
from mlra_jax.storage.paths import AnyPath, PathLike, in_bucket

# The first that is there is read.
WEIGHT_FILES = (
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "model.safetensors.index.json",
    "model.safetensors",
)
# Parsed, JSON may take thirty times its size; that of a released model has 50,000 bytes.
MAX_JSON_BYTES = 4 << 20
MAX_NAME = 255
SAFETENSORS_DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    # Known, so that a tensor of a wrong type can be refused by its own name.
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


class _RemoteTensors:
    """The tensors of a .safetensors file in a bucket, whose header ends at byte `start`.

    The library checks the header in a local file of the same size that has nothing else in it.
    """

    def __init__(self, source: RemoteBytes, start: int):
        self._source, self._start = source, start

    def opened(self):
        with tempfile.NamedTemporaryFile() as file:
            file.write(self._source[: self._start])
            file.truncate(len(self._source))
            file.flush()
            return safetensors.safe_open(file.name, framework="np")

    def read(self, name: str, spec: TensorSpec) -> np.ndarray:
        header = json.loads(self._source[8 : self._start])
        first, end = header[name]["data_offsets"]
        data = self._source[self._start + first : self._start + end]
        return np.frombuffer(data, spec.dtype).reshape(spec.shape)


class SafetensorsFile:
    """One .safetensors file behind the interface of `TorchFile`. It carries no checksums."""

    size = 0
    inside = None

    def __init__(self, path: AnyPath):
        self._path = path
        # Pipes, devices and large headers are refused, all of which the library opens.
        with contextlib.closing(map_file(path)) as mapped:
            header, first = int.from_bytes(mapped[:8], "little"), mapped[:HEAD_BYTES]
        if header > MAX_JSON_BYTES:
            found = kind(first)
            what = f"it is {found.what}" if found else f"it begins with {first[:12]}"
            raise CheckpointFileError(
                f"{path}: no safetensors file (a header of {header} bytes: {what})"
            )
        self._last: tuple[str, np.ndarray] | None = None
        self._remote = _RemoteTensors(mapped, 8 + header) if in_bucket(path) else None
        with self._open() as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            self.specs: Mapping[str, TensorSpec] = {
                name: TensorSpec(tuple(part.get_shape()), self._dtype(name, part.get_dtype()))
                for name, part in slices.items()
            }

    def read(self, name: str) -> np.ndarray:
        """The tensor, copied; the last one is kept, since it is asked for chunk by chunk."""
        if self._last is None or self._last[0] != name:
            self._last = None
            if self._remote:
                self._last = name, self._remote.read(name, self.specs[name])
                return self._last[1]
            # Opened anew, because the pages of the library's own map would add up in memory.
            with self._open() as file:
                self._last = name, file.get_tensor(name)
        return self._last[1]

    def same_bytes(self, a: str, b: str) -> bool:
        return False

    def verify(self, progress: Callable[[int], object] = lambda n: None) -> None:
        """Nothing to compare with; the library checked that the tensors fill the file exactly."""

    def release(self) -> None:
        """Nothing is held but the last tensor."""

    def close(self) -> None:
        self._last = None

    def _open(self):
        try:
            if self._remote:
                return self._remote.opened()
            return safetensors.safe_open(self._path, framework="np")
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointFileError(
                f"{self._path}: no whole safetensors file ({reason})"
            ) from None

    def _dtype(self, name: str, dtype: str) -> np.dtype:
        if dtype not in SAFETENSORS_DTYPES:
            raise CheckpointFileError(
                f"{self._path}: {name!r} has the dtype {dtype}; are the weights quantised? save "
                "them in a float type first"
            )
        return SAFETENSORS_DTYPES[dtype]


class Weights:
    """All tensors of a checkpoint folder.

    Attributes:
      folder: where it lies.
      config: the parsed config.json.
      specs: name to shape and dtype over all files, the names without prefixes that all have
        (see `foreign`), and without masks and rotary tables.
      notes: what was left out of the names and tensors, a line each.
      size: bytes that `verify` will read.
    """

    def __init__(self, folder: PathLike):
        self.folder = paths.path(folder)
        self.config: dict[str, Any] = read_json(self.folder / "config.json")
        first = next((n for n in WEIGHT_FILES if (self.folder / n).exists()), None)
        if first is None:
            raise CheckpointFileError(
                f"{self.folder}: no weights there (none of {', '.join(WEIGHT_FILES)})"
            )
        index = _read_index(self.folder / first) if first.endswith(".json") else None
        names = [first] if index is None else dict.fromkeys(index.values())
        self._files: dict[str, TorchFile | SafetensorsFile] = {}
        self._where: dict[str, TorchFile | SafetensorsFile] = {}
        try:
            self._open(names, index, TorchFile if first.startswith("pytorch") else SafetensorsFile)
            self._stored, notes = foreign.plain_names(self._where)
            self.notes = self._training_dictionaries() + notes
            self._leave_out_buffers()
        except BaseException:
            self.close()
            raise
        self.specs = {n: self._where[stored].specs[stored] for n, stored in self._stored.items()}
        self.size = sum(file.size for file in self._files.values())

    def _open(self, names: Iterable[str], index: Mapping[str, str] | None, reader: type) -> None:
        for name in names:
            if not (self.folder / name).exists():
                raise CheckpointFileError(
                    f"{self.folder / name}: this shard is missing; fetch it, too"
                )
        for name in names:
            self._files[name] = file = reader(self.folder / name)
            for tensor in file.specs:
                if not tensor.isprintable() or len(tensor) > MAX_NAME:
                    raise CheckpointFileError(
                        f"{self.folder / name}: {tensor[:100]!r} is no tensor's name"
                    )
                if tensor in self._where:
                    raise CheckpointFileError(f"{self.folder}: {tensor!r} is in two shards")
                if index is not None and index.get(tensor) != name:
                    raise CheckpointFileError(
                        f"{self.folder / name}: {tensor!r} is there and not in the index"
                    )
                self._where[tensor] = file
        for tensor, name in (index or {}).items():
            if tensor not in self._where:
                raise CheckpointFileError(
                    f"{self.folder / name}: {tensor!r} is in the index and not there"
                )

    def _training_dictionaries(self) -> list[str]:
        inside = {name: file.inside for name, file in self._files.items() if file.inside}
        return [
            f"{name} is of a training run; its {key!r} is read and the rest left out"
            for name, key in inside.items()
        ]

    def _leave_out_buffers(self) -> None:
        buffers = [name for name in self._stored if foreign.is_buffer(name)]
        for name in buffers:
            foreign.check_frequencies(name, self.read(name), foreign.rope_base(self.config))
            del self._stored[name]
        if buffers:
            more = f" and {len(buffers) - 1} more" if len(buffers) > 1 else ""
            self.notes.append(f"masks and rotary tables are left out: {buffers[0]}{more}")

    def read(self, name: str) -> np.ndarray:
        """A tensor, read-only; for .bin files a view of the file."""
        stored = self._stored[name]
        return self._where[stored].read(stored)

    def same_bytes(self, a: str, b: str) -> bool:
        """Whether two names are one tensor of one file."""
        a, b = self._stored[a], self._stored[b]
        return self._where[a] is self._where[b] and self._where[a].same_bytes(a, b)

    def verify(self, progress: Callable[[int], object] = lambda n: None) -> None:
        """Compares all files with their checksums; raises CheckpointFileError naming the entry."""
        for file in self._files.values():
            file.verify(progress)

    def release(self) -> None:
        """Gives the pages of the files back to the system."""
        for file in self._files.values():
            file.release()

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def read_json(path: AnyPath) -> dict[str, Any]:
    """A JSON object from a file; raises CheckpointFileError for anything else in it."""
    with contextlib.closing(map_file(path)) as mapped:
        if len(mapped) > MAX_JSON_BYTES:
            raise CheckpointFileError(f"{path}: {len(mapped)} bytes are too many for this file")
        data = mapped[:]
    try:
        value = json.loads(data, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointFileError(
            f"{path}: not readable as JSON ({reason}); fetch it again"
        ) from None
    if not isinstance(value, dict):
        raise CheckpointFileError(f"{path}: holds no JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice in one object")
    return result


def _read_index(path: AnyPath) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointFileError(f"{path}: no weight_map in it")
    for tensor, name in weight_map.items():
        # Shards lie beside their index; anything with a path in it would lead out of the folder.
        plain = isinstance(name, str) and name not in ("", ".", "..") and name.isprintable()
        if not plain or len(name.encode()) > MAX_NAME or "/" in name or "\\" in name:
            raise CheckpointFileError(
                f"{path}: {tensor[:100]!r} is in {str(name)[:100]!r}, which is no file name"
            )
    return weight_map
