"""Trains several runs of one variant side by side, as one program on one device."""

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlra_jax import costs
from mlra_jax.data.sources import Source
from mlra_jax.sharding import make_mesh
from mlra_jax.training.feed import Feed
from mlra_jax.training.progress import check_finite
from mlra_jax.training.settings import Experiment
from mlra_jax.training.state import TrainState, initial_state
from mlra_jax.training.step import train_step, validation_step
from studies.settings import Study, parameters

Result = dict[str, Any]


class OutOfTime(Exception):
    """The time of a call is over; what is under way is not kept."""


def train(
    study: Study,
    name: str,
    seeds: Sequence[int],
    source: Source,
    say: Callable[[str], None],
    deadline: float,
) -> list[Result]:
    """One variant with several seeds at once: states are stacked, the step is mapped over them.

    Args:
      study: the settings.
      name: the preset.
      seeds: of weights and of the order of the data.
      source: the tokens.
      say: prints one line of progress.
      deadline: of `time.monotonic()`.

    Returns:
      for each seed its result, JSON-ready: `loss` and `validation_loss` (nats per token) as pairs
      of step and value, sizes, speed (of all seeds together) and device.

    Raises:
      OutOfTime: the deadline came first.
      TrainingError: a loss was not finite.
    """
    experiment = study.experiment(name, seeds[0])
    states = fresh_states(experiment, seeds)
    run = fit(experiment, states, seeds, source, name, study.validate_every, say, deadline)
    size = parameters(experiment.model)
    return [
        {
            "variant": name,
            "seed": seed,
            "parameters": size,
            "mlp_dim": experiment.model.mlp_dim,
            "tokens": study.steps * experiment.tokens_per_step,
            "training_flops": costs.flops_per_token(experiment.model, size)
            * (study.steps * experiment.tokens_per_step),
            "tokens_per_second": run.tokens_per_second,
            "seconds_to_compile": run.seconds_to_compile,
            "side_by_side": len(seeds),
            "device": jax.devices()[0].device_kind,
            **{n: [(at, values[i]) for at, values in curve] for n, curve in run.curves.items()},
        }
        for i, seed in enumerate(seeds)
    ]


class Fitted(NamedTuple):
    """Runs side by side after their last step."""

    params: Any
    """Stacked."""
    curves: dict[str, list[tuple[int, list[float]]]]
    """`loss` and `validation_loss`: pairs of a step and each run's nats per token."""
    tokens_per_second: float
    """Of all runs together."""
    seconds_to_compile: float


def fit(
    experiment: Experiment,
    states: TrainState,
    seeds: Sequence[int],
    source: Source,
    name: str,
    validate_every: int,
    say: Callable[[str], None],
    deadline: float = math.inf,
) -> Fitted:
    """Trains stacked states to the experiment's last step; `seeds` are of the order of the data.

    `name` is for the lines that are said. Raises as `train`; `states` are used up.
    """
    mesh = make_mesh()
    step = jax.jit(jax.vmap(train_step(experiment, mesh)), donate_argnums=0)
    validate = validation(experiment, source)
    feed = Feed(mesh, experiment.data.global_batch, experiment.model)
    curves: dict[str, list] = {"loss": [], "validation_loss": []}
    losses, seconds = [], 0.0
    with contextlib.ExitStack() as until_the_end:
        orders = [
            until_the_end.enter_context(contextlib.closing(feed.train(source, seed)))
            for seed in seeds
        ]
        batch = _stacked(orders)
        began = time.monotonic()
        step = step.lower(states, batch).compile()
        compiled = time.monotonic() - began
        began = time.monotonic()
        for number in range(1, experiment.steps + 1):
            states, metrics = step(states, batch)
            losses.append(metrics["loss"])
            if number < experiment.steps:
                batch = _stacked(orders)
            if number % validate_every and number != experiment.steps:
                continue
            found = np.asarray(jnp.stack(losses)).mean(0)
            seconds += time.monotonic() - began
            losses = []
            held_out = validate(states.params)
            for curve, values in (("loss", found), ("validation_loss", held_out)):
                curves[curve].append((number, values.tolist()))
                for value in values:
                    check_finite(number, {f"{name}: {curve}": float(value)})
            rate = number * len(seeds) * experiment.tokens_per_step / seconds
            say(
                f"{name}  step {number}/{experiment.steps}  validation "
                f"{' '.join(f'{x:.4f}' for x in held_out)}  {rate:,.0f} tokens/s"
            )
            if time.monotonic() > deadline and number < experiment.steps:
                raise OutOfTime
            began = time.monotonic()
    return Fitted(states.params, curves, rate, compiled)


def fresh_states(experiment: Experiment, seeds: Sequence[int]) -> TrainState:
    """The states before the first step, stacked; each is what its seed alone would give."""
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    return jax.jit(jax.vmap(lambda key: initial_state(experiment, make_mesh(), key)))(keys)


def validation(experiment: Experiment, source: Source) -> Callable[[Any], np.ndarray]:
    """Stacked parameters -> nats per token of each run, over the same held-out tokens."""
    mesh = make_mesh()
    step = jax.jit(jax.vmap(validation_step(experiment, mesh), in_axes=(0, None)))
    feed = Feed(mesh, experiment.data.global_batch, experiment.model)
    batches = list(feed.validation(source, experiment.data.validation_tokens))

    def mean_losses(params) -> np.ndarray:
        sums = [np.asarray(jax.device_get(step(params, batch)), np.float64) for batch in batches]
        losses, weights = sum(sums)
        return losses / weights

    return mean_losses


def _stacked(orders):
    return jax.tree.map(lambda *rows: jnp.stack(rows), *map(next, orders))
