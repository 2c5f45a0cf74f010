"""What a step would take of a slice that is not there: memory, exchanges, time.

    python -m mlra_jax.plan --config=configs/paper.py:mlra_4 --topology=v5p:4x4x4 [--slices=2]
        [--mesh=fsdp=32,tensor=2] [--decode=ROWSxPOSITIONS] [--search] [--config.key=value ...]

For TPUs (v5e, v5p, v6e; `pip install 'libtpu<0.1'`) the step is compiled as it is, kernels
included, and memory and exchanges are the compiler's; for GPUs (a100, h100, h200, b200, as h100:8
with --slices for hosts) all is by formula. Times are what the work takes at the chip's peaks.
"""

import argparse
import os
import re
import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

from mlra_jax import command, sharding
from mlra_jax.command import Parser, run, use_cpu
from mlra_jax.config import ConfigError
from mlra_jax.plan import report, topology
from mlra_jax.plan.formula import Decoding
from mlra_jax.plan.planning import fitted, plan
from mlra_jax.plan.search import search
from mlra_jax.training.__main__ import read_settings
from mlra_jax.training.settings import Experiment


def main(argv: list[str] | None = None) -> int:
    """Prints the plan; see `command.run` for the exit codes."""
    parser = Parser("mlra_jax.plan", __doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", required=True, metavar="FILE[:NAME]", help="experiment, a file of configs/")
    add("--topology", required=True, metavar="CHIP:SHAPE", help="of a slice, as v5e:16x16")
    add("--slices", type=int, default=1, help="so many of them, over the slow network")
    add("--mesh", help="axes with sizes, as fsdp=16,tensor=4; default: that of the experiment")
    add("--decode", type=_decoding, metavar="ROWSxPOSITIONS", help="plan a decoding step instead")
    add("--search", action="store_true", help="try meshes and more, and rank those that fit")
    add("--keep", type=int, default=3, help="with --search: how many to find")
    add("--output", type=Path, metavar="FILE.png", help="draw the figure")
    add("--cache", metavar="DIR|off", help="folder of results; default: plans, in the user's cache")
    flags, overrides = parser.parse_known_args(argv)
    if flags.keep < 1:
        parser.error("--keep must be at least 1")
    if flags.search and flags.mesh is not None:
        parser.error("--search chooses the mesh; leave --mesh out")
    settings = read_settings(parser, flags.config, overrides)

    def work():
        use_cpu()
        run_plan(_experiment(settings.to_dict(), flags), flags)

    return run(parser, work)


def _experiment(values: dict[str, Any], flags: argparse.Namespace) -> Experiment:
    """The experiment; what of its mesh and parts the flags choose need not divide its batch."""
    if flags.search:
        values |= {"mesh": {}, "data": values["data"] | {"accumulate": 1}}
    elif flags.mesh is not None:
        values["mesh"] = sharding.mesh_sizes(flags.mesh)
    return Experiment.from_dict(values)


def run_plan(experiment: Experiment, flags: argparse.Namespace) -> None:
    """Plans or searches, and prints what was found."""
    say = lambda line: command.say(line, sys.stderr)
    where, cache = topology.describe(flags.topology, flags.slices), _cache(flags.cache)
    if flags.output and not flags.output.absolute().parent.is_dir():
        raise ConfigError(f"--output={flags.output}: its folder does not exist")
    if flags.search:
        found = search(experiment, where, say, cache, flags.decode, flags.keep)
    else:
        experiment = fitted(experiment, None, where, flags.decode)
        found = [plan(experiment, where, say, cache, flags.decode)]
    for line in report.lines(found[0]):
        print(line)
    if flags.search:
        print()
        for line in report.table(found):
            print(line)
    if flags.output:
        report.draw(found, flags.output)
        print(f"figure: {flags.output}")


def _decoding(text: str) -> Decoding:
    if not (found := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not ROWSxPOSITIONS, as 8x131072")
    return Decoding(int(found[1]), int(found[2]))


def _cache(given: str | None) -> Path | None:
    if given == "off":
        return None
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    return Path(given) if given else home / "mlra_jax" / "plans"


if __name__ == "__main__":
    sys.exit(main())
