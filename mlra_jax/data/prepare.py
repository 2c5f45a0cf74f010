"""Tokenises text into token files: `python -m mlra_jax.data.prepare --source=… --destination=…`.

The shards are a function of input and settings alone, not of the number of workers nor of
interruptions. A journal beside them says after which shard to go on.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from tqdm import tqdm

from mlra_jax.command import Parser
from mlra_jax.data import token_file
from mlra_jax.data.sources import PYDOC, pydoc_documents, read_pieces, text_files
from mlra_jax.data.tokenizers import Tokenizer, get_tokenizer
from mlra_jax.files import whole_file

HUB_PREFIX = "hf:"
_BATCH_CHARACTERS = 1 << 18
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
        with open(path, "rb") as file:
            file.seek(offset)
            for line in file:
                if line.strip():
                    text = _text_of_line(line, self._text_key, f"{path}, line at byte {offset}")
                    yield Piece((index, offset), True, text)
                offset += len(line)


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


def prepare(
    source: Input,
    destination: str | Path,
    *,
    tokenizer: Tokenizer,
    name: str,
    shard_tokens: int = 100_000_000,
    validation_first_shard: bool = False,
    workers: int = 1,
) -> list[Path]:
    """Writes the tokens of `source` as `NAME_train_000000.bin`, `NAME_train_000001.bin`, …

    Each document begins with end-of-text. Every shard but the last has `shard_tokens` tokens, so
    a document may go on in the next. Shards appear under their names when they are whole; after an
    interruption the same call goes on behind the last one, and does nothing where all are there.

    Args:
      source: see `open_input`.
      destination: a folder, made if it is missing.
      tokenizer: at most 65536 ids.
      name: what the files' names begin with.
      validation_first_shard: the first shard is called `NAME_val_000000.bin`.
      workers: threads that tokenise; the tokenizers leave Python's lock.

    Returns:
      the shards.

    Raises:
      ValueError: wrong sizes, an unreadable document, or a destination begun with other settings.
      FileExistsError: the destination has token files of this name that are not from here.
      BlockingIOError: another process is writing there.
    """
    if tokenizer.vocab_size > token_file.MAX_VOCAB_SIZE:
        raise ValueError(
            f"tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids, more than the "
            f"{token_file.MAX_VOCAB_SIZE} of a token file"
        )
    if not 1 <= shard_tokens < 2**31:
        raise ValueError(f"shard_tokens must be 1 to 2**31 - 1, not {shard_tokens}")
    if workers < 1:
        raise ValueError(f"workers must be positive, not {workers}")
    if not name or "/" in name or name.startswith("."):
        raise ValueError(f"{name!r} cannot begin a file name; give another --name")
    destination = Path(destination)
    settings = {
        "input": source.identity,
        "tokenizer": tokenizer.name,
        "shard_tokens": shard_tokens,
        "validation_first_shard": validation_first_shard,
    }
    destination.mkdir(parents=True, exist_ok=True)
    with _only_writer(destination):
        journal = _Journal(destination / f"{name}_prepare.json", settings)

        def shard_path(number: int) -> Path:
            part = "val" if validation_first_shard and number == 0 else "train"
            return destination / f"{name}_{part}_{number:06d}.bin"

        _check_finished(destination, name, journal, shard_path)
        journal.save()
        try:
            if not journal.complete:
                _write_shards(source, tokenizer, shard_tokens, workers, journal, shard_path)
            if not journal.shards:
                raise ValueError("there is no text in the source")
        except ValueError:
            # A source that is mended is another input, and nothing of this one is there.
            if not journal.shards:
                journal.path.unlink()
            raise
        return [shard_path(number) for number in range(len(journal.shards))]


def _write_shards(
    source: Input,
    tokenizer: Tokenizer,
    shard_tokens: int,
    workers: int,
    journal: _Journal,
    shard_path: Callable[[int], Path],
) -> None:
    batches = _batches(source.pieces(journal.position))
    bar = tqdm(
        total=source.size,
        initial=source.done(journal.position),
        desc="tokenising",
        unit=source.unit,
        unit_scale=True,
    )
    with bar, ThreadPoolExecutor(workers) as pool:
        encoded = _in_order(pool, lambda batch: _encode(batch, tokenizer), batches, 4 * workers)
        stream = _Stream(encoded, journal.position, journal.used)

        def advance(chunks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
            for chunk in chunks:
                yield chunk
                bar.update(source.done(stream.position) - bar.n)

        try:
            while stream.has_more():
                path = shard_path(len(journal.shards))
                count = token_file.write(path, advance(stream.take(shard_tokens)))
                journal.add(count, stream.position, stream.used)
                bar.set_postfix(shards=len(journal.shards), tokens=sum(journal.shards))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        bar.update(source.size - bar.n)
    journal.finish()


class _Stream:
    """Encoded batches as one run of tokens, to be taken in shares of any length.

    `position` and `used` say where the next token is: `used` tokens after the batch that begins
    at `position`.
    """

    def __init__(self, encoded: Iterator[tuple[Any, np.ndarray]], position: Any, used: int):
        self._encoded = encoded
        self._rest = np.empty(0, np.uint16)
        self._skip = used
        self.position = position
        self.used = used

    def has_more(self) -> bool:
        while not self._rest.size:
            following = next(self._encoded, None)
            if following is None:
                return False
            self.position, tokens = following
            self._rest = tokens[self._skip :]
            self.used, self._skip = self._skip, 0
        return True

    def take(self, count: int) -> Iterator[np.ndarray]:
        while count and self.has_more():
            part, self._rest = self._rest[:count], self._rest[count:]
            self.used += part.size
            count -= part.size
            yield part


class _Journal:
    """What is finished, in a file that is replaced after each shard."""

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path = path
        self._settings = settings
        self.shards: list[int] = []
        self.position = (0, 0)
        self.used = 0
        self.complete = False
        if not path.exists():
            return
        try:
            saved = json.loads(path.read_text())
            for key, value in settings.items():
                if saved["settings"][key] != value:
                    raise ValueError(
                        f"{path} was begun with another {key} ({saved['settings'][key]}, now "
                        f"{value}); take another destination or name"
                    )
            self.shards = saved["shards"]
            self.position = tuple(saved["position"])
            self.used = saved["used"]
            self.complete = saved["complete"]
        except (KeyError, TypeError, json.JSONDecodeError):
            raise ValueError(f"{path} is damaged; take another destination or name") from None

    def add(self, count: int, position: tuple[int, int], used: int) -> None:
        self.shards.append(count)
        self.position, self.used = position, used
        self.save()

    def finish(self) -> None:
        self.complete = True
        self.save()

    def save(self) -> None:
        state = {
            "settings": self._settings,
            "shards": self.shards,
            "position": self.position,
            "used": self.used,
            "complete": self.complete,
        }
        with whole_file(self.path) as file:
            json.dump(state, file, indent=1)


def _check_finished(
    destination: Path, name: str, journal: _Journal, shard_path: Callable[[int], Path]
) -> None:
    if not journal.path.exists():
        shard = re.compile(re.escape(name) + r"_(val|train)_\d+\.bin")
        for path in sorted(destination.iterdir()):
            if shard.fullmatch(path.name):
                raise FileExistsError(f"{path} is there already; take another destination or name")
    for number, count in enumerate(journal.shards):
        path = shard_path(number)
        if len(token_file.read(path)) != count:
            raise ValueError(f"{path} is not the shard that {journal.path} tells of; delete both")


@contextlib.contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Locks a folder against other preparing processes; the lock ends with the process."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"another process is preparing data in {folder}") from None
        yield
    finally:
        os.close(descriptor)


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Short documents together, so that a task is worth handing to a thread."""
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(batch: Sequence[Piece], tokenizer: Tokenizer) -> tuple[tuple[int, int], np.ndarray]:
    mark = np.array([tokenizer.end_of_text], np.uint16)
    arrays = []
    for piece in batch:
        if piece.begins_document:
            arrays.append(mark)
        arrays.append(tokenizer.encode_array(piece.text).astype(np.uint16))
    return batch[0].position, np.concatenate(arrays)


def _in_order(
    pool: ThreadPoolExecutor, function: Callable, items: Iterable, ahead: int
) -> Iterator[Any]:
    """`pool.map` that reads no more than `ahead` items in advance."""
    waiting = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _text_of_line(line: bytes, text_key: str, where: str) -> str:
    try:
        text = json.loads(line)[text_key]
    except (ValueError, RecursionError):
        raise ValueError(f"{where}: no JSON") from None
    except (KeyError, TypeError, IndexError):
        raise ValueError(f"{where}: no field {text_key!r}; name it with --text_key") from None
    if not isinstance(text, str):
        raise ValueError(f"{where}: field {text_key!r} holds no text")
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


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = Parser(
        prog="python -m mlra_jax.data.prepare",
        description="Tokenise text into .bin shards; run again to go on after an interruption.",
    )
    parser.add_argument(
        "--source",
        required=True,
        help="text file, .jsonl file, folder of both, pydoc, or hf:NAME[:CONFIGURATION]",
    )
    parser.add_argument("--destination", required=True, help="folder for the shards")
    parser.add_argument("--tokenizer", default="gpt2", help="gpt2, bytes, or a ranks file")
    parser.add_argument("--name", help="beginning of the file names (default: from the source)")
    parser.add_argument("--text_key", default="text", help="JSON field or column with the text")
    parser.add_argument("--split", default="train", help="of a Hugging Face data set")
    parser.add_argument("--shard_tokens", type=int, default=100_000_000)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--validation_first_shard", action="store_true", help="call the first shard NAME_val_…"
    )
    flags = parser.parse_args(arguments)
    name = flags.name or Path(flags.source.removeprefix(HUB_PREFIX).partition(":")[0]).stem
    try:
        shards = prepare(
            open_input(flags.source, text_key=flags.text_key, split=flags.split),
            flags.destination,
            tokenizer=get_tokenizer(flags.tokenizer),
            name=name,
            shard_tokens=flags.shard_tokens,
            validation_first_shard=flags.validation_first_shard,
            workers=flags.workers,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on after the last shard", file=sys.stderr)
        return 130
    tokens = sum(len(token_file.read(path)) for path in shards)
    print(f"{tokens:,} tokens in {len(shards)} shards of {flags.destination}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
