"""MHA, GQA, MQA, GTA, MFA and TPA: decoding against whole passes, what is cached, what is refused.

That the whole passes compute what they should is shown by the released logits (tests/convert).
"""

import dataclasses
import math
import re
import runpy
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from decoding import decoding_error, whole_pass
from tiny import ATTENTIONS, random_model, relative_error
from tiny import OTHERS as VARIANTS

from mlra_jax import model as models
from mlra_jax.attention import mechanism
from mlra_jax.attention.heads import HeldHeads
from mlra_jax.config import VARIANTS as PUBLISHED
from mlra_jax.config import (
    ConfigError,
    GroupedConfig,
    TiedConfig,
    preset,
)
from mlra_jax.decoder import Decoder, abstract_cache, abstract_decoder
from mlra_jax.kernels import target
from mlra_jax.kernels.absorbed_decode import api
from mlra_jax.sharding import make_mesh, named
from mlra_jax.training.settings import Experiment

MESHES = [(1, 1), (1, 4), (2, 2), (4, 2)]
UNEVEN = {"gqa": GroupedConfig(24, 6, 8), "gta": TiedConfig(24, 6, 8)}
"""As published: 24 query heads read 6 key/value heads, which do not divide over 4 devices."""


@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: f"{m[0]}x{m[1]}")
@pytest.mark.parametrize("name", VARIANTS)
def test_decoding_gives_what_each_prompt_gives_in_a_whole_pass(name, mesh):
    assert decoding_error(VARIANTS[name], *mesh) < 1e-5


@pytest.mark.parametrize("mesh", [(2, 1), (4, 1)], ids=lambda m: f"{m[0]}x{m[1]}")
@pytest.mark.parametrize("name", ["gqa", "tpa"])
def test_decoding_where_only_the_heads_are_split(name, mesh):
    assert decoding_error(VARIANTS[name], *mesh) < 1e-5


@pytest.mark.parametrize("name", ["mqa", "gta"])
def test_decoding_a_single_prompt(name):
    assert decoding_error(VARIANTS[name], 2, 2, lengths=(7,)) < 1e-5


@pytest.mark.parametrize("name", ["gqa", "tpa"])
def test_decoding_through_several_layers_two_tokens_at_a_time(name):
    assert decoding_error(VARIANTS[name], 2, 2, num_layers=3, queries=2) < 1e-5


@pytest.mark.parametrize("mesh", [(4, 1), (4, 2), (8, 1)], ids=lambda m: f"{m[0]}x{m[1]}")
@pytest.mark.parametrize("name", UNEVEN)
def test_decoding_where_key_heads_do_not_divide_over_the_devices(name, mesh):
    assert decoding_error(UNEVEN[name], *mesh) < 1e-5


@pytest.mark.parametrize("name", ATTENTIONS)
def test_adding_a_constant_to_all_positions_changes_nothing(name):
    model = random_model(tiny.config(name), make_mesh())
    row = np.random.default_rng(0).integers(0, 88, 11, np.int32)
    positions = np.arange(11, dtype=np.int32)
    # One prompt four times: from 0, from elsewhere, and with other distances between its tokens.
    positions = np.stack([positions, positions + 1_000_003, positions + 17, 2 * positions])
    plain, *shifted, stretched = whole_pass(model, np.stack([row] * 4), positions)
    assert max(relative_error(x, plain) for x in shifted) < 1e-5
    assert relative_error(stretched, plain) > 1e-3


@pytest.mark.parametrize("num_heads, num_kv_heads, tensor", [(24, 6, 4), (24, 6, 8), (30, 6, 5)])
def test_a_device_keeps_no_more_key_heads_than_its_query_heads_can_touch(
    num_heads, num_kv_heads, tensor
):
    held = HeldHeads(num_heads, num_kv_heads, tensor)
    group, mine = num_heads // num_kv_heads, num_heads // tensor
    touched = [{h // group for h in range(t * mine, (t + 1) * mine)} for t in range(tensor)]
    assert held.each == max(map(len, touched))
    head_numbers = jnp.arange(num_kv_heads)[None, None, :, None]
    kept = np.asarray(held.spread(head_numbers)).reshape(tensor, held.each)
    for t in range(tensor):
        assert touched[t] <= set(kept[t].tolist())


@pytest.mark.parametrize(
    "name, tensor, values",
    [
        # Per token: key and value of the published sizes' heads (d_h = 128), or what replaces them.
        ("mha", 4, 2 * 6 * 128),
        ("gqa", 1, 2 * 6 * 128),
        ("gqa", 2, 2 * 3 * 128),
        ("gqa", 4, 2 * 2 * 128),
        ("gqa", 8, 2 * 2 * 128),
        ("mqa", 8, 2 * 128),
        ("gta", 1, 6 * 128 + 64),
        ("gta", 2, 3 * 128 + 64),
        ("gta", 8, 2 * 128 + 64),
        ("mfa", 4, 2 * 256),
        ("tpa", 1, 2 * 2 * (24 + 128)),
        ("tpa", 4, 2 * 2 * (6 + 128)),
    ],
)
def test_values_cached_per_token_and_device(name, tensor, values):
    attention = preset(name).attention
    module = mechanism(attention)
    shapes = module.cache_shapes(attention, 1, 1, tensor)
    per_device = 0
    for entry, shape in shapes.items():
        split = tensor if "cache_latent" in module.cache_axes[entry] else 1
        assert shape[2] % split == 0
        per_device += math.prod(shape) // split
    assert per_device == values


@pytest.mark.parametrize("name", tiny.ALL)
def test_cache_shapes_are_those_of_the_prefill(name):
    config, mesh = tiny.config(name), make_mesh(tensor=4)
    tokens = jax.ShapeDtypeStruct((2, 5), jnp.int32)
    lengths = jax.ShapeDtypeStruct((2,), jnp.int32)
    prefill = lambda decoder, *prompts: decoder.prefill(*prompts, 8)
    logits, cache = jax.eval_shape(prefill, abstract_decoder(config, mesh), tokens, lengths)
    module = mechanism(config.attention)
    shapes = module.cache_shapes(config.attention, 2, 8, 4)
    assert {n: x.shape for n, x in cache.layers[0].items()} == shapes
    assert shapes.keys() == module.cache_axes.keys()
    assert logits.shape == (2, config.vocab_size) and cache.lengths.shape == (2,)


@pytest.mark.parametrize(
    "attention",
    [*VARIANTS.values(), *UNEVEN.values(), tiny.NEIGHBOURS["gqla_expanded"]],
    ids=[*VARIANTS, *(f"uneven_{name}" for name in UNEVEN), "gqla_expanded"],
)
def test_a_step_moves_neither_cache_nor_weights_between_devices(attention):
    B, T, S = 2, 1, 512
    config, mesh = tiny.config(attention), make_mesh(tensor=2, context=2)
    cache = abstract_cache(config, mesh, B, S)
    tokens = jax.ShapeDtypeStruct((B, T), jnp.int32, sharding=named(mesh))
    step = jax.jit(Decoder.step, donate_argnums=2)
    compiled = step.lower(abstract_decoder(config, mesh), tokens, cache).compile()
    # Changed in place: what is donated is written to.
    held = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(cache)
    )
    assert compiled.memory_analysis().alias_size_in_bytes >= held
    moved = [
        math.prod(map(int, shape.split(",")))
        for shapes in re.findall(r"= (.*?) (?:all-|reduce-scatter|collective)", compiled.as_text())
        for shape in re.findall(r"\[([\d,]+)\]", shapes)
    ]
    widest = B * T * max(config.embed_dim, attention.num_heads * attention.query_dim)
    assert 0 < max(moved) <= widest


@pytest.fixture
def chosen_on_hopper(monkeypatch):
    """The implementations of absorbed decode that are chosen, as if compiled for an H100."""
    pytest.importorskip(
        "mlra_jax.kernels.absorbed_decode.mosaic_gpu",
        reason="this jaxlib has no Mosaic GPU dialect",
    )
    hopper = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(target, "device", lambda: hopper)
    chosen, choose = [], api._choose
    monkeypatch.setattr(api, "_choose", lambda *args: chosen.append(choose(*args)) or chosen[-1])
    return chosen


@pytest.mark.parametrize("tensor", [1, 4])
@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "tpa"])
def test_published_sizes_decode_by_the_kernel_on_hopper(chosen_on_hopper, name, tensor):
    step_shapes(preset(name, num_layers=1), make_mesh(tensor=tensor))
    assert chosen_on_hopper == ["mosaic_gpu"]


@pytest.mark.parametrize("tensor", [1, 4])
def test_the_quickstart_decodes_by_the_kernel_on_hopper(chosen_on_hopper, tensor):
    path = Path(__file__).parents[2] / "configs" / "quickstart.py"
    model = Experiment.from_dict(runpy.run_path(str(path))["get_config"]().to_dict()).model
    execution = dataclasses.replace(model.execution, dtype="bfloat16")
    step_shapes(dataclasses.replace(model, execution=execution), make_mesh(tensor=tensor))
    assert chosen_on_hopper == ["mosaic_gpu"] * model.num_layers


def step_shapes(config, mesh):
    """The shapes in a step of two rows over a cache of 4096 positions, traced."""
    tokens = jax.ShapeDtypeStruct((2, 1), jnp.int32)
    cache = abstract_cache(config, mesh, 2, 4096)
    text = str(jax.make_jaxpr(Decoder.step)(abstract_decoder(config, mesh), tokens, cache))
    return {tuple(map(int, shape.split(","))) for shape in re.findall(r"\[(\d[\d,]*)\]", text)}


def test_factors_decode_without_keys_or_values():
    """TPA has no kernel: no array of a step is as large as its keys would be."""
    shapes = step_shapes(preset("tpa", num_layers=1), make_mesh())
    of_the_cache = [shape for shape in shapes if 4096 in shape]
    assert (2, 4096, 2, 128) in of_the_cache
    assert max(map(math.prod, of_the_cache)) <= 2 * 4096 * 2 * 128


@pytest.mark.parametrize("name", VARIANTS)
def test_heads_that_do_not_divide_over_the_mesh_are_refused_in_one_line(name):
    for mesh in (make_mesh(tensor=3), make_mesh(tensor=4, context=2)):
        attention = VARIANTS[name]
        heads = 8 if mesh.shape["tensor"] == 3 else 4
        changes = {"num_heads": heads}
        if hasattr(attention, "num_kv_heads"):
            changes["num_kv_heads"] = math.gcd(attention.num_kv_heads, heads)
        with pytest.raises(ConfigError, match=f"heads={heads} .* does not divide") as error:
            models.structure(tiny.config(dataclasses.replace(attention, **changes)), mesh)
        assert "\n" not in str(error.value)
    module = mechanism(VARIANTS[name])
    with pytest.raises(ConfigError, match="8 .*heads do not divide over tensor=3"):
        module.cache_shapes(VARIANTS[name], 1, 1, 3)
