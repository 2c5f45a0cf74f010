"""`python -m mlra_jax` lists the commands; `presets` and `configs` the models and experiments."""

import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import jax

from mlra_jax import costs, sharding
from mlra_jax.command import Parser, run, say, use_cpu
from mlra_jax.config import NEIGHBOURS, PRESETS, VARIANTS, ConfigError, ModelConfig, preset
from mlra_jax.model import structure
from mlra_jax.scaling import SIZES
from mlra_jax.training import reference
from mlra_jax.training.settings import Experiment
from mlra_jax.training.shipped import config_files, find_config

COMMANDS = {
    "mlra-jax": ("mlra_jax", "list commands, presets, configs and settings"),
    "mlra-train": ("mlra_jax.training", "train a model, or go on with it"),
    "mlra-profile": ("mlra_jax.profile", "what the devices do in a run's steps"),
    "mlra-report": ("mlra_jax.report", "runs beside each other: settings, numbers, loss curves"),
    "mlra-plan": ("mlra_jax.plan", "memory and time on a slice that is not there"),
    "mlra-decode": ("mlra_jax.generation", "continue text from a checkpoint"),
    "mlra-convert": ("mlra_jax.convert", "released weights to a checkpoint"),
    "mlra-export": ("mlra_jax.export", "a checkpoint to .safetensors as released"),
    "mlra-evaluate": ("mlra_jax.evaluate", "perplexity on token files"),
    "mlra-tasks": ("mlra_jax.evaluate.tasks", "zero-shot accuracy on the paper's tasks"),
    "mlra-prepare": ("mlra_jax.data.prepare", "text to token files"),
    "mlra-costs": ("mlra_jax.costs", "what each device caches, for every variant and split"),
    "mlra-equivariance": ("mlra_jax.analysis.equivariance", "what changes when positions move"),
    "mlra-variance": ("mlra_jax.analysis.variance", "how large attention's values are"),
    "mlra-branches": ("mlra_jax.analysis.branches", "what each branch attends to"),
}
"""Console script: module and what it does; `pyproject.toml` has them, too."""


def main(argv: list[str] | None = None) -> int:
    """Prints a line for each command, preset or config; see `command.run` for the exit codes."""
    parser = Parser(
        "mlra_jax",
        "Lists the commands (each has --help), presets, settings, or configs with what they take.",
    )
    parser.add_argument(
        "what", nargs="?", default="commands", help="commands, presets, configs, settings"
    )
    parser.add_argument(
        "files",
        nargs="*",
        metavar="FILE[:NAME]",
        help="with configs: which; default: all of ./configs, or those of the package",
    )
    flags = parser.parse_args(argv)
    lists = {
        "commands": commands,
        "presets": presets,
        "configs": lambda: configs(flags.files),
        "settings": lambda: reference.markdown().splitlines(),
    }
    if flags.what not in lists or (flags.files and flags.what != "configs"):
        wrong = flags.files[0] if flags.what in lists else flags.what
        parser.error(f"unexpected argument {wrong!r}; there are {', '.join(lists)}")

    def work():
        for line in lists[flags.what]():
            say(line)

    return run(parser, work)


def commands() -> Iterator[str]:
    for script, (module, does) in COMMANDS.items():
        yield f"{script:18}python -m {module:31}{does}"


def presets() -> Iterator[str]:
    """Parameters, weights in bfloat16, and the cache of a token, of each preset and size."""
    use_cpu()
    yield f"{'preset':34}{'parameters':>14}{'weights, bf16':>15}{'cache a token':>15}"
    sized = (f"{name}_{size}" for size in SIZES for name in VARIANTS)
    for name in (*PRESETS, *NEIGHBOURS, *sized):
        config = preset(name)
        count = parameters(config)
        cache = costs.cache_bytes_per_device(config, batch=1, capacity=1)
        yield f"{name:34}{count:14,}{2 * count / 2**30:11.2f} GiB{cache / 2**10:11.2f} KiB"


def configs(given: list[str]) -> Iterator[str]:
    """Parameters of each experiment, and about what training needs on each of its devices."""
    use_cpu()
    here = sorted(map(str, Path("configs").glob("*.py")))
    for file in given or here or map(str, config_files()):
        try:
            experiment = read_experiment(file)
        except ConfigError as error:
            if given:
                raise
            yield f"{file}: {error}"
            continue
        mesh, data, count = experiment.mesh, experiment.data, parameters(experiment.model)
        need = costs.training_bytes_per_device(
            experiment.model,
            count,
            sequences=data.part_batch // (mesh.data * mesh.fsdp),
            ways=mesh.fsdp * mesh.tensor * mesh.context,
            loss_chunk=experiment.loss_chunk,
            moment_dtype=experiment.optimizer.moment_dtype,
        )
        devices = mesh.data * mesh.fsdp * mesh.tensor * mesh.context
        yield (
            f"{file}: {count:,} parameters, {experiment.steps:,} steps of "
            f"{experiment.tokens_per_step:,} tokens, about {need / 2**30:.2f} GiB on each of "
            f"{devices} device(s)"
        )


def read_experiment(file: str) -> Experiment:
    """Of `FILE` or `FILE:NAME`; ConfigError if it makes none."""
    path, _, name = find_config(file).partition(":")
    get_config = runpy.run_path(path).get("get_config")
    if get_config is None:
        raise ConfigError(f"{path} has no get_config()")
    return Experiment.from_dict(get_config(*filter(None, [name])).to_dict())


def parameters(config: ModelConfig) -> int:
    """Their number."""
    _, shapes = structure(config, sharding.make_mesh())
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


if __name__ == "__main__":
    sys.exit(main())
