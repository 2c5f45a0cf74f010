"""A new run from the weights of another one: fine-tuning."""

import jax
import jax.numpy as jnp

from mlra_jax import checkpoints
from mlra_jax.checkpoints import Checkpoint, CheckpointError
from mlra_jax.settings_tree import flatten
from mlra_jax.training.settings import Experiment
from mlra_jax.training.state import TrainState, make_optimizer_state

FREE = ("context_length", "param_dtype", "rope_base", "zero_init")
"""Settings of a model that the same weights may be trained on with."""


def open_weights(experiment: Experiment, tokenizer: str | None) -> Checkpoint:
    """The checkpoint that `experiment.init_from` names, its latest step.

    Args:
      experiment: its model must be the checkpoint's but for the settings of `FREE`.
      tokenizer: name of the one that the run trains with.

    Raises:
      CheckpointError: nothing there, another model, or another tokenizer; all settings in which
        the models differ are named.
    """
    found = checkpoints.open_checkpoint(experiment.init_from)
    different = [line for name, line in _differences(found, experiment) if name not in FREE]
    if different:
        raise CheckpointError(
            f"init_from={experiment.init_from} has weights of another model: "
            f"{', '.join(different)}; take the model's settings from it, as "
            "--config=configs/fine_tune.py:DIR does"
        )
    if found.tokenizer not in (None, tokenizer):
        raise CheckpointError(
            f"init_from={experiment.init_from} was trained with tokenizer {found.tokenizer}, and "
            f"data.tokenizer is {tokenizer}: the same ids would mean other text"
        )
    return found


def state_from(found: Checkpoint, experiment: Experiment, abstract: TrainState) -> TrainState:
    """The state before the first step, with the weights of `found` in the dtype and shards of
    `abstract`."""
    params = found.restore("params", abstract.params)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    begin = jax.jit(
        lambda params: (jnp.zeros((), jnp.int32), make_optimizer_state(experiment, params)),
        out_shardings=(shardings.step, shardings.optimizer),
    )
    step, optimizer = begin(params)
    return TrainState(step=step, params=params, optimizer=optimizer)


def described(found: Checkpoint, experiment: Experiment) -> str:
    """One line: what was taken from the checkpoint and what was not."""
    changed = [line for _, line in _differences(found, experiment)]
    return (
        f"starting from the weights of {experiment.init_from}, step {found.step}; its optimizer, "
        "schedule, steps and place in the data are not taken"
        + (f"; {', '.join(changed)}" if changed else "")
    )


def _differences(found: Checkpoint, experiment: Experiment) -> list[tuple[str, str]]:
    there, here = (flatten(m.identity()) for m in (found.model, experiment.model))
    return [
        (name, f"{name} is {there.get(name, 'absent')} there and {here.get(name, 'absent')} here")
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]
