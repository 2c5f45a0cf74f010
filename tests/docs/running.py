"""Runs the blocks of a page on tiny sizes, in a folder that has what the pages' commands read."""

import contextlib
import dataclasses
import glob
import io
import json
import shutil
import subprocess
import time
import traceback
from pathlib import Path

import numpy as np

from mlra_jax.data import token_file
from tests.docs import table
from tests.docs.blocks import ROOT, Block, Command, commands, module
from tests.docs.checking import DocsError, as_run, kind, substituted, why_not


@dataclasses.dataclass
class Done:
    ran: int = 0
    failed: int = 0
    listed: list[str] = dataclasses.field(default_factory=list)


def run_block(block: Block, names: dict, workplace: Path, done: Done) -> None:
    """DocsError if one of its pieces fails."""
    for place, text, reason, work in pieces(block, names):
        if reason:
            done.listed.append(f"{place}  {reason}: {text}")
            continue
        began = time.perf_counter()
        with contextlib.chdir(workplace):
            work()
        done.ran += 1
        print(f"{place}  {time.perf_counter() - began:.1f} s  {text}", flush=True)


def pieces(block: Block, names: dict):
    """(place, what, why it is not run or None, the work) of each command, Python block, output."""
    match kind(block):
        case "python":
            first = block.text.partition("\n")[0]
            yield block.place, first, table.PYTHON_NOT_RUN.get(first), lambda: python(block, names)
        case "output":
            yield block.place, "the output of the block before", None, lambda: compare(block, names)
        case "shell":
            for command in commands(block):
                work = lambda command=command: names.update(__output__=shell(command))
                yield command.place, command.text, why_not(command), work


def python(block: Block, names: dict) -> None:
    """In the names of its page, with tracebacks that name the page's lines."""
    if "__prelude__" not in names:
        names["__prelude__"] = table.PRELUDES.get(block.page, "")
        exec(names["__prelude__"], names)
    code = "\n" * block.line + substituted(block.text)
    work = lambda: exec(compile(code, block.page, "exec"), names)
    names["__output__"] = quietly(block.place, work)


def compare(block: Block, names: dict) -> None:
    """The lines that a page shows as output were printed by what stands before, in this order."""
    printed = names.get("__output__", "").splitlines()
    rest = iter([line.rstrip() for line in printed])
    for line in block.text.splitlines():
        if line.strip() != "..." and line.rstrip() not in rest:
            raise DocsError(f"{block.place}: not printed: {line}\n" + "\n".join(printed))


def shell(command: Command) -> str:
    """What it printed."""
    if command.is_of_files:
        return of_files(command)
    name, arguments = as_run(command)
    for argument in arguments:
        flag, _, value = argument.partition("=")
        path = Path(value).resolve()
        # What another command or page made there is in the way; the same command goes on with it.
        if flag in ("--workdir", "--destination") and _made.get(path) != arguments:
            shutil.rmtree(path, ignore_errors=True)
            _made[path] = arguments
    return quietly(command.place, lambda: module(name).main(arguments))


def of_files(command: Command) -> str:
    """Patterns are expanded as the shell does."""
    words = [sorted(glob.glob(word)) or [word] for word in command.words]
    done = subprocess.run(sum(words, []), capture_output=True, text=True)
    if done.returncode:
        raise DocsError(f"{command.place}: {done.stderr.strip()}")
    return done.stdout


_made: dict[Path, list[str]] = {}


def quietly(place: str, work) -> str:
    """What was printed on stdout; DocsError with all of it if the work fails."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = work()
    except SystemExit as stop:
        code = stop.code
    except Exception:
        said = err.getvalue() + traceback.format_exc()
        raise DocsError(f"{place}: {out.getvalue()}\n{said}") from None
    if code:
        raise DocsError(f"{place}: ended with {code}: {out.getvalue()}{err.getvalue()}")
    return out.getvalue()


def prepare(folder: Path) -> None:
    """What the pages' commands read, by the names that they give it."""
    folder.mkdir()
    # Copies: what a page's commands write there stays there.
    for name in ("configs", "studies/configs"):
        shutil.copytree(ROOT / name, folder / name)
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        (folder / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(path, folder / path.relative_to(ROOT))
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
    mla = "python train.py --config=configs/quickstart.py --config.model.attention.branches=1 "
    mla += "--workdir=runs/mla"
    export = "python -m mlra_jax.export --checkpoint=runs/mlra_4 --destination=weights/mlra_4"
    convert = "python -m mlra_jax.convert --source=weights/mlra_4 --destination=models/mlra_4"
    with contextlib.chdir(folder):
        for line in (train, mla, export, convert):
            shell(Command("tests/docs/__main__.py", 0, tuple(line.split())))
        for copy in ("runs/mine", "runs/quickstart"):
            shutil.copytree("runs/mlra_4", copy)
        for copy in ("models/small", "DIR"):
            shutil.copytree("models/mlra_4", copy)
