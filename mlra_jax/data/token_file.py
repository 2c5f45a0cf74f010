"""Token files: a header of 256 little-endian int32, then the tokens as little-endian uint16.

The header's first three words are the magic number, the version and the number of tokens; the
rest is zero. This is the format of the reference's FineWeb shards.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from mlra_jax.files import whole_file

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 1024
MAX_VOCAB_SIZE = 1 << 16
_MAX_TOKENS = (1 << 31) - 1


def read(path: str | Path) -> np.ndarray:
    """The tokens of one file, memory-mapped and read-only: uint16 [tokens].

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the header is wrong, or the size is not what the header says.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no token file {path}")
    size = path.stat().st_size
    if size < HEADER_BYTES:
        raise ValueError(
            f"{path} is no token file: {size} bytes, expected a header of {HEADER_BYTES}"
        )
    magic, version, count = np.fromfile(path, "<i4", 3).tolist()
    if magic != MAGIC:
        raise ValueError(f"{path} is no token file: magic number {magic}, expected {MAGIC}")
    if version != VERSION:
        raise ValueError(f"{path}: token file version {version}, expected {VERSION}")
    expected = HEADER_BYTES + 2 * count
    if count < 0 or size != expected:
        fault = "is truncated" if size < expected else "does not fit its header"
        raise ValueError(
            f"{path} {fault}: {size} bytes, expected {expected} for the {count} tokens it announces"
        )
    if count == 0:  # an empty map is not allowed
        return np.empty(0, "<u2")
    return np.memmap(path, "<u2", mode="r", offset=HEADER_BYTES, shape=(count,))


def write(path: str | Path, chunks: np.ndarray | Iterable[np.ndarray]) -> int:
    """Writes one file whole or not at all, and returns the number of tokens in it.

    The tokens go to a temporary neighbour that is renamed once it is complete and on the disk.

    Args:
      path: the file; one that is there is replaced.
      chunks: integer array [tokens], or arrays one after the other.

    Raises:
      ValueError: a token is negative or does not fit 16 bits, or there are 2**31 or more.
    """
    count = 0
    with whole_file(path, "wb") as file:
        file.write(bytes(HEADER_BYTES))
        for chunk in [chunks] if isinstance(chunks, np.ndarray) else chunks:
            if chunk.size and not 0 <= chunk.min() <= chunk.max() < MAX_VOCAB_SIZE:
                raise ValueError(f"{path}: token ids must be 0 to {MAX_VOCAB_SIZE - 1}")
            count += chunk.size
            if count > _MAX_TOKENS:
                raise ValueError(f"{path}: a token file holds at most {_MAX_TOKENS} tokens")
            file.write(chunk.astype("<u2").tobytes())
        header = np.zeros(HEADER_BYTES // 4, "<i4")
        header[:3] = MAGIC, VERSION, count
        file.seek(0)
        file.write(header.tobytes())
    return count
