"""The batches of a run on its mesh: each process reads its own rows of them."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mlra_jax import sharding
from mlra_jax.config import ModelConfig
from mlra_jax.data.journal import one_tokenizer
from mlra_jax.data.pipeline import (
    ORDERS,
    TrainIterator,
    make_train_iterator,
    make_validation_batches,
)
from mlra_jax.data.sources import Source, load_source, token_files
from mlra_jax.data.tokenizers import RANKS_PREFIX, get_tokenizer
from mlra_jax.training.settings import DataSettings

Batch = dict[str, jax.Array]


def load_data(data: DataSettings, vocab_size: int) -> tuple[str, Source]:
    """The tokenizer's name and the tokens.

    Raises:
      FileNotFoundError, ValueError: as `load_source` and `get_tokenizer`; or token files that were
        prepared with another tokenizer.
      ConnectionError: the source is text and its tokenizer cannot be fetched.
    """
    files = [path for spec in (data.source, data.validation) if spec for path in token_files(spec)]
    prepared = None if data.tokenizer else one_tokenizer(files)
    tokenizer, name, unreachable = None, data.tokenizer or prepared or "gpt2", None
    try:
        tokenizer = get_tokenizer(name)
        name = tokenizer.name
    except (ConnectionError, FileNotFoundError) as e:
        if isinstance(e, FileNotFoundError) and not name.startswith(RANKS_PREFIX):
            raise
        unreachable = e  # token files need no tokenizer
    one_tokenizer(files, name, "data.tokenizer", "--config.data.tokenizer= takes the files' own")
    try:
        source = load_source(
            data.source,
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            validation=data.validation or None,
            validation_fraction=data.validation_fraction,
            token_format=data.token_format,
            cache_bytes=data.cache_bytes,
        )
    except ValueError as e:
        raise (unreachable if unreachable and "give a tokenizer" in str(e) else e) from None
    if prepared:
        note = f"tokenizer {name}, with which the token files were prepared"
        source = dataclasses.replace(source, notes=(note, *source.notes))
    return name, source


def batch_share(mesh: Mesh, rows: int, process: int) -> tuple[int, int]:
    """(index, count): of `count` equal parts of a batch of `rows`, the one that `process` feeds.

    Processes whose devices hold the same rows feed the same part. Where processes overlap in part,
    each feeds everything.
    """
    of_process: dict[int, set[int]] = {}
    for device, (row_slice,) in sharding.named(mesh, "batch").devices_indices_map((rows,)).items():
        of_process.setdefault(device.process_index, set()).update(range(rows)[row_slice])
    parts = sorted({tuple(sorted(part)) for part in of_process.values()})
    if sum(map(len, parts)) != rows or len({len(part) for part in parts}) != 1:
        return 0, 1
    return parts.index(tuple(sorted(of_process[process]))), len(parts)


@dataclasses.dataclass(frozen=True)
class Feed:
    """Batches of `rows` sequences for `model`, split over `mesh`."""

    mesh: Mesh
    rows: int
    model: ModelConfig

    def train(self, source: Source, seed: int, order: str = ORDERS[0]) -> "TrainBatches":
        """Batches without end in one of `data.pipeline.ORDERS`, read ahead."""
        how = dict(seed=seed, order=order, prefetch=2)
        return TrainBatches(self, make_train_iterator(source, **how, **self._sizes()))

    def validation(self, source: Source, max_tokens: int) -> "ValidationBatches":
        """The held-out windows in order, at most `max_tokens` of them, at each iteration."""
        batches = make_validation_batches(source, max_tokens=max_tokens, **self._sizes())
        return ValidationBatches(self, batches)

    def put(self, batch: dict[str, np.ndarray]) -> Batch:
        """This process's rows -> arrays [rows, T] over the whole mesh."""
        where = sharding.named(self.mesh, "batch", "length")
        shape = (self.rows, self.model.context_length)
        return {
            name: jax.make_array_from_process_local_data(where, array, shape)
            for name, array in batch.items()
        }

    def _sizes(self) -> dict[str, Any]:
        index, count = batch_share(self.mesh, self.rows, jax.process_index())
        return dict(
            tokenizer=None,
            vocab_size=self.model.vocab_size,
            context_length=self.model.context_length,
            global_batch=self.rows,
            process_index=index,
            process_count=count,
        )


class TrainBatches(Iterator[Batch]):
    """`inputs` and `targets`, int32 [rows, T], without end; the place can be saved and set."""

    def __init__(self, feed: Feed, batches: TrainIterator):
        self._feed, self._batches = feed, batches

    def __next__(self) -> Batch:
        return self._feed.put(next(self._batches))

    def get_state(self) -> dict[str, Any]:
        """The place behind the batches that were given out, as JSON."""
        return self._batches.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Raises ValueError for a place in other data."""
        self._batches.set_state(state)

    def close(self) -> None:
        """Ends the threads that read ahead."""
        self._batches.close()


class ValidationBatches:
    """`inputs`, `targets` and `weights` (float32), [rows, T], anew at each iteration."""

    def __init__(self, feed: Feed, batches: Iterable[dict[str, np.ndarray]]):
        self._feed, self._batches = feed, batches

    def __iter__(self) -> Iterator[Batch]:
        return map(self._feed.put, self._batches)
