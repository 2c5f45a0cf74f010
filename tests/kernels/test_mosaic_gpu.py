"""The Hopper kernel as far as a machine without a GPU can tell.

Numbers are checked by `test_mosaic_gpu_interpreted.py`, and on a GPU by `python -m
benchmarks.absorbed_decode`. Here every way of sharing the work among warpgroups is lowered to the
GPU dialect, which checks shapes, layouts, copies and the size of shared memory.
"""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from sharded_step import sharded_step

from mlra_jax.kernels.absorbed_decode import config as config_lib

mosaic_gpu = pytest.importorskip(
    "mlra_jax.kernels.absorbed_decode.mosaic_gpu", reason="this jaxlib has no Mosaic GPU dialect"
)


def problem(**changes):
    fields = dict(
        device_kind="NVIDIA H200",
        batch=1,
        queries=1,
        latents=1,
        heads=64,
        groups=1,
        width=128,
        rope=64,
        cache=4096,
        dtype="bfloat16",
    )
    return config_lib.Problem(**(fields | changes))


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(width=512, cache=1000),
        dict(width=256, heads=32, dtype="float16"),
        dict(batch=3, queries=4, latents=4, groups=2, heads=12, cache=1000),
        dict(batch=2, queries=2),
        # 2**32 elements: offsets beyond what 32 bits count.
        dict(batch=4, heads=1, width=512, cache=2**21),
        dict(latents=2, queries=8, heads=128, width=256),
    ],
    ids=["alternate", "columns", "wide", "rows_of_a_batch", "together", "longest", "most_rows"],
)
def test_lowers_for_hopper(changes):
    p = problem(**changes)
    assert mosaic_gpu.supports(p) is None
    q = (p.batch, p.queries, p.latents, p.heads, p.width)
    q_rope = (p.batch, p.queries, p.groups, p.heads, p.rope)
    shapes = q, q_rope, (p.batch, p.cache, p.latents, p.width), (p.batch, p.cache, p.rope)
    arrays = [jax.ShapeDtypeStruct(s, p.dtype) for s in shapes]
    bounds = [jax.ShapeDtypeStruct(s, jnp.int32) for s in ((p.batch, p.queries), (p.batch,))]
    op = functools.partial(mosaic_gpu.absorbed_decode, scale=0.1, config=mosaic_gpu.heuristic(p))
    text = jax.jit(op).trace(*arrays, *bounds).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == 2
    # The cache goes in as it lies: nothing pads, transposes or converts an array of its size.
    assert operations_on(text, *shapes[2:]) <= ONLY_READ


# Giving latents and their widths one dimension moves nothing.
ONLY_READ = {"custom_call", "reshape"}


def operations_on(text, *shapes):
    """The StableHLO operations that an array of one of these shapes goes into or comes out of."""
    tensors = ["tensor<" + "x".join(map(str, shape)) + "x" for shape in shapes]
    lines = [line for line in text.splitlines() if any(t in line for t in tensors)]
    return {match[1] for line in lines if (match := re.search(r"stablehlo\.(\w+)", line))}


def test_donated_cache_is_updated_and_read_in_place():
    """A decode step of four GPUs under shard_map: new entry into the cache, then attention."""
    mesh = Mesh(np.array(jax.devices()[:4]), ("tensor",))
    sizes = dict(B=2, T=1, L=4, H=24, C=128, R=64, S=4096)
    step, arrays = sharded_step(mesh, **sizes, scale=0.1, implementation="mosaic_gpu")
    traced = step.trace(*arrays)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("tf.aliasing_output") + text.count("jax.buffer_donor") == 2
    on_a_device = (2, 4096, 1, 128), (2, 4096, 64)
    assert operations_on(text, *on_a_device) == {"dynamic_update_slice"} | ONLY_READ


@pytest.mark.parametrize(
    "latents, width", [(1, 128), (2, 128), (4, 128), (1, 256), (2, 256), (1, 512)]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_serves_every_member_and_number_of_heads(latents, width, dtype):
    for queries in (1, 8):
        for heads in range(1, 129):
            sizes = dict(queries=queries, heads=heads, latents=latents, width=width, dtype=dtype)
            p = problem(batch=3, **sizes)
            assert mosaic_gpu.supports(p) is None
            config = mosaic_gpu.heuristic(p)
            assert mosaic_gpu._smem_bytes(config, p) <= 227 * 1024


@pytest.mark.parametrize(
    "changes, word",
    [
        (dict(dtype="float32"), "float32"),
        (dict(width=96), "96"),
        (dict(rope=24), "24"),
        (dict(cache=1001), "1001"),
    ],
)
def test_says_what_it_cannot_serve(changes, word):
    assert word in mosaic_gpu.supports(problem(**changes))


def test_candidates_fit_and_hold_the_heuristic():
    for changes in (dict(), dict(width=512), dict(batch=64, latents=4, heads=24)):
        p = problem(**changes)
        found = mosaic_gpu.candidates(p)
        assert mosaic_gpu.heuristic(p) in found
        assert len(set(found)) == len(found)
        for config in found:
            used = mosaic_gpu._smem_bytes(config, p)
            assert used <= 227 * 1024
            assert mosaic_gpu.Config(**dataclasses.asdict(config)) == config


def test_table_numbers_the_tiles_of_ragged_rows():
    p = problem(batch=5, latents=2, cache=1000)
    config = dataclasses.replace(mosaic_gpu.heuristic(p), ctas=7, shared=1)
    shape = mosaic_gpu._Shape(5, 1, 2, 64, 1, 128, 64, 1000, 1, 0.1, jnp.dtype("bfloat16"))
    ends, starts = [1000, 0, 65, 3, 500], [0, 0, 3, 3, 490]
    table = np.asarray(
        mosaic_gpu._table(shape, config, jnp.asarray(ends)[:, None], jnp.asarray(starts))
    )
    counts = [
        math.ceil((e - s // 8 * 8) / config.block) if e > s else 0
        for e, s in zip(ends, starts, strict=True)
    ]
    np.testing.assert_array_equal(table[:6], np.cumsum([0, *counts]))
    share = math.ceil(sum(counts) * 2 / 7)
    row_of_tile = np.repeat(np.arange(5), np.asarray(counts) * 2)
    for cta in range(7):
        if cta * share < len(row_of_tile):
            assert table[6 + cta] == row_of_tile[cta * share]
