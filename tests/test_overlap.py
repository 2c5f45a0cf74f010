"""Two devices that exchange by copies compute what one does, in every attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from tiny import ALL, random_model

from mlra_jax import sharding


@pytest.fixture(autouse=True)
def pairs_copy(monkeypatch):
    monkeypatch.setattr(sharding, "has_copies", lambda mesh: mesh.size == 2)


def block_of(name, differentiated=True, **mesh):
    """(what the block gives, behind its gradients if asked; the program), activations by a seed."""
    model = random_model(tiny.config(name), sharding.make_mesh(**mesh))
    graphdef, stacked = nnx.split(model.layers)
    weights = jax.tree.map(lambda leaf: leaf[0], stacked)
    x = jax.random.normal(jax.random.key(0), (2, 12, model.config.embed_dim))
    positions = jnp.broadcast_to(jnp.arange(12), (2, 12))

    def loss(weights, x):
        block = nnx.merge(graphdef, weights)
        y = block(x, positions)
        if not differentiated:
            y += block.prefill(x, positions)[0]  # As before the call.
        return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum(), y

    step = jax.grad(loss, (0, 1), has_aux=True) if differentiated else loss
    program = jax.jit(step).lower(weights, x).compile()
    return jax.device_get(jax.tree.leaves(program(weights, x))), program.as_text()


@pytest.mark.parametrize("name", ALL)
def test_blocks_of_two_devices_that_copy_are_those_of_one(name):
    want, _ = block_of(name)
    got, text = block_of(name, tensor=2)
    assert "collective-permute" in text, "summed by XLA"
    for one, other in zip(want, got, strict=True):
        assert np.linalg.norm(one - other) <= 2e-5 * np.linalg.norm(one)


@pytest.mark.parametrize("name", ["mlra_4", "mla"])
def test_what_has_no_gradient_is_exchanged_by_xla(name):
    """Nobody has asked that engines copy for it."""
    (_, want), _ = block_of(name, differentiated=False)
    (_, got), text = block_of(name, differentiated=False, tensor=2)
    assert "collective-permute" not in text and "all-reduce" in text
    assert np.linalg.norm(got - want) <= 2e-5 * np.linalg.norm(want)
