"""Token files: a header of 256 little-endian int32, then the tokens as little-endian uint16.

The header's first three words are the magic number, the version and the number of tokens; the
rest is zero. This is the format of the reference's FineWeb shards. Two others are read as well.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable

import numpy as np

from mlra_jax.data import file_kinds
from mlra_jax.files import whole_file
from mlra_jax.storage import paths
from mlra_jax.storage.blocks import Cache, RemoteArray, RemoteBytes
from mlra_jax.storage.paths import AnyPath, PathLike

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 1024
MAX_VOCAB_SIZE = 1 << 16
FORMATS = ("header", "uint16", "uint32")
_MAX_TOKENS = (1 << 31) - 1
# What llm.c writes: magic number to version and dtype, and what holds no tokens to train on.
_MAGICS = {MAGIC: (VERSION, "<u2"), 20240801: (7, "<u4")}
_OTHER_MAGICS = {
    20240326: "a model of llm.c",
    20240327: "a state of llm.c, to compare gradients with",
    20240328: "a tokenizer of llm.c",
    20240522: "an evaluation set of llm.c",
    20240803: "a model of llm.c",
}


def is_named(path: AnyPath) -> bool:
    """Whether a file is one of tokens by its name."""
    return path.suffix.lower() == ".bin"


Tokens = np.ndarray | RemoteArray
"""Read-only integers [tokens], which slices and `np.asarray` read."""


def read(path: PathLike, token_format: str = "header", cache: Cache | None = None) -> Tokens:
    """The tokens of one file: uint16 or uint32 [tokens], memory-mapped, or of a bucket read by
    ranges when they are asked for.

    Args:
      path: the file.
      token_format: `header`, where the file says itself what it is: as `write` makes it, or as
        llm.c writes GPT-2's (uint16) or Llama 3's tokens (uint32); `uint16` or `uint32` for
        little-endian tokens without a header, as nanoGPT's `prepare.py` writes them.
      cache: what is kept of files in a bucket; by default one of its own.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no token file of this format, or its size is not what its header says.
    """
    path = paths.path(path)
    check_format(token_format)
    if not path.is_file():
        raise FileNotFoundError(f"no token file {path}")
    size = path.stat().st_size
    if token_format == "header":
        dtype, count = _read_header(path, size)
    else:
        dtype = np.dtype(token_format).newbyteorder("<")
        count = size // dtype.itemsize
        _refuse_header(path, token_format)
    offset = HEADER_BYTES if token_format == "header" else 0
    expected = offset + dtype.itemsize * count
    if count < 0 or size != expected:
        fault = "is truncated" if size < expected else "does not fit its header"
        if not offset:
            fault = f"is not {token_format} tokens"
        raise ValueError(
            f"{path} {fault}: {size} bytes, expected {expected} for "
            + (f"the {count} tokens it announces" if offset else f"{count} tokens")
        )
    if count == 0:  # an empty map is not allowed
        return np.empty(0, dtype)
    if paths.in_bucket(path):
        return RemoteArray(RemoteBytes(path, cache or Cache()), dtype, offset, count)
    return np.memmap(path, dtype, mode="r", offset=offset, shape=(count,))


def read_all(files: Iterable[str], token_format: str) -> dict[str, Tokens]:
    """Several files by name, of a bucket through one cache. Raises as `read` does."""
    cache = Cache()
    return {file: read(file, token_format, cache) for file in files}


def check_format(token_format: str) -> None:
    """Raises ValueError unless it is one of `FORMATS`."""
    if token_format not in FORMATS:
        raise ValueError(f"token_format={token_format!r} is none of {', '.join(FORMATS)}")


def _read_header(path: AnyPath, size: int) -> tuple[np.dtype, int]:
    """The tokens' dtype and number that a file announces."""
    with path.open("rb") as file:
        head = file.read(HEADER_BYTES)
    magic, version, count = np.frombuffer(head[:12].ljust(12, b"\0"), "<i4").tolist()
    if magic not in _MAGICS or size < HEADER_BYTES:
        raise ValueError(f"{path} is no token file: {_what_instead(path, head, size, magic)}")
    wanted, dtype = _MAGICS[magic]
    if version != wanted:
        raise ValueError(f"{path}: token file version {version}, expected {wanted}")
    return np.dtype(dtype), count


def _what_instead(path: AnyPath, head: bytes, size: int, magic: int) -> str:
    kind = file_kinds.kind(head)
    if magic in _OTHER_MAGICS:
        return f"it is {_OTHER_MAGICS[magic]}"
    if kind and kind is not file_kinds.TOKENS:
        return f"it is {kind.what}"
    found = f"magic number {magic}, expected {MAGIC}"
    if size < HEADER_BYTES:
        found = f"{size} bytes, expected a header of {HEADER_BYTES}"
    if size and _is_text(head):
        return "it is text; call it otherwise, and mlra_jax.data.prepare makes token files of it"
    if kind or not size or size % 2:
        return found
    return f"{found}; if nanoGPT wrote it, tokens without a header, say token_format=uint16"


def _is_text(head: bytes) -> bool:
    """Whether the bytes are UTF-8 without control characters, up to a character that is cut."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return all(c.isprintable() or c in "\t\r\n\f" for c in text)


def _refuse_header(path: AnyPath, token_format: str) -> None:
    """A header would be read as tokens, silently."""
    with path.open("rb") as file:
        kind = file_kinds.kind(file.read(file_kinds.HEAD_BYTES))
    if kind:
        remedy = "; leave token_format=header" if kind is file_kinds.TOKENS else ""
        what = "a token file with a header" if remedy else kind.what
        raise ValueError(f"{path} is {what}, not {token_format} tokens{remedy}")


def write(path: PathLike, chunks: np.ndarray | Iterable[np.ndarray]) -> int:
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
