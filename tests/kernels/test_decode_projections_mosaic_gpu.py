"""The Hopper kernel of products of a few rows, as far as lowering it and its sizes tell.

Numbers are checked by `test_decode_projections_interpreted.py`, and on a GPU by `python -m
benchmarks.projections`.
"""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest

from benchmarks.projections import layer_of
from mlra_jax.config import VARIANTS, GroupedConfig, LatentConfig, preset
from mlra_jax.kernels.decode_projections.steps import Heads, Problem, Step

mosaic_gpu = pytest.importorskip(
    "mlra_jax.kernels.decode_projections.mosaic_gpu",
    reason="this jaxlib has no Mosaic GPU dialect",
)
H100 = "NVIDIA H100 80GB HBM3"
LAYERED = [n for n in VARIANTS if isinstance(preset(n).attention, (LatentConfig, GroupedConfig))]


def problem(layer, rows=8, dtype="bfloat16"):
    weights = tuple(layer.weights.items())
    return Problem(H100, layer.steps, tuple(layer.rows.items()), weights, rows, dtype)


def lowered(p):
    rows = {n: jax.ShapeDtypeStruct((p.count, c), p.dtype) for n, c in p.rows}
    weights = {n: jax.ShapeDtypeStruct(s, p.dtype) for n, s in p.weights}
    run = functools.partial(mosaic_gpu.chain, problem=p, config=mosaic_gpu.heuristic(p))
    return jax.jit(run).trace(rows, weights).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("rows, dtype", [(1, "bfloat16"), (33, "float16")])
def test_a_whole_layer_lowers_to_one_launch(rows, dtype):
    layer = layer_of("mlra_4")
    text = lowered(problem(layer, rows, dtype))
    assert text.count("@mosaic_gpu_v2") == 1
    # Weights go in as they lie: nothing pads, transposes or converts them.
    for shape in layer.weights.values():
        tensor = "tensor<" + "x".join(map(str, shape)) + "x"
        lines = [line for line in text.splitlines() if tensor in line]
        operations = {m[1] for line in lines if (m := re.search(r"stablehlo\.(\w+)", line))}
        assert operations <= {"custom_call"}


@pytest.mark.parametrize("name", LAYERED)
def test_serves_every_layer_at_every_number_of_rows(name):
    layer = layer_of(name)
    for rows in range(1, 65):
        p = problem(layer, rows)
        assert mosaic_gpu.supports(p) is None
        config = mosaic_gpu.heuristic(p)
        assert mosaic_gpu._smem_bytes(p, config) <= 227 * 1024
        padded = mosaic_gpu._padded(rows)
        for phase in mosaic_gpu._phases(p, config.ctas):
            # Two stages of rows at least, and what a product reads beyond them is in the ring.
            assert mosaic_gpu._row_stages(config, padded, phase.lines) >= 2
            stages = mosaic_gpu._row_stages(config, padded, phase.lines)
            beyond = (stages * padded + 64 - padded) * phase.lines * 128
            assert beyond <= config.row_kib * 1024 + config.stages * 24 * 1024
            assert phase.weight_rows * phase.lines <= 192 and phase.lines in (1, 2, 4, 8)
            assert phase.weight_rows % 8 == 0 and phase.weight_rows <= 256


@pytest.mark.parametrize("ctas", [1, 7, 132])
@pytest.mark.parametrize("outputs", [64, 1600, 3072, 9920, 50304])
@pytest.mark.parametrize("gated", [False, True])
def test_blocks_cover_all_columns_once(outputs, ctas, gated):
    columns, passes = mosaic_gpu._split(outputs, 3072, gated, None, ctas)
    assert columns % 8 == 0 and columns * (2 if gated else 1) in range(16, 193)
    seen = np.zeros(outputs, int)
    blocks = -(-outputs // columns)
    for cta in range(ctas):
        for block in range(cta * passes, min((cta + 1) * passes, blocks)):
            seen[block * columns : (block + 1) * columns] += 1
    assert (seen == 1).all()


def test_blocks_of_heads_stay_within_a_head():
    for width in (64, 128, 512):
        for inner in (128, 512):
            heads = Heads(width, 24, 192, 128)
            columns, _ = mosaic_gpu._split(24 * width, inner, False, heads, 132)
            assert width % columns == 0


def test_a_column_of_heads_is_that_of_the_definition():
    layer = layer_of("mlra_4")
    phases = {p.into: p for p in mosaic_gpu._phases(problem(layer), 132)}
    # Values: output 5 * 128 + 3 of head 5, factor 64 of branch 2, out of [branch, head, latent].
    assert int(phases["values"].column(5 * 128 + 3, 2 * 128 + 64)) == (2 * 24 + 5) * 128 + 64
    # Absorbed: branch 3 of head 7, out of queries 192 wide.
    assert int(phases["absorbed"].column((3 * 24 + 7) * 128, 64)) == 7 * 192 + 64


def test_norms_take_the_sums_of_the_step_before_where_they_can():
    layer = layer_of("mlra_4")
    phases = {p.into: p for p in mosaic_gpu._phases(problem(layer), 132)}
    assert phases["gated"].squares == "middle" and phases["middle"].sums_squares
    assert phases["queries"].squares == "inputs"
    first = dataclasses.replace(layer, steps=layer.steps[2:3], rows=dict(middle=3072))
    [alone] = mosaic_gpu._phases(problem(first), 132)
    assert alone.norm is not None and alone.squares is None


def test_no_more_ctas_than_run_at_once():
    p = problem(layer_of("gqa"))
    for kind, count in (
        (H100, 132),
        ("NVIDIA H200", 132),
        ("NVIDIA H100 PCIe", 114),
        ("NVIDIA H20", 78),
        ("NVIDIA H20-3e", 78),
    ):
        assert mosaic_gpu.heuristic(dataclasses.replace(p, device_kind=kind)).ctas == count
    part = dataclasses.replace(p, device_kind=H100 + " MIG 3g.40gb")
    assert "slice" in mosaic_gpu.supports(part)
    known = dataclasses.replace(part, multiprocessors=60)
    assert mosaic_gpu.supports(known) is None and mosaic_gpu.heuristic(known).ctas == 60
    assert mosaic_gpu._smem_bytes(known, mosaic_gpu.heuristic(known)) <= 227 * 1024


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(dtype="float32"), "float32"),
        (dict(count=65), "65 rows"),
        (dict(rows=(("x", 100),)), "100 columns"),
        (dict(weights=(("w", (64, 96)),)), "96 in the step into 'y'"),
        (dict(weights=(("w", (72, 128)),)), "72 in the step into 'y'"),
        (dict(steps=(Step("x", "w", "y", heads=Heads(32, 2, 64, 64)),)), "heads"),
    ],
)
def test_says_what_it_cannot_serve(changes, words):
    steps = (Step("x", "w", "y"),)
    served = Problem(H100, steps, (("x", 128),), (("w", (64, 128)),), 8, "bfloat16")
    assert mosaic_gpu.supports(served) is None
    assert words in mosaic_gpu.supports(dataclasses.replace(served, **changes))
