"""Whether the exchange of decoding steps is right between GPUs of one host, and what it costs.

    python -m benchmarks.exchange [--rows=8,128] [--width=3072] [--repeats=60] [--tiny]

Right: steps of seven exchanges of random numbers and of what is gathered in the end, beside float64
and to the last bit the same on all devices, while some are kept busy for a random time in front of
each. What it costs: a chain of
products, each with weights of its own, with exchanges, less the same of each device alone with
residual and norm by XLA; beside it XLA's all-reduce, residual and norm.
"""

import argparse
import functools
import statistics
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import trange

from benchmarks.timing import seconds
from mlra_jax import sharding
from mlra_jax.kernels.exchange import Exchange, supports
from mlra_jax.sharding import make_mesh

_EPS, _EXCHANGES = 1e-6, 7
_PAIRS, _LOOPS, _TIMES = 12, 24, 7
_SPLIT, _WHOLE = sharding.spec("latent"), sharding.spec()


def _each(function, mesh: Mesh, in_specs, out_specs):
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def _put(x, mesh: Mesh, spec):
    return jax.device_put(x, NamedSharding(mesh, spec))


def _step(mesh: Mesh, parts_NRD, x_RD, scale_D, columns_RV, busy_EN):
    """Exchanges one after the other; each device's next part is the normed rows times a number.
    Then the columns are gathered."""

    def delay(part_1RD, square, times_N):
        product = lambda _, square: (square @ square) / len(square)
        square = lax.fori_loop(0, times_N[lax.axis_index(sharding.MODEL)], product, square)
        return part_1RD + 0 * square[0, 0].astype(jnp.float32)

    delayed = _each(delay, mesh, (_SPLIT, _WHOLE, _WHOLE), _SPLIT)
    exchanged = Exchange(mesh, sharding.MODEL, *x_RD.shape, gathered=columns_RV.shape[1])
    for k in range(_EXCHANGES):
        parts_NRD = delayed(parts_NRD, jnp.ones((1024, 1024), jnp.bfloat16), busy_EN[k])
        x_RD, normed_RD = exchanged(parts_NRD, x_RD, scale_D, factor=1.0, eps=_EPS, dtype="float32")
        parts_NRD = normed_RD * _factors(mesh.size).astype(jnp.float32)
    whole = exchanged.gather(columns_RV)
    return x_RD, normed_RD, lax.with_sharding_constraint(whole, NamedSharding(mesh, _WHOLE))


def _factors(devices: int):
    return 0.3 * np.arange(1, devices + 1)[:, None, None]


def _expected(parts_NRD, x_RD, scale_D, columns_RV):
    for _ in range(_EXCHANGES):
        x_RD = x_RD + parts_NRD.sum(0)
        normed_RD = x_RD / np.sqrt(np.mean(x_RD**2, axis=-1, keepdims=True) + _EPS) * scale_D
        parts_NRD = normed_RD * _factors(len(parts_NRD))
    return x_RD, normed_RD, columns_RV


def error(mesh: Mesh, rows: int, width: int, repeats: int) -> float:
    """The largest relative Frobenius error of so many steps; infinite where devices differ."""
    rng, worst = np.random.default_rng(), 0.0
    step = jax.jit(functools.partial(_step, mesh))
    # As many as are gathered by the kernel, an uneven number of its CTAs'.
    columns = 4 * mesh.size * min(787, 2**17 // (rows * mesh.size))
    specs = _SPLIT, _WHOLE, _WHOLE, PartitionSpec(None, *_SPLIT)
    for _ in trange(repeats, desc=f"{rows} rows right?", file=sys.stderr):
        shapes = (mesh.size, rows, width), (rows, width), (width,), (rows, columns)
        arrays = [rng.standard_normal(shape, np.float32) for shape in shapes]
        busy_EN = rng.integers(0, 40, (_EXCHANGES, mesh.size)) * rng.integers(0, 2, (_EXCHANGES, 1))
        placed = [_put(x, mesh, spec) for x, spec in zip(arrays, specs, strict=True)]
        got = step(*placed, _put(busy_EN.astype(np.int32), mesh, _WHOLE))
        want = _expected(*(x.astype(np.float64) for x in arrays))
        for y, expected in zip(got, want, strict=True):
            first, *others = (np.asarray(shard.data) for shard in y.addressable_shards)
            if not all(np.array_equal(first, other) for other in others):
                return float("inf")
            # NaN is no small error.
            off = np.linalg.norm(first - expected) / np.linalg.norm(expected)
            worst = max(worst, float(np.nan_to_num(off, nan=np.inf)))
    return worst


def microseconds(mesh: Mesh, rows: int, width: int, how: str) -> float:
    """Of a pair of products, `width` to half of that and back, and what `how` says after it."""
    normal = functools.partial(jax.random.normal, dtype=jnp.bfloat16)
    shapes = (mesh.size, width, width // 2), (mesh.size, width // 2, width)
    draw = jax.jit(
        lambda key: [0.02 * normal(key, shape) for shape in shapes],
        out_shardings=NamedSharding(mesh, _SPLIT),
    )
    weights = [draw(jax.random.key(i, impl="unsafe_rbg")) for i in range(_PAIRS)]
    scale_D = _put(np.ones(width, np.float32), mesh, _WHOLE)

    def part(normed_RD, widen, narrow):
        y = jax.nn.silu(normed_RD @ widen[0])
        return jnp.dot(y, narrow[0], preferred_element_type=jnp.float32)[None]

    parts = _each(part, mesh, (_WHOLE, _SPLIT, _SPLIT), _SPLIT)
    summed = _each(lambda p: lax.psum(p[0], sharding.MODEL), mesh, _SPLIT, _WHOLE)
    alone = _each(lambda p: p[0], mesh, _SPLIT, _WHOLE)

    def norm(x_RD):
        wide = x_RD.astype(jnp.float32)
        return (wide * lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + _EPS) * scale_D).astype(
            x_RD.dtype
        )

    def step(x_RD, _):
        exchanged, normed_RD = Exchange(mesh, sharding.MODEL, rows, width), norm(x_RD)
        for pair in weights:
            part_NRD = parts(normed_RD, *pair)
            if how == "exchange":
                x_RD, normed_RD = exchanged(
                    part_NRD, x_RD, scale_D, factor=1.0, eps=_EPS, dtype=x_RD.dtype
                )
            else:
                total = (summed if how == "all-reduce" else alone)(part_NRD)
                x_RD = x_RD + total.astype(x_RD.dtype)
                normed_RD = norm(x_RD)
        return normed_RD, None

    chain = jax.jit(lambda x: lax.scan(step, x, None, length=_LOOPS)[0])
    x_RD = _put(normal(jax.random.key(0), (rows, width)), mesh, _WHOLE)
    return statistics.median(seconds(lambda: chain(x_RD), _TIMES)) / _LOOPS / _PAIRS * 1e6


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.exchange",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", default="8,128", help="of a step, commas between")
    parser.add_argument("--width", type=int, default=3072, help="of the model")
    parser.add_argument("--repeats", type=int, default=60, help="steps that are checked")
    parser.add_argument("--tiny", action="store_true", help="a few narrow rows: does it run?")
    flags = parser.parse_args(argv)
    if flags.tiny:
        flags.rows, flags.width, flags.repeats = "3", 256, 2
    mesh = make_mesh(tensor=len(jax.devices()))
    print(f"{mesh.size} x {jax.devices()[0].device_kind}, JAX {jax.__version__}", flush=True)
    right = True
    for rows in map(int, flags.rows.split(",")):
        if why := supports(mesh, sharding.MODEL, rows, flags.width):
            print(f"{rows} rows of {flags.width} in plain JAX: {why}")
        off = error(mesh, rows, flags.width, flags.repeats)
        right &= off < 1e-5
        print(f"{rows} rows of {flags.width}: largest error {off:.1e}", flush=True)
        alone = microseconds(mesh, rows, flags.width, "alone")
        for how in ("exchange", "all-reduce"):
            more = microseconds(mesh, rows, flags.width, how) - alone
            print(f"{rows} rows of {flags.width}: {how} {more:.1f} us of {more + alone:.1f}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
