"""MLA as branches that share its latent: where nothing is lost, and the command."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from mlra_jax import costs
from mlra_jax import model as models
from mlra_jax.analysis.subject import of_params
from mlra_jax.checkpoints import open_checkpoint
from mlra_jax.config import ConfigError, GroupedConfig, LatentConfig, ModelConfig
from mlra_jax.convert.branched import branched, branched_config, turn
from mlra_jax.convert.factored import _layer, factored, factored_config
from mlra_jax.decoder import Decoder
from mlra_jax.layers import rotate
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
    turns, fitted, _ = branching.convert(CONFIG, params, seen, R, "none")
    np.testing.assert_allclose(fitted, R, rtol=1e-4)
    made = branched(CONFIG, params, R, turns, fitted)
    assert made[0].attention == dataclasses.replace(MLA, branches=R)
    assert tiny.relative_error(logits(*made), logits(CONFIG, params)) < 1e-4
    weaker = branched(CONFIG, params, R, turns, fitted / 2)
    assert tiny.relative_error(logits(*weaker), logits(CONFIG, params)) > 1e-3


def test_slices_of_other_sizes_are_known_by_their_shares():
    """As large in keys as in the latent, a slice's part of a score is its share of the variance."""
    params, larger = params_of(), np.repeat(np.array([1.0, 0.5, 2.0, 1.5], np.float32), 8)
    attention = params["layers"]["attention"]
    for name, leaf, axis, by in (("kv_down", "kernel", 2, larger), ("kv_norm", "scale", 1, 1)):
        first = np.split(attention[name][leaf], R, axis)[0]
        attention[name] = {leaf: np.concatenate([first] * R, axis) * by}
    k_up = np.concatenate([np.split(attention["k_up"]["kernel"], R, 2)[0]] * R, 2)
    attention["k_up"] = {"kernel": k_up * larger[:, None]}
    seen = branching.look(of_params("", CONFIG, params), TOKENS)
    turns, _, sizes = branching.convert(CONFIG, params, seen, R, "none")
    np.testing.assert_allclose(sizes**2, [larger[::8] ** 2 / (larger**2).mean()] * 2, rtol=1e-4)
    strengths = np.broadcast_to(R / sizes[..., None] ** 2, (2, R, 8))
    made = branched(CONFIG, params, R, turns, strengths, sizes)
    assert tiny.relative_error(logits(*made), logits(CONFIG, params)) < 1e-4
    blind = branched(CONFIG, params, R, turns, np.full((2, R, 8), float(R)))
    assert tiny.relative_error(logits(*blind), logits(CONFIG, params)) > 1e-3


def test_principal_components_are_dealt_in_turn():
    columns, sizes = orthogonal(8), np.array([5.0, 3, 8, 1, 2, 7, 4, 6])
    turned = turn("pca", 2, columns * sizes @ columns.T)
    np.testing.assert_allclose(turned.T @ turned, np.eye(8), atol=1e-12)
    spread = np.diag(turned.T @ (columns * sizes @ columns.T) @ turned)
    np.testing.assert_allclose(spread, [8, 6, 4, 2, 7, 5, 3, 1])
    turned = turn("pca_in_order", 2, columns * sizes @ columns.T)
    spread = np.diag(turned.T @ (columns * sizes @ columns.T) @ turned)
    np.testing.assert_allclose(spread, np.arange(8, 0, -1))


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
    assert list(losses)[0] == "mla" and len(losses) == 4
    made = load_model(tmp_path / "made")
    assert made.vocabulary.tokenizer == "bytes"
    assert made.config.attention == dataclasses.replace(MLA, branches=4)
    assert branching.main(flags) == 1
    assert "exists already" in capsys.readouterr().err


def test_keys_that_differ_by_complex_factors_only_become_one_rotary_key():
    """Where queries ask nothing else, scores and values are those of the GQA, before any norm."""
    D, H, J, K = 40, 4, 2, 8
    config = tiny.config(GroupedConfig(H, J, K), rope_base=300.0)
    made = factored_config(config, latent_dim=2 * J * K, q_latent_dim=40)
    rng = np.random.default_rng(3)
    q_DHK, k_DJK, v_DJK = (rng.normal(size=(D, n, K)) for n in (H, J, J))
    pairs = np.arange(K) % (K // 2)
    q_DHK[..., pairs % 2 == 1] = 0
    numbers = rng.normal(size=(2, K // 2))
    first = k_DJK[:, 0, : K // 2] + 1j * k_DJK[:, 0, K // 2 :]
    second = first * (numbers[0] + 1j * numbers[1])
    k_DJK[:, 1] = np.concatenate([second.real, second.imag], -1)
    x_TD = rng.normal(size=(30, D))
    layer = _layer(config, made, q_DHK, k_DJK, v_DJK, x_TD.T @ x_TD / 30)
    turned = lambda x_THR: np.asarray(rotate(jnp.asarray(x_THR[None]), np.arange(30)[None], 300.0))[
        0
    ]
    project = lambda w: np.einsum("td,d...->t...", x_TD, w)
    q_THX = np.einsum("tq,qhx->thx", project(layer["q_down"]), layer["q_up"])
    c_TC = project(layer["kv_down"])
    k_THK = np.einsum("tc,hck->thk", c_TC, layer["k_up"])
    k_rope_TR = turned(project(layer["k_rope"])[:, None])[:, 0]
    q_THK, k_TJK = turned(project(q_DHK)), turned(project(k_DJK))
    for h in range(H):
        want = q_THK[:, h] @ k_TJK[:, h // 2].T / np.sqrt(K)
        got = q_THX[:, h, :K] @ k_THK[:, h].T + turned(q_THX[:, :, K:])[:, h] @ k_rope_TR.T
        assert tiny.relative_error(got / np.sqrt(K + K // 2), want) < 1e-5
        v_TK = c_TC @ layer["v_up"][h]
        assert tiny.relative_error(v_TK, project(v_DJK)[:, h // 2]) < 1e-6
    factor = np.sqrt(D / made.attention.latent_dim)
    assert (c_TC**2).mean() == pytest.approx((layer["kv_norm"][0] * factor) ** 2)


@pytest.mark.parametrize("start", ["mla", "gqa"])
def test_what_was_converted_decodes_on_four_devices_as_in_a_whole_pass(start):
    config, params = CONFIG, params_of()
    if start == "gqa":
        gqa = tiny.config("gqa", 2, vocab_size=264)
        made = factored_config(gqa)
        config, params = made, factored(gqa, params_of(gqa), np.stack([np.eye(40)] * 2), made)
    width = config.attention.latent_dim
    turns, factors = np.stack([orthogonal(width)] * 2), np.full((2, R, 8), float(R))
    made, params = branched(config, params, R, turns, factors)
    values = costs.cache_values_per_device(made, batch=1, capacity=8, tensor=4)
    assert values == 8 * (width // 4 + made.attention.rope_dim)
    mesh = make_mesh(tensor=4)
    decoder = Decoder.from_params(made, mesh, jax.tree.map(jnp.asarray, params))
    prefill = jax.jit(lambda decoder, *prompts: decoder.prefill(*prompts, 24))
    found, cache = prefill(decoder, TOKENS[:, :22], jnp.array([22, 22]))
    per_device = {k: x.sharding.shard_shape(x.shape) for k, x in cache.layers[0].items()}
    assert sum(map(math.prod, per_device.values())) == 2 * 24 * values // 8
    steps = [found]
    for i in (22, 23):
        found, cache = jax.jit(Decoder.step)(decoder, TOKENS[:, i : i + 1], cache)
        steps.append(found[:, 0])
    want = logits(made, params)[:, 21:24]
    assert tiny.relative_error(np.stack(steps, axis=1), want) < 1e-5


def test_a_gqa_becomes_an_mla_of_the_published_proportions():
    config = tiny.config("gqa_gated", vocab_size=264)
    made = factored_config(config)
    wanted = LatentConfig(8, 1, 1, 40, 20, nope_dim=12, rope_dim=6, gated=True)
    assert made.attention == wanted
    params = factored(config, params_of(config), np.eye(40)[None], made)
    _, shapes = models.structure(made, make_mesh())
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, shapes)
    assert np.isfinite(logits(made, params)).all()
    with pytest.raises(ConfigError, match="latent_dim=49 is more than the 40 dimensions"):
        factored_config(config, latent_dim=49)
    with pytest.raises(ConfigError, match="only GQA, MHA and MQA"):
        factored_config(tiny.config("gta"))


def test_a_tokenizer_of_a_ranks_file_is_named_as_before(tmp_path):
    branching.write(str(tmp_path / "made"), CONFIG, params_of(), "tiktoken:0123456789abcdef")
    assert open_checkpoint(tmp_path / "made").tokenizer == "tiktoken:0123456789abcdef"
