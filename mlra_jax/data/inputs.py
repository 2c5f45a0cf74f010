"""Documents to tokenise: text files, JSON lines, CPython's manual, data sets of Hugging Face.

Each input can be read on from the middle, so that an interrupted run does not begin again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from mlra_jax.data.sources import PYDOC, pydoc_documents, text_files
from mlra_jax.data.text_reader import line_number, read_lines, read_pieces

HUB_PREFIX = "hf:"
_ROWS_READ_AT_ONCE = 256


class Piece(NamedTuple):
    """Text that is encoded by itself: a document, or a part of a long one.

    `position` is where it begins, (file, byte) or (0, row): an input can be read on from there.
    """

    position: tuple[int, int]
    begins_document: bool
    text: str


class Input(Protocol):
    """Documents in a fixed order. `identity` changes when they do; `size` is in `unit`s."""

    identity: str
    size: int
    unit: str

    def pieces(self, position: tuple[int, int]) -> Iterator[Piece]:
        """All pieces from `position` on; (0, 0) is the beginning."""

    def done(self, position: tuple[int, int]) -> int:
        """How much of `size` lies before `position`."""


class Files:
    """Text files, a document each, and files of JSON lines, a document a line."""

    unit = "B"

    def __init__(self, files: Sequence[Path], root: Path, text_key: str):
        self._files = files
        self._text_key = text_key
        stats = [path.stat() for path in files]
        self._starts = np.cumsum([0] + [stat.st_size for stat in stats]).tolist()
        self.size = self._starts[-1]
        digest = hashlib.sha256(text_key.encode())
        for path, stat in zip(files, stats, strict=True):
            digest.update(
                f"{os.path.relpath(path, root)}\0{stat.st_size} {stat.st_mtime_ns}\n".encode()
            )
        self.identity = digest.hexdigest()

    def pieces(self, position: tuple[int, int]) -> Iterator[Piece]:
        first, offset = position
        for index in range(first, len(self._files)):
            path = self._files[index]
            if path.suffix in (".jsonl", ".ndjson"):
                yield from self._lines(index, path, offset)
            else:
                for start, text in read_pieces(path, offset):
                    yield Piece((index, start), start == 0, text)
            offset = 0

    def done(self, position: tuple[int, int]) -> int:
        return self._starts[position[0]] + position[1]

    def _lines(self, index: int, path: Path, offset: int) -> Iterator[Piece]:
        for start, line in read_lines(path, offset):
            if line.strip():
                try:
                    text = _text_of_line(line, self._text_key)
                except ValueError as error:
                    number = line_number(path, start)
                    raise ValueError(f"{path}, line {number} at byte {start}: {error}") from None
                yield Piece((index, start), True, text)


class Rows:
    """Documents by number; `read(start, stop)` gives a run of them."""

    unit = " documents"

    def __init__(self, read: Callable[[int, int], Sequence[str]], size: int, identity: str):
        self._read = read
        self.size = size
        self.identity = identity

    def pieces(self, position: tuple[int, int]) -> Iterator[Piece]:
        for start in range(position[1], self.size, _ROWS_READ_AT_ONCE):
            texts = self._read(start, min(start + _ROWS_READ_AT_ONCE, self.size))
            for row, text in enumerate(texts, start):
                if not isinstance(text, str):
                    raise ValueError(f"row {row} of the data set holds no text")
                yield Piece((0, row), True, text)

    def done(self, position: tuple[int, int]) -> int:
        return position[1]


def open_input(source: str, *, text_key: str = "text", split: str = "train") -> Input:
    """The documents that `source` names.

    Args:
      source: a text file; a `.jsonl` file; a folder of both (read in order of path, hidden files
        left out); "pydoc", the language reference inside CPython; or
        "hf:NAME" or "hf:NAME:CONFIGURATION", a Hugging Face data set (needs the `datasets` extra).
      text_key: the field of a JSON line, or the column of a data set, that holds the text.
      split: of a Hugging Face data set.

    Raises:
      FileNotFoundError: there is no such file or folder.
      ValueError: nothing to read in it, the data set cannot be had, or the `datasets` extra is
        missing.
    """
    if source == PYDOC:
        documents = pydoc_documents()
        digest = hashlib.sha256("\0".join(documents).encode()).hexdigest()
        return Rows(lambda start, stop: documents[start:stop], len(documents), digest)
    if source.startswith(HUB_PREFIX):
        return _open_hub(source.removeprefix(HUB_PREFIX), text_key, split)
    path = Path(source)
    if path.is_dir():
        files, root = text_files(path), path
    elif path.is_file():
        files, root = [path], path.parent
    else:
        raise FileNotFoundError(
            f"no source {source}: give a file, a folder, pydoc, or hf:NAME for a Hugging Face "
            "data set"
        )
    if not files:
        raise ValueError(f"folder {source} has no files")
    tokens = next((name for name in files if name.suffix == ".bin"), None)
    if tokens:
        raise ValueError(f"{tokens} is a token file already; give text")
    return Files(files, root, text_key)


def _text_of_line(line: bytes, text_key: str) -> str:
    try:
        text = json.loads(line)[text_key]
    except (ValueError, RecursionError):
        raise ValueError("no JSON") from None
    except (KeyError, TypeError, IndexError):
        raise ValueError(f"no field {text_key!r}; name it with --text_key") from None
    if not isinstance(text, str):
        raise ValueError(f"field {text_key!r} holds no text")
    return text


def _open_hub(name: str, text_key: str, split: str) -> Input:
    try:
        import datasets
    except ImportError:
        raise ValueError(
            "Hugging Face data sets need the extra: pip install 'mlra-jax[datasets]'"
        ) from None
    repository, _, configuration = name.partition(":")
    try:
        data = datasets.load_dataset(repository, configuration or None, split=split)
    except Exception as error:  # the library's errors have no common type, and many lines
        raise ValueError(f"data set {name}: {' '.join(str(error).split())}") from error
    if text_key not in data.column_names:
        raise ValueError(
            f"data set {name} has no column {text_key!r} but {', '.join(data.column_names)}; name "
            "it with --text_key"
        )
    identity = f"{name} {split} {text_key} {len(data)}"
    return Rows(lambda start, stop: data[start:stop][text_key], len(data), identity)
