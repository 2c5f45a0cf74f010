"""Second moments: predicted from sizes alone, and as measured."""

import dataclasses
import json

import pytest
import tiny
from tiny import random_model

from mlra_jax import checkpoints
from mlra_jax.analysis import variance
from mlra_jax.analysis.variance import at_initialisation, predicted, settings_of_factors
from mlra_jax.config import (
    VARIANTS,
    GroupedConfig,
    LatentConfig,
    ModelConfig,
    MultiMatrixConfig,
    TensorProductConfig,
    TiedConfig,
    preset,
)
from mlra_jax.sharding import make_mesh

SIZES = dict(num_heads=8, latent_dim=128, q_latent_dim=96, nope_dim=32, rope_dim=16)
ATTENTIONS = {
    "mha": GroupedConfig(8, 8, 32),
    "mqa": GroupedConfig(8, 1, 32),
    "gqa": GroupedConfig(8, 2, 32),
    "gta": TiedConfig(8, 2, 32),
    "mfa": MultiMatrixConfig(8, 64, 96),
    "tpa": TensorProductConfig(8, 32, 2, 6),
    "mla": LatentConfig(groups=1, branches=1, **SIZES),
    "gla_2": LatentConfig(groups=2, branches=1, **SIZES),
    "gla_4": LatentConfig(groups=4, branches=1, **SIZES),
    "mlra_2": LatentConfig(groups=2, branches=2, **SIZES),
    "mlra_4": LatentConfig(groups=1, branches=4, **SIZES),
}
_NARROW = SIZES | dict(latent_dim=64)
NEIGHBOURING = {
    "mlra_4_base": LatentConfig(groups=1, branches=4, **_NARROW, base_dim=64),
    "mlra_4_base_gated": LatentConfig(
        groups=1, branches=4, **_NARROW, base_dim=64, branch_gated=True
    ),
    "gqla": LatentConfig(
        groups=1, branches=1, **SIZES | dict(num_heads=16), num_kv_heads=8, expanded=True
    ),
}
# Wide enough that averages over weights are what is expected of them.
MODELS = settings_of_factors(
    {
        name: ModelConfig(a, vocab_size=88, num_layers=1, embed_dim=384, mlp_dim=8)
        for name, a in (ATTENTIONS | NEIGHBOURING).items()
    }
)
LENGTH = 24


def test_all_variants_are_predicted_with_and_without_factors():
    assert ATTENTIONS.keys() == set(VARIANTS)
    assert sum("without factors" in name for name in MODELS) == 5 + len(NEIGHBOURING)


@pytest.mark.parametrize("name", MODELS)
def test_predicted_is_measured_at_initialisation(name):
    expected = predicted(MODELS[name], LENGTH)
    assert at_initialisation(MODELS[name], length=LENGTH) == pytest.approx(expected, rel=0.05)


def test_predicted_where_softmaxes_are_far_from_uniform():
    wide = ModelConfig(GroupedConfig(4, 4, 64), 88, num_layers=1, embed_dim=3072, mlp_dim=8)
    expected = predicted(wide, LENGTH)
    assert expected["scores, RoPE"] == pytest.approx((3072 * 0.02**2) ** 2)
    assert at_initialisation(wide, length=LENGTH) == pytest.approx(expected, rel=0.05)


def test_predicted_where_keys_and_values_are_made_of_a_narrow_latent():
    """There values lean as the weights do."""
    sizes = dict(latent_dim=256, q_latent_dim=1024, nope_dim=128, rope_dim=64)
    latent = LatentConfig(num_heads=4, groups=1, branches=4, **sizes)
    narrow = ModelConfig(latent, 88, num_layers=1, embed_dim=3072, mlp_dim=8)
    expected = predicted(narrow, 64)
    assert at_initialisation(narrow, rows=8) == pytest.approx(expected, rel=0.04)


def test_the_factors_make_both_parts_of_a_key_alike():
    """The paper's reason, at the published sizes: 0.02² d for whatever is projected."""
    dense = 3072 * 0.02**2
    for name in ("mla", "gla_2", "mlra_4"):
        config = preset(name)
        with_factors = predicted(config, 8)
        for what in ("queries", "keys, NoPE", "keys, RoPE", "values"):
            assert with_factors[what] == pytest.approx(dense)
        assert with_factors["head outputs"] == pytest.approx(with_factors["branch outputs"])
        plain = dataclasses.replace(config.attention, scaled=False)
        without = predicted(dataclasses.replace(config, attention=plain), 8)
        assert without["keys, NoPE"] == pytest.approx(plain.latent_head_dim * 0.02**2)
        ratio = without["head outputs"] / without["branch outputs"]
        assert ratio == pytest.approx(plain.branches)


def test_the_command_shows_both_settings_of_the_factors(tmp_path, monkeypatch, capsys):
    named = {"mine": dataclasses.replace(MODELS["gla_2"], embed_dim=64)}
    monkeypatch.setattr(variance, "presets", lambda names: named)
    assert variance.main(["--preset=mine", "--length=6", f"--output={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("predicted") == 2 and "mine without factors" in printed
    numbers = json.loads((tmp_path / "variance.json").read_text())
    assert numbers["mine"]["predicted"]["cached latents"] == pytest.approx(1.0)
    assert numbers["mine"]["measured"].keys() == numbers["mine"]["predicted"].keys()
    assert (tmp_path / "variance.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_follows_a_run_through_its_checkpoints(tmp_path, capsys):
    model = random_model(tiny.config("mlra_2", 2), make_mesh())
    from flax import nnx

    params = nnx.to_pure_dict(nnx.state(model))
    manager = checkpoints.make_manager(tmp_path / "run")
    for step, factor in ((1, 1.0), (2, 3.0)):
        params["layers"]["attention"]["k_rope"]["kernel"] *= factor
        description = checkpoints.describe(model.config, "bytes")
        checkpoints.save(manager, step, params=params, model=description)
        manager.wait_until_finished()
    manager.close()
    flags = [f"--checkpoint={tmp_path}/run", "--length=6", "--layers=1"]
    assert variance.main([*flags, f"--output={tmp_path}/out"]) == 0
    assert "step 2, layer 0" in capsys.readouterr().out
    (first,), (second,) = json.loads((tmp_path / "out/variance.json").read_text())[
        "measured"
    ].values()
    assert second["keys, RoPE"] == pytest.approx(9 * first["keys, RoPE"], rel=1e-4)
    assert second["keys, NoPE"] == pytest.approx(first["keys, NoPE"], rel=1e-4)
    assert variance.main([*flags, "--step=1"]) == 0
    assert "step 2" not in capsys.readouterr().out
