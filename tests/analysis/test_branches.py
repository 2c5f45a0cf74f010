"""What branches attend to, where it is known beforehand, and in a model of random numbers."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from tiny import random_model

from mlra_jax import checkpoints
from mlra_jax.analysis import branches
from mlra_jax.analysis.subject import of_params
from mlra_jax.sharding import make_mesh

T = 12


def read(name, change=lambda attention: None, rows=2):
    model = random_model(tiny.config(name), make_mesh())
    change(model.layers.attention)
    subject = of_params(name, model.config, nnx.to_pure_dict(nnx.state(model)))
    tokens_BT = subject.tokens(rows, T)
    (layer,) = branches.read(subject, tokens_BT)
    return {what: np.array(values) for what, values in layer.items()}, subject, tokens_BT


def test_queries_of_nothing_look_at_all_alike():
    def silence(attention):
        attention.q_up.kernel[...] *= 0

    layer, *_ = read("mlra_4", silence)
    assert layer["entropy"].shape == layer["distance"].shape == (4, 8)
    assert layer["entropy"] == pytest.approx(0, abs=1e-6)
    assert layer["distance"] == pytest.approx((T - 1) / 4)  # query t looks back t/2
    assert layer["first"] == pytest.approx(np.mean(1 / np.arange(2, T + 1)))
    assert layer["overlap"] == pytest.approx(np.ones((4, 4)), abs=1e-5)


def test_numbers_of_each_head_against_numpy():
    layer, subject, tokens_BT = read("gqa")
    block = subject.block(0)
    y = block.attention.inputs(block.attention_norm(subject.embed(tokens_BT)))
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), tokens_BT.shape)
    q, k, _ = (np.asarray(x, np.float64) for x in block.attention.operands(y, positions, positions))
    scores = np.einsum("bthk,bshk->bhts", q, np.repeat(k, 2, 2)) / np.sqrt(12)
    odds = np.exp(scores) * np.tril(np.ones((T, T)))
    w = odds / odds.sum(-1, keepdims=True)
    back = np.maximum(np.arange(T)[:, None] - np.arange(T), 0)
    logs = np.log(np.where(w > 0, w, 1))
    entropy = -(w * logs).sum(-1)[..., 1:] - np.log(np.arange(2, T + 1))
    assert layer["entropy"] == pytest.approx(entropy.mean((0, 2))[None], abs=1e-5)
    assert layer["distance"] == pytest.approx((w * back).sum(-1).mean((0, 2))[None], rel=1e-4)
    assert layer["first"] == pytest.approx(w[:, :, 1:, 0].mean((0, 2))[None], rel=1e-4)
    assert (
        layer["overlap"] == pytest.approx(np.ones((1, 1)), abs=1e-5) and "key_spectrum" not in layer
    )


def test_branches_that_are_alike_have_all_in_common():
    def twins(attention):
        """The second branch as the first; the others as they are."""
        kernel = attention.kv_down.kernel[...]
        attention.kv_down.kernel[...] = kernel.at[..., 12:24].set(kernel[..., :12])
        scale = attention.kv_norm.scale[...]
        attention.kv_norm.scale[...] = scale.at[..., 12:24].set(scale[..., :12])
        up = attention.k_up.kernel[...]
        attention.k_up.kernel[...] = up.at[:, 8:16].set(up[:, :8])

    overlap = read("mlra_4", twins)[0]["overlap"]
    assert overlap[0, 1] == pytest.approx(1, abs=1e-5) and overlap == pytest.approx(overlap.T)
    assert np.diag(overlap) == pytest.approx(1, abs=1e-5)
    assert (overlap[2:, :2] < 0.95).all() and 0 < overlap[2, 3] < 0.95


def test_directions_that_the_up_projections_read():
    def narrow(attention):
        up = attention.k_up.kernel[...]  # [layer, P, C, N]; latent 1 serves branch heads 8 to 15
        attention.k_up.kernel[...] = up.at[:, 8:16, 1:].set(0)

    layer, *_ = read("mlra_4", narrow)
    spectra = layer["key_spectrum"]
    assert spectra.shape == (4, 12) and spectra[:, 0] == pytest.approx(1)
    assert spectra[1, 1:] == pytest.approx(0, abs=1e-6) and (spectra[0] > 0.1).all()
    assert branches.effective_rank(spectra[1]) == pytest.approx(1)
    assert branches.effective_rank([1.0] * 5 + [0.0]) == pytest.approx(5)
    assert (layer["value_spectrum"] > 0.1).all()


def test_the_command_reads_a_checkpoint_on_a_text(tmp_path, capsys):
    config = tiny.config("mlra_2", 2, vocab_size=264)
    model = random_model(config, make_mesh())
    manager = checkpoints.make_manager(tmp_path / "run")
    params = nnx.to_pure_dict(nnx.state(model))
    checkpoints.save(manager, 3, params=params, model=checkpoints.describe(config, "bytes"))
    manager.wait_until_finished()
    manager.close()
    flags = [f"--checkpoint={tmp_path}/run", "--length=9", f"--output={tmp_path}/out"]
    assert branches.main(flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 2 * 2 and lines[-1].split()[:2] == ["1", "1"]
    found = json.loads((tmp_path / "out" / "branches.json").read_text())
    assert found["model"] == "run" and len(found["layers"]) == 2
    subject = branches.opened(tmp_path / "run")
    again = branches.read(subject, branches.text_tokens(subject, "pydoc", 4, 9))
    assert np.allclose(again[1]["entropy"], found["layers"][1]["entropy"])
    assert (tmp_path / "out" / "branches.png").read_bytes().startswith(b"\x89PNG")
    assert branches.main([*flags, f"--source={tmp_path}/none"]) == 1
    assert "no data" in capsys.readouterr().err
