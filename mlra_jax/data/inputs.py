"""Documents to tokenise: files of text and JSON, CPython's manual, data sets of Hugging Face.

Each input can be read on from the middle, so that an interrupted run does not begin again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from mlra_jax.data import token_file
from mlra_jax.data.content import files_identity, rows_identity
from mlra_jax.data.documents import read_documents
from mlra_jax.data.sources import PYDOC, pydoc_documents, text_files
from mlra_jax.extras import install_line
from mlra_jax.storage import paths
from mlra_jax.storage.paths import AnyPath

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
    """Files of text, a document each, and of JSON, with many (`documents.layout`)."""

    unit = "B"

    def __init__(self, files: Sequence[AnyPath], root: AnyPath, text_key: str):
        self._files = files
        self._text_key = text_key
        stats = [path.stat() for path in files]
        self._starts = np.cumsum([0] + [stat.st_size for stat in stats]).tolist()
        self.size = self._starts[-1]
        digest = hashlib.sha256(text_key.encode())
        for path, stat in zip(files, stats, strict=True):
            digest.update(f"{os.path.relpath(path, root)}\0{stat.st_mtime_ns}\n".encode())
        digest.update(files_identity(files).encode())
        self.identity = digest.hexdigest()

    def pieces(self, position: tuple[int, int]) -> Iterator[Piece]:
        first, offset = position
        for index in range(first, len(self._files)):
            for start, begins, text in read_documents(self._files[index], self._text_key, offset):
                yield Piece((index, start), begins, text)
            offset = 0

    def done(self, position: tuple[int, int]) -> int:
        # Of a compressed file, the place is in what it holds.
        return min(self._starts[position[0]] + position[1], self._starts[position[0] + 1])


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
      source: a file of text, JSON lines or a JSON array, plain or compressed (see `documents`); a
        folder of these (read in order of path, hidden files left out); "pydoc", the language
        reference inside CPython; or "hf:NAME" or "hf:NAME:CONFIGURATION", a Hugging Face data set
        (needs the datasets library).
      text_key: the field of a JSON line, or the column of a data set, that holds the text.
      split: of a Hugging Face data set.

    Raises:
      FileNotFoundError: there is no such file or folder.
      ValueError: nothing to read in it, the data set cannot be had, or the datasets library
        is missing.
    """
    if source == PYDOC:
        documents = pydoc_documents()
        digest = hashlib.sha256("\0".join(documents).encode()).hexdigest()
        return Rows(lambda start, stop: documents[start:stop], len(documents), digest)
    if source.startswith(HUB_PREFIX):
        return _open_hub(source.removeprefix(HUB_PREFIX), text_key, split)
    path = paths.path(source)
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
    tokens = next((name for name in files if token_file.is_named(name)), None)
    if tokens:
        raise ValueError(f"{tokens} is a token file already; give text")
    return Files(files, root, text_key)


def _open_hub(name: str, text_key: str, split: str) -> Input:
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"{HUB_PREFIX}{name} needs the datasets library: {install_line('datasets')}"
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
    read = lambda start, stop: data[start:stop][text_key]
    identity = f"{name} {split} {text_key} {rows_identity(read, len(data))}"
    return Rows(read, len(data), identity)
