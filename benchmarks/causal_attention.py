"""Causal attention, forward and backward: errors beside float32, and times.

    python -m benchmarks.causal_attention [--over=cudnn,cudnn_grouped] [--batch=4] [--length=2048]
        [--heads=96] [--shared=4] [--widths=192,128] [--repeats=6]

Errors are relative, of the gradients of queries, keys and values, the worst of several runs on the
same fresh inputs; they are taken at `--length` of one row and at small sizes. The times are those
of the card warm and at work: many passes after each other. Sizes are those of the absorbed MLRA-4
where nothing else is said. The FLOP/s of the backward pass count the products of the causal half: 3
of the key's width, 2 of the value's. `tokamax` in `--over` is that library's own choice,
`tokamax:mosaic`, `tokamax:triton`, ... what it calls so.
"""

import argparse
import functools
import importlib.util
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mlra_jax.kernels.causal_attention import causal_attention, reference
from mlra_jax.kernels.causal_attention.api import implementation_for

_BOUND = 4e-3


def inputs(batch: int, length: int, heads: int, shared: int, widths: tuple[int, int]):
    """Fresh queries, keys, values and the gradient of the result, bfloat16."""
    keys, values = widths
    shapes = (heads, keys), (shared, keys), (shared, values), (heads, values)
    seeds = jax.random.split(jax.random.key(np.random.SeedSequence().entropy % 2**63), 4)
    draw = lambda seed, shape: jax.random.normal(seed, (batch, length, *shape), jnp.bfloat16)
    return [draw(seed, shape) for seed, shape in zip(seeds, shapes, strict=True)]


def attention(over: str, width: int) -> Callable:
    """Of queries, keys and values, by one of `causal_attention`'s implementations or tokamax."""
    library, _, implementation = over.partition(":")
    if library != "tokamax":
        return functools.partial(causal_attention, scale=width**-0.5, implementation=over)
    import tokamax

    how = dict(scale=width**-0.5, is_causal=True, implementation=implementation or None)
    return functools.partial(tokamax.dot_product_attention, **how)


def gradients(attend: Callable, q, k, v, do):
    return jax.vjp(attend, q, k, v)[1](do)


def errors(over: str, repeats: int, *sizes) -> list[float]:
    """The worst relative errors of the three gradients."""
    q, k, v, do = inputs(*sizes)
    wide = [x.astype(jnp.float32) for x in (q, k, v, do)]
    exact = functools.partial(reference.causal_attention, scale=q.shape[-1] ** -0.5)
    wanted = jax.jit(functools.partial(gradients, exact))(*wide)
    back = jax.jit(functools.partial(gradients, attention(over, q.shape[-1])))
    norm = lambda x: float(jnp.linalg.norm(x.astype(jnp.float32).ravel()))
    runs = [back(q, k, v, do) for _ in range(repeats)]
    return [
        max(norm(run[i].astype(jnp.float32) - want) for run in runs) / norm(want)
        for i, want in enumerate(wanted)
    ]


def milliseconds(call, *arguments, passes: int) -> float:
    """Of one call, many after each other."""
    jax.block_until_ready(call(*arguments))
    began = time.perf_counter()
    results = [call(*arguments) for _ in range(passes)][-1]
    jax.block_until_ready(results)
    return 1e3 * (time.perf_counter() - began) / passes


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.causal_attention",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--over", help="implementations, commas between; default: auto's, and cuDNN's own"
    )
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048, help="tokens")
    parser.add_argument("--heads", type=int, default=96, help="of queries")
    parser.add_argument("--shared", type=int, default=4, help="heads of keys and values")
    parser.add_argument("--widths", default="192,128", help="of keys and of values")
    parser.add_argument("--repeats", type=int, default=6, help="runs on the same inputs")
    parser.add_argument("--tiny", action="store_true", help="a few short rows: does it run?")
    flags = parser.parse_args(argv)
    if "tokamax" in (flags.over or "") and not importlib.util.find_spec("tokamax"):
        parser.exit(2, f"{parser.prog}: --over={flags.over} needs tokamax: pip install tokamax\n")
    keys, values = widths = tuple(map(int, flags.widths.split(",")))
    small = [(3, 128, 24, 4), (1, 384, 12, 2), (5, 256, 6, 3), (1, 256, 4, 1)]
    if flags.tiny:
        flags.batch, flags.length, flags.heads, flags.shared, flags.repeats = 1, 128, 4, 2, 2
        small = [(2, 128, 2, 1)]
    sizes = flags.batch, flags.length, flags.heads, flags.shared
    arrays = inputs(*sizes, widths)
    auto = implementation_for(jax.devices()[0], *arrays[:3])
    ways = flags.over.split(",") if flags.over else sorted({auto, auto.removesuffix("_grouped")})
    right = True
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}", flush=True)
    for over in ways:
        group = flags.heads // flags.shared
        for checked in [*small, (1, flags.length, group, 1)]:
            found = errors(over, flags.repeats, *checked, widths)
            right &= max(found) < _BOUND
            said = ", ".join(f"{x:.2e}" for x in found)
            print(f"{over}, {checked}: errors of dq, dk, dv {said}", flush=True)
    work = flags.batch * flags.heads * flags.length**2 * (3 * keys + 2 * values)
    for over in ways:
        attend = attention(over, keys)
        passes = 2 if flags.tiny else 60
        forward = milliseconds(jax.jit(attend), *arrays[:3], passes=passes)
        both = milliseconds(jax.jit(functools.partial(gradients, attend)), *arrays, passes=passes)
        backward = both - forward
        said = f"forward {forward:.3f} ms, backward {backward:.3f} ms"
        print(f"{over}, {sizes}: {said}, {work / backward / 1e9:.0f} TFLOP/s", flush=True)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
