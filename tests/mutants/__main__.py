"""Plants one fault after the other in a copy of the tree and runs the tests that must notice.

python -m tests.mutants [--gate] [--jobs=N] [NAME ...]
"""

import argparse
import collections
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.mutants.faults import ROOT, Fault, FaultError, load

_SECONDS = 600
_NOTICED, _PASSED = 1, 0


def copy_tree(destination: Path) -> Path:
    """The files that git knows or would add, as they are now."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(listed, cwd=ROOT, text=True).split("\0"):
        if name and (ROOT / name).is_file():
            (destination / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, destination / name)
    return destination


def outcome(fault: Fault, tree: Path) -> str:
    """`caught`, `survived: TEST`, or `error: …`; the tree is as before afterwards."""
    path = tree / fault.file
    text = path.read_text()
    # Written bytecode could outlive the fault: it is compared by size and whole seconds.
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    path.write_text(fault.planted(text))
    try:
        for test in fault.tests:
            pytest = ["-m", "pytest", "-x", "-n", "0", "-p", "no:cacheprovider", test]
            try:
                done = subprocess.run(
                    [sys.executable, *pytest],
                    cwd=tree,
                    env=environment,
                    capture_output=True,
                    text=True,
                    timeout=_SECONDS,
                )
            except subprocess.TimeoutExpired:
                return f"error: {test} took more than {_SECONDS} s"
            if done.returncode == _PASSED and " passed" not in done.stdout:
                return f"error: {test} ran nothing here"
            if done.returncode == _PASSED:
                return f"survived: {test}"
            if done.returncode != _NOTICED:
                last = (done.stdout + done.stderr).strip().splitlines()[-1:]
                return f"error: {test}: pytest ended with {done.returncode}: {''.join(last)}"
        return "caught"
    finally:
        path.write_text(text)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these faults or rooms")
    parser.add_argument("--gate", action="store_true", help="only the quick ones of the gate")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="at a time")
    flags = parser.parse_args()
    try:
        faults = [f for f in load() if f.gate or not flags.gate]
    except FaultError as error:
        print(f"mutants: {error}", file=sys.stderr)
        return 2
    if unknown := set(flags.names) - {n for f in faults for n in (f.name, f.room)}:
        print(f"mutants: no fault or room {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    if flags.names:
        faults = [f for f in faults if {f.name, f.room} & set(flags.names)]

    results: dict[Fault, str] = {}
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        trees: queue.Queue[Path] = queue.Queue()
        for job in range(flags.jobs):
            trees.put(copy_tree(Path(folder) / str(job)))

        def judge(fault: Fault) -> None:
            tree, began = trees.get(), time.monotonic()
            results[fault] = result = outcome(fault, tree)
            trees.put(tree)
            seconds = time.monotonic() - began
            print(
                f"[{len(results)}/{len(faults)}] {fault.room + '/' + fault.name:60} "
                f"{seconds:5.1f} s  {result}",
                flush=True,
            )

        with ThreadPoolExecutor(flags.jobs) as pool:
            list(pool.map(judge, faults))

    print(f"\n{'room':14}{'caught':>8}{'survived':>10}{'error':>7}")
    for room in sorted({f.room for f in faults}):
        kinds = [results[f].partition(":")[0] for f in faults if f.room == room]
        count = collections.Counter(kinds)
        print(f"{room:14}{count['caught']:8}{count['survived']:10}{count['error']:7}")
    missed = [f for f in faults if results[f] != "caught"]
    for fault in missed:
        print(f"{fault.room}/{fault.name}: {fault.breaks}\n    {results[fault]}")
    print(f"{len(faults) - len(missed)} of {len(faults)} planted faults caught")
    return 1 if missed or not faults else 0


if __name__ == "__main__":
    sys.exit(main())
