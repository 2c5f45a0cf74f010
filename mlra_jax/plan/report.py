"""Plans as text and as a figure."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mlra_jax.files import whole_figure
from mlra_jax.plan.planning import Plan
from mlra_jax.plan.search import name

GIB = 2**30
KINDS = {
    "parameters": "parameters",
    "optimizer": "optimizer state",
    "activations": "activations",
    "temporaries": "temporaries",
}
RESOURCES = {
    "matrix": "matrix units",
    "memory": "memory",
    "links": "links",
    "network": "network",
}


def lines(found: Plan) -> Iterator[str]:
    """All that is known of a plan."""
    e, chip, topology = found.experiment, found.topology.chip, found.topology
    by = "by formula" if found.seconds is None else f"compiled in {found.seconds:.0f} s"
    slices = f"{topology.slices} x " if topology.slices > 1 else ""
    step = f"training step of {e.data.global_batch} x {e.model.context_length:,} tokens"
    if found.decoding:
        step = f"decoding step of {found.decoding.rows} x {found.decoding.positions:,} positions"
    yield f"{slices}{topology.name}, {topology.size} devices: {step}"
    yield f"{name(found)} ({by})"
    yield ""
    yield f"{'memory of a device':34}{'GiB':>9}"
    for kind in KINDS:
        if size := getattr(found.memory, kind):
            yield f"  {_kind(kind, found):32}{size / GIB:9.2f}"
    room = f"of {chip.memory / GIB:.1f}: {'fits' if found.fits else 'does not fit'}"
    yield f"  {'all':32}{found.memory.bytes / GIB:9.2f} {room}"
    yield f"{'exchanges of a device':24}{'along':>14}{'times':>8}{'GB':>10}"
    for (kind, axes), (count, sent) in _exchanges(found).items():
        yield f"  {kind:22}{axes:>14}{count:8,}{sent / 1e9:10.3f}"
    yield f"{'time of a step':34}{'ms':>9}"
    for resource, words in RESOURCES.items():
        if spent := getattr(found.times, resource):
            yield f"  {words:32}{spent * 1e3:9.2f}  {_amount(resource, found)}"
    yield from _summary(found)


def _exchanges(found: Plan) -> dict[tuple[str, str], tuple[int, int]]:
    """(times, bytes) by kind and axes, of those that matter."""
    sums: dict[tuple[str, str], tuple[int, int]] = {}
    for c in found.collectives:
        key = c.kind, "+".join(c.axes)
        count, sent = sums.get(key, (0, 0))
        sums[key] = count + c.count, sent + c.bytes
    least = 0 if found.decoding else 1e6
    return {key: (count, sent) for key, (count, sent) in sums.items() if sent >= least}


def _amount(resource: str, found: Plan) -> str:
    if resource == "matrix":
        useful = found.work.model_flops / 1e12
        return f"{found.work.flops / 1e12:.4g} TFLOP, {useful:.4g} of them useful"
    if resource == "memory":
        return f"{found.work.traffic / 1e9:.4g} GB"
    sent = sum(c.bytes for c in found.collectives if bool(c.links) == (resource == "links"))
    return f"{sent / 1e9:.4g} GB"


def _kind(kind: str, found: Plan) -> str:
    return "cache" if found.decoding and kind == "optimizer" else KINDS[kind]


def _summary(found: Plan) -> Iterator[str]:
    times, steps = found.times, found.experiment.steps
    yield (
        f"predicted {times.least * 1e3:.4g} ms a step, bound by {times.bound} "
        f"({times.most * 1e3:.4g} if nothing overlaps): {found.tokens_per_second:,.0f} tokens/s, "
        f"{found.share_of_peak:.0%} of the peak"
    )
    if not found.decoding:
        low, high = found.chip_hours
        yield (
            f"{steps:,} steps: at least {low:,.0f} chip-hours, {high:,.0f} if nothing overlaps, "
            "both at the chips' peaks"
        )


def table(found: Sequence[Plan]) -> Iterator[str]:
    """A line for each of a search."""
    yield f"{'GiB':>7}{'ms':>10}{'to ms':>10}{'tokens/s':>13}{'peak':>6}  bound by, as"
    for p in found:
        yield (
            f"{p.memory.bytes / GIB:7.2f}{p.times.least * 1e3:10.4g}{p.times.most * 1e3:10.4g}"
            f"{p.tokens_per_second:13,.0f}{p.share_of_peak:6.0%}  {p.times.bound}, {name(p)}"
        )


def draw(found: Sequence[Plan], path: Path) -> None:
    """Memory by kind against the chip's, and time by resource, a bar a plan."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2 + 0.55 * len(found)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    labels, places = [name(p).replace(" ", "\n", 1) for p in found], range(len(found))
    memory = {_kind(kind, found[0]): [getattr(p.memory, kind) / GIB for p in found]
              for kind in KINDS}  # fmt: skip
    time = {words: [getattr(p.times, kind) * 1e3 for p in found]
            for kind, words in RESOURCES.items()}  # fmt: skip
    _stack(left, places, memory)
    left.axvline(found[0].topology.chip.memory / GIB, color="black", linestyle="--", label="chip")
    left.set(xlabel="GiB of a device", yticks=list(places), yticklabels=labels)
    _stack(right, places, time)
    for place, p in zip(places, found, strict=True):
        right.plot([p.times.least * 1e3] * 2, [place - 0.4, place + 0.4], color="black",
                   label="if all overlaps" if not place else None)  # fmt: skip
    right.set(xlabel="ms of a step, one after the other")
    left.invert_yaxis()
    for panel in (left, right):
        panel.legend(fontsize="x-small", loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
    topology = found[0].topology
    figure.suptitle(f"{topology.slices} x {topology.name}", fontsize="medium")
    whole_figure(path, figure)


def _stack(panel: Any, places: Sequence[int], parts: dict[str, list[float]]) -> None:
    before = [0.0] * len(places)
    for words, sizes in parts.items():
        if any(sizes):
            panel.barh(places, sizes, 0.7, left=before, label=words)
            before = [a + b for a, b in zip(before, sizes, strict=True)]


def row(found: Plan) -> dict[str, Any]:
    """What a committed table keeps of a plan."""
    e, decoding = found.experiment, found.decoding
    what: dict[str, Any] = dict(sequences=e.data.global_batch, tokens=e.model.context_length)
    if decoding:
        what = dict(decode=f"{decoding.rows}x{decoding.positions}")
    else:
        what |= dict(accumulate=e.data.accumulate, remat=e.model.execution.remat)
        what |= dict(loss_chunk=e.loss_chunk, chip_hours=[round(h) for h in found.chip_hours])
    return {
        "topology": found.topology.name,
        "slices": found.topology.slices,
        **what,
        "mesh": {axis: n for axis, n in dataclasses.asdict(e.mesh).items() if n > 1},
        "by": "formula" if found.seconds is None else "compiler",
        "memory": dataclasses.asdict(found.memory),
        "fits": found.fits,
        "times": {name: float(f"{t:.4g}") for name, t in dataclasses.asdict(found.times).items()},
        "collectives": [dataclasses.asdict(c) for c in found.collectives if c.bytes >= 1e6],
        "tokens_per_second": round(found.tokens_per_second),
        "share_of_peak": round(found.share_of_peak, 3),
    }
