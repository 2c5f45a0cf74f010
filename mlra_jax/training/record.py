"""What a run was trained with: `experiment.json`, and what of it a resumed run changes."""

import json
from typing import Any

from mlra_jax.files import whole_file
from mlra_jax.settings_tree import flatten
from mlra_jax.storage.paths import AnyPath
from mlra_jax.training.settings import Experiment

FILE = "experiment.json"


def changes(workdir: AnyPath, experiment: Experiment) -> list[str]:
    """A line for each setting that is another one than in the run's record; none without record.

    Model, tokenizer, data, batch and seed are refused elsewhere if they differ.
    """
    file = workdir / FILE
    if not file.exists():
        return []
    try:
        then = flatten(json.loads(file.read_text()))
    except (ValueError, AttributeError):
        return [f"{file} is damaged: what the run was trained with before is not known"]
    now = flatten(_settings(experiment))
    lines = [
        f"{name} was {then[name]!r} and is {now[name]!r} now"
        for name in now
        # Weights are taken at the beginning only, and older records lack newer settings.
        if name in then and then[name] != now[name] and name != "init_from"
    ]
    if "steps" in then and then["steps"] != experiment.steps:
        lines.append(
            f"the learning rate was to end its decay at step {then['steps']} and ends it at "
            f"{experiment.steps} now"
        )
    return lines


def write(workdir: AnyPath, experiment: Experiment, step: int) -> None:
    """Writes the settings down. Those of the steps before, if they are others, stay in
    `experiment.until_<step>.json`."""
    file, settings = workdir / FILE, json.dumps(_settings(experiment), indent=2) + "\n"
    before = file.read_text() if step and file.exists() else settings
    kept = workdir / f"experiment.until_{step}.json"
    # One that is there already is what trained those steps; what came after it trained none.
    if before != settings and not kept.exists():
        with whole_file(kept) as out:
            out.write(before)
    with whole_file(file) as out:
        out.write(settings)


def _settings(experiment: Experiment) -> dict[str, Any]:
    return experiment.to_config_dict().to_dict()
