"""The published sizes: parameter counts from shapes against counts by hand."""

import re
from pathlib import Path

import jax
import pytest

from mlra_jax.__main__ import main as list_commands
from mlra_jax.config import (
    NEIGHBOURS,
    PRESETS,
    ConfigError,
    GroupedConfig,
    LatentConfig,
    ModelConfig,
    MultiMatrixConfig,
    TensorProductConfig,
    TiedConfig,
    preset,
)
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


def test_neighbours_are_as_large():
    # MLRA-4's: a base of 256 for four latents of 64, each with up-projections for 24 heads; one
    # sigmoid a head; a number a branch and head. Of MLA's, up-projections for 4 heads only.
    mlra_4, mla = attention_parameters("mlra_4"), attention_parameters("mla")
    by_hand = {
        "mlra_4_base": mlra_4 + (4 * 64 + 256 - 4 * 128) * 24 * 256,
        "mlra_4_head_gated": mlra_4 + D * 24,
        "mlra_4_branch_gated": mlra_4 + D * 4 * 24,
        "gqla": mla - 20 * 512 * 256,
    }
    assert set(by_hand) == set(NEIGHBOURS)
    wanted = LAYERS * (mlra_4 + 3 * D * MLP_WIDTHS["mlra_4"])
    for name, attention in by_hand.items():
        config = preset(name)
        counted = sum(x.size for x in jax.tree.leaves(structure(config, make_mesh())[1]))
        layers = LAYERS * (attention + 3 * D * config.mlp_dim)
        assert counted == VOCAB * D + layers + LAYERS * 2 * D + D
        assert abs(layers - wanted) <= LAYERS * 3 * D * 4, "half a step of the MLP's width"


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


@pytest.mark.parametrize(
    ("name", "changes", "attention", "sizes"),
    [
        # (layers, width, MLP); heads of 64 below a width of 2048, of 128 from there on.
        ("mlra_4_small", {}, LatentConfig(12, 1, 4, 256, 256, 64, 32), (12, 768, 2496)),
        ("mla_medium", {}, LatentConfig(16, 1, 1, 256, 512, 64, 32), (24, 1024, 3200)),
        ("gqa_gated_small", {}, GroupedConfig(12, 3, 64, gated=True), (12, 768, 2176)),
        ("mqa_small", {}, GroupedConfig(12, 1, 64), (12, 768, 2560)),
        ("gqa_double_heads_small", {}, GroupedConfig(24, 3, 64), (12, 768, 1920)),
        ("gta", dict(embed_dim=2048), TiedConfig(16, 4, 128), (24, 2048, 6656)),
        ("mfa_small", {}, MultiMatrixConfig(12, 128, 512), (12, 768, 2048)),
        ("tpa_small", {}, TensorProductConfig(12, 64, 2, 6), (12, 768, 2752)),
        (
            "mlra_4",
            dict(embed_dim=1024, num_heads=8, num_layers=2),
            LatentConfig(8, 1, 4, 512, 320, 128, 64),
            (2, 1024, 3328),
        ),
        (
            "mlra_2_small",
            dict(latent_dim=128, gated=True, mlp_dim=100),
            LatentConfig(12, 2, 2, 128, 256, 64, 32, gated=True),
            (12, 768, 100),
        ),
        ("mha", dict(attention=TiedConfig(2, 1, 8), embed_dim=100), TiedConfig(2, 1, 8),
         (24, 100, 320)),
        ("mha", dict(num_layers=3), GroupedConfig(24, 24, 128), (3, 3072, 8192)),
    ],
)  # fmt: skip
def test_heads_widths_and_mlp_follow_the_width(name, changes, attention, sizes):
    config = preset(name, **changes)
    assert config.attention == attention
    assert (config.num_layers, config.embed_dim, config.mlp_dim) == sizes


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("mlra_4", dict(embed_dim=1000), "embed_dim=1000 would make num_heads 15.625: choose a"),
        ("gqa", dict(embed_dim=640), "embed_dim=640 would make num_kv_heads 2.5"),
        ("mla", dict(embed_dim=1024, num_heads=7), "embed_dim=1024 and num_heads=7 would make "),
        ("gla_4", dict(embed_dim=384), "num_heads=6 does not divide into groups=4"),
        ("mlra_4_smal", {}, "unknown preset 'mlra_4_smal'; did you mean mlra_4_small?"),
    ],
)
def test_widths_that_contradict_are_named(name, changes, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        preset(name, **changes)


def test_presets_and_configs_are_listed_with_their_sizes(capsys, monkeypatch):
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    root = Path(__file__).parents[1]
    monkeypatch.chdir(root)
    assert list_commands(["presets"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[1:]}
    assert {*PRESETS, *NEIGHBOURS} < rows.keys() and "mlra_4_small" in rows and "tpa_medium" in rows
    # 4.5 d_h a token and layer, 24 layers, 2 bytes.
    assert "2,873,220,096       5.35 GiB      27.00 KiB" in rows["mlra_4"]
    assert list_commands(["configs"]) == 0
    out = capsys.readouterr().out
    assert "configs/fine_tune.py: name a checkpoint's folder" in out
    assert "configs/paper.py: 2,873,220,096 parameters, 100,000 steps of 983,040 tokens" in out
    assert list_commands(["configs", "configs/fine_tune.py"]) == 1
    with pytest.raises(SystemExit):
        list_commands(["preset"])
    assert "unexpected argument 'preset'; there are commands, presets" in capsys.readouterr().err


def test_the_snippets_of_the_page_on_sizes_run(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[1] / "docs/own_model.md").read_text()
    sizes, experiment = re.findall(r"```python\n(.*?)```", page, re.S)
    names: dict = {}
    exec(sizes, names)
    config = eval('preset("mlra_4", num_layers=16, embed_dim=1280)', names)
    said = re.search(r"embed_dim=1280\)\s+# (\d+) heads of (\d+), MLP (\d+)", sizes)
    attention = config.attention
    assert [attention.num_heads, attention.nope_dim, config.mlp_dim] == list(
        map(int, said.groups())
    )
    (tmp_path / "my.py").write_text(experiment)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    assert list_commands(["configs", f"{tmp_path}/my.py"]) == 0
    assert "2,000 steps of 16,384 tokens" in capsys.readouterr().out
    refused = re.search(r"^embed_dim=1000 would.*$", page, re.M).group()
    with pytest.raises(ConfigError, match=f"^{re.escape(refused)}$"):
        preset("mlra_4", embed_dim=1000)
