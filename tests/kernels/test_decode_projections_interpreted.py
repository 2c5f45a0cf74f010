"""The numbers of the Hopper kernel of products of a few rows, in JAX's interpreter of Mosaic GPU.

The schedule of blocks, the rings and their barriers, norms, SwiGLU, residuals, heads and the order
of steps are interpreted as they are written; memory never written holds NaN, and races are errors.
Only a GPU shows what the interpreter does not model: registers and layouts, products that run on
while the program goes ahead, rings that share memory, and CTAs that wait for each other. Chains
therefore run in one CTA, which waits for itself.
"""

import functools
import secrets

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlra_jax.kernels.decode_projections import reference
from mlra_jax.kernels.decode_projections.steps import Heads, Problem, Step

mosaic_gpu = pytest.importorskip(
    "mlra_jax.kernels.decode_projections.mosaic_gpu",
    reason="this jaxlib has no Mosaic GPU dialect",
)
plgpu = mosaic_gpu.plgpu

EPS = 1e-3


@pytest.fixture
def interpreted(monkeypatch):
    """Stands in for what the interpreter lacks and compares the kernel with the reference."""
    if jax.__version_info__ < (0, 12):
        pytest.skip("the interpreter of JAX before 0.12 wants all barriers waited for")
    monkeypatch.setattr(plgpu, "griddepcontrol_wait", lambda: None)
    monkeypatch.setattr(plgpu, "griddepcontrol_launch_dependents", lambda: None)
    # The race detector takes all stages of a union of references for one place.
    monkeypatch.setattr(plgpu, "RefUnion", lambda *refs: list(refs))
    # No counters in device memory; one CTA waits for itself at a barrier.
    turnstiles = lambda n: dict(turnstiles=plgpu.Barrier(num_barriers=n)) if n else {}
    monkeypatch.setattr(mosaic_gpu, "_more_scratch", turnstiles)
    monkeypatch.setattr(mosaic_gpu, "_turnstiles", lambda n, scratch: scratch["turnstiles"])
    monkeypatch.setattr(mosaic_gpu, "_signal", plgpu.barrier_arrive)
    monkeypatch.setattr(mosaic_gpu, "_await", lambda place, ctas: plgpu.barrier_wait(place))

    def run(steps, rows, weights, count, dtype="bfloat16", **config):
        # Products of as many rows as there are: what lies behind them may be in use by a copy.
        monkeypatch.setattr(mosaic_gpu, "_ROWS", mosaic_gpu._padded(count))
        problem = Problem(
            "NVIDIA H100", tuple(steps), tuple(rows.items()), tuple(weights.items()), count, dtype
        )
        assert mosaic_gpu.supports(problem) is None
        config = mosaic_gpu.Config(**(dict(stages=2, row_kib=32) | config))
        seed = secrets.randbits(32)
        print("seed", seed)
        random = np.random.default_rng(seed)
        draw = lambda *shape: random.standard_normal(shape, np.float32)
        rows = {n: jnp.asarray(draw(count, c), dtype) for n, c in rows.items()}
        weights = {n: jnp.asarray(draw(*s) * s[-1] ** -0.5, dtype) for n, s in weights.items()}
        kernel = functools.partial(mosaic_gpu.chain, problem=problem, config=config)
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
            # Not the kernel's own jit, which may remember another interpreter.
            found = jax.jit(kernel.func.__wrapped__, static_argnames=("problem", "config"))(
                rows, weights, problem=problem, config=config
            )
        # Each step on the kernel's own results before it, so that roundings do not add up.
        known = dict(rows) | found
        for step in steps:
            wanted = reference._product(step, known, weights[step.weight])
            assert found[step.into].shape == wanted.shape and found[step.into].dtype == dtype
            got, wanted = (np.asarray(x, np.float32) for x in (found[step.into], wanted))
            assert np.linalg.norm(got - wanted) <= 2e-3 * np.linalg.norm(wanted), step
        return mosaic_gpu._phases(problem, config.ctas)

    return run


@pytest.mark.parametrize("count", [1, 7, 8, 9, 33])
def test_rows(interpreted, count):
    """A norm of its own and a residual; three CTAs of which the last has less to do."""
    steps = [Step("x", "w", "y", norm=EPS, add="h")]
    interpreted(steps, dict(x=192, h=320), dict(w=(320, 192)), count, ctas=3)


def test_several_blocks_to_a_cta(interpreted):
    """The last block is not full; stages that end beyond K."""
    [phase] = interpreted([Step("x", "w", "y")], dict(x=576), dict(w=(1280, 576)), 8, ctas=3)
    assert (phase.passes, phase.blocks, phase.columns) == (3, 9, 144)


def test_a_cta_without_work(interpreted):
    [phase] = interpreted([Step("x", "w", "y", norm=EPS)], dict(x=64), dict(w=(128, 64)), 8, ctas=9)
    assert phase.blocks == 8


def test_stages_of_many_lines(interpreted):
    """Narrow blocks: eight lines to a stage, and K no multiple of them."""
    [phase] = interpreted([Step("x", "w", "y")], dict(x=640), dict(w=(128, 640)), 8, ctas=6)
    assert (phase.columns, phase.lines) == (24, 8)


def test_more_stages_than_the_rings_have(interpreted):
    [phase] = interpreted(
        [Step("x", "w", "y", add="h")], dict(x=1024, h=192), dict(w=(192, 1024)), 33, ctas=1
    )
    config = mosaic_gpu.Config(row_kib=32)
    assert (phase.stages, mosaic_gpu._row_stages(config, 40, phase.lines)) == (16, 6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_swiglu_and_a_later_first_column(interpreted, dtype):
    steps = [Step("x", "w", "y", norm=EPS, start=64)]
    interpreted(steps, dict(x=256), dict(w=(2, 192, 192)), 7, dtype, ctas=2)


def test_heads(interpreted):
    """Values summed over branches, then queries of half a head, three branches of each."""
    steps = [Step("x", "w", "y", heads=Heads(64, 2, 64, 64, 128))]
    interpreted(steps, dict(x=384), dict(w=(128, 192)), 8, ctas=2)
    steps = [Step("x", "w", "y", heads=Heads(128, 2, 192, 128))]
    interpreted(steps, dict(x=384), dict(w=(3 * 2 * 128, 128)), 8, ctas=4)


def test_a_layer_in_one_launch(interpreted):
    steps = [
        Step("attended", "value_up", "values", heads=Heads(64, 3, 64, 64, 192)),
        Step("values", "out", "middle", add="hidden"),
        Step("middle", "gate_up", "gated", norm=EPS),
        Step("gated", "down", "new", add="middle"),
        Step("new", "in", "inputs", norm=EPS),
        Step("inputs", "query_up", "queries", norm=EPS),
        Step("queries", "key_up", "absorbed", heads=Heads(64, 3, 192, 64)),
    ]
    weights = dict(
        value_up=(192, 128),
        out=(192, 192),
        gate_up=(2, 320, 192),
        down=(192, 320),
        query_up=(576, 128),
        key_up=(384, 64),
    )
    weights["in"] = (320, 192)
    interpreted(steps, dict(attended=384, hidden=192), weights, 9, ctas=1)


def test_a_norm_by_the_sums_of_the_step_before(interpreted):
    """Over all columns, and over a part of them that begins later."""
    steps = [
        Step("x", "a", "h"),
        Step("h", "b", "y", norm=EPS),
        Step("h", "c", "z", norm=EPS, start=1536),
    ]
    weights = dict(a=(3072, 64), b=(64, 3072), c=(64, 1536))
    phases = interpreted(steps, dict(x=64), weights, 9, ctas=1)
    assert [p.squares for p in phases] == [None, "h", "h"]
