"""A step is the same step on every mesh and in any number of parts, and is the paper's AdamW."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlra_jax import sharding
from mlra_jax.config import ConfigError, LatentConfig, ModelConfig
from mlra_jax.training.optimizer import make_schedule
from mlra_jax.training.settings import DataSettings, Experiment, MeshSettings, OptimizerSettings
from mlra_jax.training.state import abstract_state, create_state, model_parts
from mlra_jax.training.step import abstract_batch, make_train_step, make_validation_step

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
        dtype="float32",
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


def run(experiment, steps=5):
    mesh = sharding.make_mesh(**dataclasses.asdict(experiment.mesh))
    state, step = create_state(experiment, mesh), make_train_step(experiment, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_batch(experiment, mesh))
    losses = []
    for i in range(steps):
        state, metrics = step(state, jax.device_put(random_batch(i), shardings))
        losses.append(jax.device_get(metrics))
    return state, losses


@pytest.fixture(scope="module")
def one_device():
    return run(on_mesh())


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)])
def test_five_steps_on_a_mesh_are_those_of_one_device(one_device, shape):
    _, expected = one_device
    state, losses = run(on_mesh(*shape))
    for name in ("loss", "gradient_norm"):
        got, want = ([m[name] for m in metrics] for metrics in (losses, expected))
        np.testing.assert_allclose(got, want, rtol=1e-5)
    assert expected[4]["loss"] < expected[0]["loss"] - 0.1, "the steps must do something"
    kernel = state.params["layers"]["mlp"]["up"]["kernel"]
    shard = kernel.addressable_shards[0].data
    assert shard.size * shape[1] * shape[2] == kernel.size


def test_parts_of_a_batch_give_what_the_whole_gives(one_device):
    whole_state, whole = one_device
    data = dataclasses.replace(EXPERIMENT.data, accumulate=4)
    parts_state, parts = run(on_mesh(2, 2, 1, data=data))
    np.testing.assert_allclose([m["loss"] for m in parts], [m["loss"] for m in whole], rtol=1e-5)
    for got, want in zip(
        *(jax.tree.leaves(jax.device_get(s.params)) for s in (parts_state, whole_state)),
        strict=True,
    ):
        assert np.linalg.norm(got - want) < 1e-4 * np.linalg.norm(want)


def test_loss_and_first_update_against_numpy(one_device):
    """Plain cross-entropy over all logits, and AdamW written out, from the step's gradients."""
    experiment = on_mesh(optimizer=dataclasses.replace(EXPERIMENT.optimizer, warmup_steps=0))
    mesh = sharding.make_mesh()
    state = create_state(experiment, mesh)
    definition, _, _ = model_parts(experiment.model, mesh)
    batch = random_batch(0)

    def plain(params):
        logits_BTV = nnx.merge(definition, params)(batch["inputs"])
        picked = jax.nn.one_hot(batch["targets"], VOCAB) * jax.nn.log_softmax(logits_BTV)
        return -picked.sum() / batch["targets"].size

    before = jax.device_get(state.params)
    loss, gradients = jax.device_get(jax.jit(jax.value_and_grad(plain))(state.params))
    after, metrics = make_train_step(experiment, mesh)(state, batch)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
    norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in jax.tree.leaves(gradients)))
    np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-5)
    rate = 1e-2
    for old, gradient, new in zip(
        *map(jax.tree.leaves, (before, gradients, jax.device_get(after.params))), strict=True
    ):
        # After one update both moments are the gradient's own: m / (sqrt(v) + eps).
        g = gradient.astype(np.float64) * min(1, 1 / norm)
        want = old - rate * (g / (np.abs(g) + 1e-8) + 0.1 * old)
        steady = np.abs(g) > 1e-6  # where eps and rounding do not decide the sign
        np.testing.assert_allclose(new[steady], want[steady], rtol=1e-4, atol=2e-6)


def test_validation_counts_each_token_by_its_weight(one_device):
    mesh = sharding.make_mesh(data=2)
    experiment = on_mesh(d=2)
    state = create_state(experiment, mesh)
    validate = make_validation_step(experiment, mesh)
    batch = random_batch(0)
    weights = np.ones((BATCH, LENGTH), np.float32)
    weights[BATCH // 2 :] = 0
    total, count = validate(state.params, batch | {"weights": weights})
    half = {name: np.concatenate([array[: BATCH // 2]] * 2) for name, array in batch.items()}
    twice, _ = validate(state.params, half | {"weights": np.ones_like(weights)})
    assert count == BATCH // 2 * LENGTH
    np.testing.assert_allclose(total * 2, twice, rtol=1e-6)


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
    assert jax.tree.map(lambda x: (x.shape, x.dtype), create_state(experiment, mesh)) == (
        jax.tree.map(lambda x: (x.shape, x.dtype), abstract)
    )
