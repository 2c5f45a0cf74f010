"""The one reader of text: no byte-order mark, three line ends, pieces of bounded size."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from pathlib import Path

_PIECE_CHARACTERS = 1 << 20
# A newline between two visible characters, or else the place before the last of the blanks in front
# of a visible character: no byte-pair word reaches across, so that encoding the pieces one by one
# gives what encoding the whole text gives.
_CUT = re.compile(r"(?<=\S\n)(?=\S)")
_OTHER_CUT = re.compile(r"(?=[ \t\r\n]\S)")
_BLOCK_BYTES = 1 << 20


def read_pieces(path: Path, start: int = 0) -> Iterator[tuple[int, str]]:
    """Cuts a UTF-8 file into pieces of one to two million characters.

    They encode independently, unless a word, or a run of blanks, is itself longer than a million
    characters: it is cut within. The last piece may be shorter. A byte-order mark at the beginning
    belongs to no piece; all else, line ends included, is as in the file.

    Args:
      path: the file.
      start: byte offset of a piece, as given before, to begin there.

    Yields:
      the byte offset of a piece, 0 for the first, and its text.

    Raises:
      ValueError: the file is not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    text, offset = "", start
    with open(path, "rb") as file:
        file.seek(start)
        if start == 0 and file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
            file.seek(0)
        end = file.tell()
        while True:
            block_start = file.tell() - len(decoder.getstate()[0])
            block = file.read(_PIECE_CHARACTERS)
            try:
                text += decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                place = block_start + error.start
                raise ValueError(
                    f"{path} is not UTF-8 text: byte {place} cannot be read "
                    f"(line {line_number(path, place)})"
                ) from None
            while cut := _find_cut(text, not block):
                piece, text = text[:cut], text[cut:]
                yield offset, piece
                offset = end = end + len(piece.encode())
            if not block:
                break
    if text:
        yield offset, text


def read_lines(path: Path, start: int = 0) -> Iterator[tuple[int, bytes]]:
    r"""The lines of a file: only `\n`, `\r\n` and `\r` end one, and neither they nor a byte-order
    mark belong to it.

    Args:
      path: the file.
      start: byte offset of a line, as given before, to begin there.

    Yields:
      the byte offset of a line, 0 for the first, and its bytes.
    """
    with open(path, "rb") as file:
        file.seek(start)
        for lines in file:
            # Of bytes, unlike of text, this splits at these three alone.
            for line in lines.splitlines(keepends=True):
                content = line.rstrip(b"\r\n")
                yield start, content.removeprefix(codecs.BOM_UTF8) if start == 0 else content
                start += len(line)


def line_number(path: Path, offset: int) -> int:
    """The number, from 1 on, of the line in which a byte of a file lies."""
    number, after_return = 1, False
    with open(path, "rb") as file:
        while offset and (block := file.read(min(offset, _BLOCK_BYTES))):
            number += block.count(b"\n") + block.count(b"\r") - block.count(b"\r\n")
            number -= after_return and block.startswith(b"\n")
            after_return = block.endswith(b"\r")
            offset -= len(block)
    return number


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
