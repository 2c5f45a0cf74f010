"""Checks and times absorbed decode on one Hopper GPU, beside what the chip can do.

    python -m benchmarks.absorbed_decode                 checks, times, table, JSON, two figures
    python -m benchmarks.absorbed_decode --quick         correctness only, small sizes
    python -m benchmarks.absorbed_decode --input=JSON    draws the figures of an earlier run

A point is timed as a jitted loop whose step feeds its output to the next step as queries, over as
many different caches as it takes to outgrow the L2 cache. Loops run for a few milliseconds with a
pause between them, so that the power limit does not decide the result; the median counts, and the
time of starting an empty loop is subtracted. The limits are measured in the same process.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path

import jax
from tqdm import tqdm

from benchmarks.absorbed_decode.points import (
    Point,
    bounds,
    draw,
    head_points,
    model_points,
    other_points,
    paper_points,
    quick_points,
)
from benchmarks.absorbed_decode.programs import compilations, error_of, programs
from benchmarks.absorbed_decode.report import failure_of, figures, table, targets
from benchmarks.limits import BYTES, describe, measure_limits, random_pool
from benchmarks.timing import compile_all, poison, seconds
from mlra_jax.kernels import target

_TOLERANCE = 5e-3


def measure_point(point: Point, limit: dict, pool: jax.Array, runs: dict, quick: bool) -> dict:
    """Checks and times one point; `runs` has its compiled programs with their loop steps."""
    row = dataclasses.asdict(point) | dict(bytes=point.bytes())
    row["floor_us"] = point.bytes() / limit["read"] * 1e6
    failed = {name: run for name, (run, _) in runs.items() if isinstance(run, str)}
    row |= {f"{name}_failed": reason for name, reason in failed.items()}
    if "kernel" in failed or "exact" in failed:
        return row
    q, q_rope, caches = draw(point, pool)
    rest = bounds(point)
    poison()
    result, _ = jax.block_until_ready(runs["kernel"][0](q, q_rope, caches, *rest))
    row["error"] = error_of(result, runs["exact"][0](q, q_rope, *caches[0], *rest))
    for name, (run, steps) in runs.items():
        if quick or name == "exact" or name in failed:
            continue
        call = lambda run=run: run(q, q_rope, caches, *rest)[1]
        times = seconds(call, 9 if name == "kernel" else 3)
        per_op = sorted((t - limit["start"]) / (steps * len(caches) + 1) for t in times)
        row[f"{name}_us"] = statistics.median(per_op) * 1e6
        row[f"{name}_spread_us"] = [per_op[0] * 1e6, per_op[-1] * 1e6]
    if not quick:
        row["fraction"] = row["floor_us"] / row["kernel_us"]
    return row


def measure(points: list[Point], limit: dict, pool: jax.Array, quick: bool) -> list[dict]:
    kind = jax.devices()[0].device_kind
    wanted = {point: programs(point, limit, kind, quick) for point in points}
    jobs = {}
    for point in points:
        jobs |= compilations(point, wanted[point])
    compiled = compile_all(jobs)
    rows = []
    for point in tqdm(points, desc="measure", file=sys.stderr):
        runs = {name: (compiled[point, name], n) for name, (_, n) in wanted[point].items()}
        rows.append(measure_point(point, limit, pool, runs, quick))
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.absorbed_decode", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--output", default="benchmarks/results", help="folder for JSON, figures")
    parser.add_argument("--quick", action="store_true", help="correctness only")
    parser.add_argument(
        "--only", help="only points whose group or name contains one of these, with commas between"
    )
    parser.add_argument("--input", type=Path, help="JSON of an earlier run to draw")
    options = parser.parse_args(argv)
    folder = Path(options.output)
    if options.input:
        folder.mkdir(parents=True, exist_ok=True)
        figures(json.loads(options.input.read_text()), folder)
        return 0
    device = jax.devices()[0]
    if not target.is_hopper(device):
        message = f"absorbed_decode: this benchmark needs a Hopper GPU, found {device.device_kind}"
        print(message, file=sys.stderr)
        return 1

    seed = time.time_ns() % 2**31
    pool = random_pool(seed, BYTES if not options.quick else 1 << 25)
    if options.quick:
        limit = dict(read=4.5e12)
        rows = measure(quick_points(), limit, pool, quick=True)
        print(table(rows))
    else:
        limit = measure_limits(pool)
        points = paper_points() + model_points() + head_points() + other_points()
        if options.only:
            wanted = options.only.split(",")
            points = [p for p in points if any(w in f"{p.group} {p.name}" for w in wanted)]
        rows = measure(points, limit, pool, quick=False)
        versions = dict(jax=jax.__version__, device=device.device_kind, seed=seed)
        print(table(rows))
        print()
        print(describe(limit))
        print("\n".join(targets(rows, limit)))
        folder.mkdir(parents=True, exist_ok=True)
        content = dict(versions=versions, limits=limit, rows=rows)
        (folder / "absorbed_decode.json").write_text(json.dumps(content, indent=1) + "\n")
        if any(r["group"] == "paper" for r in rows):
            figures(content, folder)
    wrong = [r for r in rows if not r.get("error", 1) < _TOLERANCE]
    for row in wrong:
        print(f"WRONG {row['group']} {row['name']} {row['cache']}: {failure_of(row)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
