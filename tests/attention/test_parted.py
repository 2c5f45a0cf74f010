"""Latent attention decoded over several devices: the same numbers, two exchanges a layer."""

import dataclasses
import re

import jax
import numpy as np
import pytest
import tiny
from decoding import decoding_error, lower_step

from mlra_jax import sharding
from mlra_jax.attention.parted import part_heads
from mlra_jax.config import LatentConfig
from mlra_jax.decoder import Decoder, abstract_decoder
from mlra_jax.kernels import exchange
from mlra_jax.sharding import make_mesh


@pytest.mark.parametrize(
    "groups, branches, ways, want",
    [
        (1, 4, 2, [range(8), range(8)]),
        (1, 4, 4, [range(8)] * 4),
        (2, 2, 4, [range(4), range(4, 8)] * 2),
        (4, 1, 2, [range(4), range(4, 8)]),
        (1, 1, 2, [range(4), range(4, 8)]),
    ],
)
def test_each_device_has_the_heads_of_its_latents(groups, branches, ways, want):
    sizes = dict(num_heads=8, latent_dim=48, q_latent_dim=24, nope_dim=10, rope_dim=6)
    heads = part_heads(LatentConfig(groups=groups, branches=branches, **sizes), ways)
    np.testing.assert_array_equal(heads, [list(part) for part in want])


def test_heads_of_branches_that_are_cut_elsewhere():
    sizes = dict(num_heads=6, latent_dim=48, q_latent_dim=24, nope_dim=10, rope_dim=6)
    heads = part_heads(LatentConfig(groups=1, branches=4, **sizes), 3)
    np.testing.assert_array_equal(heads[1], [2, 3, 4, 5, 0, 1, 2, 3])


LATENT = dict(num_heads=8, q_latent_dim=24, nope_dim=12, rope_dim=6)
BRANCHES = LatentConfig(groups=1, branches=4, latent_dim=40, **LATENT)
CHOSEN = dataclasses.replace(BRANCHES, latent_dim=48, head_gated=True, branch_gated=True)
GROUPS = LatentConfig(groups=2, branches=2, latent_dim=48, num_kv_heads=4, **LATENT)


@pytest.mark.parametrize(
    ("attention", "tensor", "context"), [(BRANCHES, 4, 1), (CHOSEN, 4, 2), (GROUPS, 2, 2)]
)
def test_up_projections_are_part_of_other_weights_where_that_costs_nothing(
    attention, tensor, context
):
    config, mesh = tiny.config(attention), make_mesh(tensor=tensor, context=context)
    assert decoding_error(attention, tensor, context, num_layers=2) < 1e-5
    weights = abstract_decoder(config, mesh).weights["layers"][0]["attention"]
    a = attention
    assert not {"k_up", "v_up"} & weights.keys()
    heads = a.branches * a.num_heads
    assert weights["q_up"]["kernel"].shape == (24, heads, a.latent_head_dim + a.rope_dim)
    assert weights["out"]["kernel"].shape == (heads, a.latent_head_dim, config.embed_dim)


@pytest.mark.parametrize(
    ("changes", "tensor"),
    [
        (dict(), 2),  # Two branches of each head on a device: larger than both.
        (dict(), 1),
        (dict(latent_dim=52), 4),  # Latents wider than keys.
        (dict(gated=True), 4),
        (dict(base_dim=16), 4),
    ],
)
def test_up_projections_stay_where_they_must(changes, tensor):
    config = tiny.config(dataclasses.replace(BRANCHES, **changes))
    weights = abstract_decoder(config, make_mesh(tensor=tensor)).weights["layers"][0]
    assert {"k_up", "v_up"} < weights["attention"].keys()


def test_products_of_weights_are_rounded_once():
    """bfloat16 decoders of one device and of several are as far from float32."""
    tokens = np.random.default_rng(1).integers(0, tiny.VOCAB, (2, 9), np.int32)

    def logits(dtype, mesh):
        model = tiny.random_model(tiny.config(BRANCHES, dtype=dtype), mesh)
        return Decoder.from_model(model)(tokens)

    truth = logits("float32", make_mesh())
    one, four = (logits("bfloat16", make_mesh(tensor=n)) for n in (1, 4))
    assert tiny.relative_error(four, truth) < 1.3 * tiny.relative_error(one, truth)


def exchanges(name: str, mesh, layers: int) -> dict[str, int]:
    text = lower_step(tiny.config(name, layers), mesh, batch=2, slots=16).compile().as_text()
    found = re.findall(r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-\w+)\(", text)
    return {kind: found.count(kind) for kind in found}


@pytest.mark.parametrize("tensor", [2, 4])
@pytest.mark.parametrize("name", ["mlra_4", "mlra_2_gated", "gla_4", "mlra_4_base_gated"])
def test_a_layer_exchanges_twice(name, tensor):
    mesh = make_mesh(tensor=tensor)
    one, two = (exchanges(name, mesh, layers) for layers in (1, 2))
    more = {kind: two[kind] - one.get(kind, 0) for kind in two}
    assert {kind: n for kind, n in more.items() if n} == {"all-reduce": 2}


def test_shares_of_the_positions_are_joined_by_one_exchange():
    """Beside the two of sums: latents and queries are made where they are asked for."""
    one, two = (exchanges("mla", make_mesh(context=2), layers) for layers in (1, 2))
    more = {kind: two[kind] - one.get(kind, 0) for kind in two}
    assert {kind: n for kind, n in more.items() if n} == {"all-reduce": 2, "all-to-all": 1}


@pytest.mark.parametrize("mesh", [(1, 1), (2, 1)], ids=["one", "two"])
def test_rows_that_a_gpu_wants_change_nothing(mesh, monkeypatch):
    monkeypatch.setattr(sharding, "platform", lambda mesh: "gpu")
    jax.clear_caches()
    assert decoding_error(tiny.LATENT["mlra_2"], *mesh, num_layers=2) < 1e-5
    assert decoding_error(tiny.LATENT["mlra_2"], *mesh, lengths=(7,), queries=2) < 1e-5


@pytest.mark.parametrize(("name", "context"), [("mlra_4", 2), ("gqa_gated", 1)])
def test_parts_added_by_exchanges_are_the_same_numbers(name, context, monkeypatch):
    """As on Hopper GPUs, in plain JAX; two tokens at a time."""
    monkeypatch.setattr(exchange, "supports", lambda *_: None)
    jax.clear_caches()
    config = tiny.config(name, 2)
    lengths = dict(lengths=(7,)) if context == 1 else {}
    assert decoding_error(config.attention, 2, context, num_layers=2, queries=2, **lengths) < 1e-5
