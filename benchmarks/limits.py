"""What one device can do: bytes read and copied, and products of matrices, per second.

Every benchmark quotes its times beside these, measured in the same process.
"""

import math
import statistics
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.timing import queued_seconds, seconds
from mlra_jax.kernels import target

BYTES = 4 * 10**9
# The streaming sum takes whole tiles of every multiprocessor.
_CTAS, _ROWS, _STAGES = 132, 64, 12
_CUT = _CTAS * _ROWS * 4096


def random_pool(seed: int, nbytes: int = BYTES) -> jax.Array:
    """bfloat16 numbers of about `nbytes` to measure on; never zeros, which are faster."""
    key = jax.random.key(seed, impl="unsafe_rbg")
    shape = pool_shape(nbytes)
    return jax.jit(lambda k: jax.random.normal(k, shape, jnp.bfloat16))(key)


def pool_shape(nbytes: int = BYTES) -> tuple[int]:
    """Of a pool of about so many bytes."""
    return (max(nbytes // 2 // _CUT, 1) * _CUT,)


def tiny_pool() -> jax.Array:
    """Too small to measure anything: for trying a benchmark on any machine."""
    return jax.random.normal(jax.random.key(0), [1 << 16], jnp.bfloat16)


def launch_seconds() -> float:
    """Seconds that starting a program and waiting for it takes."""
    small = jnp.ones([64, 128], jnp.bfloat16)
    empty = jax.jit(lambda q: lax.fori_loop(0, 2, lambda _, q: q * jnp.bfloat16(0.5), q))
    return statistics.median(seconds(lambda: empty(small), 30))


def readers(pool: jax.Array | jax.ShapeDtypeStruct) -> dict[str, Callable]:
    """Ways of reading a pool, compiled."""
    ways = {
        "XLA, maximum": jnp.max,
        "XLA, row sums": lambda x: jnp.sum(x.reshape(-1, 4096), axis=1, dtype=jnp.float32),
    }
    if target.is_hopper(jax.devices()[0]):
        ways["TMA, column sums"] = lambda x: _streaming_sum(x.reshape(-1, 128))
    return {f"read ({name})": jax.jit(way).lower(pool).compile() for name, way in ways.items()}


def read_bandwidth(
    pool: jax.Array, start: float, ways: dict[str, Callable] | None = None
) -> dict[str, float]:
    """Bytes a second that each way of reading `pool` reaches; `read` is the best.

    `ways` are its `readers`, where they were compiled before.
    """
    ways = ways or readers(pool)
    found = {name: pool.nbytes / queued_seconds(way, pool, start) for name, way in ways.items()}
    return found | {"read": max(found.values())}


def measure_limits(pool: jax.Array) -> dict[str, float]:
    """Bytes per second read and copied, FLOP per second of a product, seconds of a start.

    Args:
      pool: from `random_pool`.
    """
    start = launch_seconds()
    found = dict(start=start) | read_bandwidth(pool, start)
    found["copy"] = (
        2 * pool.nbytes / queued_seconds(jax.jit(lambda x: x + jnp.bfloat16(1)), pool, start)
    )
    found["matrix"] = matrix_rate(pool, start)
    return found


def matrix_rate(pool: jax.Array, start: float) -> float:
    """FLOP a second of a product of two square matrices of 8192, or of what `pool` has."""
    side = min(8192, math.isqrt(pool.size))
    square = lax.slice(pool, [0], [side * side]).reshape(side, side)
    return 2 * side**3 / queued_seconds(jax.jit(lambda a: a @ a.T), square, start)


def describe(limit: dict[str, float]) -> str:
    """The limits, one a line with its unit."""
    unit_of = {"start": "us", "matrix": "TFLOP/s"}
    lines = []
    for name, value in limit.items():
        unit = unit_of.get(name, "TB/s")
        lines.append(f"{name}: {value * (1e6 if unit == 'us' else 1e-12):.2f} {unit}")
    return "\n".join(lines)


def _streaming_sum(x: jax.Array) -> jax.Array:
    """Sum over the rows of bfloat16 [N, 128] with the same copies as the decode kernel, no more."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    ctas, rows, stages = _CTAS, _ROWS, _STAGES
    tiles = x.shape[0] // rows // ctas
    layout = plgpu.Layout.WG_STRIDED((rows, 128), 8)

    def body(x_ref, out_ref, *, buffer, full, empty):
        cta, wg = lax.axis_index("cta"), lax.axis_index("wg")

        @pl.when(wg == 1)
        def _load():
            def step(i, _):
                stage = lax.rem(i, stages)
                pl.when(i >= stages)(lambda: plgpu.barrier_wait(empty.at[stage]))
                at = pl.ds((cta * tiles + i) * rows, rows)
                plgpu.copy_gmem_to_smem(x_ref.at[at], buffer.at[stage], full.at[stage])

            lax.fori_loop(0, tiles, step, None)

        @pl.when(wg == 0)
        def _sum():
            def step(i, acc):
                stage = lax.rem(i, stages)
                plgpu.barrier_wait(full.at[stage])
                acc = acc + plgpu.load(buffer.at[stage], layout=layout).astype(jnp.float32)
                plgpu.barrier_arrive(empty.at[stage])
                return acc

            zeros = plgpu.layout_cast(jnp.zeros((rows, 128), jnp.float32), layout)
            out_ref[cta] = lax.fori_loop(0, tiles, step, zeros)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((ctas, rows, 128), jnp.float32),
        scratch_types=dict(
            buffer=plgpu.SMEM((stages, rows, 128), x.dtype),
            full=plgpu.Barrier(num_barriers=stages),
            empty=plgpu.Barrier(num_barriers=stages),
        ),
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=2,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
    )(x)
