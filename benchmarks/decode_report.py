"""Figures and tables of `python -m benchmarks.decode`, from the rows of its JSON."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.models import in_words
from mlra_jax.files import whole_figure

# Told apart by all eyes (Okabe and Ito), and by their marks.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKS = "osD^vP*X<>"
_BARS = 8, 128 * 1024


def place(row: dict) -> str:
    """`mlra_4, tensor=4`, `mlra_4, one device` or `mlra_4, 1/8`."""
    where = f"1/{row['share']}" if row.get("share") else row["mesh"] or "one device"
    return f"{row['model']}, {where}"


def _measured(runs: Iterable[dict]) -> list[dict]:
    return [row for run in runs for row in run["rows"] if "error" not in row]


def _devices(runs: Iterable[dict]) -> str:
    return ", ".join(dict.fromkeys(run.get("device", "") for run in runs))


def report(runs: Sequence[dict], points: Sequence[tuple[int, int]] = ()) -> str:
    """Markdown: times, who is how many times as fast, throughput of shares, and exchanges' part.

    Args:
      points: (batch, context) to show; all without.
    """
    rows = [row for run in runs for row in run["rows"]]
    points = points or sorted({(row["batch"], row["context"]) for row in rows})
    cells: dict[str, dict] = {}
    for row in rows:
        mine = cells.setdefault(place(row), {})
        at = row["batch"], row["context"]
        # Of several programs the one that makes the most tokens, as `generate` does.
        if at not in mine or row["tokens_per_call"] >= mine[at]["tokens_per_call"]:
            mine[at] = row
    table = lambda text: _table(
        points,
        {name: {at: text(row) for at, row in mine.items()} for name, mine in cells.items()},
    )
    reads = [row["read"] / 1e12 for row in _measured(runs) if "read" in row]
    reads += [run["read"] / 1e12 for run in runs if "read" in run]
    parts = [
        f"Milliseconds a token, in brackets times the floor; {_devices(runs)}, JAX "
        f"{', '.join(dict.fromkeys(run['jax'] for run in runs))}, {min(reads):.2f} to "
        f"{max(reads):.2f} TB/s read:",
        table(_time),
    ]
    if reference := _reference(cells):
        base = cells[reference]
        parts += [
            f"{reference} is so many times as fast as each (below 1: slower):",
            table(lambda row: _times(row, base.get((row["batch"], row["context"])))),
        ]
    if any(row["share"] for row in rows):
        parts += [
            "Thousand tokens a second of shares:",
            table(_thousands),
        ]
    if any("exchanging" in row for row in rows):
        parts += [
            "Part of the kernels' time that is in exchanges, waiting for others included:",
            table(_exchanging),
        ]
    return "\n\n".join(parts)


def _table(points: Sequence[tuple[int, int]], cells: dict[str, dict]) -> str:
    points = [at for at in points if any(mine.get(at) for mine in cells.values())]
    heads = [f"{batch} x {in_words(context)}" for batch, context in points]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(points) + 1) + "|"]
    for name, mine in cells.items():
        if any(mine.get(at) for at in points):
            lines.append(f"| {name} | {' | '.join(mine.get(at, '') for at in points)} |")
    return "\n".join(lines)


def _time(row: dict) -> str:
    if "error" not in row:
        return f"{row['milliseconds']:.2f} ({row['ratio']:.2f})"
    needs, found, _ = row["error"].partition(" of the device")
    return needs if found else "failed"


def _times(row: dict, base: dict | None) -> str:
    if base is None or row["share"] or "error" in row or "error" in base:
        return ""
    return f"{row['milliseconds'] / base['milliseconds']:.2f}"


def _thousands(row: dict) -> str:
    if "error" in row or not row["share"]:
        return ""
    return f"{row['tokens_per_second'] / 1e3:.1f}"


def _exchanging(row: dict) -> str:
    return f"{row['exchanging']:.0%}" if "exchanging" in row else ""


def _reference(cells: dict[str, dict]) -> str | None:
    """The first model on a mesh, if others are beside it."""
    return next((name for name in cells if "=" in name), None) if len(cells) > 1 else None


def figures(runs: Sequence[dict], folder: Path, name: str) -> None:
    """Draws runs into a folder.

    Where there are meshes, `NAME.png`: each mesh beside one device. Else `NAME_time.png` against
    context and `NAME_throughput.png` against batch, where two points make a line, and
    `NAME_shares_time.png` and so on of shares.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = _measured(runs)
    most = max((row["tokens_per_call"] for row in rows), default=1)
    if any(row["mesh"] for row in rows):
        chosen = [row for row in rows if row["tokens_per_call"] == most]
        _meshes(chosen, _devices(runs), folder / f"{name}.png")
        return
    for kind, x, y, rest, label in (
        ("time", "context", "milliseconds", "batch", "time a token (ms)"),
        ("throughput", "batch", "tokens_per_second", "context", "tokens a second"),
    ):
        for shares in ("", "_shares"):
            lines: dict[str, list[dict]] = {}
            for row in sorted(rows, key=lambda row: (row["model"], row[rest], row[x])):
                if row["tokens_per_call"] == most and bool(row["share"]) == bool(shares):
                    key = f"{place(row)}, {rest} {in_words(row[rest])}"
                    lines.setdefault(key.replace(", one device", ""), []).append(row)
            lines = {key: mine for key, mine in lines.items() if len({r[x] for r in mine}) > 1}
            if lines:
                path = folder / f"{name}{shares}_{kind}.png"
                _lines(lines, x, y, label, _devices(runs), path)


def _figure(size: tuple[float, float], title: str):
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
    figure.suptitle(title)
    return figure


def _draw(axes, key: str, mine: list[dict], x: str, y: str, style: dict) -> None:
    """A line with its floor, thin and dotted."""
    at = [row[x] for row in mine]
    axes.plot(at, [row[y] for row in mine], label=key, markersize=5, **style)
    time = y == "milliseconds"
    floors = [row["floor"] if time else 1e3 * row["batch"] / row["floor"] for row in mine]
    axes.plot(at, floors, ":", color=style["color"], linewidth=0.8)


def _scale(axes, x: str, ticks: Iterable[int], label: str) -> None:
    axes.plot([], [], ":", color="gray", linewidth=0.8, label="limit: reading weights and cache")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("context (tokens)" if x == "context" else "batch (prompts)")
    ticks = sorted(set(ticks))
    axes.set_xticks(ticks, [in_words(tick) for tick in ticks])
    axes.xaxis.minorticks_off()
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)


def _lines(lines: dict, x: str, y: str, label: str, devices: str, path: Path) -> None:
    figure = _figure((9, 4.5), f"Decoding steps, {devices}")
    axes = figure.subplots()
    for i, (key, mine) in enumerate(lines.items()):
        style = dict(color=_COLORS[i % len(_COLORS)], marker=_MARKS[i % len(_MARKS)])
        _draw(axes, key, mine, x, y, style)
    _scale(axes, x, (row[x] for mine in lines.values() for row in mine), label)
    figure.legend(loc="outside right upper", fontsize="small")
    whole_figure(path, figure, dpi=110)


def _meshes(rows: list[dict], devices: str, path: Path) -> None:
    """Time by context at the batch with the most rows; beside it speeds at one point as bars."""
    batch = max({row["batch"] for row in rows}, key=lambda b: sum(r["batch"] == b for r in rows))
    batch = _BARS[0] if any(row["batch"] == _BARS[0] for row in rows) else batch
    lines: dict[str, list[dict]] = {}
    for row in sorted(rows, key=lambda row: row["context"]):
        if row["batch"] == batch and not row["share"]:
            lines.setdefault(place(row), []).append(row)
    order = [name for name in dict.fromkeys(map(place, rows)) if name in lines]
    models = list(dict.fromkeys(name.partition(",")[0] for name in order))
    places = list(dict.fromkeys(name.partition(", ")[2] for name in order))
    style = {
        name: dict(
            color=_COLORS[models.index(name.partition(",")[0]) % len(_COLORS)],
            marker=_MARKS[places.index(name.partition(", ")[2]) % len(_MARKS)],
        )
        for name in order
    }
    contexts = {row["context"] for mine in lines.values() for row in mine}
    several = len(contexts) > 1
    figure = _figure(
        (12, 7) if several else (8, 5), f"Decoding steps of the 2.9B models, {devices}"
    )
    *left, right = figure.subplots(1, 1 + several, squeeze=False)[0]
    for axes in left:
        for name in order:
            _draw(axes, name, lines[name], "context", "milliseconds", style[name])
        _scale(axes, "context", contexts, f"time a token, batch {batch} (ms)")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    context = _BARS[1] if _BARS[1] in contexts else max(contexts)
    bars = {n: r for n in order for r in lines[n] if r["context"] == context}
    alone = next((n for n in bars if n.endswith("one device")), next(iter(bars)))
    base = bars[alone]["milliseconds"]
    for i, (name, row) in enumerate(reversed(bars.items())):
        right.barh(i, base / row["milliseconds"], color=style[name]["color"])
        number = f" {base / row['milliseconds']:.2f}"
        right.text(0, i, number, va="center", color="white", weight="bold", fontsize="small")
        right.plot(base / row["floor"], i, "|", color="black", markersize=14)
    right.plot([], [], "|", color="black", label="limit: reading weights and cache")
    right.set_yticks(range(len(bars)), list(reversed(bars)))
    right.set_xlabel(f"times as fast as {alone}, {batch} x {in_words(context)}")
    right.legend(fontsize="x-small", loc="lower right")
    right.grid(axis="x", alpha=0.3)
    whole_figure(path, figure, dpi=110)
