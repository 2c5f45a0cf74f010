"""Tokenises text into token files: `python -m mlra_jax.data.prepare --source=… --destination=…`.

The shards are a function of input and settings alone, not of the number of workers nor of
interruptions. A journal beside them says after which shard to go on.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mlra_jax.command import Parser, run
from mlra_jax.data import token_file
from mlra_jax.data.inputs import HUB_PREFIX, Input, Piece, open_input
from mlra_jax.data.journal import Journal
from mlra_jax.data.tokenizers import RANKS_FILE, Tokenizer, get_tokenizer, keep_ranks
from mlra_jax.files import LOCK_FILE, only_writer
from mlra_jax.storage import paths
from mlra_jax.storage.paths import AnyPath, PathLike, in_bucket

_BATCH_CHARACTERS = 1 << 18

# What the folder of a run or of a checkpoint has.
_OF_A_RUN = ("checkpoints", "experiment.json")


def prepare(
    source: Input,
    destination: PathLike,
    *,
    tokenizer: Tokenizer,
    name: str,
    shard_tokens: int = 100_000_000,
    validation_first_shard: bool = False,
    workers: int = 1,
) -> list[AnyPath]:
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
      ValueError: wrong sizes, an unreadable document, text for a shard of validation only, or a
        destination that is a run's or was begun with other settings.
      FileExistsError: the destination has token files of this name that are not from here.
      DestinationError: another process is writing there.
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
    destination = paths.path(destination)
    if any((destination / run).exists() for run in _OF_A_RUN):
        raise ValueError(f"{destination} is the folder of a run or a checkpoint; choose another")
    settings = {
        "input": source.identity,
        "tokenizer": tokenizer.name,
        "shard_tokens": shard_tokens,
        "validation_first_shard": validation_first_shard,
    }
    destination.mkdir(parents=True, exist_ok=True)
    with only_writer(destination / LOCK_FILE, destination):
        journal = Journal(destination, name, settings)
        journal.save()
        try:
            if not journal.complete:
                _write_shards(source, tokenizer, shard_tokens, workers, journal)
            if not journal.counts:
                raise ValueError("there is no text in the source")
            if validation_first_shard and len(journal.counts) == 1:
                (only,), (tokens,) = journal.shards, journal.counts
                only.unlink()
                journal.counts.clear()
                raise ValueError(
                    f"the text has {tokens} tokens, one shard of {shard_tokens}, and none is left "
                    "to train on; give smaller --shard_tokens, or no --validation_first_shard"
                )
        except ValueError:
            # A source that is mended is another input, and nothing of this one is there.
            if not journal.counts:
                journal.path.unlink()
            raise
        keep_ranks(tokenizer.name, destination / f"{name}_{RANKS_FILE}")
        return journal.shards


def _write_shards(
    source: Input, tokenizer: Tokenizer, shard_tokens: int, workers: int, journal: Journal
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
                chunks = advance(stream.take(shard_tokens))
                count = token_file.write(journal.next_shard, chunks)
                journal.add(count, stream.position, stream.used)
                bar.set_postfix(shards=len(journal.counts), tokens=sum(journal.counts))
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


def main(argv: list[str] | None = None) -> int:
    """Prepares as the flags say; see `command.run` for the exit codes."""
    parser = Parser("mlra_jax.data.prepare", "Tokenise text into .bin shards; run again to go on.")
    parser.add_argument(
        "--source",
        required=True,
        help="file of text or JSON, folder of these, pydoc, or hf:NAME[:CONFIGURATION]",
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
    flags = parser.parse_args(argv)
    source = flags.source.removeprefix(HUB_PREFIX)
    name = flags.name or Path(source if in_bucket(source) else source.partition(":")[0]).stem

    def work():
        shards = prepare(
            open_input(flags.source, text_key=flags.text_key, split=flags.split),
            flags.destination,
            tokenizer=get_tokenizer(flags.tokenizer),
            name=name,
            shard_tokens=flags.shard_tokens,
            validation_first_shard=flags.validation_first_shard,
            workers=flags.workers,
        )
        tokens = sum(len(token_file.read(path)) for path in shards)
        print(f"{tokens:,} tokens in {len(shards)} shards of {flags.destination}")

    return run(parser, work, "the same command goes on after the last shard")


if __name__ == "__main__":
    sys.exit(main())
