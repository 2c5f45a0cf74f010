"""The decoding form: what it holds, how its step reads weights, and that rows are independent."""

import math
import re

import jax
import numpy as np
import pytest
import tiny
from decoding import lower_step
from flax import nnx
from tiny import random_model, relative_error

import mlra_jax
from mlra_jax.decoder import Decoder, Vocabulary, abstract_decoder
from mlra_jax.generation import programs
from mlra_jax.sharding import make_mesh

TOKENS = np.random.default_rng(0).integers(0, tiny.VOCAB, (4, 9), np.int32)


@pytest.mark.parametrize("sizes", [{}, dict(data=4), dict(fsdp=2, tensor=2, context=2)])
@pytest.mark.parametrize("name", ["mlra_2_gated", "gqa_gated", "gta", "mfa", "tpa"])
def test_both_forms_are_the_same_model(name, sizes):
    model = random_model(tiny.config(name, 2), make_mesh(**sizes))
    decoder = Decoder.from_model(model)
    assert relative_error(decoder(TOKENS), model(TOKENS)) < 1e-5
    shapes = abstract_decoder(model.config, model.mesh)
    same = jax.tree.map(
        lambda x, like: (x.shape, x.dtype, x.sharding) == (like.shape, like.dtype, like.sharding),
        decoder.weights,
        shapes.weights,
    )
    assert all(jax.tree.leaves(same))


def test_weights_as_a_step_reads_them():
    config = tiny.config("mlra_2_gated", 2)
    model = random_model(config, make_mesh())
    decoder = Decoder.from_model(model, Vocabulary(80, "bytes"))
    assert decoder.vocabulary == Vocabulary(80, "bytes")
    state = {path: x[...] for path, x in nnx.to_flat_state(nnx.state(model))}
    of = lambda *path: np.asarray(state["layers", *path, "kernel"])
    for i in range(2):
        weights = decoder.weights["layers"][i]
        gate_up = np.asarray(weights["mlp"]["gate_up"]["kernel"])
        # 56 columns become a whole tile of 128; the rest is zero.
        assert gate_up.shape == (40, 2, 128) and not gate_up[..., 56:].any()
        np.testing.assert_array_equal(gate_up[:, 0, :56], of("mlp", "gate")[i])
        np.testing.assert_array_equal(gate_up[:, 1, :56], of("mlp", "up")[i])
        down = np.asarray(weights["mlp"]["down"]["kernel"])
        np.testing.assert_array_equal(down[:56], of("mlp", "down")[i])
        assert down.shape == (128, 40) and not down[56:].any()
        joined = [of("attention", n)[i] for n in ("q_down", "kv_down", "k_rope", "gate")]
        np.testing.assert_array_equal(
            weights["attention"]["joined"]["kernel"],
            np.concatenate([x.reshape(40, -1) for x in joined], axis=1),
        )
        assert "gate" not in weights["attention"]
    on_four = abstract_decoder(config, make_mesh(tensor=2, context=2)).weights["layers"][0]
    assert on_four["mlp"]["gate_up"]["kernel"].shape == (40, 2, 512)
    # Of several devices each has its own latents and gates beside what all have whole.
    assert on_four["attention"]["joined"]["kernel"].shape == (40, 4 * (24 + 24 + 6 + 4 * 10))


def test_weights_are_in_the_dtype_of_the_products_and_norms_as_stored():
    config = tiny.config("mla", dtype="bfloat16")
    weights = Decoder.from_model(random_model(config, make_mesh())).weights
    for path, x in jax.tree_util.tree_leaves_with_path(weights):
        assert x.dtype == ("float32" if path[-1].key == "scale" else "bfloat16"), path


def test_donated_parameters_are_gone_and_the_others_stay():
    model = random_model(tiny.config("gqa"), make_mesh())
    Decoder.from_model(model)
    params = nnx.to_pure_dict(nnx.state(model))
    assert not any(x.is_deleted() for x in jax.tree.leaves(params))
    Decoder.from_params(model.config, model.mesh, params, donate=True)
    assert all(x.is_deleted() for x in jax.tree.leaves(params))


MOVES = r"copy|concatenate|pad|transpose|convert|slice|dynamic-slice|gather|reshape"


@pytest.mark.parametrize("sizes", [{}, dict(tensor=2, context=2)], ids=["one", "four"])
@pytest.mark.parametrize("name", ["mlra_2_gated", "gqa_gated", "gta", "tpa"])
def test_a_step_moves_nothing_of_the_size_of_a_weight(name, sizes):
    """Nothing of the compiled step copies, joins, pads, converts or transposes weights."""
    config, mesh = tiny.config(name, embed_dim=256), make_mesh(**sizes)
    decoder = abstract_decoder(config, mesh)
    held = lambda x: math.prod(x.sharding.shard_shape(x.shape))
    smallest = min(held(x) for x in jax.tree.leaves(decoder.weights) if len(x.shape) > 1)
    text = lower_step(config, mesh, 1, 8 * mesh.size).compile().as_text()
    found = re.findall(rf"= \w+\[([\d,]+)\]\S* ({MOVES})\((.*)", text)
    assert found, "no instructions found: has the text form changed?"
    moved = [line for line in found if math.prod(map(int, line[0].split(","))) >= smallest]
    assert not moved


def alone(model, prompt, new, **settings):
    [row] = mlra_jax.generate(model, [prompt], max_new_tokens=new, **settings)
    return row


def test_rows_decode_as_they_do_alone():
    """Lengths, temperatures, top_k, top_p and seeds differ; one is greedy."""
    model = Decoder.from_model(random_model(tiny.config("mlra_4", 2), make_mesh()))
    prompts = [TOKENS[0].tolist(), TOKENS[1, :2].tolist(), TOKENS[2, :5].tolist(), [7]]
    rows = [
        dict(temperature=0.0, top_k=0, top_p=1.0, seed=1),
        dict(temperature=0.7, top_k=0, top_p=1.0, seed=2),
        dict(temperature=1.3, top_k=5, top_p=0.9, seed=3),
        dict(temperature=2.0, top_k=0, top_p=0.5, seed=2),
    ]
    batch = {name: [row[name] for row in rows] for name in rows[0]}
    together = mlra_jax.generate(model, prompts, max_new_tokens=12, **batch)
    for prompt, settings, row in zip(prompts, rows, together, strict=True):
        one = settings | {"seed": [settings["seed"]]}
        assert alone(model, prompt, 12, **one) == row
    # Equal prompts with seeds of their own: the seed decides, not the place.
    same = dict(max_new_tokens=12, temperature=1.0)
    a, b, c, d = mlra_jax.generate(model, [[5, 6]] * 4, seed=[4, 9, 4, 9], **same)
    assert a == c != b == d
    # One seed for all gives each its own draws.
    drawn = mlra_jax.generate(model, [[5, 6]] * 4, seed=4, **same)
    assert len(set(map(tuple, drawn))) == 4


def test_other_settings_and_lengths_compile_nothing():
    model = Decoder.from_model(random_model(tiny.config("gqa"), make_mesh()))
    prompts = [[1, 2, 3], [4, 5]]
    settings = dict(max_new_tokens=4, cache_length=24)
    mlra_jax.generate(model, prompts, **settings)
    # Where a row is not greedy there are random numbers, where one has top_k or top_p the draw
    # sorts: two more programs, of the draw alone.
    mlra_jax.generate(model, prompts, **settings, temperature=0.5)
    mlra_jax.generate(model, prompts, **settings, temperature=0.5, top_p=0.5)
    parts = (programs.prefill, programs.step, programs.draw)
    programs_of = lambda: [part._cache_size() for part in parts]
    before = programs_of()
    for other in (
        dict(temperature=0.7),
        dict(temperature=1.1, top_k=4),
        dict(temperature=[0.0, 2.0], top_p=[0.9, 1.0], seed=[1, 2]),
    ):
        mlra_jax.generate(model, [prompts[1] * 3, prompts[0]], **settings, **other)
    assert programs_of() == before


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(temperature=[1.0]), "1 values of temperature for 2 prompts"),
        (dict(top_k=[1, 2, 3]), "3 values of top_k for 2 prompts"),
        (dict(seed=[1, 2, 3]), "3 seeds for 2 prompts: give one, or one for each"),
        (dict(top_p=[1.0, 0.0]), "top_p=0.0 must lie in"),
    ],
)
def test_settings_of_another_number_than_the_prompts_are_refused(settings, words):
    model = Decoder.from_model(random_model(tiny.config("mha"), make_mesh()))
    with pytest.raises(ValueError, match=words):
        mlra_jax.generate(model, [[1], [2]], max_new_tokens=1, **settings)


@pytest.mark.parametrize(
    "name, sizes",
    [("mlra_4", dict(tensor=2, context=2)), ("tpa", {})],
)
def test_a_full_row_is_refused_and_where_it_is_traced_stays_as_it_is(name, sizes):
    decoder = Decoder.from_model(random_model(tiny.config(name, 2), make_mesh(**sizes)))
    lengths = np.array([9, 7], np.int32)
    prefill = jax.jit(lambda decoder, *prompts: decoder.prefill(*prompts, 16))
    step = jax.jit(Decoder.step)
    _, cache = prefill(decoder, TOKENS[:2], lengths)
    assert cache.capacity == 16
    # The longer row has 7 free slots.
    _, full = decoder.step(TOKENS[:2, :7], cache)
    with pytest.raises(ValueError, match=r"the cache has 16 slots and a row fills 16: no room for"):
        decoder.step(TOKENS[:2, :1], full)
    with pytest.raises(ValueError, match=r"a row fills 9: no room for 8 more token"):
        decoder.step(TOKENS[:2, :8], cache)
    _, after = step(decoder, TOKENS[2:, :1], full)
    assert (after.lengths > after.capacity).tolist() == [True, False]
    for before, now in zip(full.layers, after.layers, strict=True):
        for entry in before:
            np.testing.assert_array_equal(now[entry][0], before[entry][0])
            changed = (np.asarray(now[entry][1]) != np.asarray(before[entry][1])).reshape(16, -1)
            assert changed.any(-1).sum() == 1, "the row that has room gets its one entry"
