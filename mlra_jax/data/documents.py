"""The documents of a file: a text is one, JSON lines and JSON arrays hold many.

Which of these a file is, its content says, whatever its name.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Literal, NamedTuple

from mlra_jax.data.text_reader import (
    MAX_DOCUMENT_BYTES,
    head,
    line_number,
    read_lines,
    read_pieces,
    read_text,
)
from mlra_jax.storage.paths import AnyPath

Layout = Literal["text", "lines", "array", "objects"]
_COMPRESSED = (".gz", ".zst", ".zstd")
_BLANK = re.compile(r"[ \t\r\n]*")
_BLOCK_BYTES = 1 << 16
# Parsed, JSON may take thirty times its size. Beyond so many bytes a document must be mostly text:
# not have more of the signs that values begin or end with.
_LARGE_BYTES = 4 << 20
_MOST_SIGNS = 1 << 21
_DECODER = json.JSONDecoder()


class Part(NamedTuple):
    """A document, or a part of a long one; `start` is the byte of the file where it begins."""

    start: int
    begins_document: bool
    text: str


def read_documents(path: AnyPath, text_key: str, start: int = 0) -> Iterator[Part]:
    """The documents of a file, in the layout that `layout` says.

    Args:
      path: the file, plain or compressed by gzip or Zstandard.
      text_key: the field of a JSON object that holds the text.
      start: of a part, as given before, to begin there.

    Raises:
      ValueError: one line with file and place: no UTF-8, no JSON, no such field, a document in JSON
        of more than `MAX_DOCUMENT_BYTES`; or as `text_reader.read_blocks`.
    """
    how = layout(path, text_key)
    if how == "text":
        for place, text in read_pieces(path, start):
            yield Part(place, place == 0, text)
        return
    values = _lines(path, start) if how == "lines" else _values(path, start, how == "array")
    for place, value in values:
        if _has(text_key, value):
            value = value[text_key]
            if not isinstance(value, str):
                raise _fault(path, place, f"field {text_key!r} holds no text")
        elif not isinstance(value, str):
            raise _fault(path, place, f"no field {text_key!r}; name it with --text_key")
        yield Part(place, True, value)


def layout(path: AnyPath, text_key: str) -> Layout:
    """How the documents lie in a file.

    - `lines`: a JSON object a line. The first is one with the field, or the first two are objects,
      or the name ends in `.jsonl` or `.ndjson` (in any case, also before `.gz` and the like).
    - `array`: a JSON array of objects or, in a `.json` file, of texts.
    - `objects`: a `.json` file of objects over several lines, the first of which has the field.
    - `text`: everything else; the file is one document.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    suffix = next((s for s in reversed(suffixes) if s not in _COMPRESSED), "")
    beginning = head(path, _BLOCK_BYTES).removeprefix(codecs.BOM_UTF8).lstrip(b" \t\r\n")
    first = beginning[:1]
    if suffix in (".jsonl", ".ndjson"):
        return "lines"
    if first == b"{":
        lines = _parsed(_lines(path), 2)
        if _has(text_key, lines[0]) or all(isinstance(value, dict) for value in lines):
            return "lines"
        if suffix == ".json":
            (value,) = _parsed(_values(path, 0, False), 1)
            # What cannot be read and speaks of the field is documents, of which something is wrong.
            broken = value is None and json.dumps(text_key).encode() in beginning
            return "objects" if broken or _has(text_key, value) else "text"
    if first == b"[":
        # What follows the bracket shows whether it is JSON; the reader says what is wrong with it.
        value = next(iter(_parsed(_values(path, 0, True), 1)), None)
        if isinstance(value, dict | str | None if suffix == ".json" else dict):
            return "array"
    return "text"


def _has(text_key: str, value: Any) -> bool:
    return isinstance(value, dict) and text_key in value


def _parsed(values: Iterator[tuple[int, Any]], most: int) -> list[Any]:
    """The first values, and None for one that cannot be read."""
    found = []
    try:
        for _, value in islice(values, most):
            found.append(value)
    except ValueError:
        found.append(None)
    return found


def _lines(path: AnyPath, start: int = 0) -> Iterator[tuple[int, Any]]:
    """The places and values of lines that are not blank."""
    for place, line in read_lines(path, start):
        if line.strip():
            if _too_many_values(line, (b'"', b"[", b"{", b",")):
                raise _fault(path, place, _TOO_MANY)
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                raise _fault(path, place, "no JSON") from None
            yield place, value


def _values(path: AnyPath, start: int, array: bool) -> Iterator[tuple[int, Any]]:
    """The places and values of an array's elements, or of values one after the other."""
    cursor = _Cursor(path, start)
    if array and start == 0:
        cursor.take("[")
    more = cursor.sign() not in ("", "]")
    while more:
        yield cursor.value()
        more = cursor.sign() not in ("", "]" if array else "")
        if more and array:
            cursor.take(",")
    if array:
        cursor.take("]")
        if cursor.sign():
            raise _fault(path, cursor.place, "no JSON")


class _Cursor:
    """A place in a file of JSON, of which little more than one value is in memory."""

    def __init__(self, path: AnyPath, start: int):
        if start == 0 and head(path, 3) == codecs.BOM_UTF8:
            start = 3
        self.place = start
        self._path, self._text, self._at = path, "", 0
        self._parts = read_text(path, start, _BLOCK_BYTES)

    def sign(self) -> str:
        """The next sign that is no blank; "" at the end."""
        while True:
            self._skip(_BLANK.match(self._text, self._at).end())
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def take(self, sign: str) -> None:
        if self.sign() != sign:
            raise _fault(self._path, self.place, "no JSON")
        self._skip(self._at + 1)

    def value(self) -> tuple[int, Any]:
        """The value that begins at the next sign, and its place."""
        self.sign()
        place = self.place
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except (ValueError, RecursionError):
                rest = self._text[self._at :]
                if _too_many_values(rest, '"[{,'):
                    raise _fault(self._path, place, _TOO_MANY) from None
                if len(rest) > MAX_DOCUMENT_BYTES or not self._more():
                    raise _fault(self._path, place, "no JSON") from None
            else:
                self._skip(end)
                return place, value

    def _more(self) -> bool:
        """Reads as much as there is left to parse, so that a long value is not parsed often."""
        parts = [self._text[self._at :]]
        wanted = len(parts[0]) + min(len(parts[0]), _LARGE_BYTES)
        for part in self._parts:
            parts.append(part)
            if sum(map(len, parts)) >= wanted:
                break
        self._text, self._at = "".join(parts), 0
        return len(parts) > 1

    def _skip(self, end: int) -> None:
        self.place += len(self._text[self._at : end].encode())
        self._at = end


_TOO_MANY = f"more than {_MOST_SIGNS:,} values in a document of more than {_LARGE_BYTES >> 20} MiB"


def _too_many_values(document: Any, signs: Sequence[Any]) -> bool:
    return len(document) > _LARGE_BYTES and sum(map(document.count, signs)) > _MOST_SIGNS


def _fault(path: AnyPath, place: int, what: str) -> ValueError:
    return ValueError(f"{path}, line {line_number(path, place)} at byte {place}: {what}")
