"""Batches for training and validation, each process reading only its own rows of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from mlra_jax.data.content import arrays_identity
from mlra_jax.data.sources import Source, Windows, fingerprint, load_source
from mlra_jax.data.tokenizers import Tokenizer

Batch = dict[str, np.ndarray]
ORDERS = ("shuffled", "sequential")


class TrainIterator(Iterator[Batch]):
    """Endless batches; its place in the stream can be saved and set.

    The state is small, plain JSON and the same on every process, whatever their number, so that a
    run resumes on more or fewer processes.
    """

    def __init__(self, iterator: Any, identity: dict[str, Any]):
        self._iterator = iterator
        self._identity = identity

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """The number of batches given out, and what the stream is made of."""
        return {"next_batch": self._iterator.get_state()["next_index"], "data": self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to where `get_state` was called.

        Raises:
          ValueError: the state is of other data, or of another batch, window size, order or seed.
        """
        before = {"order": "shuffled"} | state["data"]
        for key, value in self._identity.items():
            saved = before.get(key)
            if key == "content" and saved is None:
                continue  # Runs begun before it was noted have the fingerprint only.
            if saved != value:
                raise ValueError(
                    f"cannot resume the data: {key} was {saved} in the saved run and is {value} "
                    "now; give the data and settings of that run, or another workdir"
                )
        self._iterator.set_state({"next_index": state["next_batch"]})

    def close(self) -> None:
        """Ends the threads that read ahead, if any."""
        self._iterator.close()


class ValidationBatches:
    """The held-out windows in order, again at each iteration.

    Every batch has the same shape. The last is filled up with windows of weight 0.
    """

    def __init__(self, windows: Windows, count: int, global_batch: int, rows: slice):
        self._windows = windows
        self._count = count
        self._global_batch = global_batch
        self._rows = range(global_batch)[rows]

    def __len__(self) -> int:
        return math.ceil(self._count / self._global_batch)

    def __iter__(self) -> Iterator[Batch]:
        for first in range(0, self._count, self._global_batch):
            indices = [first + row for row in self._rows]
            # Padding repeats a real window: ids stay inside the vocabulary.
            batch = _read(self._windows, [min(index, self._count - 1) for index in indices])
            real_B1 = (np.array(indices) < self._count).astype(np.float32)[:, None]
            batch["weights"] = np.broadcast_to(real_B1, batch["targets"].shape).copy()
            yield batch


def make_train_iterator(
    source: str | Source,
    *,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    context_length: int,
    global_batch: int,
    seed: int,
    order: str = "shuffled",
    process_index: int = 0,
    process_count: int = 1,
    validation: str | None = None,
    validation_fraction: float = 0.05,
    prefetch: int = 0,
) -> TrainIterator:
    """Windows without end, shuffled anew each epoch or one after the other.

    The stream of global batches depends on the data, `context_length`, `global_batch`, `order` and
    `seed` alone: process p of n reads rows p·B/n to (p+1)·B/n of it. A batch may span two epochs.

    Args:
      source: a spec or an open source, see `sources.load_source` for it and for `tokenizer`,
        `vocab_size`, `validation` and `validation_fraction`.
      context_length: T.
      global_batch: B, the sequences of all processes together.
      seed: 0 to 2**32 - 1, of the shuffling.
      order: one of `ORDERS`.
      process_index, process_count: `jax.process_index()`, `jax.process_count()`.
      prefetch: batches to read ahead in threads; 0 reads when asked.

    Returns:
      an iterator of `{"inputs": int32 [B/n, T], "targets": int32 [B/n, T]}`.

    Raises:
      FileNotFoundError, ValueError: as `load_source`; fewer tokens than one window; a batch that
        does not divide by `process_count`. Reading a batch may raise ValueError for a token id
        outside the vocabulary that lies beyond what is checked at the start.
    """
    # Hosts that only decode have no Grain.
    import grain

    rows = _rows(global_batch, process_index, process_count)
    if not 0 <= seed < 2**32:
        raise ValueError(f"the data seed must be 0 to 2**32 - 1, not {seed}")
    if order not in ORDERS:
        raise ValueError(f"the order is {order!r}, expected one of {', '.join(ORDERS)}")
    train = _open(source, tokenizer, vocab_size, validation, validation_fraction).train
    windows = Windows(train, context_length, vocab_size)
    # Indices are shuffled and batched for all processes, tokens read for this one's rows only.
    indices = grain.MapDataset.range(len(windows))
    if order == "shuffled":
        indices = indices.shuffle(seed)
    dataset = (
        indices.repeat()
        # Without end there is no remainder; asked to count one, Grain overflows for a batch of one.
        .batch(global_batch, drop_remainder=True)
        .map(lambda indices: _read(windows, indices[rows]))
    )
    options = grain.ReadOptions(num_threads=min(prefetch, 4), prefetch_buffer_size=prefetch)
    identity = {
        "windows": len(windows),
        "fingerprint": fingerprint(train),
        "content": arrays_identity([segment.tokens for segment in train]),
        "context_length": context_length,
        "global_batch": global_batch,
        "order": order,
        "seed": seed,
    }
    return TrainIterator(iter(dataset.to_iter_dataset(options)), identity)


def make_validation_batches(
    source: str | Source,
    *,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    context_length: int,
    global_batch: int,
    process_index: int = 0,
    process_count: int = 1,
    validation: str | None = None,
    validation_fraction: float = 0.05,
    max_tokens: int | None = None,
) -> ValidationBatches:
    """The held-out windows, consecutive, in order, once each.

    What is not listed is as in `make_train_iterator`.

    Args:
      max_tokens: stop before more targets than this (but after one window at least); None: all.

    Returns:
      an iterable with a length, of `{"inputs", "targets": int32 [B/n, T], "weights": float32
      [B/n, T]}`, weights 1 for what counts and 0 for the filling of the last batch.

    Raises:
      FileNotFoundError, ValueError: as `make_train_iterator`.
    """
    rows = _rows(global_batch, process_index, process_count)
    held_out = _open(source, tokenizer, vocab_size, validation, validation_fraction).validation
    windows = Windows(held_out, context_length, vocab_size, "validation")
    count = len(windows)
    if max_tokens is not None:
        count = min(count, max(1, max_tokens // context_length))
    return ValidationBatches(windows, count, global_batch, rows)


def _open(
    source: str | Source,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    validation: str | None,
    validation_fraction: float,
) -> Source:
    if isinstance(source, Source):
        return source
    return load_source(
        source,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        validation=validation,
        validation_fraction=validation_fraction,
    )


def _rows(global_batch: int, process_index: int, process_count: int) -> slice:
    if global_batch < 1 or global_batch % process_count:
        raise ValueError(
            f"a batch of {global_batch} sequences does not divide among {process_count} processes"
        )
    share = global_batch // process_count
    return slice(process_index * share, (process_index + 1) * share)


def _read(windows: Windows, indices) -> Batch:
    windows.expect(map(int, indices))
    tokens = np.stack([windows[int(index)] for index in indices])
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
