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

from mlra_jax.kernels.absorbed_decode.problem import Problem

mosaic_gpu = pytest.importorskip(
    "mlra_jax.kernels.absorbed_decode.mosaic_gpu", reason="this jaxlib has no Mosaic GPU dialect"
)
plan, walk = mosaic_gpu.plan, mosaic_gpu.walk
plgpu = walk.plgpu


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
    return Problem(**(fields | changes))


# GQA's six key/value heads on one device: values as latents, keys as their rotary keys.
GQA = dict(latents=6, groups=6, rope_heads=6, heads=4, rope=128, values_only=True)


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
        GQA | dict(batch=2),
        GQA | dict(latents=24, groups=24, rope_heads=24, heads=1),
        dict(heads=24, width=256, rope=256, values_only=True),
        dict(heads=24, width=512, values_only=True),
        dict(latents=4, heads=4, width=32, rope=16),
        dict(latents=4, heads=24, batch=31),
        # Only the autotuner takes two.
        dict(latents=2, heads=5, width=256, batch=3, dtype="float16", swap=True),
    ],
    ids=[
        "alternate",
        "columns",
        "wide",
        "rows_of_a_batch",
        "together",
        "longest",
        "most_rows",
        "GQA",
        "MHA",
        "MFA",
        "values_of_512",
        "narrow",
        "swapped",
        "swapped_2",
    ],
)
def test_lowers_for_hopper(monkeypatch, changes):
    tuned = changes.get("swap", False)
    p = problem(**{name: value for name, value in changes.items() if name != "swap"})
    order = recorded_calls(monkeypatch)
    assert mosaic_gpu.supports(p) is None
    q = (p.batch, p.queries, p.latents, p.heads, p.width)
    q_rope = (p.batch, p.queries, p.groups, p.heads, p.rope)
    k_rope = (p.batch, p.cache, *(() if p.rope_heads == 1 else (p.rope_heads,)), p.rope)
    shapes = q, q_rope, (p.batch, p.cache, p.latents, p.width), k_rope
    arrays = [jax.ShapeDtypeStruct(s, p.dtype) for s in shapes]
    if p.values_only:
        arrays[0] = None
    assert Problem.of(*arrays, p.device_kind) == p
    bounds = [jax.ShapeDtypeStruct(s, jnp.int32) for s in ((p.batch, p.queries), (p.batch,))]
    settings = mosaic_gpu.candidates(p) if tuned else [mosaic_gpu.heuristic(p)]
    config = next(config for config in settings if config.swap or not tuned)
    op = functools.partial(mosaic_gpu.absorbed_decode, scale=0.1, config=config)
    text = jax.jit(op).trace(*arrays, *bounds).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == 2
    # Each launch waits for the one before it, lets the next begin, and only then copies. None asks
    # for registers, of which nvJitLink leaves each warpgroup as many.
    waits = ["griddepcontrol_wait", "griddepcontrol_launch_dependents"]
    split, join = order[: order.index(waits[0], 1)], order[order.index(waits[0], 1) :]
    assert split[:2] == waits and set(split[2:]) == {"copy_gmem_to_smem"}
    assert join[:2] == waits and not set(join[2:]) & {*waits, "copy_gmem_to_smem"}
    # The cache goes in as it lies: nothing pads, transposes or converts an array of its size.
    assert operations_on(text, *shapes[2:]) <= ONLY_READ


def recorded_calls(monkeypatch):
    """The waits and copies of a kernel being traced in order, and its wishes for registers."""
    order = []

    def record(name):
        function = getattr(plgpu, name)

        def call(*args, **keywords):
            order.append(name)
            return function(*args, **keywords)

        monkeypatch.setattr(plgpu, name, call)

    record("griddepcontrol_wait")
    record("griddepcontrol_launch_dependents")
    record("copy_gmem_to_smem")
    record("set_max_registers")
    return order


def test_launches_overlap_only_when_asked(monkeypatch):
    order = recorded_calls(monkeypatch)
    for p in (problem(cache=64), problem(batch=2, cache=64)):
        config = dataclasses.replace(mosaic_gpu.heuristic(p), overlap=False)
        q = (p.batch, p.queries, p.latents, p.heads)
        shapes = (*q, 128), (*q, 64), (p.batch, 64, 1, 128), (p.batch, 64, 64)
        arrays = [jax.ShapeDtypeStruct(s, p.dtype) for s in shapes]
        bounds = [jax.ShapeDtypeStruct(s, jnp.int32) for s in ((p.batch, 1), (p.batch,))]
        op = functools.partial(mosaic_gpu.absorbed_decode, scale=0.1, config=config)
        jax.make_jaxpr(op)(*arrays, *bounds)
    assert set(order) == {"copy_gmem_to_smem"}


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
    "latents, width", [(1, 128), (2, 128), (4, 128), (1, 256), (2, 256), (1, 512), (4, 32), (1, 64)]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_serves_every_member_and_number_of_heads(latents, width, dtype):
    for queries in (1, 8):
        for heads in range(1, 129):
            sizes = dict(queries=queries, heads=heads, latents=latents, width=width, dtype=dtype)
            p = problem(batch=3, **sizes)
            assert mosaic_gpu.supports(p) is None
            config = mosaic_gpu.heuristic(p)
            assert plan.smem_bytes(plan.Shape(p, config)) <= 227 * 1024


def test_says_what_it_cannot_serve():
    for name, served, refused in (
        ("dtype", ("bfloat16", "float16"), ("float32", "float64")),
        ("width", (32, 64, 128, 256, 512), (16, 48, 127, 129, 384, 1024)),
        ("rope", (16, 32, 64, 128, 256), (8, 24, 48, 96, 512)),
        ("cache", (8, 4096), (4095, 4097, 4100)),
        ("queries", (1, 16), (17, 64, 2048)),
    ):
        for value in served:
            assert mosaic_gpu.supports(problem(**{name: value})) is None
        for value in refused:
            assert str(value) in mosaic_gpu.supports(problem(**{name: value}))


LONG = dict(cache=131072)


@pytest.mark.parametrize(
    "changes, chosen",
    [
        # One row: tiles in stripes over as many CTAs as have equally much to do.
        (LONG, dict(stages=4, ctas=128, stripes=True)),
        (dict(cache=64), dict(stages=4, ctas=1, stripes=True)),
        (dict(cache=72), dict(stages=4, ctas=2, stripes=True)),
        (dict(cache=133 * 64), dict(stages=4, ctas=67, stripes=True)),
        (dict(cache=132 * 64), dict(stages=4, ctas=132, stripes=True)),
        (LONG | dict(device_kind="NVIDIA H20"), dict(stages=4, ctas=76, stripes=True)),
        (LONG | dict(device_kind="NVIDIA H100 PCIe"), dict(stages=4, ctas=114, stripes=True)),
        (LONG | dict(device_kind="NVIDIA H800 PCIe"), dict(stages=4, ctas=114, stripes=True)),
        # Two latents to a tile where their query rows fit one product each.
        (LONG | dict(latents=4, heads=24), dict(stages=4, ctas=128, shared=2, stripes=True)),
        (dict(latents=4, heads=32, queries=2, batch=2), dict(shared=2, join_rows=2)),
        (dict(latents=2, heads=33, queries=2, batch=2), dict(query_stages=2, join_rows=2)),
        (dict(latents=3, batch=2), dict(query_stages=2, join_rows=2)),
        # Few query rows are joined by all multiprocessors; each row of the batch has as many CTAs.
        (dict(heads=24, batch=8), dict(ctas=128, query_stages=2, join_rows=1)),
        (dict(latents=2, heads=64, rope=128), dict(stages=3, ctas=64, shared=2, stripes=True)),
        # Of few query rows cache positions are the rows of products, in long batches; of one
        # latent sooner.
        (dict(heads=24, batch=9), dict(query_stages=2, swap=True, join_rows=1)),
        (dict(heads=16, queries=2, batch=9), dict(query_stages=2, swap=True, join_rows=2)),
        (dict(heads=33, batch=9), dict(query_stages=2, join_rows=2)),
        (dict(width=256, heads=24, batch=9), dict(swap=True, join_rows=2)),
        (
            dict(width=256, rope=256, values_only=True, heads=24, batch=9),
            dict(stages=2, swap=True, join_rows=2),
        ),
        (GQA | dict(batch=9), dict(query_stages=2, swap=True, join_rows=2)),
        (dict(latents=4, heads=24, batch=31), dict(stages=2, shared=4, swap=True)),
        (dict(latents=4, heads=24, batch=30), dict(stages=4, shared=2)),
        (dict(latents=8, heads=24, batch=16), dict(stages=2, ctas=128, shared=4, swap=True)),
        (
            dict(latents=4, heads=16, queries=2, batch=64),
            dict(stages=2, ctas=128, shared=4, swap=True),
        ),
        (dict(latents=4, heads=33, batch=64), dict(stages=4, ctas=128, shared=2)),
        (dict(latents=2, heads=24, batch=31), dict(stages=4, shared=2, swap=True)),
        (dict(latents=2, heads=24, batch=30), dict(stages=4, shared=2)),
        (dict(latents=2, heads=33, batch=64), dict(stages=4, ctas=128, shared=2)),
        (LONG | dict(latents=2, heads=24), dict(stages=4, ctas=128, shared=2, stripes=True)),
        (dict(latents=4, heads=8, width=256, batch=64), dict(stages=4, swap=True)),
        (
            dict(latents=4, heads=8, width=64, rope=32, batch=64),
            dict(ctas=128, shared=4, swap=True),
        ),
        (dict(latents=4, heads=8, width=32, rope=16, batch=64), dict(query_stages=2)),
        (
            # Two tiles of four do not fit.
            dict(latents=4, groups=4, heads=32, rope=256, batch=64),
            dict(stages=2, ctas=128, shared=2),
        ),
        # Four units at most divide the CTAs among themselves, and only evenly; more have as many
        # each where few CTAs are left over.
        (dict(latents=4, heads=65), dict(stages=4, ctas=128, stripes=True)),
        (dict(latents=5), dict(ctas=130, query_stages=2, join_rows=2)),
        (dict(latents=4, heads=65, device_kind="NVIDIA H20"), dict(ctas=76, query_stages=2)),
        # Wide latents leave room for fewer stages.
        (dict(batch=64), dict(stages=4, ctas=128, query_stages=2)),
        (dict(width=256), dict(stages=4, ctas=64, stripes=True)),
        (dict(width=256, heads=128), dict(stages=3, ctas=64, stripes=True)),
        (dict(width=512, batch=64), dict(stages=2, ctas=128)),
        (dict(width=512, rope=128, batch=2), dict(stages=1, join_rows=2)),
        # Keys and values by head: nothing is shared that two of a tile would read once.
        (GQA, dict(query_stages=2, join_rows=1)),
        (GQA | dict(latents=4, groups=4, rope_heads=4), dict(stages=4, ctas=128, stripes=True)),
        (dict(width=256, rope=256, values_only=True), dict(stages=2, ctas=64, stripes=True)),
    ],
)
def test_heuristic(changes, chosen):
    assert mosaic_gpu.heuristic(problem(**changes)) == mosaic_gpu.Config(**chosen)


def test_candidates_fit_and_hold_the_heuristic():
    tried = lambda found, name: {getattr(config, name) for config in found}
    for changes, blocks, stages, shared, query_stages, join_rows in (
        (dict(), {64, 128}, {2, 4}, {1}, {1, 2}, {4}),
        (dict(width=512, batch=2), {64}, {1, 2}, {1}, {1, 2}, {2, 4, 8}),
        (
            dict(batch=64, latents=4, heads=24),
            {64, 128},
            {1, 2, 3, 4},
            {1, 2, 4},
            {1, 2},
            {2, 4, 8},
        ),
        (dict(latents=2, heads=24), {64, 128}, {1, 2, 3, 4}, {1, 2}, {1, 2}, {4}),
        (GQA, {64, 128}, {1, 2, 3, 4}, {1, 2}, {1, 2}, {1, 2, 4, 8}),
        (GQA | dict(rope=32), {64, 128}, {2, 4}, {1}, {1, 2}, {1, 2, 4, 8}),
    ):
        p = problem(**changes)
        found = mosaic_gpu.candidates(p)
        first = mosaic_gpu.heuristic(p)
        assert found[0] == first and len(set(found)) == len(found)
        assert tried(found, "block") == blocks and tried(found, "stages") == stages
        assert tried(found, "shared") == shared and tried(found, "query_stages") == query_stages
        assert tried(found, "join_rows") == join_rows
        for config in found:
            # Only the heuristic's own pairing may keep its stripes; others use the whole chip.
            own = (config.shared, config.swap) == (first.shared, first.swap)
            assert config.stripes == (first.stripes and own)
            assert config.ctas == (first.ctas if config.stripes or config == first else 132)
            used = plan.smem_bytes(plan.Shape(p, config))
            assert used <= 227 * 1024
            assert mosaic_gpu.Config(**dataclasses.asdict(config)) == config


def memory_of(scratch):
    """Bytes of shared memory that a scratch type takes; of a union, those of its largest member."""
    if isinstance(scratch, plgpu.Barrier):
        return 8 * int(np.prod(scratch.num_barriers))
    return math.prod(scratch.shape) * jnp.dtype(scratch.dtype).itemsize


def test_shared_memory_is_counted_as_the_launch_takes_it(monkeypatch):
    launch = {}
    monkeypatch.setattr(plgpu, "kernel", lambda body, **kwargs: launch.update(kwargs))
    for changes in (
        dict(),
        dict(batch=2, heads=100),
        dict(latents=4, heads=24, groups=2),
        dict(latents=2, heads=7, batch=3),
        dict(width=256, heads=9),
        dict(width=256, heads=128, queries=2, rope=16),
        dict(width=512),
        dict(width=512, heads=128, batch=2, rope=32),
        GQA,
        dict(latents=2, rope_heads=2, heads=20, batch=2),
        dict(width=512, values_only=True),
        dict(width=32, rope=16, batch=2),
        dict(latents=4, heads=24, batch=2),
    ):
        p = problem(**changes)
        for config in mosaic_gpu.candidates(p):
            shape = plan.Shape(p, config)
            mosaic_gpu.walk.launch(shape, 0.1)
            taken = sum(map(memory_of, launch["scratch_types"].values()))
            counted = plan.smem_bytes(shape)
            # Statistics and barriers are counted as whole KiB.
            assert counted - 3 * 1024 <= taken <= counted - 1024
            assert launch["grid"] == (config.ctas,)
            parts, lses = launch["out_type"]
            assert parts.shape[3] == lses.shape[2]
            units = p.batch * p.latents // config.shared * shape.row_blocks
            assert parts.shape[3] == config.ctas + (0 if config.stripes else units)


def test_table_numbers_the_tiles_of_ragged_rows():
    p = problem(batch=5, queries=2, latents=2, cache=1000)
    config = dataclasses.replace(mosaic_gpu.heuristic(p), ctas=7, shared=1)
    shape = plan.Shape(p, config)
    ends, starts = [1000, 0, 65, 3, 500], [0, 0, 3, 3, 490]
    # The farther of a row's two ends counts.
    lengths = jnp.asarray(
        [[end, max(end - 300, 0)][:: 1 - 2 * (b % 2)] for b, end in enumerate(ends)]
    )
    table = np.asarray(mosaic_gpu.schedule.table(shape, lengths, jnp.asarray(starts)))
    counts = [
        math.ceil((e - s // 8 * 8) / config.block) if e > s else 0
        for e, s in zip(ends, starts, strict=True)
    ]
    np.testing.assert_array_equal(table[:6], np.cumsum([0, *counts]))
    np.testing.assert_array_equal(table[6:11], [0, 0, 0, 0, 488])
    units = shape.units
    share = math.ceil(sum(counts) * units / 7)
    row_of_tile = np.repeat(np.arange(5), np.asarray(counts) * units)
    for cta in range(7):
        if cta * share < len(row_of_tile):
            assert table[11 + cta] == row_of_tile[cta * share]
