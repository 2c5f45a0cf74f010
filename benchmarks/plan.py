"""The tables of plans: what the 2.9B models take of TPU slices of 4 to 512 chips.

    python -m benchmarks.plan [--only=v5e:16x16] [--compile=N] [--print] [--draw=FILE.png]

A row is the first that fits of a search, for 2**20 tokens a step (2**21 of 32K tokens on two
slices): 512 x 2048 or 32 x 32768; the last rows of MLRA-4 decode. The compiler takes one to four
minutes of a core for each of which the table has only the formula's figures, MLRA-4's first, and N
of them are made (default: all); --only makes those of a topology anew, --print prints the tables of
docs/plan.md and compiles nothing, --draw makes its figure. `benchmarks/results/plan.json` has the
rows.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from mlra_jax.config import ConfigError, preset
from mlra_jax.files import whole_file
from mlra_jax.plan import chips, report, topology
from mlra_jax.plan.formula import Decoding
from mlra_jax.plan.planning import fitted, plan
from mlra_jax.plan.search import search
from mlra_jax.sharding import all_axes
from mlra_jax.training.settings import DataSettings, Experiment, MeshSettings

Row = dict[str, Any]
RESULTS = Path(__file__).parent / "results" / "plan.json"
KEY = ("topology", "slices", "tokens", "decode", "by_hand", "model")
SLICES = (
    ("v5e:16x16", 1),
    ("v5p:4x4x4", 1),
    ("v5e:16x16", 2),
    ("v5e:4x4", 1),
    ("v6e:16x16", 1),
    ("v5p:4x8x8", 1),
    ("v5p:4x8x8", 2),
    ("v6e:16x16", 2),
    ("v5e:8x8", 1),
    ("v5p:2x2x4", 1),
    ("v6e:8x8", 1),
    ("v6e:4x4", 1),
    ("v5p:2x2x1", 1),
    ("v6e:2x2", 1),
    ("v5e:2x2", 1),
)
"""In the order of their compilation."""
BY_HAND = {
    ("v5e:16x16", 1, 2048): dict(fsdp=64, tensor=4),
    ("v5p:4x4x4", 1, 2048): dict(fsdp=32, tensor=2),
}
"""What somebody who reads docs/meshes.md and configs/paper.py would take."""
DECODING = (("v5e:4x4", dict(data=4, tensor=4), Decoding(4, 131072)),)


OTHERS = ("mlra_2", "mla", "gla_2", "gqa")
"""Models beside MLRA-4, which has no name in its rows."""
COMPARED = (("v5e:16x16", 1, 2048), ("v5p:4x4x4", 1, 32768))
"""Of the others, compiled first."""


def experiment(tokens: int, slices: int, model: str | None = None) -> Experiment:
    sequences = max(2**20 // tokens, 32 * slices)
    model = preset(model or "mlra_4", context_length=tokens)
    return Experiment(model=model, data=DataSettings(source="x", global_batch=sequences))


def of_row(row: Row) -> Experiment:
    """The experiment whose training step a row is of."""
    run = experiment(row["tokens"], row["slices"], row.get("model"))
    return dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, remat=row["remat"]),
        data=dataclasses.replace(run.data, accumulate=row["accumulate"]),
        mesh=MeshSettings(**row["mesh"]),
        loss_chunk=row["loss_chunk"],
    )


def keys() -> Iterator[tuple]:
    """Of all rows, in the order of their compilation: `KEY`'s values."""
    for name, _, step in DECODING:
        yield name, 1, None, f"{step.rows}x{step.positions}", None, None
    steps = [(name, slices, tokens) for name, slices in SLICES for tokens in (2048, 32768)]
    for step in steps:
        yield *step, None, None, None
        if step in BY_HAND:
            yield *step, None, True, None
    for step in (*COMPARED, *(step for step in steps if step not in COMPARED)):
        for model in OTHERS:
            yield *step, None, None, model


def made(key: tuple, cache: Path | None, say: Callable[[str], None], compiled: bool) -> Row:
    name, slices, tokens, decode, by_hand, model = key
    where = topology.describe(name, slices)
    if not compiled:
        where = where.by_formula()
    if decode:
        [(mesh, step)] = [(m, s) for n, m, s in DECODING if n == name]
        run = fitted(experiment(2048, 1), all_axes(mesh), where, step)
        return report.row(plan(run, where, say, cache, step))
    run, named = experiment(tokens, slices, model), dict(model=model) if model else {}
    if by_hand:
        hand = fitted(run, all_axes(BY_HAND[name, slices, tokens]), where)
        return report.row(plan(hand, where, say, cache)) | dict(by_hand=True)
    try:
        return report.row(search(run, where, say, cache, keep=1)[0]) | named
    except ConfigError as error:
        by = "compiler" if compiled else "formula"
        found = dict(topology=name, slices=slices, tokens=tokens, by=by, fits=False) | named
        return found | dict(sequences=run.data.global_batch, reason=str(error))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="make the rows of this topology anew")
    parser.add_argument("--compile", type=int, default=1000, help="so many at most")
    parser.add_argument("--print", action="store_true", help="print the table only")
    parser.add_argument("--draw", type=Path, help="draw a slice's plans into this file only")
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/mlra_jax/plans").expanduser())
    flags = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    rows = {tuple(row.get(part) for part in KEY): row for row in stored}
    if flags.draw:
        return draw(flags.draw, flags.cache)
    if flags.print:
        return print("\n".join((*markdown(rows.values()), "", *models(rows))))
    say = lambda line: print(line, flush=True)
    missing = [key for key in keys() if key not in rows]
    for i, key in enumerate(missing, 1):
        say(f"by formula, {i} of {len(missing)}: {' '.join(str(part) for part in key if part)}")
        rows[key] = made(key, None, lambda line: None, compiled=False)
    write(rows)
    waiting = [k for k in keys() if rows[k]["by"] == "formula" or k[0] == flags.only]
    waiting = [key for key in waiting if flags.only in (None, key[0])][: flags.compile]
    for i, key in enumerate(waiting, 1):
        say(f"row {i} of {len(waiting)}: {' '.join(str(part) for part in key if part)}")
        rows[key] = made(key, flags.cache, say, compiled=True)
        write(rows)


def draw(path: Path, cache: Path) -> None:
    """Search and hand for the first slice of `BY_HAND`, compiled where the cache has them not."""
    name, slices, tokens = key = next(iter(BY_HAND))
    where, run = topology.describe(name, slices), experiment(tokens, slices)
    found = search(run, where, print, cache, keep=1)
    hand = plan(fitted(run, all_axes(BY_HAND[key]), where), where, print, cache)
    report.draw([*found, hand], path)


def write(rows: dict[tuple, Row]) -> None:
    with whole_file(RESULTS) as file:
        json.dump(sorted(rows.values(), key=order), file, indent=1)
        file.write("\n")


def order(row: Row) -> tuple:
    place = row["topology"][:3], chips_of(row), bool(row.get("by_hand"))
    return row.get("model") or "", bool(row.get("decode")), row.get("tokens", 0), *place


def chips_of(row: Row) -> int:
    return row["slices"] * math.prod(map(int, row["topology"].partition(":")[2].split("x")))


def models(rows: dict[tuple, Row]) -> Iterator[str]:
    """All models beside each other: thousands of tokens/s, GiB of a device."""
    yield f"| slice | tokens | mlra_4 | {' | '.join(OTHERS)} |"
    yield f"|---|---|{'---|' * (1 + len(OTHERS))}"
    for row in rows.values():
        name, slices, tokens, decode, by_hand, model = (row.get(part) for part in KEY)
        if decode or by_hand or model:
            continue
        found = [rows[name, slices, tokens, None, None, other] for other in (None, *OTHERS)]
        cells = " | ".join(map(cell, found))
        yield f"| {f'{slices} x ' if slices > 1 else ''}{name} | {tokens:,} | {cells} |"


def cell(row: Row) -> str:
    if not row["fits"]:
        return "nothing fits"
    size = sum(row["memory"].values()) / 2**30
    rate = row["tokens_per_second"] / 1e3
    text = f"{rate:,.{0 if rate >= 100 else 1}f} ({size:.1f})"
    return f"**{text}**" if row["by"] == "compiler" else text


def markdown(rows: Any) -> Iterator[str]:
    """MLRA-4, all that is known."""
    yield "| slice | a step | mesh, form | GiB of | s a step | tokens/s | bound by | by |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in (row for row in rows if not row.get("model")):
        slices = f"{row['slices']} x " if row["slices"] > 1 else ""
        step = row.get("decode") or f"{row['sequences']} x {row['tokens']}"
        first = f"| {slices}{row['topology']} | {step.replace('x', ' x ').replace('  ', ' ')} |"
        if not row["fits"]:
            yield f"{first} nothing fits | | | | | {row['by']} |"
            continue
        mesh = " ".join(f"{axis}={n}" for axis, n in row["mesh"].items())
        form = f", {row['remat']}, {row['accumulate']} part(s)" if "remat" in row else ""
        hand = " (by hand)" if row.get("by_hand") else ""
        chip = chips.find(row["topology"].partition(":")[0])
        size = sum(row["memory"].values()) / 2**30
        times = row["times"]
        bound = max(times, key=times.get)
        yield (
            f"{first} {mesh}{form}{hand} | {size:.1f} of {chip.memory / 2**30:.0f} | "
            f"{max(times.values()):.3g} to {sum(times.values()):.3g} | "
            f"{row['tokens_per_second']:,} | {bound} | {row['by']} |"
        )


if __name__ == "__main__":
    main()
