"""Names and shapes of every published model."""

import dataclasses
import math

import numpy as np
import pytest

from mlra_jax.config import PRESETS, ConfigError, preset
from mlra_jax.convert import chunks
from mlra_jax.convert.chunks import chunk_shapes
from mlra_jax.convert.errors import CheckpointFileError
from mlra_jax.convert.recognise import recognise
from mlra_jax.convert.released import HEAD, layout, released_values


@pytest.mark.parametrize("name", PRESETS)
def test_published_sizes_are_recognised(name):
    """From the names, shapes and config.json of a 2.9B model back to its preset."""
    config = preset(name)
    shapes = layout(config).tensors
    found, notes = recognise(shapes, released_values(config, "float32"), variant=name)
    assert found == config and notes == []


@pytest.mark.parametrize(
    "name", ["mha", "gqa_gated", "gta", "mfa", "tpa", "mla_gated", "gla_2_gated", "mlra_2_gated"]
)
def test_layout_is_the_models_tree_and_uses_every_number_once(name):
    config = preset(name, num_layers=2, vocab_size=50304, embed_dim=3072)
    described = layout(config)
    cut = chunk_shapes(config)
    assert cut.keys() == described.leaves.keys()
    for path, leaf in described.leaves.items():
        assert len(cut[path]) == len(leaf.shape)
        assert all(n % b == 0 for n, b in zip(leaf.shape, cut[path], strict=True))
        assert not leaf.stacked or cut[path][0] == 1
    # Counting on one number per byte would take gigabytes; one layer's attention is enough.
    counts = {
        n: np.zeros(s, np.int8)
        for n, s in described.tensors.items()
        if n.startswith("transformer.h.0.attn.")
    }
    for path, leaf in described.leaves.items():
        if path.startswith("layers.attention."):
            for part in leaf.parts:
                view = part.view(counts["transformer.h.0." + part.name])
                assert view.shape == part.shape
                view += 1
    assert all((count == 1).all() for count in counts.values())
    ours = sum(math.prod(leaf.shape) for leaf in described.leaves.values())
    theirs = sum(math.prod(s) for n, s in described.tensors.items() if n != HEAD)
    assert ours == theirs


def test_large_layers_are_cut_for_eight_devices():
    cut = chunk_shapes(preset("mlra_4"))
    assert cut["layers.mlp.gate.kernel"] == (1, 3072, 9880 // 8)
    assert cut["layers.attention.k_up.kernel"] == (1, 12, 128, 128)
    assert cut["embed.embedding"] == (50304 // 8, 3072)
    assert cut["layers.mlp_norm.scale"] == (1, 3072)


def test_layers_are_cut_from_a_size_on(monkeypatch):
    small = dict(num_layers=2, embed_dim=48)
    config = dataclasses.replace(preset("mlra_4"), **small, mlp_dim=64)
    for smallest, block in ((48 * 64, (1, 48, 8)), (48 * 64 + 1, (1, 48, 64))):
        monkeypatch.setattr(chunks, "MIN_CHUNK", smallest)
        assert chunk_shapes(config)["layers.mlp.gate.kernel"] == block
    # As many parts as divide it, eight at most.
    monkeypatch.setattr(chunks, "MIN_CHUNK", 1)
    for width, ways in ((60, 4), (62, 2), (63, 1), (48, 8)):
        shapes = chunk_shapes(dataclasses.replace(config, mlp_dim=width))
        assert shapes["layers.mlp.gate.kernel"] == (1, 48, width // ways)


def test_absurd_descriptions_end_soon():
    config = preset("mlra_4", num_layers=2)
    shapes, values = dict(layout(config).tensors), released_values(config, "float32")
    # No list of names is made that is longer than what the files hold.
    for layers in (len(shapes) // 4 + 1, len(shapes)):
        with pytest.raises(CheckpointFileError, match=f"n_layer={layers} is too much for"):
            recognise(shapes, values | {"n_layer": layers})
    assert recognise(shapes, values | {"n_layer": len(shapes) // 4})[0].num_layers > 2
    largest = recognise(shapes, values | {"block_size": 2**31 - 1})[0]
    assert largest.context_length == 2**31 - 1
    wrong = (("n_layer", 2**31 - 1), ("n_head", 10**30), ("n_embd", 1.5), ("n_head", 0))
    for name, value in (*wrong, ("block_size", 2**31), ("block_size", True)):
        with pytest.raises(CheckpointFileError, match=f"config.json: {name}"):
            recognise(shapes, values | {name: value})
    up = "transformer.h.0.attn.kv_b_proj"
    for shape in ((2**24, 128, 24 * 256), (4, 128, 24 * 256 + 1), (4, 128, 0), (4,), ()):
        with pytest.raises((CheckpointFileError, ConfigError)):
            recognise(shapes | {up: shape}, values)
