"""Fresh states of training: weights drawn once for each model and seed, put onto any mesh."""

import dataclasses
import functools

import jax
import numpy as np

from mlra_jax import sharding
from mlra_jax.config import Execution
from mlra_jax.training.settings import DataSettings, Experiment
from mlra_jax.training.state import abstract_state, create_state


def fresh_state(experiment, mesh):
    """What `create_state` gives, without compiling it for each mesh; may be donated."""
    like = abstract_state(experiment, mesh)
    made = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
    # They do not depend on how the model is computed.
    model = dataclasses.replace(experiment.model, execution=Execution())
    made = dataclasses.replace(made, params=_params(model, experiment.seed))
    return jax.tree.map(lambda x, like: jax.device_put(np.array(x), like.sharding), made, like)


@functools.cache
def _params(model, seed):
    experiment = Experiment(model, DataSettings(source="pydoc"), seed=seed)
    return jax.device_get(create_state(experiment, sharding.make_mesh()).params)
