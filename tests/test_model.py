"""A model is the same however it is made, split or taken apart."""

import chex
import jax
import numpy as np
import pytest
import tiny
from flax import nnx
from tiny import relative_error

from mlra_jax import model as models
from mlra_jax.sharding import make_mesh

TOKENS = np.random.default_rng(0).integers(0, 88, (4, 10), np.int32)


def test_sharded_creation_makes_the_same_weights_in_their_places():
    config = tiny.config("mlra_2_gated", num_layers=2)
    whole = models.create(config, make_mesh(), seed=5)
    split = models.create(config, make_mesh(data=2, fsdp=2, tensor=2), seed=5)
    weights = lambda model: jax.device_get(nnx.to_pure_dict(nnx.state(model)))
    chex.assert_trees_all_close(weights(whole), weights(split), rtol=1e-6)
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(nnx.state(split)))
    total = sum(x.nbytes for x in jax.tree.leaves(nnx.state(split)))
    assert held < 0.35 * total  # fsdp x tensor is a quarter; norms and small matrices are whole
    assert relative_error(split(TOKENS), whole(TOKENS)) < 1e-6
    before = np.asarray(whole(TOKENS))
    whole.unstack()
    assert relative_error(whole(TOKENS), before) < 1e-6


@pytest.mark.parametrize("member", ["mla", "mlra_4"])
def test_a_token_does_not_see_later_ones(member):
    model = models.create(tiny.config(member), make_mesh(), seed=2)
    changed = TOKENS.copy()
    changed[:, 6:] = (changed[:, 6:] + 1) % 88
    before, after = np.asarray(model(TOKENS)), np.asarray(model(changed))
    assert relative_error(after[:, :6], before[:, :6]) < 1e-6
    assert relative_error(after[:, 6:], before[:, 6:]) > 1e-2
