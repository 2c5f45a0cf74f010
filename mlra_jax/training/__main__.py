"""Train a model: `mlra-train --config=configs/NAME.py --workdir=DIR [--config.key=value ...]`.

FILE may be one of your own; configs/NAME.py, or NAME alone, is found from any folder.
Without `--config.key` every setting is that of the file; `DIR/experiment.json` keeps what was used.
The same command goes on where the last checkpoint of DIR stands. On GPUs 95% of the memory are
reserved; XLA_CLIENT_MEM_FRACTION in the environment says otherwise.
Exit code 75: saved and stopped before the last step, by a signal or because a machine goes away.
"""

import re
import sys
from argparse import RawDescriptionHelpFormatter

from absl import flags as absl_flags
from ml_collections import ConfigDict, config_flags

from mlra_jax.command import STOPPED, Parser, Switch, claim_gpu_memory, end_now, run, say, use_cpu
from mlra_jax.settings_tree import closest, flatten, meant
from mlra_jax.training import reference
from mlra_jax.training.cluster import joined
from mlra_jax.training.loop import train
from mlra_jax.training.peers import JOIN_SECONDS
from mlra_jax.training.settings import Experiment
from mlra_jax.training.shipped import find_config
from mlra_jax.training.tracing import Span
from mlra_jax.training.watchers import Watching, check_wandb

GPU_MEMORY = 0.95


def main(argv: list[str] | None = None) -> int:
    """Trains as the flags say; see `command` for the exit codes."""
    parser = Parser(
        "mlra_jax.training",
        __doc__,
        formatter_class=RawDescriptionHelpFormatter,
        epilog=reference.text(),
    )
    add = parser.add_argument
    add("--config", required=True, metavar="FILE[:NAME]", help="experiment, a file of configs/")
    add("--workdir", required=True, help="folder for checkpoints and metrics")
    add(
        "--distributed",
        action=Switch,
        help="join the processes of a cluster that JAX detects; default: where TPU slices, GKE, "
        "Slurm or Open MPI have set their variables for several",
    )
    add("--coordinator", help="HOST:PORT of process 0, to join processes that JAX cannot detect")
    add("--num_processes", type=int, help="with --coordinator: how many")
    add("--process_id", type=int, help="with --coordinator: which one this is, from 0 on")
    add("--join_seconds", type=float, default=JOIN_SECONDS, help="within which all must have come")
    add("--profile_steps", metavar="A-B", help="steps to trace, as 20-22, into WORKDIR/profile")
    add("--wandb", default="", metavar="PROJECT", help="log to Weights & Biases, too")
    flags, overrides = parser.parse_known_args(argv)
    if not flags.workdir:
        parser.error("--workdir is empty")
    settings = read_settings(parser, flags.config, overrides)

    ended = True

    def work():
        nonlocal ended
        experiment = prepared(settings)
        watching = Watching(Span.of(flags.profile_steps), flags.wandb)
        check_wandb(flags.wandb)
        with joined(flags, experiment, say, lambda line: end_now(parser, line)) as peers:
            ended = train(experiment, flags.workdir, say, peers, watching)

    code = run(parser, work, "the same command goes on from the last checkpoint")
    return code or (0 if ended else STOPPED)


def prepared(settings: ConfigDict) -> Experiment:
    """The experiment, once the devices are set up as it says; before JAX is used."""
    experiment = Experiment.from_dict(settings.to_dict())
    if experiment.virtual_cpu_devices:
        use_cpu(experiment.virtual_cpu_devices)
    claim_gpu_memory(GPU_MEMORY)
    return experiment


def read_settings(parser: Parser, file: str, overrides: list[str]) -> ConfigDict:
    """The settings of `get_config()` in `file` with `--config.key=value` put over them.

    Every mistake is a usage error of one line that names the nearest setting.

    Args:
      parser: of the command.
      file: `FILE` or `FILE:NAME`, which hands NAME to `get_config`; see `shipped.find_config`.
      overrides: what else stands on the command line.
    """
    file = find_config(file)
    argv = [parser.prog, f"--config={file}", *overrides]
    values = absl_flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    try:
        rest = values(argv)[1:]
    except (absl_flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        message = str(error.args[0] if error.args else error)
        parser.error(_misnamed(values, file, overrides) or message.splitlines()[0])
    if rest:
        parser.error(f"{parser.unknown(rest[0])}; settings are given as --config.key=…")
    if not isinstance(values.config, ConfigDict):
        parser.error(_unreadable(values.config))
    return values.config


def _misnamed(values: absl_flags.FlagValues, file: str, overrides: list[str]) -> str | None:
    """Names the first `--config.a.b` that the experiment does not have, and its likely meaning."""
    try:
        settings = values["config"].parser.parse(file)
    # A file of the user's may raise anything.
    except Exception as error:
        reason = re.sub(r"^[\w.]+Error: ", "", str(error).strip().splitlines()[-1])
        return f"--config={file}: {reason}"
    if not isinstance(settings, ConfigDict):
        return _unreadable(settings)
    paths = [argument.lstrip("-").partition("=")[0] for argument in overrides]
    for path in (path for path in paths if path.startswith("config.")):
        known = settings
        for i, name in enumerate(path.split(".")[1:], 1):
            parent = ".".join(path.split(".")[:i])
            if not isinstance(known, ConfigDict):
                return f"unknown setting --{path}: {parent} has no parts"
            if name not in known:
                if elsewhere := meant(name, flatten(settings.to_dict())):
                    return f"unknown setting --{path}; did you mean --config.{elsewhere}?"
                return f"unknown setting --{path}; {closest(name, known, f'--{parent}.')}"
            known = known[name]
    return None


def _unreadable(settings) -> str:
    """Why there is no experiment: config_flags keeps the error until the value is used."""
    try:
        settings.to_dict()
    except AttributeError:
        pass
    except Exception as error:
        return f"--config cannot be read: {str(error).splitlines()[-1].strip()}"
    return "--config is no experiment: get_config() must return a ConfigDict"


if __name__ == "__main__":
    sys.exit(main())
