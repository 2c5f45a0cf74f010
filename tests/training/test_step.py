"""A step is the same step on every mesh and in any number of parts, and is the paper's AdamW."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlra_jax import layers, sharding
from mlra_jax import model as models
from mlra_jax.config import ConfigError, Execution, LatentConfig, ModelConfig
from mlra_jax.model import Model
from mlra_jax.training import step as steps
from mlra_jax.training.optimizer import make_schedule
from mlra_jax.training.settings import DataSettings, Experiment, MeshSettings, OptimizerSettings
from mlra_jax.training.state import (
    abstract_state,
    create_state,
)
from mlra_jax.training.step import (
    abstract_batch,
    loss_sum,
    make_train_step,
    make_validation_step,
)
from tests.training.states import fresh_state
from tests.training.test_optimizer import adamw, rate

BATCH, LENGTH, VOCAB = 16, 24, 96
MLRA_4 = LatentConfig(
    num_heads=8, groups=1, branches=4, latent_dim=32, q_latent_dim=24, nope_dim=8, rope_dim=4
)
EXPERIMENT = Experiment(
    model=ModelConfig(
        attention=MLRA_4,
        vocab_size=VOCAB,
        num_layers=2,
        embed_dim=32,
        mlp_dim=48,
        context_length=LENGTH,
        zero_init=False,
        execution=Execution(dtype="float32"),
    ),
    data=DataSettings(source="pydoc", tokenizer="bytes", global_batch=BATCH),
    optimizer=OptimizerSettings(peak_learning_rate=1e-2, warmup_steps=2),
    steps=8,
    loss_chunk=10,
)


def on_mesh(d=1, fsdp=1, tensor=1, **changes):
    settings = MeshSettings(data=d, fsdp=fsdp, tensor=tensor)
    return dataclasses.replace(EXPERIMENT, mesh=settings, **changes)


def random_batch(step):
    """Tokens of which a third occur: something to learn in five steps."""
    tokens = np.random.default_rng(step).integers(0, VOCAB // 3, (BATCH, LENGTH + 1), np.int32)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}


def run(experiment, steps=5, compiled=None):
    """(the last state, the metrics of all steps), each of which takes the place of its state."""
    mesh = sharding.make_mesh(**dataclasses.asdict(experiment.mesh))
    state, step = fresh_state(experiment, mesh), compiled or make_train_step(experiment, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_batch(experiment, mesh))
    losses = []
    for i in range(steps):
        before = state
        state, metrics = step(before, jax.device_put(random_batch(i), shardings))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params))
        losses.append(jax.device_get(metrics))
    return state, losses


def lowered_without_a_loop(remat="none", data=EXPERIMENT.data, **mesh):
    """(experiment, its lowered step), in which the two blocks follow each other."""
    model = dataclasses.replace(EXPERIMENT.model, unroll=2, remat=remat)
    experiment = on_mesh(**mesh, model=model, data=data)
    mesh = sharding.make_mesh(**mesh)
    arguments = abstract_state(experiment, mesh), abstract_batch(experiment, mesh)
    return experiment, make_train_step(experiment, mesh).lower(*arguments)


def held_in_turn(lowered):
    """Types, of each barrier that holds the stream's gradient first, of what it holds besides."""
    return re.findall(r"optimization_barrier .* : tensor<16x24x32xf32>, (.*)", lowered.as_text())


@pytest.fixture(scope="module")
def one_device():
    return run(on_mesh())


def takes_the_steps_of(one_device, experiment, step):
    """The compiled step gives its losses and its last state."""
    (want_state, expected), (got_state, losses) = one_device, run(experiment, compiled=step)
    got, want = ([m["loss"] for m in metrics] for metrics in (losses, expected))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    jax.tree.map(close, *map(jax.device_get, (got_state, want_state)))


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)])
def test_five_steps_on_a_mesh_are_those_of_one_device(one_device, shape, monkeypatch):
    # As on GPUs: each device's width of the MLP is padded, from 24 or 12; gradients are summed in
    # turn, or those of what is split along its last dimension are made in parts.
    monkeypatch.setattr(models, "product_step", lambda mesh: 20 if shape[2] > 1 else 1)
    monkeypatch.setattr(layers, "on_gpus", lambda mesh: shape[1] == 2)
    in_turn = lambda mesh, axes: shape[2] < 4 and sharding.splits(mesh, axes, sharding.FSDP)
    monkeypatch.setattr(sharding, "copies", in_turn)
    _, expected = one_device
    state, losses = run(on_mesh(*shape))
    for name in ("loss", "gradient_norm", "learning_rate"):
        got, want = ([m[name] for m in metrics] for metrics in (losses, expected))
        np.testing.assert_allclose(got, want, rtol=1e-5)
    assert expected[4]["loss"] < expected[0]["loss"] - 0.1, "the steps must do something"
    kernel = state.params["layers"]["mlp"]["up"]["kernel"]
    shard = kernel.addressable_shards[0].data
    assert shard.size * shape[1] * shape[2] == kernel.size


def test_a_step_that_is_not_finite_changes_nothing_but_counters(monkeypatch):
    """Weights and moments to the bit; the step after it takes its own learning rate."""
    whole, faults = steps.loss_sum, {VOCAB - 1: "loss", VOCAB - 2: "gradient_norm"}

    def loss_sum(model, batch, chunk, _):
        first = batch["inputs"][0, 0]
        # The root of 0 has a slope without bound.
        some = jnp.clip(VOCAB - 2 - first, 0, 1).astype(jnp.float32)
        root = jnp.sqrt(some * (model.embed.embedding[...] ** 2).sum())
        return whole(model, batch, chunk) + jnp.where(first < VOCAB - 1, root, 1 / root)

    monkeypatch.setattr(steps, "loss_sum", loss_sum)
    model = dataclasses.replace(EXPERIMENT.model, num_layers=1)
    experiment, mesh = on_mesh(model=model, loss_chunk=LENGTH), sharding.make_mesh()
    state, step = fresh_state(experiment, mesh), make_train_step(experiment, mesh)
    state, _ = step(state, random_batch(0))
    before = jax.device_get(state)
    for number, (token, fault) in enumerate(faults.items(), 1):
        batch = random_batch(number)
        batch["inputs"][0, 0] = token
        state, metrics = step(state, batch)
        assert not np.isfinite(metrics[fault])
        assert fault == "loss" or np.isfinite(metrics["loss"])
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), before.params)
        pairs = zip(
            jax.tree.leaves(before.optimizer), jax.tree.leaves(state.optimizer), strict=True
        )
        for old, new in pairs:
            np.testing.assert_array_equal(new, old if old.ndim else old + number)
    state, metrics = step(state, random_batch(3))
    assert metrics["learning_rate"] == pytest.approx(rate(experiment.optimizer, 8, 3))
    changed = jax.tree.map(lambda a, b: np.any(a != b), state.params, before.params)
    assert int(state.step) == 4 and all(jax.tree.leaves(changed))


def test_steps_without_a_loop_over_blocks_are_those_with_one(one_device, monkeypatch):
    monkeypatch.setattr(models, "product_step", lambda mesh: 20)  # From 24 to 40.
    experiment, lowered = lowered_without_a_loop(fsdp=2, tensor=2)
    step = lowered.compile()
    gate_and_up = re.findall(r"\[32,40\]\S* all-gather\(", step.as_text())
    assert len(gate_and_up) == 2 * 2, "gathered again in the backward pass"
    up_projections = re.findall(r"\[16,8,8\]\S* all-gather\(", step.as_text())
    assert len(up_projections) == 2 * 2, "left to XLA, which gathers them for each product"
    assert f"tensor<2x{VOCAB}x32xf32>" in lowered.as_text(), "the head's gradient by share"
    in_turn = held_in_turn(lowered)
    assert len(in_turn) == 1, "a block's gradients before the next block but one"
    shapes = re.findall(r"tensor<([\dx]+)xf32>", in_turn[0])
    padded = [shapes.count(shape) for shape in ("32x80", "80x32")]
    assert padded == [2, 1], "cut before they are used"
    assert all("x" in shape for shape in shapes), "vectors are exchanged one by one"
    takes_the_steps_of(one_device, experiment, step)


@pytest.mark.parametrize("copies", [False, True])
def test_gradients_of_blocks_that_are_recomputed_are_all_held(monkeypatch, copies):
    """What came later would keep what was recomputed for it."""
    monkeypatch.setattr(sharding, "has_copies", lambda mesh: copies)
    _, lowered = lowered_without_a_loop("block", fsdp=2)
    (held,) = held_in_turn(lowered)
    assert held.count("<32x48xf32>") == 2 and held.count("<32xf32>") > 1


def test_two_devices_that_exchange_by_copies_take_the_steps_of_one(one_device, monkeypatch):
    """As on two GPUs that split heads: each exchange beside a product that nothing waits for."""
    monkeypatch.setattr(sharding, "has_copies", lambda mesh: True)
    experiment, lowered = lowered_without_a_loop(tensor=2)
    barriers = re.findall(r"optimization_barrier .* : (.*)", lowered.as_text())
    found = [re.findall(r"tensor<([x\d]+)xf32>", barrier) for barrier in barriers]
    # Those of attention itself have activations alone.
    found = [shapes for shapes in found if not any("x24x" in shape for shape in shapes[1:])]
    stream, of_heads, queries = "2x16x24x32", "2x8x16x24x8", "2x16x24x8x12"
    mlp = [[stream, "48x32"], [of_heads, "32x48"], [queries, "32x48"]]
    assert found[:3] == found[4:7] == mlp
    kernels = {"8x8x32", "32x4", "32x32", "32x24", "24x8x12"}  # out, k_rope, the downs, q_up
    for first, *others in (found[3], found[7]):
        assert first == stream and kernels <= set(others)
        assert others.count("32x8x8") == 2, "k_up and v_up"
    step = lowered.compile()
    summed = re.findall(rf"f32\[{BATCH},{LENGTH},32\]\S* all-reduce\(", step.as_text())
    assert len(summed) == 1, "more than the tokens' vectors"
    takes_the_steps_of(one_device, experiment, step)


def test_the_heads_gradient_is_made_in_the_parts_that_gpus_send_each_other(one_device, monkeypatch):
    """Each an array from the first chunk on: none is cut out of a whole gradient to be sent."""
    _, expected = one_device
    monkeypatch.setattr(sharding, "has_copies", lambda mesh: True)
    experiment, lowered = lowered_without_a_loop(fsdp=2)
    (held,) = held_in_turn(lowered)
    assert not re.search(r"<\d+x\d+xf32>", held), "more than gradients of heads"
    shares = set(re.findall(rf"tensor<(?:2|1)x{VOCAB}x(?:\d+x)*(\d+)xf32>", lowered.as_text()))
    assert shares == {"16"}, "wider than what a device keeps"
    _, losses = run(experiment, steps=2, compiled=lowered.compile())
    for name in ("loss", "gradient_norm"):
        got, want = ([m[name] for m in metrics] for metrics in (losses, expected[:2]))
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_parts_of_a_batch_give_what_the_whole_gives(one_device):
    whole_state, whole = one_device
    data = dataclasses.replace(EXPERIMENT.data, accumulate=4)
    parts_state, parts = run(on_mesh(2, 2, 1, data=data))
    for name in ("loss", "gradient_norm", "learning_rate"):
        got, want = ([m[name] for m in metrics] for metrics in (parts, whole))
        np.testing.assert_allclose(got, want, rtol=1e-5)
    for got, want in zip(
        *(jax.tree.leaves(jax.device_get(s.params)) for s in (parts_state, whole_state)),
        strict=True,
    ):
        assert np.linalg.norm(got - want) < 1e-4 * np.linalg.norm(want)


def test_weights_are_gathered_once_for_all_parts_of_a_batch(one_device):
    """Not in the loop over parts, where each part's gradients go to where they belong."""
    _, whole = one_device
    data = dataclasses.replace(EXPERIMENT.data, accumulate=4)
    experiment, lowered = lowered_without_a_loop(data=data, fsdp=2)
    step = lowered.compile()
    programs = step.as_text().split("\n\n")
    gathers = [len(re.findall(r"= f32\S+ all-gather\(", text)) for text in programs]
    (entry,) = (i for i, text in enumerate(programs) if text.startswith("ENTRY"))
    # Ten kernels of both layers and the token vectors, which the head reads, too.
    assert gathers[entry] == 11 and sum(gathers) == 11, "gathered by each part, or for each use"
    _, losses = run(experiment, steps=2, compiled=step)
    for name in ("loss", "gradient_norm"):
        got, want = ([m[name] for m in metrics] for metrics in (losses, whole[:2]))
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_gradients_of_parts_are_summed_in_float32():
    """The same row eleven times, each a part: the gradient is the row's, also in bfloat16."""
    narrow = dict(param_dtype="bfloat16", execution=Execution(dtype="bfloat16"), num_layers=1)
    model = dataclasses.replace(EXPERIMENT.model, **narrow)
    mesh, row = sharding.make_mesh(), {k: v[:1] for k, v in random_batch(0).items()}
    moments = []
    for parts in (1, 11):
        data = dataclasses.replace(EXPERIMENT.data, global_batch=parts, accumulate=parts)
        experiment = on_mesh(model=model, data=data)
        batch = {name: np.repeat(array, parts, 0) for name, array in row.items()}
        state, _ = make_train_step(experiment, mesh)(fresh_state(experiment, mesh), batch)
        moments.append([leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim])
    for alone, together in zip(*moments, strict=True):
        assert together.dtype == jnp.bfloat16
        alone, together = (np.asarray(x, np.float32) for x in (alone, together))
        assert np.linalg.norm(together - alone) <= 2e-4 * np.linalg.norm(alone)


def test_gradient_of_a_token_seen_often_is_summed_in_float32():
    """Half of 4,096 tokens are one: a sum in bfloat16 would stop growing long before."""
    mesh, rng = sharding.make_mesh(), np.random.default_rng(0)
    tokens = np.where(rng.random((64, 65)) < 0.5, 7, rng.integers(0, VOCAB, (64, 65)))
    batch = {"inputs": tokens[:, :-1].astype(np.int32), "targets": tokens[:, 1:].astype(np.int32)}
    gradients = []
    for dtype in ("float32", "bfloat16"):
        model = dataclasses.replace(EXPERIMENT.model, execution=Execution(dtype), num_layers=1)
        definition, _ = models.structure(model, mesh)
        loss = lambda params, definition=definition: loss_sum(
            nnx.merge(definition, params), batch, chunk=64
        )
        params = fresh_state(on_mesh(model=model), mesh).params
        gradients.append(np.asarray(jax.jit(jax.grad(loss))(params)["embed"]["embedding"]))
    exact, narrow = gradients
    assert np.linalg.norm(narrow - exact) < 1e-2 * np.linalg.norm(exact)


def plain_loss(experiment, mesh):
    """The loss over all logits at once, and its gradient."""
    definition, _ = models.structure(experiment.model, mesh)

    def loss(params, batch):
        logits_BTV = nnx.merge(definition, params)(batch["inputs"])
        picked = jax.nn.one_hot(batch["targets"], VOCAB) * jax.nn.log_softmax(logits_BTV)
        return -picked.sum() / batch["targets"].size

    return jax.jit(jax.value_and_grad(loss))


def test_steps_against_numpy_with_clipping():
    """Cross-entropy over all logits, and AdamW written out, from the plain gradients.

    Each step's loss is that before its update, its norm that before clipping, its rate its own.
    """
    # An eps as large as the clipped gradients: without it only their signs would count.
    optimizer = OptimizerSettings(
        peak_learning_rate=0.05, warmup_steps=2, clip_norm=0.02, eps=1e-4, b1=0.6, b2=0.8
    )
    experiment, mesh = on_mesh(optimizer=optimizer, steps=4), sharding.make_mesh()
    state, step = fresh_state(experiment, mesh), make_train_step(experiment, mesh)
    plain = plain_loss(experiment, mesh)
    start, tree = jax.tree.flatten(jax.device_get(state.params))
    gradients, want = [], start
    for i in range(4):
        loss, gradient = plain(
            jax.tree.unflatten(tree, [w.astype(np.float32) for w in want]), random_batch(i)
        )
        gradients.append([np.asarray(g) for g in jax.tree.leaves(gradient)])
        want = adamw(optimizer, 4, start, gradients)[-1]
        norm = np.sqrt(sum(np.square(g, dtype=np.float64).sum() for g in gradients[-1]))
        assert norm > 5 * optimizer.clip_norm
        state, metrics = step(state, random_batch(i))
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
        np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-4)
        np.testing.assert_allclose(metrics["learning_rate"], rate(optimizer, 4, i), rtol=1e-6)
        assert int(state.step) == i + 1
    for old, new, expected in zip(start, jax.tree.leaves(state.params), want, strict=True):
        moved = np.linalg.norm(expected - old)
        assert np.linalg.norm(new - expected) < 1e-3 * moved


def test_validation_counts_each_token_by_its_weight(one_device):
    mesh = sharding.make_mesh(data=2)
    experiment = on_mesh(d=2)
    state = fresh_state(experiment, mesh)
    validate = make_validation_step(experiment, mesh)
    batch = random_batch(0)
    weights = np.ones((BATCH, LENGTH), np.float32)
    weights[BATCH // 2 :] = 0
    total, count = validate(state.params, batch | {"weights": weights})
    half = {name: np.concatenate([array[: BATCH // 2]] * 2) for name, array in batch.items()}
    twice, _ = validate(state.params, half | {"weights": np.ones_like(weights)})
    assert count == BATCH // 2 * LENGTH
    np.testing.assert_allclose(total * 2, twice, rtol=1e-6)
    # The sum over rows, each by itself, with a weight of its own.
    rows = [
        validate(state.params, batch | {"weights": weights * 0 + (np.arange(BATCH) == i)[:, None]})
        for i in range(BATCH)
    ]
    factors = np.linspace(0, 3, BATCH).astype(np.float32)
    factors_BT = np.broadcast_to(factors[:, None], (BATCH, LENGTH))
    total, count = validate(state.params, batch | {"weights": factors_BT})
    np.testing.assert_allclose(
        total, sum(f * r[0] for f, r in zip(factors, rows, strict=True)), rtol=1e-5
    )
    np.testing.assert_allclose(count, factors_BT.sum(), rtol=1e-6)


class Head(nnx.Module):
    """Stands for a model: a table of vectors, and another one as its output head."""

    def __init__(self, table_VD, head_VD):
        self.mesh, self.table_VD = sharding.make_mesh(), nnx.Param(table_VD)
        self.embed = nnx.Dict(embedding=nnx.Param(head_VD))

    def hidden(self, tokens_BT, whole=None):
        return self.table_VD[...][tokens_BT]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 5, 6, 7])
def test_the_loss_in_chunks_of_any_size_against_numpy(chunk, weighted, monkeypatch):
    """7 positions: chunks that divide them, that leave one, that leave all but one."""
    logits = steps.logits

    def of_a_chunk(x_BTD, *rest):
        assert x_BTD.shape[1] <= chunk, "more positions at a time than a chunk"
        return logits(x_BTD, *rest)

    monkeypatch.setattr(steps, "logits", of_a_chunk)
    generator = np.random.default_rng(chunk)
    table = generator.standard_normal((9, 4)).astype(np.float32)
    head = generator.standard_normal((9, 4)).astype(np.float32)
    tokens = generator.integers(0, 9, (2, 8))
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
    weights = np.ones((2, 7), np.float32)
    if weighted:
        weights = batch["weights"] = generator.uniform(0, 2, (2, 7)).astype(np.float32)
    definition, params = nnx.split(Head(jnp.asarray(table), jnp.asarray(head)))
    third = lambda params: loss_sum(nnx.merge(definition, params), batch, chunk) / 3
    loss, gradient = jax.tree.map(lambda x: 3 * x, jax.value_and_grad(third)(params))
    assert loss == 3 * third(params)
    x_BTD = table.astype(np.float64)[batch["inputs"]]
    logits = x_BTD @ head.T
    chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    right = np.eye(9)[batch["targets"]]
    want = -(weights * np.log((chances * right).sum(-1))).sum()
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    want = np.einsum("btd,btv->vd", x_BTD, weights[..., None] * (chances - right))
    np.testing.assert_allclose(gradient.embed.embedding[...], want, rtol=1e-4, atol=1e-5)
    slopes = np.einsum("btv,vd->btd", weights[..., None] * (chances - right), head)
    want = np.zeros(table.shape)
    np.add.at(want, batch["inputs"], slopes)
    np.testing.assert_allclose(gradient.table_VD[...], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [10, 100])
def test_no_more_logits_exist_than_a_chunk_has(chunk):
    """Neither at once nor kept for the backward pass, in the lowered steps."""
    experiment, mesh = on_mesh(loss_chunk=chunk), sharding.make_mesh()
    state, batch = abstract_state(experiment, mesh), abstract_batch(experiment, mesh)
    weights = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.float32)
    train = make_train_step(experiment, mesh).lower(state, batch)
    validate = make_validation_step(experiment, mesh).lower(
        state.params, batch | {"weights": weights}
    )
    for lowered in (train, validate):
        text = lowered.as_text()
        shapes = set(re.findall(rf"tensor<((?:\d+x)+){VOCAB}xf32>", text))
        logits = {s for s in shapes if s.startswith(f"{BATCH}x")}
        # All whole chunks, then what is left.
        assert logits == ({"16x10x", "16x4x"} if chunk == 10 else {"16x24x"})
        # One share of the batch, on one device.
        kept = {s for s in shapes if s.endswith("x16x10x")} - {"1x16x10x"}
        assert not kept, "kept for each chunk"


def test_logits_are_computed_once_a_step():
    """Three products have the size of the vocabulary: the logits, and the gradients of both."""
    experiment, mesh = on_mesh(loss_chunk=LENGTH), sharding.make_mesh()
    step = make_train_step(experiment, mesh)
    text = step.lower(abstract_state(experiment, mesh), abstract_batch(experiment, mesh)).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert sum(bool(re.search(rf"[<x]{VOCAB}x", line)) for line in products) == 3


def test_schedule_is_the_papers():
    schedule = make_schedule(OptimizerSettings(), 100_000)
    steps = np.array([0, 1, 1000, 2000, 51_000, 100_000, 120_000])
    want = [0, 8e-10 * 100, 8e-5, 1.6e-4, 0.55 * 1.6e-4, 1.6e-5, 1.6e-5]
    np.testing.assert_allclose([schedule(s) for s in steps], want, rtol=1e-4)


def test_sizes_that_do_not_divide_are_named():
    with pytest.raises(ConfigError, match=r"global_batch=16 .* multiple of 3"):
        on_mesh(d=3)
    with pytest.raises(ConfigError, match=r"multiple of 24"):
        on_mesh(2, 4, data=dataclasses.replace(EXPERIMENT.data, accumulate=3))
    narrow = dataclasses.replace(EXPERIMENT.model, mlp_dim=50)
    with pytest.raises(ConfigError, match=r"mlp=50 .*tensor=4"):
        abstract_state(on_mesh(tensor=4, model=narrow), sharding.make_mesh(tensor=4))


def test_abstract_state_has_moments_where_their_parameters_are():
    experiment = on_mesh(2, 2, 2)
    mesh = sharding.make_mesh(2, 2, 2)
    abstract = abstract_state(experiment, mesh)
    params = jax.tree.leaves(abstract.params)
    moments = [leaf for leaf in jax.tree.leaves(abstract.optimizer) if leaf.ndim]
    assert [m.sharding for m in moments] == [p.sharding for p in params] * 2
    assert all(m.dtype == jnp.float32 for m in moments)
    facts = lambda x: (x.shape, x.dtype, x.sharding)
    state = create_state(experiment, mesh)
    assert jax.tree.map(facts, state) == jax.tree.map(facts, abstract)
    assert (int(state.step), state.step.dtype) == (0, jnp.int32)
    # The weights are those of one device.
    jax.tree.map(np.testing.assert_array_equal, state, fresh_state(experiment, mesh))


def test_a_fresh_state_is_the_models_own_by_seed():
    mesh, experiment = sharding.make_mesh(), on_mesh(seed=3)
    state = create_state(experiment, mesh)
    model = jax.jit(lambda: nnx.to_pure_dict(nnx.state(Model(experiment.model, rngs=nnx.Rngs(3)))))
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-5), state.params, model()
    )
    other = create_state(on_mesh(seed=4), mesh).params["embed"]["embedding"]
    assert not np.array_equal(state.params["embed"]["embedding"], other)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(state.optimizer))


def test_a_batch_is_described_as_it_will_come():
    mesh = sharding.make_mesh(2, 2, 2)
    described = abstract_batch(on_mesh(2, 2, 2), mesh)
    assert described.keys() == {"inputs", "targets"}
    for struct in described.values():
        assert (struct.shape, struct.dtype) == ((BATCH, LENGTH), jnp.int32)
        assert struct.sharding.shard_shape(struct.shape) == (BATCH // 4, LENGTH)
