"""What a run leaves to read: a JSONL file, TensorBoard files, a loss curve."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import tensorboardX

from mlra_jax.files import whole_file

METRICS_FILE = "metrics.jsonl"
CURVE_FILE = "loss_curve.png"


class MetricsWriter:
    """Appends to `metrics.jsonl` and to TensorBoard files; a line is on the disk when `write` ends.

    Args:
      workdir: an existing folder.
      step: the step from which the run goes on; what was written after it by a run that was
        killed is dropped, so that no step appears twice.
    """

    def __init__(self, workdir: Path, step: int):
        path = workdir / METRICS_FILE
        kept = [line for line in read_metrics(workdir) if line["step"] <= step]
        with whole_file(path) as file:
            file.writelines(json.dumps(line) + "\n" for line in kept)
        self._file = path.open("a")
        self._board = tensorboardX.SummaryWriter(
            str(workdir / "tensorboard"), purge_step=step + 1 if step else None
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line; floats keep every digit."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


def read_metrics(workdir: str | Path) -> list[dict[str, float]]:
    """The lines of `metrics.jsonl`; a last line that a kill cut off is left out."""
    path = Path(workdir) / METRICS_FILE
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def plot_losses(workdir: Path, vocab_size: int) -> Path:
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
    figure.savefig(path, dpi=120)
    return path
