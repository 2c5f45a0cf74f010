"""Where tokens come from: token files, text files, folders of either, or CPython's own manual."""

from __future__ import annotations

import bisect
import dataclasses
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mlra_jax.data import token_file
from mlra_jax.data.documents import layout
from mlra_jax.data.text_reader import is_compressed, read_pieces
from mlra_jax.data.token_file import Tokens
from mlra_jax.data.tokenizers import Tokenizer
from mlra_jax.storage import paths
from mlra_jax.storage.blocks import CACHE_BYTES, Cache, RemoteArray
from mlra_jax.storage.paths import AnyPath, files_below, in_bucket

PYDOC = "pydoc"
# Token files are checked up to this many tokens before a run starts (a fraction of a second), the
# rest as it is read: 100 GB must not delay the first step.
_TOKENS_CHECKED_FIRST = 100_000_000
_TOKENS_CHECKED_AT_ONCE = 1 << 22
# A small compressed file may hold any amount of text, and this text is in memory.
_MAX_UNPACKED = 64 << 20
_MAX_HELD_OUT = 10_000_000
_VALIDATION_WORDS = frozenset(("val", "valid", "validation", "test"))
_TRAINING_WORDS = frozenset(("train", "training"))
_FILES_NAMED = 4


@dataclasses.dataclass(frozen=True)
class Segment:
    """A run of consecutive tokens: integer array [tokens], in memory, memory-mapped or remote.

    `name` and `offset` (position of the first token in the file) are for messages.
    """

    name: str
    tokens: Tokens
    offset: int = 0


@dataclasses.dataclass(frozen=True)
class Source:
    """Training tokens and the tokens held out for validation; `notes` are lines for the user."""

    train: tuple[Segment, ...]
    validation: tuple[Segment, ...]
    notes: tuple[str, ...] = ()


class Windows(Sequence):
    """Windows of `context_length` + 1 tokens, taken every `context_length` tokens.

    A window's first `context_length` tokens are inputs, its last are their targets; the last
    target is the next window's first input, so that each token is predicted once and no two
    windows share an input. A window never reaches across two segments; the tail of a segment
    that fills no window is left out. `purpose` is for messages.

    Raises:
      ValueError: no segment is as long as one window; or, when a window is read, a token id is
        not below `vocab_size`.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        context_length: int,
        vocab_size: int,
        purpose: str = "training",
    ):
        if context_length < 1:
            raise ValueError(f"context_length must be positive, not {context_length}")
        self._segments = segments
        self._context_length = context_length
        self._vocab_size = vocab_size
        counts = [max(0, len(part.tokens) - 1) // context_length for part in segments]
        self._ends = list(accumulate(counts))
        if not sum(counts):
            longest = max(segments, key=lambda part: len(part.tokens))
            raise ValueError(
                f"too little {purpose} data in {longest.name}: {len(longest.tokens)} tokens are "
                f"less than one window of context_length + 1 = {context_length + 1}"
            )

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> np.ndarray:
        """Window `index`, int32 [context_length + 1]."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        segment, start = self._place(index)
        window = np.asarray(segment.tokens[start : start + self._context_length + 1])
        _check_ids(segment, window, start, self._vocab_size)
        return window.astype(np.int32)

    def expect(self, indices: Iterable[int]) -> None:
        """Begins to read these windows where that takes time, all at once."""
        for index in indices:
            segment, start = self._place(index)
            if isinstance(segment.tokens, RemoteArray):
                segment.tokens.expect([(start, start + self._context_length + 1)])

    def _place(self, index: int) -> tuple[Segment, int]:
        """The segment in which a window lies, and where there it begins."""
        place = bisect.bisect_right(self._ends, index)
        first = index - (self._ends[place - 1] if place else 0)
        return self._segments[place], first * self._context_length


def load_source(
    spec: str,
    *,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    validation: str | None = None,
    validation_fraction: float = 0.05,
    token_format: str = "header",
    cache_bytes: int = CACHE_BYTES,
) -> Source:
    """Opens what `spec` names and sets tokens aside for validation.

    Args:
      spec: a text file, a token file (`.bin`), a folder (all token files in it or, where there
        are none, all its files as text, hidden ones left out, in order of their paths), several
        of these joined by commas, a glob pattern, or "pydoc", the language reference inside
        every CPython. Each text document begins with end-of-text.
      tokenizer: for text; token files need none.
      vocab_size: the model's; every id must be below it.
      validation: a spec of its own for validation. Without it, token files with the word val,
        valid, validation or test in their own names are validation where there are others to
        train on; else the tail of the tokens is.
      validation_fraction: how much of the tokens that tail is, at most 10 million tokens.
      token_format: of all token files, see `token_file.read`.
      cache_bytes: how much is kept of token files in a bucket, all together.

    Raises:
      FileNotFoundError: the spec names nothing.
      ValueError: a file is damaged, empty or no UTF-8 text, an id is outside the vocabulary, or
        text comes without a tokenizer or with one that is larger than the vocabulary.
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction must be between 0 and 1, not {validation_fraction}")
    files = _expand(spec)
    files, held_out, note = _roles(files)
    notes = (note,) if note else ()
    cache = Cache(cache_bytes)
    load = lambda files: _load(files, tokenizer, vocab_size, token_format, cache)
    train = load(files)
    if validation is not None:
        if held_out:
            names = _listed([str(path) for path in held_out])
            notes += (f"neither trained nor validated on, by their names: {names}",)
        return Source(train, load(_expand(validation)), notes)
    if held_out:
        return Source(train, load(held_out), notes)
    return Source(*_hold_out(train, validation_fraction), notes)


def token_files(spec: str) -> list[Path]:
    """Those among the files that `spec` names; raises FileNotFoundError if it names nothing."""
    return [path for path in _expand(spec) if path != PYDOC and token_file.is_named(path)]


def describe(source: Source, validation_tokens: int | None = None) -> list[str]:
    """The notes, a line for what trains and one for what validates, with their tokens.

    `validation_tokens` is how many of the held-out ones are used at most; None: all.
    """
    return [
        *source.notes,
        _described("training on", source.train, None),
        _described("validating on", source.validation, validation_tokens),
    ]


def fingerprint(segments: Sequence[Segment]) -> str:
    """A short check of the ends of all segments, as runs of all versions have noted it.

    `content.arrays_identity` sees what lies between them.
    """
    digest = 0
    for segment in segments:
        for part in (segment.tokens[:65536], segment.tokens[-65536:]):
            digest = zlib.crc32(np.asarray(part, "<u4").tobytes(), digest)
        digest = zlib.crc32(str(len(segment.tokens)).encode(), digest)
    return f"{digest:08x}"


def text_files(folder: AnyPath) -> list[AnyPath]:
    """All files under `folder` but hidden ones, ordered by path, subfolders included.

    Links are followed; a folder that several ways lead to is read once.
    """
    if in_bucket(folder):
        below = lambda path: path.relative_to(folder).parts
        return [path for path in files_below(folder) if not any(n[0] == "." for n in below(path))]
    found, seen = [], set()
    for here, folders, names in os.walk(folder, followlinks=True):
        status = os.stat(here)
        place = status.st_dev, status.st_ino
        # A link to a folder above would never end.
        folders[:] = [] if place in seen else sorted(n for n in folders if n[0] != ".")
        if place not in seen:
            found += [Path(here, name) for name in names if name[0] != "."]
        seen.add(place)
    return sorted((path for path in found if path.is_file()), key=lambda path: path.parts)


def pydoc_documents() -> list[str]:
    """The language reference that CPython's `help()` shows, one document a topic."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def _expand(spec: str) -> list[AnyPath | str]:
    if not str(spec):
        raise FileNotFoundError("no data: the source is empty")
    whole = paths.path(spec)
    if spec == PYDOC:
        return [PYDOC]
    if whole.is_dir():
        files = text_files(whole)
        if not files:
            raise FileNotFoundError(f"no data: folder {spec} has no files")
        return [path for path in files if token_file.is_named(path)] or files
    if whole.is_file():
        return [whole]
    if "," in spec:
        return [path for part in spec.split(",") if part.strip() for path in _expand(part.strip())]
    files = [path for path in paths.matching(spec) if path.is_file()]
    if not files:
        raise FileNotFoundError(f"no data: {spec} is neither a file nor a folder, nor matches any")
    return files


def _roles(
    files: Sequence[AnyPath | str],
) -> tuple[list[AnyPath | str], list[AnyPath | str], str | None]:
    """Files to train on, files to validate on, and a note where all names say validation."""
    words = [_words(path) for path in files]
    held_out = [_means_validation(each) for each in words]
    if not all(held_out):
        return *_parted(files, held_out), None
    # A word that every name begins with is the name of the data, not a role.
    shared = 0
    while len({tuple(each[: shared + 1]) for each in words}) == 1 and shared < len(words[0]):
        shared += 1
    held_out = [_means_validation(each[shared:]) for each in words]
    if any(held_out) and not all(held_out):
        return *_parted(files, held_out), None
    note = f"all names say validation, so all are trained on: {_listed([str(f) for f in files])}"
    return list(files), [], note


def _parted(files: Sequence[AnyPath | str], held_out: Sequence[bool]):
    pairs = list(zip(files, held_out, strict=True))
    return [path for path, held in pairs if not held], [path for path, held in pairs if held]


def _words(path: AnyPath | str) -> list[str]:
    """The words of a token file's own name; of text, whose names are its authors', none."""
    if path == PYDOC or not token_file.is_named(path):
        return []
    return re.findall(r"[^\W\d_]+", path.stem.lower())


def _means_validation(words: Sequence[str]) -> bool:
    """By the last word that is a role: `test_suite_train_000001` is trained on."""
    roles = [word for word in words if word in _VALIDATION_WORDS | _TRAINING_WORDS]
    return bool(roles) and roles[-1] in _VALIDATION_WORDS


def _described(purpose: str, segments: Sequence[Segment], most: int | None) -> str:
    total = sum(len(part.tokens) for part in segments)
    names = [
        part.name
        + (f" from token {part.offset:,} on" if part.offset else "")
        + (f" ({len(part.tokens):,})" if len(segments) > 1 else "")
        for part in segments
    ]
    used = f"{total:,}" if most is None or total <= most else f"{most:,} of {total:,}"
    return f"{purpose} {used} tokens: {_listed(names)}"


def _listed(names: Sequence[str]) -> str:
    """All names, or the first of many and how many more there are."""
    if len(names) <= _FILES_NAMED:
        return ", ".join(names)
    return f"{', '.join(names[: _FILES_NAMED - 1])} and {len(names) - _FILES_NAMED + 1} more"


def _load(
    files: Sequence[AnyPath | str],
    tokenizer: Tokenizer | None,
    vocab_size: int,
    token_format: str,
    cache: Cache,
) -> tuple[Segment, ...]:
    """Token files as one segment each; all text together as one segment."""
    segments, texts = [], []
    for path in files:
        if path == PYDOC or not token_file.is_named(path):
            texts.append(path)
        else:
            segments.append(Segment(str(path), token_file.read(path, token_format, cache)))
    for segment in segments:
        if isinstance(segment.tokens, RemoteArray):
            continue  # Checked as they are read.
        first = segment.tokens[: _TOKENS_CHECKED_FIRST // len(segments)]
        for start in range(0, len(first), _TOKENS_CHECKED_AT_ONCE):
            part = first[start : start + _TOKENS_CHECKED_AT_ONCE]
            _check_ids(segment, part, start, vocab_size)
    if texts:
        segments.append(_encode(texts, tokenizer, vocab_size))
    return tuple(segments)


def _encode(
    files: Sequence[AnyPath | str], tokenizer: Tokenizer | None, vocab_size: int
) -> Segment:
    name = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    if tokenizer is None:
        raise ValueError(f"{name} is text: give a tokenizer")
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids, more than the model's "
            f"vocab_size {vocab_size}"
        )
    dtype = np.uint16 if tokenizer.vocab_size <= token_file.MAX_VOCAB_SIZE else np.uint32
    size = sum(path.stat().st_size for path in files if path != PYDOC)
    mark = np.array([tokenizer.end_of_text], dtype)
    arrays = []
    with tqdm(total=size, desc="tokenising", unit="B", unit_scale=True, delay=1) as bar:
        for path in files:
            for begins_document, piece in _pieces(path):
                if begins_document:
                    arrays.append(mark)
                arrays.append(tokenizer.encode_array(piece).astype(dtype))
                bar.update(len(piece.encode()))
    return Segment(name, np.concatenate(arrays) if arrays else np.empty(0, dtype))


def _pieces(path: AnyPath | str) -> Iterator[tuple[bool, str]]:
    """The text of one file in pieces, each with whether a document begins there."""
    prepare = f"python -m mlra_jax.data.prepare --source={path} --destination=DIR"
    if path == PYDOC:
        yield from ((True, document) for document in pydoc_documents())
    elif layout(path, "text") != "text":
        raise ValueError(f"{path} holds documents in JSON; make token files of it first: {prepare}")
    else:
        left = _MAX_UNPACKED if is_compressed(path) else math.inf
        for start, piece in read_pieces(path):
            left -= len(piece)
            if left < 0:
                raise ValueError(
                    f"{path} holds more than {_MAX_UNPACKED >> 20} Mi characters; make token files "
                    f"of it first: {prepare}"
                )
            yield start == 0, piece


def _hold_out(
    segments: tuple[Segment, ...], fraction: float
) -> tuple[tuple[Segment, ...], tuple[Segment, ...]]:
    """Cuts the tail off: `fraction` of all tokens, at most `_MAX_HELD_OUT`."""
    total = sum(len(part.tokens) for part in segments)
    left = min(int(total * fraction), _MAX_HELD_OUT)
    train, tail = list(segments), []
    while left and train:
        last = train.pop()
        cut = max(0, len(last.tokens) - left)
        left -= len(last.tokens) - cut
        tail.insert(0, Segment(last.name, last.tokens[cut:], last.offset + cut))
        if cut:
            train.append(Segment(last.name, last.tokens[:cut], last.offset))
    if not tail:
        tail = [Segment(segments[-1].name, segments[-1].tokens[:0])]
    return tuple(train), tuple(tail)


def _check_ids(segment: Segment, tokens: np.ndarray, start: int, vocab_size: int) -> None:
    if tokens.size and int(tokens.max()) >= vocab_size:
        place = int(np.argmax(tokens >= vocab_size))
        raise ValueError(
            f"{segment.name}: token id {int(tokens[place])} at position "
            f"{segment.offset + start + place} is outside the vocabulary of {vocab_size}"
        )
