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
import contextlib
import io
import json
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

import jax
import numpy as np

from mlra_jax.data import token_file
from tests.docs import table
from tests.docs.blocks import ROOT, Block, Command, blocks, commands, module, pages
from tests.docs.checking import DocsError, as_run, check_block, kind, substituted, why_not


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.docs", description=__doc__)
    parser.add_argument("pages", nargs="*", type=Path, help="only these; default: all")
    flags = parser.parse_args()
    began, listed, failed, ran = time.perf_counter(), [], [], 0
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
                for place, text, reason, work in pieces(block, names):
                    start = time.perf_counter()
                    try:
                        check_block(block)
                        if reason:
                            listed.append(f"{place}  {reason}: {text}")
                            continue
                        with contextlib.chdir(workplace):
                            work()
                        ran += 1
                        print(f"{place}  {time.perf_counter() - start:.1f} s  {text}", flush=True)
                    except DocsError as error:
                        failed.append(str(error))
                        print(f"FAILED {error}", flush=True)
    print("\nNot run here, program, flags and imports checked:", *listed, sep="\n  ")
    seconds = time.perf_counter() - began
    print(f"\n{ran} run, {len(listed)} not run here, {len(failed)} failed, {seconds:.0f} s")
    return 1 if failed else 0


def pieces(block: Block, names: dict):
    """(place, what, why it is not run or None, the work) of each command or Python block."""
    match kind(block):
        case "python":
            first = block.text.partition("\n")[0]
            yield block.place, first, table.PYTHON_NOT_RUN.get(first), lambda: python(block, names)
        case "shell":
            for command in commands(block):
                work = lambda command=command: shell(command)
                yield command.place, command.text, why_not(command), work


def python(block: Block, names: dict) -> None:
    """In the names of its page, with tracebacks that name the page's lines."""
    if len(names) == 1:
        exec(table.PRELUDES.get(block.page, ""), names)
    code = "\n" * block.line + substituted(block.text)
    quietly(block.place, lambda: exec(compile(code, block.page, "exec"), names))


def shell(command: Command) -> None:
    name, arguments = as_run(command)
    for argument in arguments:
        flag, _, value = argument.partition("=")
        path = Path(value).resolve()
        # What another command or page made there is in the way; the same command goes on with it.
        if flag in ("--workdir", "--destination") and _made.get(path) != arguments:
            shutil.rmtree(path, ignore_errors=True)
            _made[path] = arguments
    quietly(command.place, lambda: module(name).main(arguments))


_made: dict[Path, list[str]] = {}


def quietly(place: str, work):
    """DocsError with what was printed if the work fails."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            result = work()
    except SystemExit as stop:
        result = stop.code
    except Exception:
        raise DocsError(f"{place}: {said.getvalue()}\n{traceback.format_exc()}") from None
    if isinstance(result, int) and result:
        raise DocsError(f"{place}: ended with {result}: {said.getvalue()}")
    return result


def prepare(folder: Path) -> None:
    """What the pages' commands read, by the names that they give it."""
    folder.mkdir()
    for name in ("train.py", "decode.py", "configs", "studies", "benchmarks", "docs", "README.md"):
        (folder / name).symlink_to(ROOT / name)
    text = (ROOT / "README.md").read_text()
    for name in ("book.txt", "my_text.txt", "books/one.txt", "books/two.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "prompts.txt").write_text("The \nA ")
    (folder / "fineweb.jsonl").write_text(json.dumps({"text": text}) + "\n")
    shutil.copy(ROOT / "configs/quickstart.py", folder / "my.py")
    tokens = np.frombuffer(text.encode(), np.uint8).astype(np.uint16)
    for name in ("fineweb_val_000000", "fineweb/a_val_000000", "fineweb/a_train_000001"):
        (folder / name).parent.mkdir(exist_ok=True)
        token_file.write(folder / f"{name}.bin", tokens)
    for name in ("wikipedia", "c4"):
        token_file.write(folder / f"{name}.bin", tokens)
    train = "python train.py --config=configs/quickstart.py --workdir=runs/mlra_4"
    export = "python -m mlra_jax.export --checkpoint=runs/mlra_4 --destination=weights/mlra_4"
    convert = "python -m mlra_jax.convert --source=weights/mlra_4 --destination=models/mlra_4"
    with contextlib.chdir(folder):
        for line in (train, export, convert):
            shell(Command("tests/docs/__main__.py", 0, tuple(line.split())))
        for copy in ("runs/mine", "runs/quickstart"):
            shutil.copytree("runs/mlra_4", copy)
        for copy in ("models/small", "DIR"):
            shutil.copytree("models/mlra_4", copy)


if __name__ == "__main__":
    sys.exit(main())
