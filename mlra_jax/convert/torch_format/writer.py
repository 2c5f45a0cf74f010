"""Writes files as ``torch.save`` does, without PyTorch: for tests and benchmarks.

Storages are streamed, so that a file may be larger than memory.
"""

import struct
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mlra_jax.convert.torch_format.unpickle import STORAGES, Storage, Tensor

_NAMES = {dtype: name for name, dtype in STORAGES.items()}


def contiguous(storage: Storage, shape: Sequence[int]) -> Tensor:
    """The whole of a storage as a row-major tensor."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return Tensor(storage, 0, tuple(shape), tuple(reversed(strides)))


def pickle_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """The pickle (protocol 2) of a dictionary of tensors, as in ``data.pkl``."""
    items = b"".join(_text(name) + _tensor(tensor) for name, tensor in tensors.items())
    return b"\x80\x02}(" + items + b"u."


def write_torch_file(
    path: str | Path, tensors: Mapping[str, Tensor], storages: Mapping[str, Iterable[bytes]]
) -> None:
    """Writes one file.

    Args:
      path: to write to.
      tensors: by name; several may be views of one storage.
      storages: the bytes of each storage by its key, in pieces of any size.
    """
    root = Path(path).stem
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{root}/data.pkl", pickle_tensors(tensors))
        archive.writestr(f"{root}/byteorder", "little")
        for key, pieces in storages.items():
            with archive.open(f"{root}/data/{key}", "w", force_zip64=True) as entry:
                for piece in pieces:
                    entry.write(piece)
        archive.writestr(f"{root}/version", "3\n")


def _text(text: str) -> bytes:
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _number(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def _global(name: str) -> bytes:
    return b"c" + name.replace(" ", "\n").encode() + b"\n"


def _tuple(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def _tensor(tensor: Tensor) -> bytes:
    storage = _tuple(
        _text("storage"),
        _global(_NAMES[tensor.storage.dtype]),
        _text(tensor.storage.key),
        _text("cpu"),
        _number(tensor.storage.count),
    )
    arguments = _tuple(
        storage + b"Q",
        _number(tensor.offset),
        _tuple(*map(_number, tensor.shape)),
        _tuple(*map(_number, tensor.strides)),
        b"\x89",
        _global("collections OrderedDict") + b")R",
    )
    return _global("torch._utils _rebuild_tensor_v2") + arguments + b"R"
