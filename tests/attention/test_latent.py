"""The latent family: decoding against whole passes, sharding, what positions mean."""

import dataclasses

import pytest
import tiny
from decoding import decoding_error
from tiny import LATENT as MEMBERS
from tiny import SIZES

from mlra_jax import model as models
from mlra_jax.config import ConfigError, LatentConfig
from mlra_jax.sharding import make_mesh

MESHES = [(1, 1), (1, 4), (2, 2), (4, 2)]


@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: f"{m[0]}x{m[1]}")
@pytest.mark.parametrize("member", MEMBERS)
def test_decoding_a_ragged_batch_gives_what_each_prompt_gives_alone(member, mesh):
    assert decoding_error(MEMBERS[member], *mesh) < 1e-5


@pytest.mark.parametrize("mesh", [(2, 1), (4, 1)], ids=lambda m: f"{m[0]}x{m[1]}")
@pytest.mark.parametrize("member", ["mla", "mlra_2"])
def test_decoding_where_only_the_latents_are_split(member, mesh):
    assert decoding_error(MEMBERS[member], *mesh) < 1e-5


@pytest.mark.parametrize("member", ["mla", "mlra_4"])
def test_decoding_a_single_prompt(member):
    assert decoding_error(MEMBERS[member], 2, 2, lengths=(7,)) < 1e-5


def test_decoding_through_several_layers_two_tokens_at_a_time():
    assert decoding_error(MEMBERS["mlra_2"], 2, 2, num_layers=3, queries=2) < 1e-5


def test_an_unpublished_member():
    three_by_two = LatentConfig(groups=3, branches=2, **SIZES | dict(num_heads=6))
    assert decoding_error(three_by_two, 2, 1) < 1e-5


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
        models.structure(tiny.config(MEMBERS["mlra_4"]), make_mesh(tensor=3))
    with pytest.raises(ConfigError, match=r"heads=12 .* does not divide over tensor=4 x context=2"):
        odd = dataclasses.replace(MEMBERS["mlra_4"], num_heads=12)
        models.structure(tiny.config(odd), make_mesh(tensor=4, context=2))
