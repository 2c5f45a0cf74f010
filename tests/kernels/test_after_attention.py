"""A layer behind its attention in one launch. No GPU here: its numbers in plain JAX, how CTAs share
the work, that it lowers, and that decoding steps take it where it serves."""

import collections
import dataclasses
import functools
import itertools
import re
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from decoding import decoding_error
from jax import export
from jax.sharding import PartitionSpec as P

from benchmarks.after_attention import errors, layers_of, step_of
from benchmarks.models import model_config
from mlra_jax import sharding
from mlra_jax.attention import sharded
from mlra_jax.attention.latent import LatentAttention
from mlra_jax.decoder import abstract_cache, abstract_decoder
from mlra_jax.kernels import after_attention, exchange, target
from mlra_jax.kernels.after_attention import Shape, api, mosaic_gpu, plan, reference
from mlra_jax.sharding import make_mesh

FACTORS, EPS = (1.0, 1.5), (1e-6, 1e-5)
MLRA_4 = dict(entry=1216, query=1024, latent=128, rope=64, nope=128, asked=4608)
PAPER = Shape(answer=3072, stream=3072, mlp=2560, rows=8, **MLRA_4)
SMALL = Shape(192, 384, 256, 16, entry=384, query=192, latent=64, rope=64, nope=128, asked=384)
WIDE = Shape(1088, 2048, 1408, 8, entry=1600, query=1024, latent=512, rope=64, nope=64, asked=2048)
# MLRA-4's answer on four devices, and one wider than the stream.
IN_PARTS = dataclasses.replace(PAPER, in_parts=True)
WIDE_IN_PARTS = Shape(answer=640, stream=256, mlp=256, rows=8, in_parts=True)
SHAPES = [PAPER, Shape(answer=3072, stream=3072, mlp=2560, rows=8), SMALL, WIDE]
SHAPES += [IN_PARTS, WIDE_IN_PARTS]


def arguments(ways, *, R=5, K=6, D=8, F=10, dtype="float32"):
    """Of as many devices, K and F of each."""
    draw = np.random.default_rng(0).standard_normal
    shapes = [(R, K * ways), (D, R), (D,), (D,), (K * ways, D), (D, 2, F * ways), (F * ways, D)]
    answer, x, *rest = (jnp.asarray(draw(s), dtype) for s in shapes)
    return answer, x, rest[:2], rest[2:]


def launched(mesh, answer_RK, x_DR, scales, weights):
    """A layer that no attention follows."""
    (R, _), D = answer_RK.shape, len(x_DR)
    axes = tuple(a for a in sharding.MODEL if mesh.shape[a] > 1)
    sizes = (n // mesh.size for n in (len(weights[0]), mesh.size * D, len(weights[2])))
    how = dict(scales=tuple(scales), factors=FACTORS, eps=EPS, of_answer=P(None, axes))
    layer = api.Layer(*weights, of_weights=(P(axes), P(None, None, axes), P(axes)), **how)
    step = exchange.Exchange(mesh, sharding.MODEL, R, D)
    return after_attention.AfterAttention(step, Shape(*sizes, R))(answer_RK, x_DR, layer, None)


def in_float64(answer_RK, x_DR, scales, weights):
    """(the stream, its norm)."""
    arrays = answer_RK, x_DR.T, *scales, *weights
    answer, x, scale_0, scale_1, out, widen, narrow = (np.asarray(y, np.float64) for y in arrays)
    mean = lambda x: np.mean(x**2, axis=-1, keepdims=True)
    x = x + answer @ out
    normed = x / np.sqrt(mean(x) + EPS[0]) * scale_0 * FACTORS[0]
    gate, up = (normed @ widen[:, i] for i in (0, 1))
    x = x + (gate / (1 + np.exp(-gate)) * up) @ narrow
    return x, x / np.sqrt(mean(x) + EPS[1]) * scale_1 * FACTORS[1]


@pytest.mark.parametrize("sizes", [dict(tensor=2), dict(tensor=2, context=4)])
def test_plain_launch_is_the_layer(sizes):
    mesh = make_mesh(**sizes)
    arrays = arguments(mesh.size)
    found = jax.jit(functools.partial(launched, mesh))(*arrays)
    for got, expected in zip((found[0].T, found[1]), in_float64(*arrays), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("sizes", "shape"), [(dict(tensor=2), SMALL), (dict(context=2), WIDE)])
def test_plain_launch_enters_the_attention_that_follows(sizes, shape):
    """Queries and caches of layers one after the other, in bfloat16."""
    assert max(errors(make_mesh(**sizes), shape)) < 2e-2


def units(product):
    """Of each CTA."""
    every = jax.vmap(product.unit)(jnp.arange(plan.CTAS, dtype=jnp.int32))
    return zip(*(np.asarray(x).tolist() for x in every), strict=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_ctas_share_every_product_once(shape):
    for product in shape.products:
        covered = np.zeros((product.tiles, product.contracted // plan.SLAB), int)
        for tile, share, first, copies in units(product):
            assert copies == 0 or share < product.shares
            assert copies * product.blocks <= product.most
            if copies:
                covered[tile, first : first + copies * product.blocks] += 1
        assert (covered == 1).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_places_on_the_board_are_apart(shape):
    places, words = shape.places(), 0
    for name, size in shape.board.items():
        assert places[name] == words
        words += int(np.prod(size)) * shape.rows
    assert places["end"] == words
    # From there on all is emptied, and nothing before it; a block may be read at the end.
    heard_by_many = [name for name in shape.board if not name.startswith("parts")]
    after_others = ["hidden", "entered_next", "squares_next", "entered_query", "squares_query"]
    assert list(shape.board)[-len(heard_by_many) :] == heard_by_many
    assert heard_by_many[:2] == ["entered_mlp", "squares_mlp"]
    # Whoever exchanges a block of the stream empties the answer.
    answer = ["answer"] if shape.in_parts else []
    assert heard_by_many[2:] == answer + after_others[: 5 if shape.entry else 3]
    emptied = places["hidden"] + shape.emptied * shape.emptying
    assert words <= emptied <= shape.board_size - plan.SLAB * shape.rows


@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_is_told_before_it_is_emptied_or_emptied_before_it_is_heard(shape):
    """Who has heard of whom, through all that was heard on the way."""
    out, widen, narrow = shape.products[:3]

    def taken_by(product):
        """(tile, share, the blocks it takes) of each CTA with a part in the product."""
        return [
            (tile, share, range(first, first + copies * product.blocks))
            for tile, share, first, copies in units(product)
            if copies
        ]

    tile_of = lambda product, block: block * plan.SLAB // product.tile
    # (tile, share) of the parts that have been told, before each block of the MLP's input is,
    entered = {
        b: {(t, s) for t, s, _ in taken_by(out) if t == tile_of(out, b)}
        for b in range(shape.blocks)
    }
    # and before each block of `hidden`; and the widened parts of the MLP that have.
    hidden, widened = {}, {}
    for g in range(shape.mlp // plan.SLAB):
        tiles = {tile_of(widen, g), tile_of(widen, g + shape.mlp // plan.SLAB)}
        heard = [unit for unit in taken_by(widen) if unit[0] in tiles]
        hidden[g] = set().union(*(entered[b] for *_, blocks in heard for b in blocks))
        widened[g] = {(t, s) for t, s, _ in heard}
    everyone = {(t, s) for t, s, _ in taken_by(out)}
    assert len(everyone) == shape.emptying
    # They are the first CTAs, of which each empties a piece.
    assert all(copies > 0 for *_, copies in list(units(out))[: shape.emptying])
    assert all(before == everyone for before in hidden.values())
    for b in range(shape.blocks):
        taken = {g for t, _, blocks in taken_by(narrow) if t == tile_of(narrow, b) for g in blocks}
        assert taken == set(hidden)  # All that gate, so all that hear the squares.
        assert set().union(*(widened[g] for g in taken)) == {(t, s) for t, s, _ in taken_by(widen)}


def test_every_block_has_a_warpgroup():
    workers = itertools.product(range(plan.CTAS), range(plan.MULTIPLIERS))
    ctas = [types.SimpleNamespace(index=cta, wg=wg) for cta, wg in workers]
    everyone = list(range(len(ctas)))
    assert sorted(mosaic_gpu._Cta.block.fget(cta) for cta in ctas) == everyone
    assert sorted(mosaic_gpu._Cta.gated.fget(cta) for cta in ctas) == everyone
    # Those without a part in the paper's product are the first to gate.
    idle = plan.CTAS - PAPER.products[1].tiles * PAPER.products[1].shares
    first = {cta.index for cta in ctas if mosaic_gpu._Cta.gated.fget(cta) < 2 * idle}
    assert first == set(range(plan.CTAS - idle, plan.CTAS))


H200 = types.SimpleNamespace(core_count=132)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (dict(), None),
        (dict(entry=0), None),
        (dict(rows=4), "4 rows are no multiple of 8 up to 8"),
        (dict(rows=16), "16 rows are no multiple of 8 up to 8"),
        (dict(answer=3100), "the width of the answer on a device, 3100, is no multiple of 64"),
        (dict(stream=3136), "the width of the stream on a device, 3136, is no multiple of 128"),
        (dict(mlp=2500), "the width of the MLP on a device, 2500, is no multiple of 128"),
        (dict(answer=6144, mlp=5120), "weights, 142 MiB on a device, are more than 128"),
        (dict(stream=512, mlp=33792 // 2 + 128), "wider than all multiprocessors take at once"),
        (dict(answer=64, stream=2432, mlp=4352, entry=0), "8 rows do not fit"),
    ],
)
def test_says_what_it_serves(changes, why):
    answer = after_attention.supports(
        H200, dataclasses.replace(PAPER, **changes), ["bfloat16", jnp.bfloat16]
    )
    assert answer is None if why is None else why in answer


def test_serves_bfloat16_on_whole_chips_only():
    assert "bfloat16" in after_attention.supports(H200, PAPER, ["bfloat16", "float32"])
    small = types.SimpleNamespace(core_count=114)
    assert "multiprocessors" in after_attention.supports(small, PAPER, ["bfloat16"])


@pytest.mark.parametrize(
    "changes",
    [
        dict(entry=0),
        dict(entry=1220),
        dict(query=1000),
        dict(latent=96),
        dict(latent=256, entry=1344),
        dict(rope=32),
        dict(nope=96),
        dict(asked=4608 + 64),
        dict(asked=33792 + 256),
    ],
)
def test_what_follows_is_left_out_where_it_does_not_fit(changes):
    assert PAPER.enters and SMALL.enters
    assert not WIDE.enters  # Its latent is.
    assert not dataclasses.replace(PAPER, **changes).enters


@pytest.fixture
def on_hopper(monkeypatch):
    monkeypatch.setattr(target, "is_hopper", lambda device: True)


def exported(function, *structs):
    safe = [export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    return export.export(function, platforms=["cuda"], disabled_checks=safe)(*structs).mlir_module()


@pytest.mark.parametrize(("sizes", "shape"), [(dict(tensor=4), WIDE), (dict(context=2), SMALL)])
def test_launches_of_a_step_share_inboxes_and_board(sizes, shape, on_hopper):
    mesh, shape = make_mesh(**sizes), dataclasses.replace(shape, rows=8)
    structs = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), layers_of(mesh, shape, num_layers=4)
    )
    with jax.enable_x64(mesh.size == 4):
        text = exported(step_of(mesh, shape), *structs)
    # One exchange with a barrier, then launches without. They are one function, but the last, whose
    # inboxes nobody reads.
    assert text.count("skip_device_barrier = false") == 1
    calls = re.findall(r"call @(_by_kernel\w*)\(", text)
    assert len(calls) == 5 and len(set(calls[1:4])) == 1 and len(set(calls)) == 3
    constants = dict(re.findall(r"(%\S+) = stablehlo.constant dense<(\d)> : tensor<1xi32>", text))
    turns = [constants[turn] for turn in re.findall(r"call @_by_kernel\w*\(.*?, (%\w+)\) : ", text)]
    assert turns == ["0", "1", "0", "2", "1"]
    assert "all_reduce" not in text and "all_gather" not in text


# --- In decoding steps ---


def structs(model, sizes, batch, layers=2):
    """(a decoder of few layers, tokens, a cache)."""
    mesh = make_mesh(**sizes)
    config = dataclasses.replace(model_config(model), num_layers=layers, vocab_size=512)
    tokens = jax.ShapeDtypeStruct((batch, 1), jnp.int32, sharding=sharding.named(mesh))
    return abstract_decoder(config, mesh), tokens, abstract_cache(config, mesh, batch, 1024)


def launches(model, sizes, batch):
    """(the shape, whether an attention follows) of each launch in a step of two layers."""
    arguments, made = structs(model, sizes, batch), []

    def after(self, answer, x_DR, layer, attention, call=after_attention.AfterAttention.__call__):
        made.append((self.shape, attention is not None))
        return call(self, answer, x_DR, layer, attention)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api.AfterAttention, "__call__", after)
        patch.setattr(sharding, "platform", lambda mesh: "gpu")
        patch.setattr(exchange, "supports", lambda *_: None)
        jax.eval_shape(lambda d, t, c: d.step(t, c), *arguments)
    return made


@pytest.mark.parametrize(
    ("model", "sizes", "batch", "entries", "in_parts"),
    [
        ("mlra_4", dict(tensor=4), 1, [True, False], True),
        ("gla_4", dict(tensor=4), 8, [False, False], True),
        ("gla_4", dict(tensor=2, context=2), 8, [True, False], False),
        ("mla", dict(context=4), 8, [False, False], False),
        ("gqa", dict(tensor=4), 8, [False, False], False),
        ("mlra_4", dict(tensor=4), 9, [], False),
        ("mlra_4", dict(tensor=2), 8, [True, False], False),
        ("mha", dict(), 8, [], False),
    ],
)
def test_steps_take_it_where_it_serves(model, sizes, batch, entries, in_parts, on_hopper):
    found = launches(model, sizes, batch)
    assert [entered for _, entered in found] == entries
    assert {shape.in_parts for shape, _ in found} <= {in_parts}
    if model == "mlra_4" and sizes["tensor"] == 4 and entries:
        assert {shape for shape, _ in found} == {IN_PARTS}


def test_a_layer_of_mlra_4_on_four_devices_is_two_launches(on_hopper, monkeypatch):
    """But for the first. Only the step's first exchange asks XLA where other devices' memory is."""
    monkeypatch.setattr(sharding, "platform", lambda mesh: "gpu")
    monkeypatch.setattr(exchange, "supports", lambda *_: None)
    decoder, tokens, cache = structs("mlra_4", dict(tensor=4), 3, layers=5)
    text = exported(jax.jit(lambda d, t, c: d.step(t, c)), decoder, tokens, cache)
    functions = dict(re.findall(r"func.func private @(\w+)(.*?)\n  }", text, re.DOTALL))
    kernels = {name: body.count("@mosaic_gpu_v2(") for name, body in functions.items()}
    called = collections.Counter(re.findall(r"call @(\w+)\(", text))
    of_layers = {name: count for name, count in called.items() if kernels.get(name) and count > 1}
    assert sorted(of_layers.values()) == [4, 5] and of_layers["absorbed_decode"] == 5
    assert all(kernels[name] == 1 for name in of_layers)
    far = [name for name, body in functions.items() if "collective_metadata = true" in body]
    assert far == ["_by_kernel"]
    assert "all_gather" not in text and "all_reduce" not in text


def test_places_of_tokens():
    """By two devices that share latents and two that share positions."""
    mesh, axes = make_mesh(tensor=2, context=2), LatentAttention.cache_axes
    cache = dict(latents=jax.ShapeDtypeStruct((3, 8, 4, 64), "bfloat16"))
    how = dict(cache_axes=axes, mesh=mesh)
    places, first = sharded.places(jnp.array([0, 5, 7], jnp.int32), 4, 2, 4, cache, **how)
    # Slots 0 and 1; 5 and 6; 7 and one beyond the last; and a row that has no cache.
    of_context = [[0, -1, -1, 7, -1, -1, -1, -1], [-1, 0, 6, -1, 11, -1, -1, -1]]
    assert places.tolist() == of_context * 2
    assert first.tolist() == [0, 0, 2, 2]


@pytest.mark.parametrize(
    ("name", "tensor", "context", "queries"),
    [
        ("mlra_4", 4, 1, 1),
        ("gla_2", 2, 2, 1),
        ("mla", 1, 2, 5),
        ("gqa", 2, 1, 1),
        ("mlra_2_base", 2, 1, 1),
        ("mlra_2_gated", 2, 1, 1),
        ("gqla", 2, 1, 1),
    ],
)
def test_steps_by_it_are_whole_passes(name, tensor, context, queries, monkeypatch):
    """In plain JAX, as other devices compute it, with what follows in models of latents."""
    monkeypatch.setattr(exchange, "supports", lambda *_: None)
    monkeypatch.setattr(after_attention, "supports", lambda *_: None)
    monkeypatch.setattr(Shape, "enters", property(lambda shape: shape.entry > 0))
    follow = mock.Mock(wraps=reference.enter)
    monkeypatch.setattr(reference, "enter", follow)
    monkeypatch.setattr(reference, "after_attention", mock.Mock(wraps=reference.after_attention))
    how = dict(num_layers=2, queries=queries)
    assert decoding_error(tiny.ALL[name], tensor, context, **how) < 1e-5
    assert reference.after_attention.call_count
    assert bool(follow.call_count) == (name not in ("gqa", "mlra_2_base", "mlra_2_gated"))
