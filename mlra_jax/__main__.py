"""`python -m mlra_jax` lists the commands."""

import sys

from mlra_jax.command import Parser

COMMANDS = {
    "mlra-train": ("mlra_jax.training", "train a model, or go on with it"),
    "mlra-profile": ("mlra_jax.profile", "what the devices do in a run's steps"),
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
    """Prints a line for each command."""
    Parser("mlra_jax", "Lists the commands; each has --help.").parse_args(argv)
    for script, (module, does) in COMMANDS.items():
        print(f"{script:18}python -m {module:31}{does}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
