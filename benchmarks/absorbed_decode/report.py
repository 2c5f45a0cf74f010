"""The table, what the targets say, and the two figures."""

import re
from pathlib import Path

from benchmarks.absorbed_decode.points import K
from benchmarks.models import in_words
from mlra_jax.files import whole_figure


def failure_of(row: dict) -> str:
    return row.get("kernel_failed") or row.get("exact_failed") or f"error {row['error']:.1e}"


def table(rows: list[dict]) -> str:
    lines = [
        f"{'group':9} {'point':18} {'batch':>5} {'context':>8} {'MB':>8} {'floor':>7} "
        f"{'kernel':>7} {'of floor':>8} {'TB/s':>5} {'XLA':>8} {'cuDNN':>7} {'tokamax':>7} "
        f"{'error':>8}"
    ]
    for row in rows:
        head = f"{row['group']:9} {row['name']:18} {row['batch']:5} {row['cache']:8} "
        if "error" not in row:
            lines.append(head + "failed: " + failure_of(row))
            continue
        number = lambda key, form, row=row: format(row[key], form) if key in row else "-"
        rate = row["bytes"] / row["kernel_us"] / 1e6 if "kernel_us" in row else 0
        lines.append(
            head + f"{row['bytes'] / 1e6:8.1f} {row['floor_us']:7.1f} "
            f"{number('kernel_us', '.1f'):>7} {number('fraction', '.0%'):>8} {rate:5.2f} "
            f"{number('xla_us', '.1f'):>8} {number('cudnn_us', '.1f'):>7} "
            f"{number('tokamax_us', '.1f'):>7} {row['error']:8.1e}"
        )
    return "\n".join(lines)


def targets(rows: list[dict], limit: dict) -> list[str]:
    """What is aimed at, each with what was measured.

    Long contexts: 85% of the read bandwidth and 6 us. Short ones: 9 us. Batches: 80%.
    """
    by = {(r["name"], r["cache"]): r for r in rows if r["group"] == "paper" and "kernel_us" in r}
    lines = []
    for (name, cache), row in by.items():
        if name in ("MLRA-4 4-way", "MLA"):
            most = row["bytes"] / (0.85 * limit["read"]) * 1e6 + 6
            verdict = "met" if row["kernel_us"] <= most else "missed"
            lines.append(
                f"{name} {cache // K}K: {row['kernel_us']:.1f} of {most:.1f} us: {verdict}"
            )
    for cache in sorted({c for _, c in by}):
        ours = by.get(("MLRA-4 4-way", cache))
        for other in ("MLA", "GQA 8-way"):
            if ours and (other, cache) in by:
                ratio = by[other, cache]["kernel_us"] / ours["kernel_us"]
                lines.append(f"{other} / MLRA-4 at {cache // K}K: {ratio:.2f}")
    for row in rows:
        if row["group"] == "queries" and row["cache"] == 2 * K:
            verdict = "met" if row["kernel_us"] <= 9 else "missed"
            lines.append(f"2K, batch 1: {row['kernel_us']:.1f} of 9 us: {verdict}")
        if row["batch"] == 64 and row["cache"] == 4 * K and row["group"] == "24 heads":
            verdict = "met" if row["fraction"] >= 0.8 else "missed"
            lines.append(f"batch 64 x 4K {row['name']}: {row['fraction']:.0%} of 80%: {verdict}")
    return lines


def figures(content: dict, folder: Path) -> None:
    """Time and bandwidth against context, one line a model, from the JSON of a run."""
    import matplotlib.figure

    rows = [r for r in content["rows"] if r["group"] == "paper" and "kernel_us" in r]
    of_model: dict[str, list[dict]] = {}
    for row in rows:
        name = re.sub(r"(.*) (\d+)-way", r"\1, one of \2 devices", row["name"])
        of_model.setdefault(name, []).append(row)
    contexts = sorted({row["cache"] for row in rows})
    for kind in ("time", "bandwidth"):
        figure = matplotlib.figure.Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        for i, (name, mine) in enumerate(of_model.items()):
            x = [r["cache"] for r in mine]
            if kind == "time":
                axes.plot(x, [r["kernel_us"] for r in mine], f"C{i}o-", label=name)
                axes.plot(x, [r["floor_us"] for r in mine], f"C{i}:", linewidth=1)
            else:
                y = [r["bytes"] / r["kernel_us"] / 1e6 for r in mine]
                axes.plot(x, y, f"C{i}o-", label=name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(contexts, [in_words(context) for context in contexts])
        axes.set_xlabel("context (tokens)")
        if kind == "time":
            axes.plot([], [], ":", color="gray", label="bytes / read bandwidth")
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.set_ylabel("time per call (µs)")
        else:
            read = content["limits"]["read"] / 1e12
            axes.axhline(read, color="gray", linestyle=":", label="read bandwidth")
            axes.set_ylim(0)
            axes.set_ylabel("cache read (TB/s)")
        device = content["versions"]["device"]
        axes.set_title(f"Absorbed decoding on one {device}, batch 1, one query token")
        axes.grid(alpha=0.3)
        axes.legend()
        whole_figure(folder / f"absorbed_decode_{kind}.png", figure, dpi=110)
