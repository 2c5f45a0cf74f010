"""Train a model: python train.py --config=configs/NAME.py --workdir=DIR [--config.key=value ...]

Without `--config.key` every setting is that of the file; `DIR/experiment.json` keeps what was used.
The same command goes on where the last checkpoint of DIR stands.
"""

import os
import re
import sys

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from mlra_jax.settings_tree import closest
from mlra_jax.training.settings import Experiment

_CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment, a file of configs/.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder for checkpoints and metrics.")
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    None,
    "Join the processes of a cluster that JAX detects (TPU pods, Slurm, ...). Default: where "
    "TPU_WORKER_HOSTNAMES names several hosts.",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, to join processes that JAX cannot detect."
)
_PROCESSES = flags.DEFINE_integer("num_processes", None, "With --coordinator: how many.")
_PROCESS = flags.DEFINE_integer("process_id", None, "With --coordinator: which one this is.")


def parse_flags(argv: list[str]) -> list[str]:
    """Like absl's own, but every mistake is one line."""
    try:
        rest = flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as e:
        message = str(e.args[0] if e.args else e)
        sys.exit(f"train.py: {_misnamed(argv) or message.splitlines()[0]}")
    if len(rest) > 1:
        sys.exit(f"train.py: unexpected argument {rest[1]!r}; settings are given as --config.key=…")
    for flag in (_CONFIG, _WORKDIR):
        if not flag.value:
            sys.exit(f"train.py: --{flag.name} is missing; {__doc__.splitlines()[0]}")
    if not isinstance(_CONFIG.value, ConfigDict):
        sys.exit(f"train.py: {_unreadable(_CONFIG.value)}")
    return rest


def _misnamed(argv: list[str]) -> str | None:
    """Names the first `--config.a.b` that the experiment does not have, and its likely meaning."""
    given = [a.lstrip("-").partition("=") for a in argv[1:] if a.startswith("-")]
    files = [value for name, _, value in given if name == "config"]
    if not files:
        return None
    try:
        settings = flags.FLAGS["config"].parser.parse(files[-1])
    except Exception as e:
        reason = re.sub(r"^[\w.]+Error: ", "", str(e).strip().splitlines()[-1])
        return f"--config={files[-1]}: {reason}"
    if not isinstance(settings, ConfigDict):
        return _unreadable(settings)
    for path, _, _ in given:
        if not path.startswith("config."):
            continue
        known = settings
        for i, name in enumerate(path.split(".")[1:], 1):
            parent = ".".join(path.split(".")[:i])
            if not isinstance(known, ConfigDict):
                return f"unknown setting --{path}: {parent} has no parts"
            if name not in known:
                return f"unknown setting --{path}; {closest(name, known, f'--{parent}.')}"
            known = known[name]
    return None


def _unreadable(settings) -> str:
    """Why there is no experiment: config_flags keeps the error until the value is used."""
    try:
        settings.to_dict()
    except Exception as e:
        return f"--config cannot be read: {str(e).splitlines()[-1].strip()}"
    return "--config is no experiment: get_config() must return a ConfigDict"


def join_processes() -> None:
    """Before anything else touches a device."""
    import jax

    pod = "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
    if _COORDINATOR.value:
        jax.distributed.initialize(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    elif _DISTRIBUTED.value or (_DISTRIBUTED.value is None and pod):
        jax.distributed.initialize()


def main(_) -> None:
    logging.set_verbosity(logging.ERROR)
    try:
        experiment = Experiment.from_dict(_CONFIG.value.to_dict())
        import jax

        if experiment.virtual_cpu_devices:
            jax.config.update("jax_platforms", "cpu")
            jax.config.update("jax_num_cpu_devices", experiment.virtual_cpu_devices)
        join_processes()

        from mlra_jax.training.loop import train

        train(experiment, _WORKDIR.value, say=lambda line: print(line, flush=True))
    except (ValueError, OSError) as e:
        if "\n" in str(e):  # not one of ours
            raise
        sys.exit(f"train.py: {e}")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
