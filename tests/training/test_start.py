"""New runs from other runs' weights, and the record that a run keeps of its settings."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlra_jax import checkpoints, sharding
from mlra_jax import model as models
from mlra_jax.checkpoints import CheckpointError
from mlra_jax.training import record, start
from mlra_jax.training.__main__ import read_settings
from mlra_jax.training.loop import train
from mlra_jax.training.settings import Experiment, MeshSettings
from mlra_jax.training.state import abstract_state
from tests.training import tiny

ROOT = Path(__file__).parents[2]
PLAIN = dataclasses.replace(
    tiny.experiment(), virtual_cpu_devices=0, steps=4, mesh=MeshSettings(), log_every=4
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A checkpoint of weights alone, in bfloat16, and the parameters in it."""
    folder = tmp_path_factory.mktemp("weights")
    model = models.create(PLAIN.model, sharding.make_mesh(), seed=3)
    params = nnx.to_pure_dict(nnx.state(model))
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    config = dataclasses.replace(PLAIN.model, param_dtype="bfloat16")
    with checkpoints.make_manager(folder) as manager:
        described = checkpoints.describe(config, "bytes")
        checkpoints.save(manager, 7, params=params, model=described)
    return folder, params


def with_model(folder, **changes) -> Experiment:
    model = dataclasses.replace(PLAIN.model, **changes)
    return dataclasses.replace(PLAIN, model=model, init_from=str(folder))


def test_a_state_begins_with_the_weights_alone_in_its_own_dtype_and_shards(weights):
    folder, params = weights
    experiment = dataclasses.replace(
        with_model(folder, context_length=6, rope_base=5e5), mesh=MeshSettings(fsdp=2, tensor=4)
    )
    mesh = sharding.make_mesh(fsdp=2, tensor=4)
    found = start.open_weights(experiment, "bytes")
    state = start.state_from(found, experiment, abstract_state(experiment, mesh))
    for got, want in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True):
        assert got.dtype == jnp.float32 and len(got.sharding.device_set) == 8
        np.testing.assert_array_equal(got, want.astype(jnp.float32))
    assert int(state.step) == 0
    assert all(not np.asarray(x).any() for x in jax.tree.leaves(state.optimizer))
    line = start.described(found, experiment)
    assert line.startswith(f"starting from the weights of {folder}, step 7; its optimizer, ")
    for changed in (
        "context_length is 12 there and 6 here",
        "param_dtype is bfloat16 there and float32 here",
        "rope_base is 10000.0 there and 500000.0 here",
    ):
        assert changed in line


def test_other_weights_are_refused_with_every_setting_that_differs(weights, tmp_path):
    folder, _ = weights
    with pytest.raises(CheckpointError) as error:
        start.open_weights(with_model(folder, mlp_dim=32, num_layers=2, norm_eps=1e-5), "bytes")
    assert "mlp_dim is 24 there and 32 here, norm_eps is 1e-06 there" in str(error.value)
    assert "num_layers is 1 there and 2 here" in str(error.value)
    unscaled = dataclasses.replace(PLAIN.model.attention, scaled=False)
    with pytest.raises(CheckpointError, match="attention.scaled is True there and False here"):
        start.open_weights(with_model(folder, attention=unscaled), "bytes")
    with pytest.raises(CheckpointError, match="trained with tokenizer bytes, and data.tokenizer"):
        start.open_weights(with_model(folder), "gpt2")
    with pytest.raises(CheckpointError, match="/nowhere does not exist"):
        train(with_model("/nowhere"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_from_weights_then_resumed_then_repeated(weights, tmp_path):
    """The first validation is that of the weights; then the run's own state wins; the record of
    what was trained survives another setting, and a finished run changes nothing."""
    workdir, lines = tmp_path / "run", []
    still = dataclasses.replace(PLAIN.optimizer, peak_learning_rate=0.0)
    first = dataclasses.replace(with_model(weights[0]), optimizer=still)
    train(first, workdir, lines.append)
    assert lines[0].startswith(f"starting from the weights of {weights[0]}, step 7")
    _, shapes = models.structure(PLAIN.model, sharding.make_mesh())
    for x, y in zip(
        jax.tree.leaves(checkpoints.open_checkpoint(workdir).restore("params", shapes)),
        jax.tree.leaves(weights[1]),
        strict=True,
    ):
        np.testing.assert_array_equal(x, y.astype(jnp.float32))

    was, lines = (workdir / record.FILE).read_text(), []
    train(dataclasses.replace(first, log_every=2), workdir, lines.append)
    assert f"{workdir} is already at step 4 of 4" in lines
    assert "not taken: log_every was 4 and is 2 now" in lines
    assert (workdir / record.FILE).read_text() == was

    lines = []
    train(dataclasses.replace(first, steps=5, init_from="/gone"), workdir, lines.append)
    assert lines[0] == f"resuming {workdir} from step 4"
    assert "from here on: steps was 4 and is 5 now" in lines
    assert any("was to end its decay at step 4 and ends it at 5 now" in line for line in lines)
    assert not any("init_from" in line for line in lines)
    assert (workdir / "experiment.until_4.json").read_text() == was
    assert json.loads((workdir / record.FILE).read_text())["steps"] == 5


def test_the_record_keeps_what_trained_the_steps_before(tmp_path):
    def written(step, **changes):
        record.write(tmp_path, dataclasses.replace(PLAIN, **changes), step)
        return {f.name: json.loads(f.read_text())["keep"] for f in tmp_path.iterdir()}

    assert written(0, keep=1) == {"experiment.json": 1}
    assert written(3, keep=1) == {"experiment.json": 1}
    both = {"experiment.until_3.json": 1}
    assert written(3, keep=2) == both | {"experiment.json": 2}
    # Killed before it had saved anything: those settings have trained nothing.
    assert written(3, keep=3) == both | {"experiment.json": 3}
    assert record.changes(tmp_path, dataclasses.replace(PLAIN, keep=3)) == []
    (tmp_path / "experiment.json").write_text("{")
    assert "is damaged" in record.changes(tmp_path, PLAIN)[0]


def test_a_released_model_is_fine_tuned_by_its_folder_alone(released, tmp_path):
    """`--config=configs/fine_tune.py:DIR` takes the model's settings from the checkpoint."""
    from mlra_jax.command import Parser

    converted, text = released("mlra_4"), tmp_path / "ranks"
    settings = read_settings(Parser("x", ""), f"{ROOT}/configs/fine_tune.py:{converted}", [])
    experiment = Experiment.from_dict(settings.to_dict())
    stored = checkpoints.open_checkpoint(converted).model
    assert experiment.model == dataclasses.replace(stored, param_dtype="float32")
    assert experiment.init_from == str(converted) and not text.exists()
    found = start.open_weights(experiment, "any: a converted checkpoint names none")
    assert found.step == 0


def test_a_folder_of_weights_is_no_workdir_and_the_error_says_what_to_do(weights):
    other = dataclasses.replace(PLAIN.model, mlp_dim=32)
    words = rf"take another workdir and --config.init_from={weights[0]}$"
    with pytest.raises(CheckpointError, match=words):
        train(dataclasses.replace(PLAIN, model=other), weights[0])
