"""The table of plans: what the 2.9B MLRA-4 takes of TPU slices of 4 to 512 chips.

    python -m benchmarks.plan [--only=v5e:16x16] [--cache=DIR]

A row is the first that fits of a search, for 2**20 tokens a step (2**21 of 32K tokens on two
slices): 512 x 2048 or 32 x 32768. Each takes the compiler one to four minutes on a core; rows that
the file has stay, unless --only names their topology. `benchmarks/results/plan.json` has them.
"""

import argparse
import json
import os
from pathlib import Path

import jax

from mlra_jax.config import ConfigError, preset
from mlra_jax.files import whole_file
from mlra_jax.plan import report, topology
from mlra_jax.plan.planning import fitted, plan
from mlra_jax.plan.search import search
from mlra_jax.sharding import all_axes
from mlra_jax.training.settings import DataSettings, Experiment

RESULTS = Path(__file__).parent / "results" / "plan.json"
SLICES = (
    ("v5e:16x16", 1),
    ("v5p:4x4x4", 1),
    ("v5e:16x16", 2),
    ("v5p:4x8x8", 1),
    ("v6e:16x16", 1),
    ("v5p:4x8x8", 2),
    ("v6e:16x16", 2),
    ("v5e:4x4", 1),
    ("v5e:8x8", 1),
    ("v5p:2x2x4", 1),
    ("v6e:8x8", 1),
    ("v6e:4x4", 1),
    ("v5p:2x2x1", 1),
    ("v6e:2x2", 1),
    ("v5e:2x2", 1),
)
BY_HAND = {
    ("v5e:16x16", 1, 2048): dict(fsdp=64, tensor=4),
    ("v5p:4x4x4", 1, 2048): dict(fsdp=32, tensor=2),
}
"""What somebody who reads docs/meshes.md and configs/paper.py would take."""


def experiment(tokens: int, slices: int) -> Experiment:
    sequences = max(2**20 // tokens, 32 * slices)
    model = preset("mlra_4", context_length=tokens)
    return Experiment(model=model, data=DataSettings(source="x", global_batch=sequences))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="make the rows of this topology anew")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 32768])
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/mlra_jax/plans").expanduser())
    flags = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    say = lambda line: print(line, flush=True)
    for tokens in flags.tokens:
        for name, slices in SLICES:
            if flags.only and name != flags.only:
                continue
            key = (name, slices, tokens)
            old = [row for row in rows if (row["topology"], row["slices"], row["tokens"]) == key]
            if old and not flags.only:
                continue
            rows = [row for row in rows if row not in old] + made(key, flags.cache, say)
            with whole_file(RESULTS) as file:
                json.dump(sorted(rows, key=order), file, indent=1)


def made(key: tuple[str, int, int], cache: Path, say) -> list[dict]:
    """The rows of a slice: that of the search, and that of a mesh chosen by hand if any."""
    name, slices, tokens = key
    where, run = topology.describe(name, slices), experiment(tokens, slices)
    say(f"{slices} x {name}, {tokens} tokens, load {os.getloadavg()[0]:.0f}")
    rows = []
    try:
        rows.append(report.row(search(run, where, say, cache, keep=1)[0]))
    except ConfigError as error:
        say(str(error))
        empty = dict(topology=name, slices=slices, sequences=run.data.global_batch, tokens=tokens)
        rows.append(empty | dict(fits=False, reason=str(error)))
    if key in BY_HAND:
        hand = fitted(run, all_axes(BY_HAND[key]), where)
        rows.append(report.row(plan(hand, where, say, cache)) | dict(by_hand=True))
    return rows


def order(row: dict) -> tuple:
    return row["tokens"], row["topology"][:3], chips(row), row.get("by_hand", False)


def chips(row: dict) -> int:
    size = row["slices"]
    for n in row["topology"].partition(":")[2].split("x"):
        size *= int(n)
    return size


if __name__ == "__main__":
    main()
