"""The commands of `docs/first_hour.md` in a fresh clone, on two cores: what each of them takes.

`python -m benchmarks.first_hour [--minutes=10]`. Fails if one fails, or if all take longer. Seconds
of the processor are those of all cores together: half of them is what two idle cores need.
"""

import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def commands(page: str) -> list[str]:
    """The lines of the page's bash blocks."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page, re.M | re.S)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def timed(command: str, folder: Path) -> tuple[float, float]:
    """(seconds, seconds of the processor) of a command, which must not fail."""
    spent = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    began, before = time.monotonic(), spent()
    print(f"\n$ {command}", flush=True)
    # What this environment says of Python must not reach the clone's own.
    names = ("PYTHONPATH", "VIRTUAL_ENV", "MAKEFLAGS")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    # Nothing is downloaded or compiled already.
    environment["XDG_CACHE_HOME"] = str(folder / ".cache")
    done = subprocess.run(command, shell=True, cwd=folder, env=environment)
    if done.returncode:
        sys.exit(f"exit code {done.returncode}: {command}")
    return time.monotonic() - began, spent() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=10.0, help="that all may take")
    flags = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    with tempfile.TemporaryDirectory() as place:
        clone = Path(place) / "mlra_jax"
        rows = [("git clone", *timed(f"git clone --quiet '{ROOT}' '{clone}'", Path(place)))]
        for command in commands((clone / "docs" / "first_hour.md").read_text()):
            rows.append((command, *timed(command, clone)))
    total = ("all", sum(row[1] for row in rows), sum(row[2] for row in rows))
    print(f"\n{'command':50}{'seconds':>10}{'processor':>11}")
    for command, seconds, processor in (*rows, total):
        print(f"{command[:48]:50}{seconds:10.1f}{processor:11.1f}")
    if total[1] > 60 * flags.minutes:
        sys.exit(f"longer than {flags.minutes:g} minutes")


if __name__ == "__main__":
    main()
