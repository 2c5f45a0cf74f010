"""Runs beside each other: settings that differ, numbers, loss curves.

    python -m mlra_jax.report RUN [RUN ...] [--output=report]

RUN is the workdir of a training run, also of one that still goes on. The text goes to the terminal;
the folder gets `report.png`, the loss curves, and `report.html`, all of it in one file.
"""

import argparse
import base64
import dataclasses
import html
import io
import json
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from mlra_jax.command import Parser, run
from mlra_jax.files import whole_file
from mlra_jax.settings_tree import flatten
from mlra_jax.storage import paths
from mlra_jax.storage.paths import AnyPath, PathLike
from mlra_jax.training import record, terminal
from mlra_jax.training.metrics import METRICS_FILE, read_metrics

Table = list[list[str]]
"""Rows of cells, the first of them the names of the columns."""

_NONE = "-"


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run has left in its workdir."""

    name: str
    settings: dict[str, Any]
    """Flat, by dotted names."""
    lines: list[dict[str, float]]
    """Of its metrics."""

    def points(self, what: str, per_step: int = 1) -> list[tuple[float, float]]:
        """(step, value) wherever `what` was written, steps counted in `per_step`."""
        return [(per_step * line["step"], line[what]) for line in self.lines if what in line]

    @property
    def tokens_per_step(self) -> int:
        """By its metrics; 0 before the first line."""
        logged = [line for line in self.lines if "tokens" in line]
        return round(logged[-1]["tokens"] / logged[-1]["step"]) if logged else 0


def read(workdir: PathLike) -> Run:
    """Raises ValueError, in one line, where there is no run or its settings cannot be read."""
    folder = paths.path(workdir)
    if not (folder / METRICS_FILE).exists():
        raise ValueError(f"{workdir}: there is no {METRICS_FILE}; give the --workdir of a run")
    settings = folder / record.FILE
    try:
        found = flatten(json.loads(settings.read_text()))
    except FileNotFoundError:
        found = {}
    except (ValueError, AttributeError):
        raise ValueError(f"{settings} is damaged; delete it to see the rest") from None
    return Run(str(workdir).rstrip("/"), found, read_metrics(folder))


def differing(runs: Sequence[Run]) -> Table:
    """A row for each setting that is not the same in all runs."""
    names = sorted({name for one in runs for name in one.settings})
    rows = [[name, *(str(one.settings.get(name, _NONE)) for one in runs)] for name in names]
    return [["setting", *_names(runs)], *(row for row in rows if len(set(row[1:])) > 1)]


def numbers(runs: Sequence[Run]) -> Table:
    """A row for each run; columns that no run has are left out."""
    rows = [_numbers(one) for one in runs]
    titles = [title for title in rows[0] if any(row[title] != _NONE for row in rows)]
    cells = [[row[title] for title in titles] for row in rows]
    return [["run", *titles], *([one.name, *row] for one, row in zip(runs, cells, strict=True))]


def _numbers(one: Run) -> dict[str, str]:
    def last(what: str, form: str) -> str:
        points = one.points(what)
        return format(points[-1][1], form) if points else _NONE

    steps, validated = [line["step"] for line in one.lines], one.points("validation_loss")
    rates = [rate for _, rate in one.points("tokens_per_second")]
    lowest = min(validated, key=lambda point: point[1], default=None)
    seconds = one.points("seconds")
    return {
        "step": f"{max(steps, default=0):,}",
        "of": f"{one.settings['steps']:,}" if "steps" in one.settings else _NONE,
        "tokens": last("tokens", ",.0f"),
        "loss": last("loss", ".4f"),
        "validation": last("validation_loss", ".4f"),
        "lowest, at step": f"{lowest[1]:.4f}, {lowest[0]:,}" if lowest else _NONE,
        "tokens/s": f"{statistics.median(rates):,.0f}" if rates else _NONE,
        "MFU": last("model_flops_utilization", ".1%"),
        "goodput": last("goodput", ".1%"),
        "skipped": last("skipped_steps", ",.0f"),
        "hours": f"{seconds[-1][1] / 3600:.2f}" if seconds else _NONE,
    }


def text(runs: Sequence[Run]) -> str:
    """For a terminal: both tables, and the losses as curves of characters."""
    per_step, axis = _scale(runs)
    what, title = "validation_loss", "validation loss"
    if not any(one.points(what) for one in runs):
        what, title = "loss", "training loss"
    curves = {one.name: one.points(what, scale) for one, scale in zip(runs, per_step, strict=True)}
    different = differing(runs)
    parts = [_aligned(numbers(runs))]
    if len(runs) > 1:
        same = "all settings are the same"
        parts.append(_aligned(different) if len(different) > 1 else same)
    if drawn := terminal.draw(curves, axis):
        parts.append(f"{title} (nats per token)\n{drawn}")
    return "\n\n".join(parts)


def figure(runs: Sequence[Run]) -> bytes:
    """The loss curves as PNG: training thin, validation with circles."""
    import matplotlib.figure

    drawing = matplotlib.figure.Figure(figsize=(9, 5.5), layout="constrained")
    axes = drawing.add_subplot()
    per_step, axis = _scale(runs)
    for i, (one, scale) in enumerate(zip(runs, per_step, strict=True)):
        style = dict(color=f"C{i % 10}", linestyle="-" if i < 10 else "--")
        trained, validated = one.points("loss", scale), one.points("validation_loss", scale)
        if trained:
            name = f"{one.name}, training"
            axes.plot(*zip(*trained, strict=True), linewidth=0.8, alpha=0.5, label=name, **style)
        if validated:
            name = f"{one.name}, validation (last {validated[-1][1]:.3f})"
            axes.plot(*zip(*validated, strict=True), "o", markersize=4, label=name, **style)
    axes.set(xlabel=axis, ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize=8)
    png = io.BytesIO()
    drawing.savefig(png, dpi=120, format="png")
    return png.getvalue()


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font-family: sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em }}
table {{ border-collapse: collapse; display: block; overflow-x: auto }}
th, td {{ padding: .3em .8em; border-bottom: 1px solid #ccc; text-align: right }}
th:first-child, td:first-child {{ text-align: left }}
img {{ max-width: 100% }}
</style></head><body><h1>{title}</h1>
{body}
</body></html>
"""


def page(runs: Sequence[Run], png: bytes) -> str:
    """HTML that needs no other file; names and settings are escaped."""
    title = "Training runs" if len(runs) > 1 else f"Run {html.escape(runs[0].name)}"
    parts = [_rows(numbers(runs))]
    if len(runs) > 1:
        different = differing(runs)
        parts.append("<h2>Settings that differ</h2>")
        parts.append(_rows(different) if len(different) > 1 else "<p>None.</p>")
    data = base64.b64encode(png).decode()
    parts += ["<h2>Loss</h2>", f'<img alt="loss curves" src="data:image/png;base64,{data}">']
    return _PAGE.format(title=title, body="\n".join(parts))


def write(runs: Sequence[Run], folder: AnyPath) -> tuple[AnyPath, AnyPath]:
    """Writes `report.png` and `report.html`, each whole; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    png = figure(runs)
    with whole_file(folder / "report.png", "wb") as file:
        file.write(png)
    with whole_file(folder / "report.html") as file:
        file.write(page(runs, png))
    return folder / "report.png", folder / "report.html"


def _scale(runs: Sequence[Run]) -> tuple[list[int], str]:
    """How much of the horizontal axis a step is, and what that counts: steps of unlike batches are
    compared by their tokens."""
    tokens = [one.tokens_per_step for one in runs]
    if len(set(tokens)) == 1 or 0 in tokens:
        return [1] * len(runs), "step"
    return tokens, "tokens"


def _names(runs: Sequence[Run]) -> list[str]:
    return [one.name for one in runs]


def _aligned(table: Table) -> str:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    )


def _rows(table: Table) -> str:
    def row(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    head, *rest = table
    return "\n".join(
        ["<table>", row(head, "th"), *(row(cells, "td") for cells in rest), "</table>"]
    )


def main(argv: list[str] | None = None) -> int:
    """Compares as the arguments say; see `command.run` for the exit codes."""
    parser = Parser(
        "mlra_jax.report", __doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="workdir of a training run")
    parser.add_argument("--output", default="report", help="folder of the files")
    flags = parser.parse_args(argv)
    names = [name.rstrip("/") for name in flags.runs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        parser.error(f"{twice} is given twice")

    def work():
        runs = [read(workdir) for workdir in flags.runs]
        print(text(runs), flush=True)
        print(" and ".join(map(str, write(runs, paths.path(flags.output)))), flush=True)

    return run(parser, work)


if __name__ == "__main__":
    sys.exit(main())
