"""The published sizes: parameter counts from shapes against counts by hand."""

import re

import jax
import pytest

from mlra_jax.config import PRESETS, ConfigError, ModelConfig, preset
from mlra_jax.model import structure
from mlra_jax.sharding import make_mesh

D, LAYERS, VOCAB = 3072, 24, 50304
MLP_WIDTHS = {
    "mha": 8192,
    "mqa": 10152,
    "gqa": 9728,
    "gqa_gated": 8704,
    "gqa_double_heads": 7680,
    "gta": 9960,
    "mfa": 8024,
    "tpa": 10760,
    "mla": 9448,
    "mla_gated": 8424,
    "mla_double_heads": 7320,
    "gla_2": 10048,
    "gla_2_gated": 9024,
    "gla_2_double_heads": 8344,
    "gla_4": 10136,
    "mlra_2": 10048,
    "mlra_2_gated": 9024,
    "mlra_4": 9880,
    "mlra_4_gated": 8856,
}


def published_name(name):
    """The model that an ablation ablates: its sizes are the same."""
    return re.sub("_(no_scale|normal_initialization)$", "", name)


def attention_parameters(name):
    """One layer's attention, by hand from the paper's table; head width 128 but for MFA."""
    H = 48 if "double_heads" in name else 24
    heads, gate = H * 128, D * H * 128 * ("gated" in name)
    out = heads * D
    base = re.sub("_(gated|double_heads)$", "", name)
    if base in ("mha", "mqa", "gqa"):
        kv_heads = {"mha": 24, "mqa": 1, "gqa": 6}[base]
        return D * heads + 2 * D * kv_heads * 128 + out + gate
    if base == "gta":
        return D * heads + D * 6 * 128 + D * 64 + out
    if base == "mfa":
        return D * 2048 + 2048 + 2048 * 24 * 256 + 2 * D * 256 + 24 * 256 * D
    if base == "tpa":
        return D * (24 + 128) * (6 + 2 + 2) + out
    # Each of the branches up-projects, for every head, 512 / latents wide latents to keys, values.
    latents, branches = {
        "mla": (1, 1),
        "gla_2": (2, 1),
        "gla_4": (4, 1),
        "mlra_2": (4, 2),
        "mlra_4": (4, 4),
    }[base]
    q_latent = 1536 if base == "mla" else 1024
    queries = D * q_latent + q_latent + q_latent * H * (128 + 64)
    latent = D * (512 + 64) + 512
    up = branches * H * (512 // latents) * (128 + 128)
    return queries + latent + up + out + gate


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_counts(name):
    _, shapes = structure(preset(name), make_mesh())
    counted = sum(x.size for x in jax.tree.leaves(shapes))
    base = published_name(name)
    layer = attention_parameters(base) + 3 * D * MLP_WIDTHS[base] + 2 * D
    assert counted == VOCAB * D + LAYERS * layer + D
    assert abs(counted / 2.9e9 - 1) < 0.02


def test_every_published_model_and_ablation_has_a_preset():
    assert {published_name(name) for name in PRESETS} == MLP_WIDTHS.keys()
    assert {"gla_2_no_scale", "mla_no_scale", "mlra_2_no_scale"} < set(PRESETS)
    main = ["mha", "mqa", "gqa", "gta", "mfa", "tpa", "mla", "gla_2", "gla_4", "mlra_2", "mlra_4"]
    assert {f"{name}_normal_initialization" for name in main} < set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_differ_from_what_they_ablate_only_in_what_is_ablated(name):
    config, base = preset(name), preset(published_name(name))
    assert config.mlp_dim == MLP_WIDTHS[published_name(name)]
    assert config.zero_init == (not name.endswith("_normal_initialization"))
    assert getattr(config.attention, "scaled", True) == (not name.endswith("_no_scale"))
    changed = config.to_dict()
    changed["zero_init"] = True
    if "scaled" in changed["attention"]:
        changed["attention"]["scaled"] = True
    assert ModelConfig.from_dict(changed) == base


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match="unknown preset 'mlra4'; did you mean mlra_4"):
        preset("mlra4")


def test_unknown_preset_that_is_near_none_lists_them_all():
    with pytest.raises(ConfigError, match="unknown preset 'zzzzzz'; there are mha, mqa, gqa, gta"):
        preset("zzzzzz")
