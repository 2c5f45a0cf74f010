"""What a training run carries from step to step, and where each part of it lives."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

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
    """Nested dict of arrays, as in a checkpoint. Where the loop over blocks is unrolled, a list of
    the layers' arrays stands for each stack of them (`unstacked`)."""
    optimizer: Any


def unstacked(state: TrainState) -> TrainState:
    """The same with every layer's arrays by themselves, as a step without a loop has them.

    Such a step gets gradients layer by layer; to pile them up would take longer than AdamW takes
    over them. Each stack is deleted when it is cut, so that no more than one exists twice.
    """

    def cut(path, x):
        if jax.tree_util.DictKey("layers") not in path:
            return x
        where = NamedSharding(x.sharding.mesh, PartitionSpec(*x.sharding.spec[1:]))
        if isinstance(x, jax.ShapeDtypeStruct):
            return [jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=where)] * x.shape[0]
        layers = jax.jit(list, out_shardings=where)(x)
        x.delete()
        return layers

    return jax.tree.map_with_path(cut, state)


def stacked(state: TrainState) -> TrainState:
    """The same as a checkpoint holds it; undoes `unstacked`, and deletes what it stacks, too."""

    def stack(layers):
        if not isinstance(layers, list):
            return layers
        where = layers[0].sharding
        where = NamedSharding(where.mesh, PartitionSpec(None, *where.spec))
        whole = jax.jit(jnp.stack, out_shardings=where)(layers)
        for layer in layers:
            layer.delete()
        return whole

    return _over_lists(stack, state)


def traced_stacks(params: Any) -> Any:
    """The parameters as the model has them, inside a step: the compiler sees through the stacks."""
    return _over_lists(lambda x: jnp.stack(x) if isinstance(x, list) else x, params)


def _over_lists(function, tree):
    return jax.tree.map(function, tree, is_leaf=lambda x: isinstance(x, list))


def steps_by_layer(experiment: Experiment, mesh: Mesh) -> bool:
    """Whether a step takes the state `unstacked`."""
    return 1 < models.unrolled(experiment.model, mesh) == experiment.model.num_layers


def initial_state(experiment: Experiment, mesh: Mesh, seed: int | jax.Array) -> TrainState:
    """The state before the first step; `seed` is a whole number or a random key."""
    params = models.fresh_params(experiment.model, mesh, seed)
    optimizer = make_optimizer(experiment.optimizer, experiment.steps).init(params)
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, optimizer=optimizer)


def abstract_state(experiment: Experiment, mesh: Mesh) -> TrainState:
    """Shapes and shardings of the state that a step takes; the mesh's devices need not exist here.

    The optimizer's moments lie where their parameters lie; counters are on every device.
    """
    stored = abstract_stored_state(experiment, mesh)
    return unstacked(stored) if steps_by_layer(experiment, mesh) else stored


def abstract_stored_state(experiment: Experiment, mesh: Mesh) -> TrainState:
    """As `abstract_state`, of the state that a checkpoint holds."""
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

    def create():
        state = initial_state(experiment, mesh, experiment.seed)
        # A list of the layers' shardings stands where the stack is to be cut.
        is_list = lambda where: isinstance(where, list)
        cut = lambda where, x: list(x) if is_list(where) else x
        return jax.tree.map(cut, shardings, state, is_leaf=is_list)

    return jax.jit(create, out_shardings=shardings, compiler_options=options)()
