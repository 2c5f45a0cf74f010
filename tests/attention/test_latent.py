"""The latent family: decoding against whole passes, sharding, what positions mean."""

import dataclasses
import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from decoding import decoding_error
from flax import nnx
from tiny import LATENT as MEMBERS
from tiny import NEIGHBOURS, SIZES

from mlra_jax import model as models
from mlra_jax.attention import latent, sharded
from mlra_jax.config import ConfigError, LatentConfig, preset
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


@pytest.mark.parametrize(
    "member, mesh",
    [
        ("mlra_2_base", (1, 1)),
        ("mlra_2_base", (4, 2)),
        ("mlra_4_base_gated", (2, 2)),
        ("gqla", (4, 1)),
        ("gqla_expanded", (4, 2)),
    ],
)
def test_decoding_the_neighbours(member, mesh):
    assert decoding_error(NEIGHBOURS[member], *mesh, queries=2) < 1e-5


def test_the_page_on_neighbours_decodes_the_same_weights_in_both_ways():
    page = (Path(__file__).parents[2] / "docs/neighbours.md").read_text()
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", page, re.S)[1], names)
    model = tiny.random_model(tiny.config(NEIGHBOURS["gqla"]), make_mesh())
    tokens = np.arange(6, dtype=np.int32)[None]
    other = names["other_way"](model)
    assert "k" in other.prefill(tokens, np.array([6]), 8)[1].layers[0]
    assert tiny.relative_error(other(tokens), model(tokens)) < 1e-5


def test_decoding_through_several_layers_two_tokens_at_a_time():
    assert decoding_error(MEMBERS["mlra_2"], 2, 2, num_layers=3, queries=2) < 1e-5


def test_an_unpublished_member():
    three_by_two = LatentConfig(groups=3, branches=2, **SIZES | dict(num_heads=6))
    assert decoding_error(three_by_two, 2, 1) < 1e-5


WIDTHS = dict(num_heads=8, latent_dim=32, q_latent_dim=24, nope_dim=8, rope_dim=6)
"""As published: MLRA's latents are as wide as a head's key, and so are GLA-4's."""


def whole_and_gradients(config, mesh):
    """Logits of a sequence, and the gradients of all weights for a random weighting of them."""
    model = tiny.random_model(config, mesh)
    definition, params = nnx.split(model)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, tiny.VOCAB, (2, 9), np.int32)
    wanted = rng.standard_normal((2, 9, tiny.VOCAB)).astype(np.float32)

    def total(params):
        logits = nnx.merge(definition, params)(tokens)
        return (logits * wanted).sum(), logits

    return jax.device_get(jax.jit(jax.grad(total, has_aux=True))(params))


@functools.cache
def materialised(member):
    """Logits and gradients by keys and values of all branch heads."""
    config = tiny.config(dataclasses.replace(MEMBERS[member], **WIDTHS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latent, "absorbs", lambda a: False)
        return whole_and_gradients(config, make_mesh())


@pytest.mark.parametrize(
    "member, sizes", [("mlra_4", dict(data=2, tensor=4)), ("mlra_2", dict(tensor=8))]
)
def test_trained_in_absorbed_form_as_with_keys_and_values_of_all_heads(member, sizes):
    config = tiny.config(dataclasses.replace(MEMBERS[member], **WIDTHS))
    assert latent.absorbs(config.attention)
    gradients, logits = whole_and_gradients(config, make_mesh(**sizes))
    plain_gradients, plain = materialised(member)
    assert tiny.relative_error(logits, plain) < 2e-6
    for got, want in zip(*map(jax.tree.leaves, (gradients, plain_gradients)), strict=True):
        assert tiny.relative_error(got, want) < 1e-5


@pytest.mark.parametrize("member, absorbed", [("mlra_4", True), ("gla_4", True), ("gla_2", False)])
def test_what_whole_sequences_attend_to_is_chosen_by_widths(monkeypatch, member, absorbed):
    """Of the published sizes: latents and rotary keys, or keys and values of every head."""
    config, mesh = preset(member), make_mesh()
    seen = []

    def attend(q, k, v, **_):
        seen.append((q.shape[2:], k.shape[2:], v.shape[2:]))
        return q[..., : v.shape[-1]]

    def attend_to_latents(q, q_rope, c, k_rope, **_):
        return attend(jnp.concatenate([q, q_rope], axis=-1), c, c)

    monkeypatch.setattr(sharded, "whole_sequence", attend)
    monkeypatch.setattr(sharded, "whole_sequence_of_latents", attend_to_latents)
    definition, shapes = models.structure(config, mesh)
    tokens = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    jax.eval_shape(lambda p, t: nnx.merge(definition, p).hidden(t), shapes, tokens)
    branch_heads = 24 * config.attention.branches
    keys = (4, 128) if absorbed else (branch_heads, 192)
    assert set(seen) == {((branch_heads, 192), keys, (keys[0], 128))}


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
