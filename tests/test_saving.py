"""Models into checkpoints and out again, in both forms; and the pages on one's own JAX code."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

import mlra_jax
from mlra_jax import checkpoints
from mlra_jax.attention import MODULES, register
from mlra_jax.attention.grouped import GroupedAttention
from mlra_jax.checkpoints import CheckpointError
from mlra_jax.config import KINDS, ConfigError, GroupedConfig
from mlra_jax.convert import convert
from mlra_jax.convert.exporting import export
from mlra_jax.data import tokenizers
from mlra_jax.decoder import Decoder, Vocabulary
from mlra_jax.loading import load_model, tokenizer_of
from mlra_jax.saving import load_trainable, save_model
from mlra_jax.sharding import make_mesh

TOKENS = np.arange(12, dtype=np.int32).reshape(2, 6)


def same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, x), y in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=str(path))


def params(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


@pytest.mark.parametrize(
    "name, mesh",
    [
        ("mlra_4", {}),
        ("mlra_2_gated", dict(tensor=2, context=2)),
        ("mlra_4", dict(tensor=4)),
        ("gqa_gated", {}),
        ("tpa", dict(tensor=2)),
    ],
)
def test_a_decoder_is_saved_as_the_model_that_it_was_made_of(name, mesh, tmp_path):
    model = tiny.random_model(tiny.config(name, num_layers=2), make_mesh(**mesh))
    save_model(Decoder.from_model(model, Vocabulary(80, "bytes")), tmp_path)
    opened = checkpoints.open_checkpoint(tmp_path)
    assert (opened.model, opened.tokenizer, opened.step) == (model.config, "bytes", 0)
    same(params(load_trainable(tmp_path)), params(model))


def test_a_decoder_without_up_projections_is_not_saved(tmp_path):
    absorbed = dataclasses.replace(tiny.LATENT["mlra_4"], latent_dim=40)
    model = tiny.random_model(tiny.config(absorbed), make_mesh(tensor=4))
    with pytest.raises(ValueError, match="save what load_trainable gives, or load_model on one"):
        save_model(Decoder.from_model(model, Vocabulary(80, "bytes")), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_ranks_go_where_the_weights_go(tmp_path, monkeypatch):
    ranks, text = tmp_path / "ranks", "so many words"
    tiny.write_ranks(ranks)
    model = tiny.random_model(tiny.config("gqa", num_layers=1, vocab_size=264), make_mesh())
    save_model(model, tmp_path / "saved", ranks)
    original = ranks.read_bytes()
    ranks.unlink()

    def whose(folder):
        monkeypatch.setattr(tokenizers, "_met", {})
        return tokenizer_of(load_model(folder))

    assert whose(tmp_path / "saved").encode(text) == [255 - byte for byte in text.encode()]
    export(tmp_path / "saved", tmp_path / "released", quiet=True)
    monkeypatch.setattr(tokenizers, "_met", {})
    convert(tmp_path / "released", tmp_path / "converted", quiet=True)
    assert whose(tmp_path / "converted").encode(text) == [255 - byte for byte in text.encode()]
    kept = tmp_path / "converted" / tokenizers.RANKS_FILE
    assert kept.read_bytes() == original
    tiny.write_ranks(kept, range(256))
    with pytest.raises(ValueError, match=f"{kept} holds the ranks of"):
        whose(tmp_path / "converted")


def test_a_model_in_training_form_saves_loads_and_exports(tmp_path):
    config = tiny.config("mlra_4", num_layers=2, vocab_size=264)
    model = tiny.random_model(config, make_mesh(fsdp=2))
    folder = tmp_path / "model"
    save_model(model, folder, "bytes")
    again = load_trainable(folder, make_mesh(tensor=4))
    assert again.mesh.shape["tensor"] == 4
    same(params(again), params(model))
    decoder = mlra_jax.load_model(folder)
    assert decoder.vocabulary == Vocabulary(257, "bytes")
    assert tiny.relative_error(decoder(TOKENS), model(TOKENS)) < 1e-6
    export(folder, tmp_path / "released", note=lambda line: None, quiet=True)
    assert (tmp_path / "released/model.safetensors").exists()

    # Edited, then saved beside the first: the latest is what loads.
    model.embed.embedding[...] = model.embed.embedding[...] * 2
    save_model(model, folder, "bytes", step=3)
    same(params(load_trainable(folder)), params(model))
    same(params(load_trainable(folder, step=0)), params(again))
    with pytest.raises(CheckpointError, match="has step 3 already; choose another folder or a la"):
        save_model(model, folder)
    with pytest.raises(FileNotFoundError, match="no tokenizer 'byte'"):
        save_model(model, tmp_path / "none", "byte")
    assert not (tmp_path / "none").exists()


def test_no_digit_is_lost_whatever_the_dtypes(tmp_path):
    config = tiny.config("mla", dtype="bfloat16", param_dtype="float32")
    model = tiny.random_model(config, make_mesh())
    save_model(model, tmp_path / "wide")
    decoder = mlra_jax.load_model(tmp_path / "wide")
    # Products' weights in bfloat16, norms in float32: both fit float32.
    save_model(decoder, tmp_path / "again")
    stored = checkpoints.open_checkpoint(tmp_path / "again").model
    assert (stored.param_dtype, stored.execution.dtype) == ("float32", "bfloat16")
    same(mlra_jax.load_model(tmp_path / "again").weights, decoder.weights)
    narrow = mlra_jax.load_model(tmp_path / "wide", dtype="bfloat16")
    save_model(narrow, tmp_path / "narrow")
    assert checkpoints.open_checkpoint(tmp_path / "narrow").model.param_dtype == "bfloat16"
    assert load_trainable(tmp_path / "narrow").config == dataclasses.replace(
        config, param_dtype="float32"
    )
    assert load_trainable(tmp_path / "narrow", param_dtype=jnp.bfloat16).config.param_dtype == (
        "bfloat16"
    )


def test_the_page_on_ones_own_loop_runs(tmp_path, monkeypatch, capsys):
    """Every snippet, in order: trained, saved, loaded, decoded; an attention of one's own."""
    config = tiny.config("mlra_4", vocab_size=264)
    save_model(tiny.random_model(config, make_mesh()), tmp_path / "models/small", "bytes")
    (tmp_path / "my_text.txt").write_text("The quick brown fox. " * 50)
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[1] / "docs/your_own_loop.md").read_text()
    page = page.replace("range(20)", "range(11)")  # up to the second line that it prints
    names: dict = {"__name__": "__main__"}
    try:
        for snippet in re.findall(r"```python\n(.*?)```", page, re.S):
            exec(snippet, names)
    finally:
        KINDS.pop("normed", None)
        MODULES.pop(names.get("NormedConfig"), None)
    first, later = (float(line.split()[1]) for line in capsys.readouterr().out.splitlines())
    assert later < first, "it learns"
    assert len(names["new"]) == 8 and all(token < 257 for token in names["new"])
    same(params(load_trainable("models/mine")), params(names["model"]))
    assert any(np.asarray(x).any() for x in jax.tree.leaves(names["gradients"]))
    # The attention of one's own: keys and queries of any length count as unit ones.
    mine, decoder = names["mine"], names["decoder"]
    assert tiny.relative_error(decoder(TOKENS), mine(TOKENS)) < 1e-5
    assert (tmp_path / "models/normed/checkpoints/0").is_dir()


def test_a_kind_is_registered_once():
    class Other(GroupedConfig):
        kind = "latent"

    with pytest.raises(ConfigError, match="kind='latent' is LatentConfig's already"):
        register(Other, GroupedAttention)
    assert Other not in MODULES
