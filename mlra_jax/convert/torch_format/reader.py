"""Tensors of a ``torch.save`` file, without PyTorch.

A file is a zip archive of stored entries (`archive`): ``<root>/data.pkl`` describes the tensors
(`unpickle`) and ``<root>/data/<key>`` holds the numbers of each storage. Tensors come out as
read-only NumPy views of the memory map; nothing is loaded until it is touched.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from mlra_jax.convert.errors import CheckpointFileError
from mlra_jax.convert.torch_format.archive import StoredArchive
from mlra_jax.convert.torch_format.unpickle import MAX_BYTES, Tensor, read_tensors
from mlra_jax.storage.paths import PathLike


class TensorSpec(NamedTuple):
    """Shape and dtype of a tensor in a file."""

    shape: tuple[int, ...]
    dtype: np.dtype


class TorchFile:
    """One file written by ``torch.save``: a dictionary of tensors.

    Attributes:
      specs: name to shape and dtype (float32, bfloat16, float16, or a type that callers refuse).
      size: bytes that `verify` will read.
      inside: under which name the tensors are in a training dictionary, if they are.

    Raises:
      CheckpointFileError: anything about the file that is not as torch.save writes it.
    """

    def __init__(self, path: PathLike):
        self._archive = StoredArchive(path)
        try:
            self._root = self._find_root()
            self._tensors, self.inside = self._read_tensors()
        except BaseException:
            self.close()
            raise
        self.specs: Mapping[str, TensorSpec] = {
            name: TensorSpec(tensor.shape, tensor.storage.dtype)
            for name, tensor in self._tensors.items()
        }
        self.size = sum(entry.size for entry in self._archive.entries.values())

    def read(self, name: str) -> np.ndarray:
        """A tensor as a read-only view of the file; views of one storage share their bytes."""
        tensor = self._tensors[name]
        width = tensor.storage.dtype.itemsize
        return np.ndarray(
            tensor.shape,
            tensor.storage.dtype,
            self._archive.data(self._entry(tensor)),
            tensor.offset * width,
            tuple(stride * width for stride in tensor.strides),
        )

    def same_bytes(self, a: str, b: str) -> bool:
        """Whether two names are one tensor (tied weights are stored once)."""
        a, b = self._tensors[a], self._tensors[b]
        return (a.storage.key, a.storage.dtype, a.offset, a.shape, a.strides) == (
            b.storage.key,
            b.storage.dtype,
            b.offset,
            b.shape,
            b.strides,
        )

    def verify(self, progress: Callable[[int], object] = lambda n: None) -> None:
        """Compares every archive entry with its CRC-32; ``progress`` is told the bytes read."""
        self._archive.verify(progress)

    def release(self) -> None:
        """Gives the file's pages back to the system; arrays stay valid and are read again."""
        self._archive.release(0, len(self._archive.map))

    def close(self) -> None:
        """Closes the file. Arrays still alive keep the map alive instead."""
        try:
            self._archive.close()
        except BufferError:
            self.release()

    def _error(self, text: str) -> CheckpointFileError:
        return CheckpointFileError(f"{self._archive.path}: {text}")

    def _entry(self, tensor: Tensor) -> str:
        return f"{self._root}/data/{tensor.storage.key}"

    def _find_root(self) -> str:
        roots = [
            name.removesuffix("/data.pkl")
            for name in self._archive.entries
            if name.endswith("/data.pkl") and name.count("/") == 1
        ]
        if len(roots) != 1:
            raise self._error("a zip archive without one data.pkl is no torch.save file")
        return roots[0]

    def _read_tensors(self) -> tuple[dict[str, Tensor], str | None]:
        order = self._archive.entries.get(f"{self._root}/byteorder")
        if order is not None and self._archive.data(f"{self._root}/byteorder") != b"little":
            raise self._error("its numbers are not little-endian")
        pickle = f"{self._root}/data.pkl"
        if self._archive.entries[pickle].size > MAX_BYTES:
            raise self._error(f"its pickle is larger than {MAX_BYTES} bytes")
        try:
            tensors, inside = read_tensors(bytes(self._archive.data(pickle)))
        except CheckpointFileError as error:
            raise self._error(str(error)) from None
        for name, tensor in tensors.items():
            entry = self._archive.entries.get(self._entry(tensor))
            if entry is None:
                raise self._error(f"the numbers of {name!r} are missing (storage file absent)")
            if entry.size != tensor.storage.count * tensor.storage.dtype.itemsize:
                raise self._error(f"the storage of {name!r} has not the length that it declares")
        return tensors, inside
