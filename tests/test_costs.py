"""Bytes of a cache, for every variant and every way to split it."""

import dataclasses
import math
import re

import pytest
import tiny

from mlra_jax import costs, sharding
from mlra_jax.attention import mechanism
from mlra_jax.config import NEIGHBOURS, VARIANTS, ConfigError, Execution, preset

# Values a token, layer and device in units of d_h at 1, 2, 4 and 8 ways by tensor: the paper's
# table 1 for the latent family, the definitions for the others.
PUBLISHED = {
    "mla": (4.5, 4.5, 4.5, 4.5),
    "gla_2": (4.5, 2.5, 2.5, 2.5),
    "gla_4": (4.5, 2.5, 1.5, 1.5),
    "mlra_2": (4.5, 2.5, 1.5, 1.5),
    "mlra_4": (4.5, 2.5, 1.5, 1.5),
    "mha": (48, 24, 12, 6),
    "mqa": (2, 2, 2, 2),
}
# A base of 2 d_h on every device, beside four latents of half a d_h; keys of 1.5 and values of 1.
NEIGHBOURING = {
    "mlra_4_base": (4.5, 3.5, 3, 3),
    "mlra_4_head_gated": (4.5, 2.5, 1.5, 1.5),
    "mlra_4_branch_gated": (4.5, 2.5, 1.5, 1.5),
    "gqla": (10, 5, 2.5, 2.5),
}


@pytest.mark.parametrize("name", [*PUBLISHED, *NEIGHBOURING])
def test_values_per_device_are_the_papers_and_the_definitions(name):
    config = preset(name)
    for tensor, widths in zip((1, 2, 4, 8), WIDTHS[name], strict=True):
        values = costs.cache_values_per_device(config, batch=1, capacity=8, tensor=tensor)
        assert values == 8 * 128 * widths


def test_context_shares_of_the_published_models():
    for name, tensor, context, widths in [
        ("mlra_4", 4, 2, 0.75),
        ("mla", 1, 4, 1.125),
        ("mla", 4, 2, 2.25),
        ("tpa", 1, 2, 4.75 / 2),
    ]:
        size = dict(batch=3, capacity=64, tensor=tensor, context=context)
        values = costs.cache_values_per_device(preset(name), **size)
        assert values == 3 * 64 * 128 * widths


# The same of every variant, and of those that the paper's table leaves out.
WIDTHS = (
    PUBLISHED
    | NEIGHBOURING
    | {
        "gqa": (12, 6, 4, 4),  # 6 key heads over 4 devices: two on each
        "gta": (6.5, 3.5, 2.5, 2.5),
        "mfa": (4, 4, 4, 4),
        # Rank 2 of keys and of values; every device has the factors that all heads share.
        "tpa": tuple(2 * 2 * (24 / tensor + 128) / 128 for tensor in (1, 2, 4, 8)),
    }
)
NAMES = (*VARIANTS, *NEIGHBOURS)
TENSOR = (1, 2, 4, 8, 1, 1, 1, 2, 4)
CONTEXT = (1, 1, 1, 1, 2, 4, 8, 2, 2)


def test_every_cell_of_the_table():
    tokens, batch = 65536, 3
    heading, *lines = costs.table(NAMES, tokens=tokens, batch=batch).splitlines()
    assert heading.startswith(f"Cache per device in GiB, {batch} x {tokens} tokens, bfloat16")
    assert lines[2].split() == [
        "ways",
        *["1", "2", "4", "8", "2", "4", "8"],
        "2",
        "x",
        "2",
        "4",
        "x",
        "2",
    ]
    assert tuple(zip(TENSOR, CONTEXT, strict=True)) == costs.SPLITS
    rows = {line[:20].strip(): re.findall(r"(\S+) \((\S+)\)", line) for line in lines[3:]}
    assert rows.keys() == set(NAMES) == WIDTHS.keys()
    for name, cells in rows.items():
        for (gib, width), tensor, context in zip(cells, TENSOR, CONTEXT, strict=True):
            want = WIDTHS[name][(1, 2, 4, 8).index(tensor)] / context
            assert width == f"{want:.3g}", (name, tensor, context)
            assert gib == f"{want * 128 * 2 * 24 * tokens * batch / 2**30:.2f}"


def test_what_cannot_be_split_is_a_dash():
    row = costs.table(["mla_double_heads"], 8, 1).splitlines()[-1]
    assert "-" not in row
    with pytest.raises(ConfigError, match="4 latent heads and tensor=3"):
        costs.cache_bytes_per_device(preset("mlra_4"), batch=1, capacity=8, tensor=3)


@pytest.mark.parametrize("dtype, width", [("bfloat16", 2), ("float32", 4)])
def test_bytes_are_those_of_all_layers_in_the_compute_dtype(dtype, width):
    config = preset("mlra_4", execution=Execution(dtype), num_layers=5)
    size = dict(batch=2, capacity=48, tensor=4, context=2)
    held = costs.cache_bytes_per_device(config, **size)
    assert held == 2 * 24 * (128 + 64) * 5 * width


@pytest.mark.parametrize("name", tiny.ALL)
def test_what_is_counted_is_what_the_arrays_hold(name):
    config, mesh = tiny.config(name, 2), sharding.make_mesh(data=2, tensor=2, context=2)
    module = mechanism(config.attention)
    shapes = module.cache_shapes(config.attention, 4, 16, 2)
    held = sum(
        math.prod(sharding.named(mesh, *module.cache_axes[n]).shard_shape(shape)) * 4
        for n, shape in shapes.items()
    )
    counted = costs.cache_bytes_per_device(config, batch=2, capacity=16, tensor=2, context=2)
    assert counted == 2 * held


def test_the_command_prints_the_table_that_was_asked_for(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["costs", "--tokens=4096", "--batch=3"])
    costs.main()
    assert capsys.readouterr().out == costs.table(NAMES, tokens=4096, batch=3) + "\n"
    monkeypatch.setattr("sys.argv", ["costs"])
    costs.main()
    assert capsys.readouterr().out == costs.table(NAMES, tokens=131072, batch=1) + "\n"
    for flag in ("--tokens=7", "--batch=0"):
        monkeypatch.setattr("sys.argv", ["costs", flag])
        with pytest.raises(SystemExit) as end:
            costs.main()
        assert end.value.code == 2 and "at least" in capsys.readouterr().err


def test_what_training_takes_is_counted():
    config = preset("mha_small", context_length=128, dtype="bfloat16")
    count = 1000
    how = dict(sequences=3, ways=4, loss_chunk=64)
    size = lambda moment_dtype="", **changes: costs.training_bytes_per_device(
        dataclasses.replace(config, **changes), count, moment_dtype=moment_dtype, **how
    )
    # Weights, gradients and two moments of 4 bytes over 4 ways; 12 layers of inputs and one block's
    # 4 x 768 + 4 x 12 x 64 + 3 x 2048 in 2 bytes; twice 64 positions' logits in 4.
    inside, logits = 4 * 768 + 4 * 768 + 3 * 2048, 2 * 3 * 64 * 50304 * 4
    assert size() == 16 * count // 4 + 3 * 128 * (12 * 768 + inside) * 2 + logits
    everything = 16 * count // 4 + 3 * 128 * 12 * (768 + inside) * 2 + logits
    for remat, need in dict(none=everything, products=everything, block=size()).items():
        assert size(execution=Execution(remat=remat)) == need
    assert size() - size("bfloat16") == 2 * 2 * count // 4
