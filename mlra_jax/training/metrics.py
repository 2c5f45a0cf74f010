"""What a run leaves to read: a JSONL file, TensorBoard files, a loss curve."""

import contextlib
import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from tensorboardX import event_file_writer, summary
from tensorboardX.proto import event_pb2

from mlra_jax.files import Lines, naming, whole_figure, whole_file
from mlra_jax.storage import paths
from mlra_jax.storage.paths import AnyPath, PathLike, files_below, in_bucket

METRICS_FILE = "metrics.jsonl"
DAMAGED_FILE = METRICS_FILE + ".damaged"
CURVE_FILE = "loss_curve.png"


class Watcher(Protocol):
    """Is told each line of metrics of a run, in order."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class MetricsWriter:
    """Appends to `metrics.jsonl` and to TensorBoard files; a line is on the disk when `write` ends.

    In a bucket, where files only come whole, it is there when `sync` ends, or some seconds later.

    Args:
      workdir: an existing folder.
      step: the step from which the run goes on; what was written after it by a run that was
        killed is dropped, so that no step appears twice. Before the first it is 0.
      say: prints one note for each damaged line, which moves to `metrics.jsonl.damaged`.
    """

    def __init__(self, workdir: AnyPath, step: int, say: Callable[[str], None] = print):
        path = workdir / METRICS_FILE
        lines, damaged = _read_lines(path)
        if damaged:
            # Before the file is written anew, so that a kill between the two loses nothing.
            aside = path.with_name(DAMAGED_FILE)
            before = aside.read_bytes() if aside.exists() else b""
            with whole_file(aside, "wb") as file:
                file.write(before + b"".join(line + b"\n" for _, line in damaged))
            for number, _ in damaged:
                say(f"{path}, line {number}: damaged; set aside in {aside.name}")
        kept = [line for line in lines if line["step"] <= step] if step else []
        self._lines = Lines(path, (json.dumps(line) + "\n" for line in kept))
        self._watchers: list[Watcher] = []
        self._board_folder = workdir / "tensorboard"
        self._board_folder.mkdir(exist_ok=True)
        self._local = None
        if in_bucket(workdir):
            # The library's own way to a bucket holds a run up when that fails, and its end.
            self._local = tempfile.TemporaryDirectory()
        # The library's usual writer has a thread, and waits for ever when that could not write.
        folder = self._local.name if self._local else self._board_folder
        self._board = event_file_writer.EventsWriter(f"{folder}/events")
        if step:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._record(event_pb2.Event(step=step + 1, session_log=start))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line; floats keep every digit.

        Raises OSError, with the file's name.
        """
        self._lines.add(json.dumps({"step": step, **values}) + "\n")
        scalars = [summary.scalar(name, value) for name, value in values.items()]
        self._record(*(event_pb2.Event(step=step, summary=scalar) for scalar in scalars))
        for watcher in self._watchers:
            watcher.write(step, values)

    def tell(self, watcher: Watcher) -> None:
        """From now on `watcher` is told, too, and is closed with this."""
        self._watchers.append(watcher)

    def sync(self) -> None:
        """All that was written is where others read it when this ends. Raises OSError."""
        self._lines.sync()
        for file in files_below(Path(self._local.name)) if self._local else ():
            (self._board_folder / file.name).write_bytes(file.read_bytes())

    def close(self) -> None:
        for watcher in self._watchers:
            watcher.close()
        # Each write was flushed; what could not be is told already.
        with contextlib.suppress(OSError):
            self.sync()
            self._lines.close()
            self._board.close()
        if self._local:
            self._local.cleanup()

    def _record(self, *events: event_pb2.Event) -> None:
        with naming(self._board_folder):
            for event in events:
                event.wall_time = time.time()
                self._board.write_event(event)
            self._board.flush()


def read_metrics(workdir: PathLike) -> list[dict[str, float]]:
    """The lines of `metrics.jsonl`; damaged ones, and a last one that a kill cut off, are left
    out."""
    return _read_lines(paths.path(workdir) / METRICS_FILE)[0]


def _read_lines(path: AnyPath) -> tuple[list[dict[str, float]], list[tuple[int, bytes]]]:
    """The good lines, and the others with their numbers from 1 on.

    What follows the last newline was being written when the run was killed: neither of the two.
    """
    good, damaged = [], []
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
        # Bytes that are no UTF-8 are a ValueError, too.
        except (ValueError, RecursionError):
            values = None
        if _is_metrics(values):
            good.append(values)
        else:
            damaged.append((number, line))
    return good, damaged


def _is_metrics(values: Any) -> bool:
    """What `MetricsWriter.write` writes: numbers by name, with a whole one for the step."""
    return (
        isinstance(values, dict)
        and type(values.get("step")) is int
        and all(type(value) in (int, float) for value in values.values())
    )


def plot_losses(workdir: AnyPath, vocab_size: int) -> AnyPath:
    """Draws training and validation loss over steps, with that of a uniform guess, as PNG."""
    import matplotlib.figure

    lines = read_metrics(workdir)
    figure = matplotlib.figure.Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, label, style in (
        ("loss", "training", dict(linewidth=1, alpha=0.7)),
        ("validation_loss", "validation", dict(linewidth=2, marker="o", markersize=4)),
    ):
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            last = f" (last {points[-1][1]:.3f})"
            axes.plot(*zip(*points, strict=True), label=label + last, **style)
    uniform = math.log(vocab_size)
    axes.axhline(
        uniform,
        color="gray",
        linestyle=":",
        label=f"uniform guess, ln {vocab_size} = {uniform:.2f}",
    )
    axes.set(xlabel="step", ylabel="loss (nats per token)", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    path = workdir / CURVE_FILE
    whole_figure(path, figure)
    return path
