"""The Hopper kernel's numbers without a GPU: both launches in JAX's interpreter of Mosaic GPU.

Schedule, copies, barriers, masks, softmax, hand-over and joining are interpreted as they are
written; memory never written holds NaN, and races and reads out of bounds are errors. Only a GPU
shows what the interpreter does not model: registers and layouts, products that run on while the
program goes ahead (and the fences and waits that they need), CTAs side by side, and launches that
overlap.
"""

import functools
import secrets

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import truth
from jax import lax
from jax.experimental import pallas as pl

from mlra_jax.kernels.absorbed_decode.problem import Problem

mosaic_gpu = pytest.importorskip(
    "mlra_jax.kernels.absorbed_decode.mosaic_gpu", reason="this jaxlib has no Mosaic GPU dialect"
)
interpreter = pytest.importorskip("interpreter")
join, plan, walk = mosaic_gpu.join, mosaic_gpu.plan, mosaic_gpu.walk
plgpu = walk.plgpu

SCALE = 0.09


def weigh(parts, lses, sums, statistics):
    """What the kernel writes in the GPU's own instructions: sums of parts by weight."""
    wg, groups = lax.axis_index("wg"), join.JOINERS
    mine = jnp.arange(lses.shape[0]) // 8 % groups == wg
    lse = jnp.where(mine, lses[...], -jnp.inf)
    top = jnp.maximum(lse.max(), join.LOWEST)
    weights = jnp.exp2(lse - top)
    total = (weights[:, None] * parts[...].astype(jnp.float32)).sum(axis=0)
    # Here one warp of each warpgroup does it all.
    sums[pl.ds(wg * 512, 512)] = jnp.pad(total, (0, 384))
    lowest = jnp.full([3], join.LOWEST, jnp.float32)
    statistics[pl.ds(wg * 4, 4)] = jnp.concatenate([top[None], lowest])
    statistics[pl.ds((groups + wg) * 4, 4)] = jnp.pad(weights.sum()[None], (0, 3))


@pytest.fixture
def interpreted(monkeypatch):
    """Stands in for what the interpreter lacks and runs the kernel in it."""
    interpreter.stand_in(monkeypatch)
    # When a launch may begin: no rule for it on a CPU, and no effect on the numbers.
    monkeypatch.setattr(plgpu, "griddepcontrol_wait", lambda: None)
    monkeypatch.setattr(plgpu, "griddepcontrol_launch_dependents", lambda: None)
    monkeypatch.setattr(join, "weigh_parts", weigh)
    # What is written in the GPU's own instructions.
    over_rows = dict(add=jnp.sum, max=jnp.max)
    monkeypatch.setattr(walk.tiles, "over_rows", lambda op, x, _: over_rows[op](x, axis=0))
    monkeypatch.setattr(walk, "_any_above", lambda x: (x > 0).any())
    # Joining a row is a call into Python: fewer rows to a product, which the interpreter allows.
    monkeypatch.setattr(plan, "ROWS", 16)

    def compiled(config, _q, _q_rope, latents, *_):
        # The race detector takes all stages of a union of references for one place.
        one_place = latents.shape[-1] == 512 and config.query_stages > 1
        params = plgpu.InterpretGPUParams(detect_races=not one_place)
        kernel = jax.jit(functools.partial(mosaic_gpu.absorbed_decode, scale=SCALE, config=config))

        def run(*arrays):
            with plgpu.force_gpu_interpret_mode(params):
                return kernel(*arrays)

        return run

    return compiled


# Ends and starts on, before and behind the edges of tiles of 64, which begin at multiples of 8.
# The last end of a row is not always its greatest.
EDGES = [
    ([64, 63], 0),
    ([65, 64], 0),
    ([62, 63], 1),
    ([72, 71], 9),
    ([72, 73], 8),
    ([127, 129], 7),
    ([128, 127], 0),
    ([64, 66], 64),
    ([66, 65], 65),
]


@pytest.mark.parametrize(
    "mode, sizes, config, bounds",
    [
        # One row whose tiles go to three CTAs in turn. The tile that a CTA asks for unseen may be
        # another than its first, or one too many.
        (
            "alternate",
            dict(B=1, T=1, L=1, H=5, C=128, S=400, G=1),
            dict(ctas=3, stages=2, stripes=True),
            [[([395], 5)], [([330], 70)], [([65], 0)], [([0], 0)]],
        ),
        (
            "alternate",
            dict(B=9, T=2, L=1, H=3, C=128, S=136, G=1),
            dict(ctas=3, stages=4, join_rows=8),
            [EDGES, [([0, 0], 9)] * 9],
        ),
        # A row in five parts, one more than are read at once.
        (
            "alternate",
            dict(B=2, T=1, L=1, H=3, C=128, S=264, G=1),
            dict(ctas=11, stages=2, join_rows=8),
            [[([264], 0), ([9], 8)]],
        ),
        # An empty row, one of a few positions, latents in two groups, two rows' queries in flight.
        (
            "alternate",
            dict(B=3, T=2, L=4, H=3, C=128, S=136, G=2),
            dict(ctas=5, stages=2, query_stages=2, join_rows=4),
            [[([131, 132], 11), ([0, 0], 0), ([5, 6], 3)]],
        ),
        # GLA-2's width in float16; the first query sees nothing, the second most.
        (
            "alternate",
            dict(B=1, T=3, L=1, H=2, C=256, S=200, G=1, dtype="float16"),
            dict(ctas=5, stages=2, stripes=True),
            [[([0, 193, 1], 0)]],
        ),
        # Two units of two latents each, and more CTAs than tiles for one of them.
        (
            "latents",
            dict(B=1, T=2, L=4, H=3, C=128, S=136, G=4, R=32),
            dict(ctas=6, stages=2, shared=2, stripes=True),
            [[([130, 129], 9)]],
        ),
        (
            "latents",
            dict(B=3, T=1, L=2, H=5, C=128, S=208, G=1),
            dict(ctas=4, stages=2, shared=2, join_rows=2),
            [[([203], 11), ([0], 0), ([64], 0)]],
        ),
        # Cache positions as the rows of products: four latents with rotary queries in two groups;
        # a row in two parts, one hidden from its first query, an empty row.
        (
            "swapped_4",
            dict(B=4, T=2, L=4, H=5, C=128, S=208, G=2, R=32),
            dict(ctas=3, stages=2, shared=4, swap=True, join_rows=2),
            [[([203, 130], 11), ([0, 0], 0), ([0, 65], 1), ([64, 63], 0)]],
        ),
        # One latent, whose second warpgroup may have no tile, or the only one of a visit.
        (
            "swapped_1",
            dict(B=4, T=2, L=1, H=5, C=128, S=336, G=1, R=32),
            dict(ctas=3, stages=4, swap=True, join_rows=2),
            [[([320, 319], 0), ([0, 0], 0), ([200, 1], 72), ([129, 131], 0)]],
        ),
        (
            "swapped_1",
            dict(B=2, T=1, L=2, H=7, C=256, S=464, G=2),
            dict(ctas=5, stages=2, swap=True, query_stages=2),
            [[([464], 3), ([70], 0)]],
        ),
        (
            "swapped_1",
            dict(B=1, T=1, L=1, H=7, C=64, S=464, G=1),
            dict(ctas=3, stages=4, swap=True, stripes=True),
            [[([464], 3)], [([330], 70)], [([40], 0)]],
        ),
        # Two stages of queries; wide latents with keys of their own.
        (
            "swapped_2",
            dict(B=2, T=1, L=4, H=7, C=256, S=264, G=2, N=4, dtype="float16"),
            dict(ctas=4, stages=2, shared=2, swap=True, query_stages=2),
            [[([259], 11), ([65], 0)]],
        ),
        (
            "swapped_2",
            dict(B=1, T=2, L=4, H=3, C=64, S=136, G=4),
            dict(ctas=6, stages=2, shared=2, swap=True, stripes=True),
            [[([130, 129], 9)]],
        ),
        # Two blocks of query rows, each of two tiles.
        (
            "together",
            dict(B=1, T=7, L=1, H=5, C=128, S=200, G=1, R=16),
            dict(ctas=4, stages=1, stripes=True),
            [[([193, 132, 128, 134, 127, 136, 131], 59)]],
        ),
        # MLA's width; the results pass through the memory of the queries.
        (
            "columns",
            dict(B=1, T=1, L=1, H=3, C=512, S=264, G=1, R=32),
            dict(ctas=3, stages=2, stripes=True),
            [[([200], 90)], [([64], 0)]],
        ),
        (
            "columns",
            dict(B=2, T=2, L=1, H=3, C=512, S=200, G=1, R=32),
            dict(ctas=2, stages=2, join_rows=3),
            [[([193, 192], 0), ([66, 67], 1)]],
        ),
        (
            "columns",
            dict(B=1, T=1, L=2, H=5, C=512, S=264, G=1),
            dict(block=128, ctas=3, stages=1, query_stages=2),
            [[([257], 0)]],
        ),
        # Keys and values by head, no queries of the values: GQA on one device, ragged and several
        # queries; MHA, one query row to a head, narrow.
        (
            "alternate",
            dict(B=3, T=2, L=3, H=4, C=128, S=136, G=3, R=128, N=3, values_only=True),
            dict(ctas=5, stages=2, query_stages=2, join_rows=2),
            [[([131, 132], 11), ([0, 0], 0), ([66, 65], 3)]],
        ),
        (
            "alternate",
            dict(B=1, T=1, L=4, H=1, C=64, S=136, G=4, R=32, N=4, values_only=True),
            dict(ctas=8, stages=2, stripes=True),
            [[([133], 67)]],
        ),
        # Two latents to a tile, each with its own rotary key.
        (
            "latents",
            dict(B=2, T=1, L=4, H=5, C=128, S=136, G=2, N=4),
            dict(ctas=4, stages=2, shared=2, join_rows=2),
            [[([130], 11), ([65], 0)]],
        ),
        # The quickstart's widths.
        (
            "alternate",
            dict(B=2, T=2, L=4, H=3, C=32, S=200, G=1, R=16),
            dict(ctas=3, stages=4, query_stages=2),
            [[([193, 192], 0), ([66, 67], 1)]],
        ),
    ],
    ids=[
        "stripes",
        "edges",
        "parts",
        "ragged",
        "wide",
        "pairs",
        "pairs-ragged",
        "swapped-four",
        "swapped-one",
        "swapped-one-wide",
        "swapped-one-stripes",
        "swapped-wide",
        "swapped-stripes",
        "together",
        "MLA-stripes",
        "MLA",
        "MLA-L2",
        "grouped",
        "one-row-a-head",
        "pairs-own-keys",
        "narrow",
    ],
)
def test_numerics(interpreted, mode, sizes, config, bounds):
    B, T, L, H, C, S, G = (sizes[n] for n in "BTLHCSG")
    R, dtype = sizes.get("R", 64), sizes.get("dtype", "bfloat16")
    N, values_only = sizes.get("N", 1), sizes.get("values_only", False)
    config = mosaic_gpu.Config(**config)
    problem = Problem("NVIDIA H200", B, T, L, H, G, C, R, S, dtype, N, values_only)
    assert plan.Shape(problem, config).mode.name == mode
    seed = secrets.randbits(32)
    print("seed", seed)
    random = np.random.default_rng(seed)
    k_rope = (B, S, N, R) if N > 1 else (B, S, R)
    shapes = (B, T, L, H, C), (B, T, G, H, R), (B, S, L, C), k_rope
    arrays = [random.standard_normal(s, np.float32).astype(jnp.dtype(dtype)) for s in shapes]
    # Scores of hundreds in the first head: exp of them is beyond float32.
    arrays[values_only][:, :, :, 0] *= 256
    if values_only:
        arrays[0] = None
    assert Problem.of(*arrays, "NVIDIA H200") == problem
    kernel = interpreted(config, *arrays)
    for rows in bounds:
        lengths_BT, starts_B = (np.array(x, np.int32) for x in zip(*rows, strict=True))
        out, lse = kernel(*arrays, lengths_BT, starts_B)
        assert out.dtype == dtype and lse.dtype == jnp.float32
        out, lse = np.asarray(out, np.float32), np.asarray(lse)
        wanted, wanted_lse = truth.absorbed_decode(*arrays, lengths_BT, starts_B, scale=SCALE)
        hidden = np.isneginf(wanted_lse)
        assert (np.isneginf(lse) == hidden).all() and not out[hidden].any()
        # Every row by itself: a short one must not hide behind the long ones.
        for b in range(B):
            assert np.linalg.norm(out[b] - wanted[b]) <= 5e-3 * np.linalg.norm(wanted[b])
        np.testing.assert_allclose(lse[~hidden], wanted_lse[~hidden], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    "C, config",
    [
        (128, dict(ctas=3, stages=4, stripes=True)),
        (128, dict(ctas=5, stages=2, query_stages=2)),
        (128, dict(ctas=2, stages=2, shared=2)),
        (512, dict(ctas=3, stages=2)),
    ],
    ids=["alternate-stripes", "alternate-two-stages", "latents", "columns"],
)
def test_rows_beyond_the_queries_are_multiplied_as_zeros(C, config, interpreted, monkeypatch):
    """As a GPU that multiplies what happens to lie there lowers its clock."""
    beyond, product = [], plgpu.wgmma
    B, L = 1 if "stripes" in config else 2, config.get("shared", 1)

    def recorded(acc, left, right):
        weights = isinstance(left, jax.Array)
        # Behind the first latent's queries are those of the second.
        if weights or L == 1:
            rows = (left if weights else left[...])[8:]
            jax.debug.callback(lambda x: beyond.append(np.array(x, np.float32)), rows)
        product(acc, left, right)

    monkeypatch.setattr(plgpu, "wgmma", recorded)
    random = np.random.default_rng(0)
    shapes = (B, 1, L, 5, C), (B, 1, 1, 5, 64), (B, 336, L, C), (B, 336, 64)
    arrays = [jnp.asarray(random.standard_normal(s), jnp.bfloat16) for s in shapes]
    kernel = interpreted(mosaic_gpu.Config(**config), *arrays)
    kernel(*arrays, jnp.array([[300], [200]][:B]), jnp.zeros(B, jnp.int32))
    jax.effects_barrier()
    assert len(beyond) > 10 and not any(x.any() for x in beyond)


def test_latents_are_copied_once_and_only_where_a_row_sees(interpreted, monkeypatch):
    moved = []
    copy = plgpu.copy_gmem_to_smem
    shapes = (4, 1, 4, 4, 128), (4, 1, 1, 4, 64), (4, 336, 4, 128), (4, 336, 64)

    def recorded(source, *others):
        copy(source, *others)
        if source.ref.shape == (4, 336, 4 * 128):
            row, positions, columns = source.transforms[-1].indices
            record = lambda *at: moved.append(tuple(map(int, at)))
            jax.debug.callback(record, row, columns.start, positions.start)

    monkeypatch.setattr(plgpu, "copy_gmem_to_smem", recorded)
    arrays = [jnp.zeros(s, jnp.bfloat16) for s in shapes]
    kernel = interpreted(mosaic_gpu.Config(ctas=3, stages=2, shared=2), *arrays)
    # Two rows that end with a tile, one a position later.
    kernel(*arrays, jnp.array([[320], [0], [200], [129]]), jnp.array([0, 0, 72, 0]))
    jax.effects_barrier()
    begins = {0: range(0, 320, 64), 2: range(72, 200, 64), 3: range(0, 129, 64)}
    assert sorted(moved) == [
        (row, column, at) for row in begins for column in (0, 256) for at in begins[row]
    ]
