"""The latent family: decoding against whole passes, sharding, what positions mean."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from decoding import decoding_error, relative_error, small_config

from mlra_jax import model as models
from mlra_jax.config import ConfigError, LatentConfig
from mlra_jax.sharding import make_mesh

SIZES = dict(num_heads=8, latent_dim=48, q_latent_dim=24, nope_dim=10, rope_dim=6)
MEMBERS = {
    "mla": LatentConfig(groups=1, branches=1, **SIZES),
    "gla_2": LatentConfig(groups=2, branches=1, **SIZES),
    "gla_4": LatentConfig(groups=4, branches=1, **SIZES),
    "mlra_2": LatentConfig(groups=2, branches=2, **SIZES),
    "mlra_4": LatentConfig(groups=1, branches=4, **SIZES),
}
MEMBERS |= {
    "mlra_2_gated": dataclasses.replace(MEMBERS["mlra_2"], gated=True),
    "mlra_4_no_scale": dataclasses.replace(MEMBERS["mlra_4"], scaled=False),
}
MESHES = [(1, 1), (2, 1), (4, 1), (1, 4), (2, 2), (4, 2)]


@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: f"{m[0]}x{m[1]}")
@pytest.mark.parametrize("member", MEMBERS)
def test_decoding_a_ragged_batch_gives_what_each_prompt_gives_alone(member, mesh):
    assert decoding_error(MEMBERS[member], *mesh) < 1e-5


@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: f"{m[0]}x{m[1]}")
@pytest.mark.parametrize("member", MEMBERS)
def test_decoding_a_single_prompt(member, mesh):
    assert decoding_error(MEMBERS[member], *mesh, lengths=(7,)) < 1e-5


def test_decoding_through_several_layers_two_tokens_at_a_time():
    assert decoding_error(MEMBERS["mlra_2"], 2, 2, num_layers=3, queries=2) < 1e-5


def test_an_unpublished_member():
    three_by_two = LatentConfig(groups=3, branches=2, **SIZES | dict(num_heads=6))
    assert decoding_error(three_by_two, 2, 1) < 1e-5


@pytest.mark.parametrize("member", MEMBERS)
def test_adding_a_constant_to_all_positions_changes_nothing(member):
    model = models.create(small_config(MEMBERS[member]), make_mesh(), seed=3)
    tokens = np.random.default_rng(0).integers(0, 88, (2, 11), np.int32)
    positions = jnp.broadcast_to(jnp.arange(11, dtype=jnp.int32), tokens.shape)
    shifted = positions + jnp.array([[1_000_003], [17]])
    assert relative_error(model(tokens, shifted), model(tokens)) < 1e-5
    # ... while the distances between them matter.
    assert relative_error(model(tokens, 2 * positions), model(tokens)) > 1e-3


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(num_heads=9), "num_heads=9 does not divide into groups=2"),
        (dict(latent_dim=50), "latent_dim=50 does not divide into 4 latent heads"),
        (dict(rope_dim=5), "rope_dim=5 must be even"),
        (dict(nope_dim=0), "nope_dim=0 must be at least 1"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        dataclasses.replace(MEMBERS["mlra_2"], **changes)


def test_meshes_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="4 latent heads and tensor=3"):
        models.abstract_state(small_config(MEMBERS["mlra_4"]), make_mesh(tensor=3))
    with pytest.raises(ConfigError, match=r"heads=12 .* does not divide over tensor=4 x context=2"):
        odd = dataclasses.replace(MEMBERS["mlra_4"], num_heads=12)
        models.abstract_state(small_config(odd), make_mesh(tensor=4, context=2))
