"""What a study found: one table, comparisons in words, two figures."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from mlra_jax.config import ModelConfig
from mlra_jax.costs import cache_values_per_device
from mlra_jax.files import whole_figure, whole_file
from mlra_jax.settings_tree import ConfigError
from studies.settings import Study, changed
from studies.training import Result

WAYS = (1, 2, 4, 8)
_POSITIONS = 8
_AT = 4
"""The ways of the figure."""
Results = Mapping[str, Sequence[Result]]


class Compared(NamedTuple):
    """One variant less another, over the seeds that both have."""

    difference: float
    low: float
    high: float
    pairs: int

    @property
    def told_apart(self) -> bool:
        return self.low > 0 or self.high < 0


def cache_values(model: ModelConfig, ways: int) -> float | None:
    """Values cached per token, layer and device; None where the variant cannot be split so."""
    try:
        values = cache_values_per_device(model, batch=1, capacity=_POSITIONS, tensor=ways)
    except ConfigError:
        return None
    return values / _POSITIONS


def last_losses(results: Sequence[Result]) -> dict[int, float]:
    """The validation loss at the end of each run, by seed."""
    return {result["seed"]: result["validation_loss"][-1][1] for result in results}


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error, which one value does not have (nan)."""
    values = np.asarray(values, np.float64)
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), float(error)


def compare(these: Sequence[Result], those: Sequence[Result]) -> Compared | None:
    """Paired by seed, with the 95% interval of Student's t; None for fewer than two pairs.

    Runs of a seed share tokens, their order and the first weights, so that what a lucky order gives
    to one it gives to the other, and only what remains counts as chance.
    """
    left, right = last_losses(these), last_losses(those)
    differences = [left[seed] - right[seed] for seed in sorted(left.keys() & right.keys())]
    if len(differences) < 2:
        return None
    mean, error = mean_and_error(differences)
    reach = float(stats.t.ppf(0.975, len(differences) - 1)) * error
    return Compared(mean, mean - reach, mean + reach, len(differences))


def words(study: Study, results: Results) -> list[str]:
    """A line for each comparison: with the reference, and of each change with what it changes."""
    pairs = [(name, study.reference) for name in results if changed(name) is None]
    pairs += [(name, base) for name in results if (base := changed(name)) is not None]
    lines, count = [], 0
    for name, base in pairs:
        if name == base or base not in results:
            continue
        found = compare(results[name], results[base])
        if found is None:
            lines.append(f"{name} and {base}: fewer than two seeds in common, nothing can be said.")
            continue
        count += 1
        side = "below" if found.difference < 0 else "above"
        ends = sorted((abs(found.low), abs(found.high)))
        if found.told_apart:
            told = (
                f"ends {abs(found.difference):.4f} nats {side} {base}, 95% interval {ends[0]:.4f}"
            )
            lines.append(f"{name} {told} to {ends[1]:.4f} ({found.pairs} pairs).")
        else:
            lines.append(
                f"{name} and {base} are not told apart: {found.difference:+.4f} nats, 95% interval "
                f"{found.low:+.4f} to {found.high:+.4f} ({found.pairs} pairs)."
            )
    if count:
        lines.append(
            f"Of {count} comparisons, {0.05 * count:.1f} would be told apart by chance if all "
            "variants were alike; the intervals hold for seeds, not for other texts or sizes."
        )
    return lines


def table(study: Study, results: Results) -> str:
    """Markdown: a row for each variant, lowest loss first."""
    caches = " | ".join(f"cache, {ways}-way" for ways in WAYS)
    lines = [
        f"| | validation loss | runs | parameters | MLP | {caches} | training FLOPs | tokens/s "
        "| on |",
        "|---|" + "---|" * (7 + len(WAYS) - 1),
    ]
    rows = sorted(results.items(), key=lambda row: mean_and_error([*last_losses(row[1]).values()]))
    for name, runs in rows:
        mean, error = mean_and_error([*last_losses(runs).values()])
        model, first = study.model(name), runs[0]
        caches = [cache_values(model, ways) for ways in WAYS]
        cells = [
            name,
            f"{mean:.4f}" + ("" if math.isnan(error) else f" ± {error:.4f}"),
            str(len(runs)),
            f"{first['parameters'] / 1e6:.2f}M",
            str(first["mlp_dim"]),
            *("-" if values is None else f"{values:g}" for values in caches),
            f"{first['training_flops']:.2e}",
            f"{np.median([run['tokens_per_second'] for run in runs]):,.0f}",
            ", ".join(sorted({run["device"] for run in runs})),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write(study: Study, results: Results, folder: str | Path) -> str:
    """Writes `report.md`, `loss_by_cache.png` and `loss_by_tokens.png`; returns the report."""
    folder, first = Path(folder), next(iter(results.values()))[0]
    text = "\n\n".join(
        [
            f"Loss in nats per token after {first['tokens']:,} tokens, mean and standard error "
            f"over seeds; cache in values per token, layer and device; tokens/s of "
            f"{first['side_by_side']} runs side by side on one device.",
            table(study, results),
            "\n".join(f"- {line}" for line in words(study, results)),
        ]
    )
    with whole_file(folder / "report.md") as file:
        file.write(text + "\n")
    _draw(study, results, folder)
    return text


def _draw(study: Study, results: Results, folder: Path) -> None:
    import matplotlib.figure

    by_cache = matplotlib.figure.Figure(figsize=(9, 6), layout="constrained")
    by_tokens = matplotlib.figure.Figure(figsize=(12, 6), layout="constrained")
    caches, (tokens, beside_reference) = by_cache.subplots(), by_tokens.subplots(1, 2)
    reference, late = _curves(results.get(study.reference, ())), [0.0]
    places = {name: cache_values(study.model(name), _AT) for name in results}
    for i, (name, runs) in enumerate(results.items()):
        style: dict = dict(color=f"C{i % 10}", label=name)
        mean, error = mean_and_error([*last_losses(runs).values()])
        values = places[name]
        if values is not None:
            # Those that cache as much stand side by side.
            beside = [other for other in places if places[other] == values]
            values *= 1.04 ** (beside.index(name) - (len(beside) - 1) / 2)
            caches.errorbar(
                values, mean, None if math.isnan(error) else error, fmt="osD^v"[i // 10], **style
            )
        curves = _curves(runs)
        line = dict(linestyle=("-", "--", ":")[i // 10 % 3], color=f"C{i % 10}")
        steps = np.array(runs[0]["validation_loss"])[:, 0]
        seen = steps * runs[0]["tokens"] / steps[-1]
        tokens.plot(seen, np.mean([*curves.values()], 0), label=name, linewidth=1, **line)
        pairs = [curves[seed] - reference[seed] for seed in curves.keys() & reference.keys()]
        for pair in pairs:
            beside_reference.plot(seen, pair, linewidth=0.6, alpha=0.3, **line)
            late += pair[len(pair) // 2 :].tolist()
        if pairs:
            beside_reference.plot(seen, np.mean(pairs, 0), linewidth=1.5, **line)
    by_cache.legend(loc="outside right upper", fontsize=7)
    caches.set(
        xlabel=f"cached values per token, layer and device, {_AT}-way",
        ylabel="validation loss (nats per token), mean and standard error over seeds",
        xscale="log",
    )
    ticks = sorted({int(values) for values in places.values() if values is not None})
    caches.set_xticks(ticks, ticks)
    caches.minorticks_off()
    tokens.set(xlabel="training tokens", ylabel="validation loss, mean over seeds (nats per token)")
    tokens.legend(fontsize=7, ncols=2)
    beside_reference.set(
        xlabel="training tokens",
        ylabel=f"less that of {study.reference} with the same seed: each, and their mean",
        # The first steps differ by more than all that comes later.
        ylim=(1.1 * min(late) - 0.02, 1.1 * max(late) + 0.02),
    )
    for figure, file_name in ((by_cache, "loss_by_cache.png"), (by_tokens, "loss_by_tokens.png")):
        for axes in figure.axes:
            axes.grid(alpha=0.3)
        whole_figure(folder / file_name, figure)


def _curves(runs: Sequence[Result]) -> dict[int, np.ndarray]:
    """The validation losses of each run, by seed."""
    return {run["seed"]: np.array(run["validation_loss"])[:, 1] for run in runs}
