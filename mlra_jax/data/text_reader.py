"""The one reader of text: no byte-order mark, three line ends, pieces of bounded size.

Compressed files are read as what they hold; what is no text is refused by its name.
"""

from __future__ import annotations

import codecs
import gzip
import re
import zlib
from collections.abc import Iterator
from itertools import chain

from mlra_jax.data import file_kinds
from mlra_jax.storage.paths import AnyPath

try:
    from compression import zstd  # Python 3.14
except ImportError:
    try:
        from backports import zstd
    except ImportError:
        zstd = None

MAX_DOCUMENT_BYTES = 32 << 20
"""Of a line, or of a document in JSON: either is in memory several times while it is read."""
_DECOMPRESSORS = {file_kinds.GZIP: lambda file: gzip.GzipFile(fileobj=file)}
_ZSTD_ERRORS = ()
if zstd:
    _DECOMPRESSORS[file_kinds.ZSTD] = zstd.ZstdFile
    _ZSTD_ERRORS = (zstd.ZstdError,)
_PIECE_CHARACTERS = 1 << 20
# A newline between two visible characters, or else the place before the last of the blanks in front
# of a visible character: no byte-pair word reaches across, so that encoding the pieces one by one
# gives what encoding the whole text gives.
_CUT = re.compile(r"(?<=\S\n)(?=\S)")
_OTHER_CUT = re.compile(r"(?=[ \t\r\n]\S)")
_BLOCK_BYTES = 1 << 20


def read_pieces(path: AnyPath, start: int = 0) -> Iterator[tuple[int, str]]:
    """Cuts a UTF-8 file into pieces of one to two million characters.

    They encode independently, unless a word, or a run of blanks, is itself longer than a million
    characters: it is cut within. The last piece may be shorter. A byte-order mark at the beginning
    belongs to no piece; all else, line ends included, is as in the file.

    Args:
      path: the file, plain or compressed (gzip, Zstandard); offsets are in what it holds.
      start: byte offset of a piece, as given before, to begin there.

    Yields:
      the byte offset of a piece, 0 for the first, and its text.

    Raises:
      ValueError: the file is not UTF-8; or see `read_blocks`.
    """
    text, offset, end = "", start, start or _mark_bytes(path)
    for part in chain(read_text(path, end, _PIECE_CHARACTERS), [""]):
        text += part
        while cut := _find_cut(text, not part):
            piece, text = text[:cut], text[cut:]
            yield offset, piece
            offset = end = end + len(piece.encode())
    if text:
        yield offset, text


def read_text(path: AnyPath, start: int = 0, size: int = 0) -> Iterator[str]:
    """What lies in a UTF-8 file from a byte on, about `size` bytes at a time, none of them empty.

    Raises:
      ValueError: the file is not UTF-8; or see `read_blocks`.
    """
    decoder, place = codecs.getincrementaldecoder("utf-8")(), start
    for block in chain(read_blocks(path, start, size), [b""]):
        waiting = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            place += error.start - waiting
            raise ValueError(
                f"{path} is not UTF-8 text: byte {place} cannot be read "
                f"(line {line_number(path, place)})"
            ) from None
        place += len(block)
        if text:
            yield text


def read_lines(path: AnyPath, start: int = 0) -> Iterator[tuple[int, bytes]]:
    r"""The lines of a file: only `\n`, `\r\n` and `\r` end one, and neither they nor a byte-order
    mark belong to it.

    Args:
      path: the file, plain or compressed; offsets are in what it holds.
      start: byte offset of a line, as given before, to begin there.

    Yields:
      the byte offset of a line, 0 for the first, and its bytes.

    Raises:
      ValueError: a line of more than `MAX_DOCUMENT_BYTES`; or see `read_blocks`.
    """
    rest = b""
    for block in chain(read_blocks(path, start), [b""]):
        # Of bytes, unlike of text, this splits at these three alone.
        lines = (rest + block).splitlines(keepends=True)
        # The last may go on in the next block, and a return may be half of a line's end.
        rest = lines.pop() if block and lines and not lines[-1].endswith(b"\n") else b""
        if len(rest) > MAX_DOCUMENT_BYTES:
            raise ValueError(
                f"{path}: the line at byte {start + sum(map(len, lines))} is longer than "
                f"{MAX_DOCUMENT_BYTES >> 20} MiB; part it into several"
            )
        for line in lines:
            content = line.rstrip(b"\r\n")
            yield start, content.removeprefix(codecs.BOM_UTF8) if start == 0 else content
            start += len(line)


def line_number(path: AnyPath, offset: int) -> int:
    """The number, from 1 on, of the line in which a byte of a file lies."""
    number, after_return = 1, False
    for block in read_blocks(path):
        block = block[:offset]
        number += block.count(b"\n") + block.count(b"\r") - block.count(b"\r\n")
        number -= after_return and block.startswith(b"\n")
        after_return = block.endswith(b"\r")
        offset -= len(block)
        if not offset:
            break
    return number


def read_blocks(path: AnyPath, start: int = 0, size: int = 0) -> Iterator[bytes]:
    """The bytes that a file holds, from one on, `size` at a time.

    What is compressed by gzip or Zstandard is known by its first bytes and read decompressed.

    Raises:
      ValueError: compressed data is damaged; or the file is no text but something known (a Parquet
        file, a PDF, …), which the message names with a way to get text of it.
    """
    with path.open("rb") as plain:
        kind = file_kinds.in_place_of_text(plain.read(file_kinds.HEAD_BYTES))
        plain.seek(0)
        opened = _DECOMPRESSORS.get(kind)
        if kind and not opened:
            raise ValueError(f"{path} is {kind.what}: {kind.remedy}")
        try:
            file = opened(plain) if opened else plain
            inner = file_kinds.in_place_of_text(file.read(file_kinds.HEAD_BYTES))
            if inner:
                raise ValueError(
                    f"{path} is {inner.what} within {kind.what}: decompress it, then {inner.remedy}"
                )
            file.seek(start)
            while block := file.read(size or _BLOCK_BYTES):
                yield block
        except (OSError, EOFError, zlib.error, *_ZSTD_ERRORS) as error:
            if not opened:
                raise
            reason = " ".join(str(error).split())[:100]
            raise ValueError(f"{path} is damaged {kind.what} ({reason}); get it again") from None


def head(path: AnyPath, size: int) -> bytes:
    """The first `size` bytes that a file holds, or all of them. Raises as `read_blocks` does."""
    return next(read_blocks(path, 0, size), b"")


def is_compressed(path: AnyPath) -> bool:
    """Whether a file is read decompressed."""
    with path.open("rb") as file:
        return file_kinds.kind(file.read(file_kinds.HEAD_BYTES)) in _DECOMPRESSORS


def _mark_bytes(path: AnyPath) -> int:
    """The length of a file's byte-order mark."""
    return len(codecs.BOM_UTF8) if head(path, 3) == codecs.BOM_UTF8 else 0


def _find_cut(text: str, whole: bool) -> int | None:
    """Where the first piece of a text ends; None for what is left, or while more must be read.

    What it gives depends on the text alone, not on how much of it has been read.
    """
    least, most = _PIECE_CHARACTERS, 2 * _PIECE_CHARACTERS
    if cut := _CUT.search(text, least, most + 1):
        return cut.start()
    if len(text) < most + (1 if whole else 2):
        return None
    if cut := _OTHER_CUT.search(text, least, most + 2):
        return cut.start()
    return most
