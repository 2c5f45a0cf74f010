"""Runs every block of README and docs on tiny sizes, and lists those that cannot run here.

python -m tests.docs [PAGE ...]

A page's blocks run in order in a folder of its own with small files under the names that the pages
use. What is put in place of full sizes stands in `tests/docs/table.py`.
"""

import os

os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true"
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

import jax

from tests.docs.blocks import blocks, pages
from tests.docs.checking import DocsError, check_block
from tests.docs.running import Done, prepare, run_block


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.docs", description=__doc__)
    parser.add_argument("pages", nargs="*", type=Path, help="only these; default: all")
    flags = parser.parse_args()
    began, done = time.perf_counter(), Done()
    with tempfile.TemporaryDirectory() as folder:
        # Pages compile the same programs.
        jax.config.update("jax_compilation_cache_dir", f"{folder}/compiled")
        prepared = Path(folder) / "prepared"
        prepare(prepared)
        for page in [path.resolve() for path in flags.pages] or pages():
            workplace = Path(folder) / page.stem
            shutil.copytree(prepared, workplace, symlinks=True)
            names: dict = {"__name__": "__page__"}
            for block in blocks(page):
                try:
                    check_block(block)
                    run_block(block, names, workplace, done)
                except DocsError as error:
                    done.failed += 1
                    print(f"FAILED {error}", flush=True)
    print("\nNot run here; program, flags and imports were checked:", *done.listed, sep="\n  ")
    print(
        f"\n{done.ran} run, {len(done.listed)} not run here, {done.failed} failed, "
        f"{time.perf_counter() - began:.0f} s"
    )
    return 1 if done.failed else 0


if __name__ == "__main__":
    sys.exit(main())
