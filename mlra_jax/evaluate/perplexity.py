"""Perplexity of a checkpoint on token files, the paper's way."""

import contextlib
import dataclasses
import glob
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from mlra_jax import checkpoints, sharding
from mlra_jax.config import ModelConfig
from mlra_jax.data import token_file
from mlra_jax.data.content import arrays_identity
from mlra_jax.data.journal import one_tokenizer
from mlra_jax.data.sources import Segment, Windows
from mlra_jax.decoder import Decoder
from mlra_jax.evaluate.scoring import check_batch, token_scores
from mlra_jax.evaluate.stored import check_same, checkpoint_identity
from mlra_jax.execution import DTypeLike, dtype_name
from mlra_jax.files import whole_file
from mlra_jax.loading import beyond_training, compute_line, load_model
from mlra_jax.storage import paths
from mlra_jax.storage.paths import AnyPath, PathLike, can_hold_files, files_below

MAX_TOKENS = 100_000_000
_ROWS_PER_DEVICE = 4
_SECONDS_BETWEEN_SAVES = 20.0


@dataclasses.dataclass
class Tally:
    """What is known of one set: so many windows of `window` tokens, and their summed loss."""

    window: int
    windows: int = 0
    loss_sum: float = 0.0
    """Nats, float64."""

    @property
    def tokens(self) -> int:
        return self.windows * self.window

    @property
    def loss(self) -> float:
        return self.loss_sum / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def result(self) -> dict[str, Any]:
        return {"perplexity": self.perplexity, "loss": self.loss, "tokens": self.tokens}


def tallies(
    model: Decoder, windows: Windows, total: int, batch: int, done: Tally
) -> Iterator[Tally]:
    """Reads windows on from `done` and yields the tally after each batch, up to `total` windows.

    A window of T + 1 tokens gives T predictions, the first after one token, as in training; the
    last target is the next window's first input. Losses are summed in float64, window by window, so
    that the sum depends neither on the batch nor on where it was interrupted.
    """
    pending = None
    for first in range(done.windows, total, batch):
        indices = range(first, min(first + batch, total))
        # Those of the next batch, too.
        windows.expect(range(first, min(first + 2 * batch, total)))
        # The last batch is filled up with a window again, whose loss is not counted.
        tokens = np.stack([windows[min(first + row, total - 1)] for row in range(batch)])
        losses = token_scores(model, tokens[:, :-1], tokens[:, 1:])[0], len(indices)
        if pending is not None:
            done = _add(done, *pending)
            yield done
        pending = losses
    if pending is not None:
        yield _add(done, *pending)


def _add(done: Tally, log_probs_BT, rows: int) -> Tally:
    loss_sum = done.loss_sum
    for row in np.asarray(log_probs_BT, np.float64)[:rows]:
        loss_sum -= float(row.sum())
    if not math.isfinite(loss_sum):
        raise ValueError(
            f"the loss of windows {done.windows} to {done.windows + rows - 1} is not finite: the "
            "weights are damaged, or --dtype=float16 is too narrow for them"
        )
    return dataclasses.replace(done, windows=done.windows + rows, loss_sum=loss_sum)


def evaluate(
    checkpoint: PathLike,
    tokens: Sequence[PathLike],
    *,
    window: int | None = None,
    max_tokens: int = MAX_TOKENS,
    output: PathLike | None = None,
    mesh: Mesh | None = None,
    batch: int | None = None,
    dtype: DTypeLike | None = None,
    step: int | None = None,
    token_format: str = "header",
    allow_nonfinite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Perplexity of each token file, exp(mean loss), and the mean over the files.

    Consecutive windows from the first token on, none overlapping; tokens at the end that fill no
    window are left out. With `output`, sums are kept in `<output>.partial` on the way and the same
    call goes on from there; finished results are read again, not computed again.

    Args:
      checkpoint, step: folder of a training run or a conversion; its latest step by default.
      tokens: `.bin` files, each a set by itself, folders or patterns (`c4/**/*.bin`) of them.
      window: tokens that the model sees at once; by default its `context_length`.
      max_tokens: of each set; whole windows only.
      output: JSON file for the result.
      mesh: the batch is split over `data` and `fsdp`, the model over the rest; one device.
      batch: windows at a time, by default 4 for each device that splits the batch.
      dtype, allow_nonfinite: as for `load_model`; a loss that is not finite is refused always.
      token_format: of the token files, see `token_file.read`.
      quiet: no progress bars.

    Returns:
      `{"checkpoint", "step", "settings", "sets": {file: {"perplexity", "loss", "tokens"}},
      "mean_perplexity"}`, also written to `output`.

    Raises:
      CheckpointError, ConfigError, FileNotFoundError, ValueError: one line; nothing was written.
        `output` or its partial sums are of another evaluation.
    """
    mesh = sharding.make_mesh() if mesh is None else mesh
    dtype = None if dtype is None else dtype_name(dtype)
    opened = checkpoints.open_checkpoint(checkpoint, step)
    files = _files(tokens, opened.tokenizer)
    window = _checked_window(window, max_tokens, opened.model)
    sets = token_file.read_all(files, token_format)
    windows = _windows(sets, window, opened.model.vocab_size)
    settings = {
        "checkpoint": checkpoint_identity(opened.folder),
        "window": window,
        "max_tokens": max_tokens,
        "param_dtype": dtype or opened.model.param_dtype,
        "dtype": dtype or opened.model.execution.dtype,
        "tokens": {file: arrays_identity([part]) for file, part in sets.items()},
    }
    store = _Store(output, settings)
    if store.result is not None:
        return store.result
    batch = batch or _ROWS_PER_DEVICE * sharding.size(mesh, sharding.BATCH)
    model = load_model(checkpoint, mesh, dtype, opened.step, allow_nonfinite)
    check_batch(model, batch)
    _say_how(model.config, dtype, window, quiet)
    with store.kept():
        for file in files:
            total = min(len(windows[file]), max_tokens // window)
            done = store.tally(file, window)
            sums = tallies(model, windows[file], total, batch, done)
            for tally in _shown(sums, Path(file).name, done, total, quiet):
                store.note(file, tally)
    results = {file: store.tally(file, window).result() for file in files}
    result = {
        "checkpoint": str(checkpoint),
        "step": opened.step,
        "settings": settings,
        "sets": results,
        "mean_perplexity": sum(r["perplexity"] for r in results.values()) / len(results),
    }
    store.finish(result)
    return result


def table(result: Mapping[str, Any]) -> str:
    """The result of `evaluate` as lines of text."""
    width = max(len(name) for name in (*result["sets"], "mean"))
    lines = [f"{'set':{width}}  {'perplexity':>12}  {'loss':>9}  {'tokens':>13}"]
    for name, values in result["sets"].items():
        lines.append(
            f"{name:{width}}  {values['perplexity']:12.4f}  {values['loss']:9.5f}  "
            f"{values['tokens']:13,}"
        )
    return "\n".join([*lines, f"{'mean':{width}}  {result['mean_perplexity']:12.4f}"])


class _Store:
    """Partial sums beside the output, and the output itself; both replaced whole or not at all."""

    def __init__(self, output: PathLike | None, settings: Mapping[str, Any]):
        self.settings, self.tallies, self.saved = settings, {}, time.monotonic()
        self.output = None if output is None else paths.path(output)
        self.result = None
        if self.output is None:
            return
        check_output(output)
        self.partial = self.output.with_name(f".{self.output.name}.partial")
        self.result = self._read(self.output)
        if self.result is None and (kept := self._read(self.partial)) is not None:
            self.tallies = kept["tallies"]

    def tally(self, file: str, window: int) -> Tally:
        return Tally(window, **self.tallies.get(file, {}))

    def note(self, file: str, tally: Tally) -> None:
        self.tallies[file] = {"windows": tally.windows, "loss_sum": tally.loss_sum}
        if time.monotonic() - self.saved > _SECONDS_BETWEEN_SAVES:
            self._save()

    @contextlib.contextmanager
    def kept(self):
        """Saves the sums also when the block ends early."""
        try:
            yield
        finally:
            self._save()

    def finish(self, result: Mapping[str, Any]) -> None:
        if self.output is not None:
            write_json(self.output, result)
            self.partial.unlink(missing_ok=True)

    def _save(self) -> None:
        self.saved = time.monotonic()
        if self.output is not None and self.tallies:
            write_json(self.partial, {"settings": self.settings, "tallies": self.tallies})

    def _read(self, path: AnyPath) -> dict[str, Any] | None:
        """What `path` says if it is of this evaluation, None if it is not there."""
        if not path.exists():
            return None
        try:
            stored = json.loads(path.read_text())
            settings = dict(stored["settings"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is no result of an evaluation; delete it") from None
        check_same(path, settings, self.settings, "evaluation", "--output")
        return stored


def check_output(output: PathLike | None) -> None:
    """Raises ValueError when no file can be written there; before the work, not after it."""
    path = None if output is None else paths.path(output).absolute()
    if path is not None and (path.is_dir() or not can_hold_files(path.parent)):
        raise ValueError(f"--output={output} is a folder, or its folder does not exist")


def write_json(path: AnyPath, values: Mapping[str, Any]) -> None:
    """Writes one file whole or not at all."""
    with whole_file(path) as file:
        json.dump(values, file, indent=1)


def _shown(
    sums: Iterator[Tally], name: str, done: Tally, total: int, quiet: bool
) -> Iterator[Tally]:
    """The same tallies under a bar of `total` windows."""
    with tqdm(
        desc=name,
        initial=done.tokens,
        total=total * done.window,
        unit="token",
        unit_scale=True,
        mininterval=0.5,
        disable=quiet,
    ) as bar:
        for tally in sums:
            yield tally
            bar.set_postfix_str(f"perplexity {tally.perplexity:.4f}", refresh=False)
            bar.update(tally.tokens - bar.n)


def _say_how(config: ModelConfig, dtype: str | None, window: int, quiet: bool) -> None:
    lines = compute_line(config, dtype and "as --dtype says"), beyond_training(config, window)
    for line in () if quiet else filter(None, lines):
        print(line, file=sys.stderr, flush=True)


def _files(tokens: Sequence[PathLike], tokenizer: str | None) -> list[str]:
    """The files that names and patterns say, each once, and none of another tokenizer.

    The name of a file that is there is no pattern.
    """
    files = []
    for name in map(str, tokens):
        path = paths.path(name)
        pattern = glob.escape(name) != name and not path.exists()
        found = [str(f) for f in paths.matching(name) if f.is_file()] if pattern else [name]
        if path.is_dir():
            found = [str(file) for file in files_below(path) if file.suffix == ".bin"]
        if not found:
            raise FileNotFoundError(f"--tokens={name} matches no file")
        files += found
    if not files:
        raise ValueError("no token file: give --tokens=FILE.bin")
    if len(set(files)) < len(files):
        raise ValueError(f"--tokens={','.join(files)} names a file twice")
    one_tokenizer(
        map(paths.path, files), tokenizer, "the checkpoint's", "prepare the text with that one"
    )
    return files


def _windows(
    sets: Mapping[str, token_file.Tokens], window: int, vocab_size: int
) -> dict[str, Windows]:
    return {
        file: Windows([Segment(file, tokens)], window, vocab_size, "evaluation")
        for file, tokens in sets.items()
    }


def _checked_window(window: int | None, max_tokens: int, config: ModelConfig) -> int:
    window = config.context_length if window is None else window
    if window < 1 or max_tokens < window:
        raise ValueError(
            f"window={window} and max_tokens={max_tokens}: at least one window of one token"
        )
    return window
