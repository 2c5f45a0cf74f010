"""Times whole decoding steps of the published 2.9B models beside what their bytes take.

    python -m benchmarks.decode [--models="mlra_4,mla mlra_4,mla:tensor=4 mla:context=4 gqa:1/8"]
                                [--mesh=tensor=2] [--points="8x128K,1x2K;1x128K,32x16K"]
                                [--tokens_per_call=1,8] [--profile[=1x2K]] [--first_token]
                                [--processes=14] [--output=FILE.json] [--figures=FOLDER] [--report]
    python -m benchmarks.decode --input=FILE.json --figures=FOLDER --report [--points=1x2K,8x128K]

A step is the compiled program that `generate` runs: embedding, layers, head, greedy draw; weights
and caches are random, which does not change the time. Steps follow each other as they do there, the
host one ahead; the median of several runs of 32 counts. The floor is one device's weights and cache
over the read bandwidth measured in the same process.

Each model is measured on one device or, behind a colon, on a mesh; `1/8` is one device's share of a
tensor axis of eight (`1/4x2`: also of a context axis of two) on one device, its weights and its
cache, without what devices exchange.

`mlra_4@1x2K,8x2K`, or behind a mesh, is a model at points of its own.

Each model on its mesh is a process, once for the points up to each `;`. `--processes` of them start
side by side and compile; then they measure in turn, in their order, and at the same time only where
they have different GPUs.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
from tqdm import tqdm

from benchmarks.decode_report import figures, report
from benchmarks.decode_worker import Part
from benchmarks.models import model_config, parse_points
from mlra_jax import sharding
from mlra_jax.command import Parser, run
from mlra_jax.files import whole_file

MODELS = "mlra_4,mlra_2,mla,gla_2,gqa"
POINTS = "1x2K,1x16K,1x128K,8x2K,8x128K,32x2K,32x32K,128x1K,128x4K"
WORKER = (sys.executable, "-m", "benchmarks.decode_worker")


class Process:
    """The process of a part, started; `gpus` are those that it sees, all if none are named."""

    def __init__(self, part: Part, gpus: Sequence[str], patience: float):
        self.part, self.gpus, self._patience = part, gpus, patience
        self._left, self._silent = list(part.points), False
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [*WORKER, json.dumps(dataclasses.asdict(part))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            # Ctrl-C and what `timeout` sends go to a group: this one is told, and ends the others.
            start_new_session=True,
            env=_environment() | ({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}),
        )

    def prepare(self, compiled: Callable[[], object]) -> dict:
        """Waits until all is compiled; what the process says of its devices, if it came so far."""
        for message in self._messages():
            if "ready" in message:
                return message["ready"]
            compiled()
        return {}

    def measure(self, add: Callable[[dict], None]) -> None:
        """Gives it its turn and waits for its end; each point becomes a row, whatever happens."""
        with contextlib.suppress(BrokenPipeError):  # It has ended; below is why.
            os.write(self._process.stdin.fileno(), b"\n")
        for message in self._messages():
            row = message["row"]
            add(row)
            self._left.remove((row["batch"], row["context"], row["tokens_per_call"]))
        if self._left:
            error = self._failure()
            for point in self._left:
                add(self.part.row(point) | dict(error=error))

    def close(self) -> None:
        """Ends it, whatever it does; what it has not measured is no failure."""
        self._left.clear()
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _messages(self) -> Iterator[dict]:
        while True:
            timer = threading.Timer(self._patience, self._give_up)
            timer.start()
            line = self._process.stdout.readline()
            timer.cancel()
            if not line.endswith("\n"):  # Nothing, or what a process that ended was saying.
                self._process.wait()
                return
            yield json.loads(line)

    def _give_up(self) -> None:
        self._silent = True
        self._process.kill()

    def _failure(self) -> str:
        if self._silent:
            return f"nothing done in {self._patience:g} s (--patience)"
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()]
        return f"the process ended with {self._process.returncode}: {''.join(lines[-1:])}"[:300]


def _environment() -> dict[str, str]:
    """That of the processes: they keep compiled programs where this one was told to, and only this
    one shows bars."""
    names = "enable_compilation_cache", "compilation_cache_dir"
    names += ("persistent_cache_min_compile_time_secs",)
    told = {f"JAX_{name.upper()}": getattr(jax.config, f"jax_{name}") for name in names}
    told = {name: str(value) for name, value in told.items() if value is not None}
    return os.environ | told | {"TQDM_DISABLE": "1"}


def visible_gpus() -> list[str]:
    """What CUDA calls the GPUs that JAX would take; empty where it takes none."""
    if os.environ.get("JAX_PLATFORMS", "cuda").split(",")[0] not in ("cuda", "gpu"):
        return []
    if named := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return named.split(",")
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    return [str(i) for i, _ in enumerate(listed.stdout.splitlines())]


def placed(parts: Sequence[Part], gpus: Sequence[str]) -> list[Sequence[str]]:
    """The GPUs of each part: as many as its mesh has, spread over all."""
    begin, places = 0, []
    for part in parts:
        count = math.prod(sharding.mesh_sizes(part.mesh).values())
        begin = -(-begin // count) * count
        places.append([gpus[(begin + i) % len(gpus)] for i in range(min(count, len(gpus)))])
        begin += count
    return places


def measure_all(
    parts: Sequence[Part],
    processes: int,
    patience: float,
    know: Callable[[dict], object],
    add: Callable[[dict], None],
) -> None:
    """Measures all parts, so many processes at a time.

    Args:
      know: takes what a process says of its devices.
      add: takes each row, from several threads.
    """
    gpus = visible_gpus()
    idle = collections.defaultdict(threading.Lock)
    for wave in itertools.batched(parts, processes):
        began = time.perf_counter()
        places = placed(wave, gpus) if gpus else [()] * len(wave)
        pool = concurrent.futures.ThreadPoolExecutor(len(wave))
        with pool, contextlib.ExitStack() as stack:
            started = [
                stack.enter_context(contextlib.closing(Process(part, place, patience)))
                for part, place in zip(wave, places, strict=True)
            ]
            total = sum(len(part.points) for part in wave)
            with tqdm(total=total, desc="compile", file=sys.stderr, leave=False) as bar:
                for said in pool.map(lambda process: process.prepare(bar.update), started):
                    know(said)
            seconds = time.perf_counter() - began
            tqdm.write(f"{total} points of {len(wave)} processes compiled in {seconds:.0f} s")
            turns = []
            for process in started:
                mine = [idle[gpu] for gpu in process.gpus or ("all",)]
                for lock in mine:
                    lock.acquire()
                turns.append(pool.submit(_turn, process, add, mine))
            for turn in turns:
                turn.result()


def _turn(process: Process, add: Callable[[dict], None], locks: Sequence[threading.Lock]) -> None:
    try:
        process.measure(add)
    finally:
        for lock in locks:
            lock.release()


def line(row: dict) -> str:
    where = f"1/{row['share']} of it" if row["share"] else row["mesh"] or "one device"
    name = f"{row['model']:8} {where:20} {row['batch']:4} x {row['context']:7}"
    name += f" by {row['tokens_per_call']}" if row["tokens_per_call"] > 1 else ""
    if "error" in row:
        return f"{name}  {row['error'][:120]}"
    text = (
        f"{name} {row['milliseconds']:8.3f} ms {row['floor']:8.3f} floor {row['ratio']:5.2f}x "
        f"{row['tokens_per_second']:9.0f} tok/s  {row['peak_GB']:6.2f} GB  "
        f"compile {row['compile_seconds']:5.1f} s"
    )
    if "kernels" in row:
        text += f"  {row['kernels']:.0f} kernels {row['graphs']:.1f} graphs"
        text += f" {row['exchanging']:.0%} exchanging"
    if "first_token_seconds" in row:
        text += f"  first token {row['first_token_seconds']:.2f} s"
    return text


def parts_of(flags: argparse.Namespace) -> list[Part]:
    """What the flags ask for, the points up to a `;` of all models first.

    Raises ValueError, or a subclass, for what is no model, mesh, share or point.
    """
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", flags.tokens_per_call):
        raise ValueError(f"--tokens_per_call={flags.tokens_per_call}: give numbers, as in 1,8")
    if flags.processes < 1:
        raise ValueError(f"--processes={flags.processes}: give at least 1")
    calls = [int(n) for n in flags.tokens_per_call.split(",")]
    groups = [parse_points(group) for group in (flags.points or POINTS).split(";")]
    profiled = parse_points("" if flags.profile == "all" else flags.profile)
    parts: list[list[Part]] = [[] for _ in groups]
    for word in flags.models.split():
        place, _, own = word.partition("@")
        names, _, where = place.partition(":")
        ways = re.fullmatch(r"1/([1-9]\d*(x[1-9]\d*)?)", where)
        mesh, share = ("", ways[1]) if ways else (where or flags.mesh, "")
        sharding.mesh_sizes(mesh)
        for name in names.split(","):
            model_config(name, share)
            for mine, points in zip(parts, [parse_points(own)] if own else groups, strict=False):
                part = Part(
                    name,
                    mesh,
                    share,
                    [(*point, n) for point in points for n in calls],
                    points if flags.profile == "all" else profiled,
                    flags.first_token,
                    flags.tiny,
                )
                mine.append(part)
    return sum(parts, [])


def measured(flags: argparse.Namespace, command: Sequence[str]) -> dict:
    """All points that the flags ask for, printed as they come, written in the order asked."""
    parts = parts_of(flags)
    if flags.output and not flags.output.absolute().parent.is_dir():
        raise ValueError(f"--output={flags.output}: its folder does not exist; make it first")
    named = [flag for flag in command if not flag.startswith(("--output", "--figures"))]
    result: dict = dict(command=shlex.join(["python", "-m", "benchmarks.decode", *named]), rows=[])
    adding = threading.Lock()
    asked = [part.row(point) for part in parts for point in part.points]
    place_of = {tuple(row.values()): place for place, row in enumerate(asked)}
    with tqdm(total=len(asked), desc="points", file=sys.stderr) as bar:

        def add(row):
            with adding:
                result["rows"].append(row)
                result["rows"].sort(key=lambda row: place_of[tuple(row[key] for key in asked[0])])
                tqdm.write(line(row))
                bar.update()
                if flags.output:
                    with whole_file(flags.output) as file:
                        file.write(json.dumps(result, indent=1) + "\n")

        measure_all(parts, flags.processes, flags.patience, result.update, add)
    return result


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        "benchmarks.decode", __doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.prog = "python -m benchmarks.decode"  # It is not decode.py.
    add = parser.add_argument
    add("--models", default=MODELS, help="MODEL,MODEL[:MESH|:1/WAYS][@POINTS], with spaces between")
    add("--mesh", default="", help="of the models without one, as in tensor=2,context=2")
    add("--points", help=f"batch x context, commas between, a ; before what can wait: {POINTS}")
    add("--tokens_per_call", default="1", help="tokens of a program, commas between")
    add("--profile", nargs="?", default="", const="all", help="points whose kernels are counted")
    add("--first_token", action="store_true", help="also prefill each context")
    add("--processes", type=int, default=1, help="that compile side by side")
    add("--patience", type=float, default=600, help="seconds after which one that hangs is ended")
    add("--tiny", action="store_true", help="one narrow layer: does it run?")
    add("--output", type=Path, help="JSON, written after every point")
    add("--figures", type=Path, help="folder for figures of all points")
    add("--report", action="store_true", help="print the tables in Markdown")
    add("--input", type=Path, help="JSON of an earlier run to draw; nothing is measured")
    flags = parser.parse_args(argv)

    def work():
        result = (
            json.loads(flags.input.read_text())
            if flags.input
            else measured(flags, sys.argv[1:] if argv is None else argv)
        )
        runs = result if isinstance(result, list) else [result]
        if flags.figures:
            figures(runs, flags.figures, (flags.input or flags.output or Path("decode")).stem)
        if flags.report:
            print(report(runs, parse_points((flags.points or "").replace(";", ","))))

    return run(parser, work, f"{flags.output} has what was measured" if flags.output else "")


if __name__ == "__main__":
    sys.exit(main())
