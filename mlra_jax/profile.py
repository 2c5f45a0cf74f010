"""What the devices do in the steps of a run, by a profile of a few of them.

    python -m mlra_jax.profile --config=configs/NAME.py [--config.key=value ...] [--steps=3]
        [--output=DIR]

The settings are those of training. The steps are a run's first ones: data, compilation and memory
are as there, and nothing is saved. DIR gets the profile for TensorBoard and for Perfetto; a table
of the time by kind is printed where the profiler sees kernels, on GPUs and TPUs.
"""

import argparse
import collections
import contextlib
import dataclasses
import re
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
from jax.profiler import ProfileData

from mlra_jax import sharding
from mlra_jax.command import Parser, run, say
from mlra_jax.storage.paths import on_disk
from mlra_jax.training.__main__ import prepared, read_settings
from mlra_jax.training.feed import Feed, load_data
from mlra_jax.training.fitting import compile_step
from mlra_jax.training.settings import Experiment
from mlra_jax.training.state import create_state
from mlra_jax.training.step import make_train_step

# What a kernel does, by its name in small letters or, on TPUs, what it was made of; the first that
# fits.
_KINDS = (
    (
        "attention backward",
        r"bprop|sdpa.*bwd|dot_do_o|convert_dq|fmha_reduce|splash.*d(q|kv)|attention_backward",
    ),
    ("attention forward", r"fprop|sdpa|flash|splash|attention_forward"),
    ("communication", r"nccl|p2p|all[-_]?(reduce|gather|to[-_]all)|reduce[-_]?scatter|permute"),
    ("copies", r"memcpy|memset"),
    ("products", r"gemm|nvjet|cutlass|cublas|xmma|dot"),
)
_OTHER = "element-wise"
_OPTIMIZER = "optimizer"


@dataclasses.dataclass(frozen=True)
class Kernel:
    """All launches of one kernel, on the first device."""

    name: str
    launches: float
    microseconds: float


def kernels_of(trace: Path, calls: int) -> list[Kernel]:
    """Kernels and copies of one of `calls` calls in an `.xplane.pb` file, the longest in all first.

    Empty where the profiler saw neither a GPU nor a TPU.
    """
    planes = {p.name: p for p in ProfileData.from_file(str(trace)).planes}
    gpu = next((p for name, p in planes.items() if "GPU:0" in name), None)
    tpu = next((p for name, p in planes.items() if "TPU:0" in name), None)
    launches: collections.Counter[str] = collections.Counter()
    nanoseconds: collections.Counter[str] = collections.Counter()
    plane = gpu or tpu
    for line in plane.lines if plane else ():
        # Other lines have the same time again, by modules and (on GPUs) by operations.
        if ("XLA" in line.name) if gpu else (line.name != "XLA Ops"):
            continue
        for event in line.events:
            name = event.name.partition(" = ")[0].lstrip("%")
            launches[name] += 1
            nanoseconds[name] += event.duration_ns
    return [
        Kernel(name, launches[name] / calls, total / calls / 1e3)
        for name, total in nanoseconds.most_common()
    ]


def by_kind(found: Iterable[Kernel], text: str, platform: str = "gpu") -> dict[str, float]:
    """Milliseconds by what kernels do, the longest first.

    Args:
      found: kernels of one step.
      text: of the compiled step, which says where each fused operation comes from: what was made in
        the scope `optimizer` of the step is the optimizer's.
      platform: of the device; on a TPU a kernel's own name says nothing.
    """
    made_in = dict(re.findall(r"%?([\w.\-]+) = .*?op_name=\"([^\"]*)\"", text))
    made_in = {re.sub(r"[.\-]", "_", name): scope for name, scope in made_in.items()}
    total: dict[str, float] = {}
    for kernel in found:
        scope = made_in.get(re.sub(r"[.\-]", "_", kernel.name), "")
        name = f"{kernel.name} {scope if platform == 'tpu' else ''}".lower()
        kind = next((k for k, pattern in _KINDS if re.search(pattern, name)), _OTHER)
        if kind == _OTHER and _OPTIMIZER in scope:
            kind = _OPTIMIZER
        total[kind] = total.get(kind, 0.0) + kernel.microseconds / 1e3
    return dict(sorted(total.items(), key=lambda pair: -pair[1]))


def profile_steps(
    experiment: Experiment, steps: int, folder: Path, say: Callable[[str], None]
) -> None:
    """Profiles `steps` steps of an experiment after two others, and says what they took.

    Raises as `training.train` does for wrong settings or data.
    """
    mesh = sharding.make_mesh(**dataclasses.asdict(experiment.mesh))
    _, source = load_data(experiment.data, experiment.model.vocab_size)
    feed = Feed(mesh, experiment.data.global_batch, experiment.model)
    with contextlib.closing(feed.train(source, experiment.seed, experiment.data.order)) as batches:
        state, batch = create_state(experiment, mesh), next(batches)
        program = compile_step(make_train_step, experiment, mesh, (state, batch), say)
        for _ in range(2):
            state, metrics = jax.block_until_ready(program(state, batch))
        with jax.profiler.trace(str(folder), create_perfetto_trace=True):
            began = time.perf_counter()
            for _ in range(steps):
                state, metrics = program(state, next(batches))
            jax.block_until_ready(metrics)
            milliseconds = 1e3 * (time.perf_counter() - began) / steps
    trace = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    platform = sharding.platform(mesh)
    kinds = by_kind(kernels_of(trace, steps), program.as_text(), platform)
    say(f"{milliseconds:.1f} ms a step, {experiment.tokens_per_step:,} tokens")
    for kind, spent in kinds.items():
        say(f"  {kind:20}{spent:9.1f} ms  {spent / milliseconds:6.1%}")
    if kinds:
        say(f"  {'nothing':20}{(idle := milliseconds - sum(kinds.values())):9.1f} ms  "
            f"{idle / milliseconds:6.1%}")  # fmt: skip
    else:
        say(f"no table: the profiler names no kernels of a {platform}")
    say(f"tensorboard --logdir={folder}    (with the xprof plug-in)")
    say(f"https://ui.perfetto.dev opens {trace.parent / 'perfetto_trace.json.gz'}")


def main(argv: list[str] | None = None) -> int:
    """Profiles as the flags say; see `command.run` for the exit codes."""
    parser = Parser(
        "mlra_jax.profile", __doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config", required=True, metavar="FILE[:NAME]", help="experiment, a file of configs/")
    add("--steps", type=int, default=3, help="how many are profiled")
    add("--output", default="profile", help="folder of the profile")
    flags, overrides = parser.parse_known_args(argv)
    if flags.steps < 1:
        parser.error("--steps must be at least 1")
    settings = read_settings(parser, flags.config, overrides)

    def work():
        folder = on_disk(flags.output, "--output")
        profile_steps(prepared(settings), flags.steps, folder, say)

    return run(parser, work)


if __name__ == "__main__":
    sys.exit(main())
