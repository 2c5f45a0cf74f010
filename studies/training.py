"""Trains several runs of one variant side by side, as one program on one device."""

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mlra_jax import costs
from mlra_jax.data.sources import Source
from mlra_jax.sharding import make_mesh
from mlra_jax.training.feed import Feed
from mlra_jax.training.progress import check_finite
from mlra_jax.training.state import initial_state
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
    mesh, experiment = make_mesh(), study.experiment(name, seeds[0])
    state = _states(study, name, mesh, seeds)
    step = jax.jit(jax.vmap(train_step(experiment, mesh)), donate_argnums=0)
    validate = jax.jit(jax.vmap(validation_step(experiment, mesh), in_axes=(0, None)))
    feed = Feed(mesh, study.data.global_batch, experiment.model)
    held_out = list(feed.validation(source, study.data.validation_tokens))
    curves: dict[str, list] = {"loss": [], "validation_loss": []}
    losses, seconds = [], 0.0
    with contextlib.ExitStack() as until_the_end:
        orders = [
            until_the_end.enter_context(contextlib.closing(feed.train(source, seed)))
            for seed in seeds
        ]
        batch = _stacked(orders)
        began = time.monotonic()
        step = step.lower(state, batch).compile()
        compiled = time.monotonic() - began
        began = time.monotonic()
        for number in range(1, study.steps + 1):
            state, metrics = step(state, batch)
            losses.append(metrics["loss"])
            if number < study.steps:
                batch = _stacked(orders)
            if number % study.validate_every and number != study.steps:
                continue
            found = np.asarray(jnp.stack(losses)).mean(0)
            seconds += time.monotonic() - began
            losses = []
            validation = _mean_loss(validate, state.params, held_out)
            for curve, values in (("loss", found), ("validation_loss", validation)):
                curves[curve].append((number, values.tolist()))
                for value in values:
                    check_finite(number, {f"{name}: {curve}": float(value)})
            rate = number * len(seeds) * experiment.tokens_per_step / seconds
            say(
                f"{name}  step {number}/{study.steps}  validation "
                f"{' '.join(f'{x:.4f}' for x in validation)}  {rate:,.0f} tokens/s"
            )
            if time.monotonic() > deadline and number < study.steps:
                raise OutOfTime
            began = time.monotonic()
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
            "tokens_per_second": rate,
            "seconds_to_compile": compiled,
            "side_by_side": len(seeds),
            "device": mesh.devices.flat[0].device_kind,
            **{n: [(at, values[i]) for at, values in curve] for n, curve in curves.items()},
        }
        for i, seed in enumerate(seeds)
    ]


def _states(study: Study, name: str, mesh: Mesh, seeds: Sequence[int]):
    """The states before the first step, stacked; each is what its seed alone would give."""
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    return jax.jit(jax.vmap(lambda key: initial_state(study.experiment(name, 0), mesh, key)))(keys)


def _stacked(orders):
    return jax.tree.map(lambda *rows: jnp.stack(rows), *map(next, orders))


def _mean_loss(validate, params, batches) -> np.ndarray:
    """Nats per token of each run, over the same held-out tokens."""
    sums = [np.asarray(jax.device_get(validate(params, batch)), np.float64) for batch in batches]
    losses, weights = sum(sums)
    return losses / weights
