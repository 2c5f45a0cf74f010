"""MLA as branches that share its latent: where nothing is lost, and the command."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from mlra_jax import model as models
from mlra_jax.analysis.subject import of_params
from mlra_jax.config import ConfigError, ModelConfig
from mlra_jax.convert.branched import branched, branched_config, turn
from mlra_jax.loading import load_model
from mlra_jax.saving import save_model
from mlra_jax.sharding import make_mesh
from studies import branching

MLA = dataclasses.replace(tiny.LATENT["mla"], latent_dim=32)
CONFIG = tiny.config(MLA, 2, vocab_size=264)
TOKENS = np.random.default_rng(0).integers(0, 264, (2, 24), np.int32)
R = 4


def params_of(config: ModelConfig = CONFIG) -> dict:
    model = tiny.random_model(config, make_mesh())
    return jax.device_get(nnx.to_pure_dict(nnx.state(model)))


def logits(config: ModelConfig, params: dict) -> np.ndarray:
    definition, _ = models.structure(config, make_mesh())
    return np.asarray(nnx.merge(definition, jax.tree.map(jnp.asarray, params))(TOKENS))


def orthogonal(size: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(1).normal(size=(size, size)))[0]


@pytest.mark.parametrize("scaled", [True, False])
def test_a_turned_latent_is_the_same_model(scaled):
    config = dataclasses.replace(CONFIG, attention=dataclasses.replace(MLA, scaled=scaled))
    params = params_of(config)
    one = np.ones((2, 1, 8))
    turns = np.stack([orthogonal(32), turn("hadamard", 1, np.eye(32))])
    made = branched(config, params, 1, turns, one)
    assert tiny.relative_error(logits(*made), logits(config, params)) < 1e-5


def test_slices_that_say_the_same_lose_nothing():
    """Each slice makes the same scores and another part of the values."""
    params = params_of()
    attention = params["layers"]["attention"]
    leaves = (("kv_down", "kernel", 2), ("k_up", "kernel", 2), ("kv_norm", "scale", 1))
    for name, leaf, axis in leaves:
        first = np.split(attention[name][leaf], R, axis)[0]
        attention[name] = {leaf: np.concatenate([first] * R, axis)}
    seen = branching.look(of_params("", CONFIG, params), TOKENS)
    turns, fitted = branching.convert(CONFIG, params, seen, R, "none")
    np.testing.assert_allclose(fitted, R, rtol=1e-4)
    made = branched(CONFIG, params, R, turns, fitted)
    assert made[0].attention == dataclasses.replace(MLA, branches=R)
    assert tiny.relative_error(logits(*made), logits(CONFIG, params)) < 1e-4
    weaker = branched(CONFIG, params, R, turns, fitted / 2)
    assert tiny.relative_error(logits(*weaker), logits(CONFIG, params)) > 1e-3


def test_principal_components_are_dealt_in_turn():
    columns, sizes = orthogonal(8), np.array([5.0, 3, 8, 1, 2, 7, 4, 6])
    turned = turn("pca", 2, columns * sizes @ columns.T)
    np.testing.assert_allclose(turned.T @ turned, np.eye(8), atol=1e-12)
    spread = np.diag(turned.T @ (columns * sizes @ columns.T) @ turned)
    np.testing.assert_allclose(spread, [8, 6, 4, 2, 7, 5, 3, 1])


def test_what_cannot_be_branched_is_refused():
    with pytest.raises(ConfigError, match="only MLA's latent becomes branches"):
        branched_config(tiny.config("gla_2"), 4)
    with pytest.raises(ConfigError, match="latent_dim=48 does not divide into 5 latent heads"):
        branched_config(tiny.config("mla"), 5)
    with pytest.raises(ConfigError, match="latent_dim=48 is no power of 2"):
        turn("hadamard", 4, np.eye(48))


def test_the_command_compares_and_keeps_one(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(branching, "TURNS", ("hadamard",))
    model = tiny.random_model(dataclasses.replace(CONFIG, num_layers=1), make_mesh())
    save_model(model, tmp_path / "mla", "bytes")
    (tmp_path / "text.txt").write_text("A line of text, and so on. " * 300)
    flags = [f"--checkpoint={tmp_path}/mla", f"--source={tmp_path}/text.txt", "--rows=2"]
    flags += ["--length=20", f"--destination={tmp_path}/made", "--turn=hadamard"]
    assert branching.main(flags) == 0
    losses = dict(line.rsplit("loss ") for line in capsys.readouterr().out.splitlines())
    losses = {name.strip(): float(value) for name, value in losses.items()}
    assert list(losses)[0] == "mla" and len(losses) == 3
    made = load_model(tmp_path / "made")
    assert made.config.attention == dataclasses.replace(MLA, branches=4)
    assert branching.main(flags) == 1
    assert "exists already" in capsys.readouterr().err
