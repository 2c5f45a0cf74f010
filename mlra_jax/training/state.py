"""What a training run carries from step to step, and where each part of it lives."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mlra_jax import model as models
from mlra_jax import sharding
from mlra_jax.training.optimizer import make_optimizer
from mlra_jax.training.settings import Experiment


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Leaves are arrays, or `jax.ShapeDtypeStruct`s with shardings in an abstract state."""

    step: Any
    """int32, updates done."""
    params: Any
    """Nested dict of arrays, as in a checkpoint."""
    optimizer: Any


def initial_state(experiment: Experiment, mesh: Mesh, seed: int | jax.Array) -> TrainState:
    """The state before the first step; `seed` is a whole number or a random key."""
    params = models.fresh_params(experiment.model, mesh, seed)
    optimizer = make_optimizer_state(experiment, params)
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, optimizer=optimizer)


def make_optimizer_state(experiment: Experiment, params: Any) -> Any:
    """The optimizer's state before the first step."""
    return make_optimizer(experiment.optimizer, experiment.steps).init(params)


def abstract_state(experiment: Experiment, mesh: Mesh) -> TrainState:
    """Shapes and shardings of a run's state; the mesh's devices need not exist here.

    The optimizer's moments lie where their parameters lie; counters are on every device.
    """
    _, params = models.structure(experiment.model, mesh)
    param_shardings = jax.tree.map(lambda x: x.sharding, params)
    shapes = jax.eval_shape(lambda: initial_state(experiment, mesh, experiment.seed))
    everywhere = sharding.named(mesh)
    shardings = TrainState(
        step=everywhere,
        params=param_shardings,
        optimizer=optax.tree.map_params(
            make_optimizer(experiment.optimizer, experiment.steps),
            lambda _, where: where,
            shapes.optimizer,
            param_shardings,
            transform_non_params=lambda _: everywhere,
        ),
    )
    return jax.tree.map(
        lambda shape, where: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where),
        shapes,
        shardings,
    )


def create_state(experiment: Experiment, mesh: Mesh) -> TrainState:
    """The state before the first step, created in its shards: no device ever holds a whole one."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(experiment, mesh))
    # What runs once needs no optimising: on a CPU this spares most of the compilation.
    options = {"xla_backend_optimization_level": 1} if sharding.platform(mesh) == "cpu" else None

    create = lambda: initial_state(experiment, mesh, experiment.seed)
    return jax.jit(create, out_shardings=shardings, compiler_options=options)()
