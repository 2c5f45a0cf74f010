"""Scores depend on positions through differences alone, and what breaks that is named."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from tiny import ATTENTIONS, NEIGHBOURS, random_model

from mlra_jax.analysis import equivariance
from mlra_jax.analysis.equivariance import SHIFTS, kept, measure
from mlra_jax.analysis.subject import fresh, of_params
from mlra_jax.attention.latent import LatentAttention
from mlra_jax.layers import Projection, rotate
from mlra_jax.sharding import make_mesh

LENGTH = 9
ALL = ATTENTIONS | {name: NEIGHBOURS[name] for name in ("mlra_4_base_gated", "gqla_expanded")}


def measured(name, **settings):
    model = random_model(tiny.config(name, 2), make_mesh())
    subject = of_params(name, model.config, nnx.to_pure_dict(nnx.state(model)))
    return measure(subject, length=LENGTH, dtypes=("float32",), **settings)


@pytest.mark.parametrize("name", ALL)
def test_every_variant_keeps_its_scores_when_all_positions_move(name):
    report, a = measured(name, layers=1), ALL[name]
    assert report["findings"] == []
    moves = report["dtypes"]["float32"]["moves"]
    assert max(SHIFTS) == 1_000_000 and len(moves) == len(SHIFTS) + 3
    branch_heads = a.num_heads * getattr(a, "num_branches", 1)
    for move, change in moves.items():
        (layer,) = change["layers"]
        assert len(layer["nope"]) == len(layer["rope"]) == branch_heads
        assert len(layer["outputs"]) == a.num_heads
        if move != "padded left":  # there XLA multiplies other shapes
            assert layer["nope"] == [0] * branch_heads
        if kept(move):
            assert max(layer["nope"] + layer["rope"] + layer["outputs"]) < 1e-5
            assert change["logits"] < 1e-5
        else:
            assert min(layer["rope"]) > 1e-2 and min(layer["outputs"]) > 1e-3
            assert change["logits"] > 1e-3
    (mass,) = report["dtypes"]["float32"]["layers"]
    shares = np.array(list(mass.values()))
    assert shares.shape == (2, branch_heads) and (shares > 0).all() and (shares <= 1).all()
    if not a.query_dim - a.rope_dim:
        assert np.allclose(mass["rope_mass"], 1)  # all of the scores are rotary


class AddedPositions(LatentAttention):
    """Absolute positions in the latents."""

    def _kept(self, y, positions_BT):
        kept, wave_BT = super()._kept(y, positions_BT), jnp.sin(positions_BT / 7.0)
        return kept | {"latents": kept["latents"] + wave_BT[:, :, None, None]}


class RotatedBefore(LatentAttention):
    """What is compressed has been rotated."""

    def _kept(self, y, positions_BT):
        turned = rotate(y["kv_down"][:, :, None], positions_BT, self.rope_base)[:, :, 0]
        return super()._kept(y | {"kv_down": turned}, positions_BT)


class RotatedBeforeTheRotaryKey(LatentAttention):
    """The rotary key is projected from something rotated."""

    def _add_parameters(self, config, project, rngs):
        super()._add_parameters(config, project, rngs)
        R = config.attention.rope_dim
        self.mix: Projection = project((R, R), (None, None), init=nnx.initializers.normal(1.0))

    def _kept(self, y, positions_BT):
        turned = rotate(y["k_rope"][:, :, None], positions_BT, self.rope_base)[:, :, 0]
        return super()._kept(y | {"k_rope": self.mix(turned)}, positions_BT)


class SlotAsPosition(LatentAttention):
    """Keys are rotated by where they lie."""

    def _kept(self, y, positions_BT):
        slots = jnp.broadcast_to(jnp.arange(positions_BT.shape[1]), positions_BT.shape)
        return super()._kept(y, slots)


@pytest.mark.parametrize(
    "mechanism, named",
    [
        (AddedPositions, "have absolute positions added"),
        (RotatedBefore, "rotated before a projection or compression"),
        (RotatedBeforeTheRotaryKey, "rotated before a projection or compression"),
        (SlotAsPosition, "a slot of the cache may stand for them"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_what_breaks_it_is_named(mechanism, named):
    subject = fresh("broken", tiny.config("mlra_4"), attention=mechanism)
    (finding,) = measure(subject, length=LENGTH, dtypes=("float32",))["findings"]
    assert finding.startswith("layer 0: keys ") and named in finding


def test_positions_that_enter_outside_of_attention_are_noticed(monkeypatch):
    subject = fresh("tiny", tiny.config("gqa"))
    see = equivariance._see

    def moved(block, x_BTD, move, length):
        return see(block, x_BTD + 0.01 * jnp.sin(1.0 * move.query), move, length)

    monkeypatch.setattr(equivariance, "_see", moved)
    (finding,) = measure(subject, length=LENGTH, dtypes=("float32",))["findings"]
    assert finding.startswith("logits change by") and "positions enter elsewhere" in finding


def test_the_command_writes_table_numbers_and_figure(tmp_path, monkeypatch, capsys):
    models = {"mine": tiny.config("gta", 2)}
    monkeypatch.setattr(equivariance, "presets", lambda names, **_: models)
    arguments = ["--preset=mine", "--layers=1", "--length=7", f"--output={tmp_path}/out"]
    assert equivariance.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "mine" and lines[3].startswith("all +1 ")
    assert sum(line.startswith(("all", "padded", "queries", "keys")) for line in lines) == 10
    (report,) = json.loads((tmp_path / "out" / "equivariance.json").read_text())
    assert report["dtypes"].keys() == {"float32", "bfloat16"}
    rounded = report["dtypes"]["bfloat16"]["moves"]["all +1"]["logits"]
    assert 1e-5 < rounded < 1e-2, "bfloat16 rounds what it rotates"
    assert (tmp_path / "out" / "equivariance.png").read_bytes().startswith(b"\x89PNG")
