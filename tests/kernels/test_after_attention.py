"""A layer behind its attention in one launch. No GPU here: its numbers in plain JAX, how CTAs share
the work, that it lowers, and that decoding steps take it where it serves."""

import dataclasses
import functools
import itertools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from decoding import decoding_error
from jax import export
from jax.sharding import PartitionSpec as P

from benchmarks.models import model_config
from mlra_jax import sharding
from mlra_jax.decoder import abstract_cache, abstract_decoder
from mlra_jax.kernels import after_attention, exchange, target
from mlra_jax.kernels.after_attention import Shape, api, mosaic_gpu, plan
from mlra_jax.sharding import make_mesh

FACTORS, EPS = (1.0, 1.5), (1e-6, 1e-5)
PAPER = Shape(answer=3072, stream=3072, mlp=2560, entry=1216, rows=8)
SHAPES = [
    PAPER,
    dataclasses.replace(PAPER, entry=0),
    Shape(answer=192, stream=384, mlp=256, entry=320, rows=16),
    Shape(answer=1088, stream=2048, mlp=1408, entry=832, rows=8),
]


def arguments(ways, *, R=5, K=6, D=8, F=10, E=7, dtype="float32"):
    """Of as many devices, K, F and E of each."""
    draw = np.random.default_rng(0).standard_normal
    shapes = [(R, K * ways), (D, R), (D,), (D,), (K * ways, D), (D, 2, F * ways), (F * ways, D)]
    answer, x, *rest = (jnp.asarray(draw(s), dtype) for s in [*shapes, (D, E * ways)])
    return answer, x, rest[:2], rest[2:]


def launched(mesh, entered, answer_RK, x_DR, scales, weights, layers=1):
    """Launches of as many equal layers, with an entry or without; what follows each."""
    (R, _), D = answer_RK.shape, len(x_DR)
    axes = tuple(a for a in sharding.MODEL if mesh.shape[a] > 1)
    out, widen, narrow, entry = weights
    shape = Shape(*(n // mesh.size for n in (len(out), mesh.size * D, len(narrow))), 0, R)
    shape = dataclasses.replace(shape, entry=entry.shape[1] // mesh.size)
    of_weights = P(axes), P(None, None, axes), P(axes), P(None, axes)
    how = dict(scales=tuple(scales), factors=FACTORS, eps=EPS)
    how |= dict(of_answer=P(None, axes), of_weights=of_weights)
    layer = api.Layer(out, widen, narrow, entry=entry if entered else None, **how)
    step = exchange.Exchange(mesh, sharding.MODEL, R, D)
    launch = after_attention.AfterAttention(step, shape)
    if step.inbox is not None:  # The one before the layers.
        zeros = jnp.zeros((mesh.size, R, D))
        x_RD, _ = step(zeros, x_DR.T, scales[0], factor=1.0, eps=1e-6, dtype="bfloat16")
        x_DR = x_RD.T
    following = [None] * layers
    for i in range(layers):
        x_DR, following[i] = launch(answer_RK, x_DR, layer)
    return x_DR, *following


def in_float64(answer_RK, x_DR, scales, weights):
    """(the stream, its norm, the products of the entry)."""
    arrays = answer_RK, x_DR.T, *scales, *weights
    answer, x, scale_0, scale_1, out, widen, narrow, entry = (
        np.asarray(y, np.float64) for y in arrays
    )
    mean = lambda x: np.mean(x**2, axis=-1, keepdims=True)
    x = x + answer @ out
    normed = x / np.sqrt(mean(x) + EPS[0]) * scale_0 * FACTORS[0]
    gate, up = (normed @ widen[:, i] for i in (0, 1))
    x = x + (gate / (1 + np.exp(-gate)) * up) @ narrow
    normed = x / np.sqrt(mean(x) + EPS[1]) * scale_1 * FACTORS[1]
    return x, normed, normed @ entry


@pytest.mark.parametrize("entered", [True, False])
@pytest.mark.parametrize("sizes", [dict(tensor=2), dict(tensor=2, context=4)])
def test_plain_launch_is_the_layer(sizes, entered):
    mesh = make_mesh(**sizes)
    arrays = arguments(mesh.size)
    x_DR, following = jax.jit(functools.partial(launched, mesh, entered))(*arrays)
    x, normed, products = in_float64(*arrays)
    np.testing.assert_allclose(x_DR.T, x, rtol=1e-4, atol=1e-4)
    if not entered:
        np.testing.assert_allclose(following, normed, rtol=1e-4, atol=1e-4)
        return
    # Each device's columns, its summands one after the other.
    found = np.asarray(following).reshape(mesh.size, -1, *following.shape[1:]).sum(1)
    np.testing.assert_allclose(np.concatenate(found, axis=-1), products, rtol=1e-4, atol=1e-3)


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
    assert list(shape.board)[5:] == ["hidden", "entered_next", "squares_next"]
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
    assert len(everyone) * plan.MULTIPLIERS == shape.emptying
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
        (dict(entry=1220), "the width of the entry on a device, 1220, is no multiple of 64"),
        (dict(answer=6144, mlp=5120), "weights, 133 MiB on a device, are more than 128"),
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


@pytest.fixture
def on_hopper(monkeypatch):
    monkeypatch.setattr(target, "is_hopper", lambda device: True)


def exported(function, *structs):
    safe = [export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    return export.export(function, platforms=["cuda"], disabled_checks=safe)(*structs).mlir_module()


@pytest.mark.parametrize("entered", [True, False])
@pytest.mark.parametrize(("sizes", "D"), [(dict(tensor=4), 512), (dict(context=2), 384)])
def test_launches_of_a_step_share_inboxes_and_board(sizes, D, entered, on_hopper):
    mesh = make_mesh(**sizes)
    how = dict(R=8, K=192, D=D, F=128, E=192, dtype="bfloat16")
    structs = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments(mesh.size, **how)
    )
    with jax.enable_x64(mesh.size == 4):
        function = functools.partial(launched, mesh, entered, layers=4)
        text = exported(jax.jit(function), *structs)
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


def launches(model, sizes, batch):
    """(the shape, whether it has an entry) of each launch in a step of two layers."""
    mesh = make_mesh(**sizes)
    config = dataclasses.replace(model_config(model), num_layers=2, vocab_size=512)
    decoder = abstract_decoder(config, mesh)
    cache = abstract_cache(config, mesh, batch, 1024)
    tokens = jax.ShapeDtypeStruct((batch, 1), jnp.int32, sharding=sharding.named(mesh))
    made = []

    def after(self, answer, x_DR, layer, call=after_attention.AfterAttention.__call__):
        made.append((self.shape, layer.entry is not None))
        return call(self, answer, x_DR, layer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api.AfterAttention, "__call__", after)
        patch.setattr(sharding, "platform", lambda mesh: "gpu")
        patch.setattr(exchange, "supports", lambda *_: None)
        jax.eval_shape(lambda d, t, c: d.step(t, c), decoder, tokens, cache)
    return made


@pytest.mark.parametrize(
    ("model", "sizes", "batch", "entries"),
    [
        ("mlra_4", dict(tensor=4), 1, [True, False]),
        ("mla", dict(context=4), 8, [True, False]),
        ("gla_2", dict(tensor=2, context=2), 8, [True, False]),
        ("gqa", dict(tensor=4), 8, [False, False]),
        ("mlra_4", dict(tensor=4), 9, []),
        ("mlra_2", dict(tensor=2), 8, [True, False]),
        ("mha", dict(), 8, []),
    ],
)
def test_steps_take_it_where_it_serves(model, sizes, batch, entries, on_hopper):
    found = launches(model, sizes, batch)
    assert [entered for _, entered in found] == entries
    if model == "mlra_4" and entries:
        assert {shape for shape, _ in found} == {PAPER}


@pytest.mark.parametrize(
    ("name", "tensor", "context", "queries"),
    [("mlra_4", 4, 1, 1), ("gla_2", 2, 2, 1), ("gqa", 2, 1, 1), ("mla", 1, 2, 5)],
)
def test_steps_by_it_are_whole_passes(name, tensor, context, queries, monkeypatch):
    """In plain JAX, as other devices compute it."""
    taken = []
    monkeypatch.setattr(exchange, "supports", lambda *_: None)
    monkeypatch.setattr(after_attention, "supports", lambda *_: taken.append(1))
    how = dict(num_layers=2, queries=queries)
    assert decoding_error(tiny.ATTENTIONS[name], tensor, context, **how) < 1e-5
    assert taken
