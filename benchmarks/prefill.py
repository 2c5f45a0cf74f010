"""Times the prefill of whole prompts by the published 2.9B models, chunk by chunk.

    python -m benchmarks.prefill [--length=2048,16384,131072] [--over=blocks,cudnn]
                                 [--models=mlra_4,mla] [--mesh=tensor=2] [--chunk=2048] [--whole]
                                 [--output=FILE.json]

The programs are those that `generate` runs; weights and tokens are random, which does not change
the time. Each way of attending to the cache (`mlra_jax.attention.base.OVER`) is timed; `--whole`
adds the pass without chunks, as short prompts take it. The share is that of the matrix rate
measured in the same process, of the products of the whole-sequence form without what is masked.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from benchmarks import limits
from benchmarks.models import (
    bytes_per_device,
    model_config,
    parse_size,
    peak_gigabytes,
    random_tree,
)
from mlra_jax import sharding
from mlra_jax.attention import mechanism
from mlra_jax.attention.base import OVER
from mlra_jax.cache import round_capacity
from mlra_jax.costs import flops_per_token
from mlra_jax.decoder import Decoder, abstract_decoder
from mlra_jax.generation import programs

_RUNS = 3


def forward_flops(decoder: Decoder, batch: int, length: int) -> float:
    """Products and sums of one prefill, on all devices; logits of the last token only."""
    parameters = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(decoder.weights["layers"]))
    of_length = dataclasses.replace(decoder.config, context_length=length)
    return batch * length * flops_per_token(of_length, parameters) / 3


def prefill(
    decoder: Decoder, batch: int, length: int, chunk: int, over: str | None
) -> tuple[Callable[[], object], float, float]:
    """(a call that prefills once, seconds of compiling, GB that a device holds meanwhile).

    Without `over` it is the pass without chunks.
    """
    mesh = decoder.mesh
    capacity = round_capacity(length, mesh)
    shape = (batch, -(-length // chunk) * chunk)
    tokens = np.random.default_rng(0).integers(0, decoder.config.vocab_size, shape, np.int32)
    lengths = np.full(batch, length, np.int32)
    began = time.perf_counter()
    if over is None:
        prompt = tokens[:, :length]
        lowered = programs.prefill.lower(decoder, prompt, lengths, capacity=capacity)
        compiled = lowered.compile()
        once = lambda: compiled(decoder, prompt, lengths)
    else:
        lowered = programs.empty.lower(decoder, batch=batch, capacity=capacity)
        shapes, empty = lowered.out_info, lowered.compile()
        shapes = jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
            shapes,
            empty.output_shardings,
        )
        start = np.int32(0)
        compiled = programs.extend.lower(
            decoder, *shapes, tokens[:, :chunk], lengths, start, over=over
        ).compile()

        def once():
            state = empty(decoder)
            for start in range(0, length, chunk):
                part = tokens[:, start : start + chunk]
                state = compiled(decoder, *state, part, lengths, np.int32(start))
            return state[0]

    return once, time.perf_counter() - began, peak_gigabytes(compiled)


def default_over(decoder: Decoder) -> str:
    """The way to attend that `generate` takes on the decoder's devices."""
    attention = mechanism(decoder.config.attention)
    make = lambda: attention(decoder.config, mesh=decoder.mesh, rngs=nnx.Rngs(0))
    return nnx.eval_shape(make).extends_over()


def measure(row: dict, decoder: Decoder, over: str | None, matrix: float) -> None:
    """Fills a row of the table, whose line grows meanwhile, so that one sees what hangs.

    `matrix` is the rate of one device.
    """
    batch, length = row["batch"], row["length"]
    once, compiling, peak = prefill(decoder, batch, length, row["chunk"], over)
    row |= dict(
        compile_seconds=compiling,
        peak_GB=peak,
        weights_GB=bytes_per_device(decoder.weights) / 1e9,
    )
    print(f"  compile {compiling:5.1f} s {peak:6.2f} GB", end="", flush=True)
    jax.block_until_ready(once())
    seconds = []
    # A long one is not repeated: what differs from run to run is little beside it.
    while len(seconds) < _RUNS and sum(seconds) < 20:
        began = time.perf_counter()
        jax.block_until_ready(once())
        seconds.append(time.perf_counter() - began)
    median = statistics.median(seconds)
    flops = forward_flops(decoder, batch, length) / median / decoder.mesh.size
    row |= dict(
        seconds=median,
        spread=[min(seconds), max(seconds)],
        tokens_per_second=batch * length / median,
        flops=flops,
        share=flops / matrix,
    )
    print(
        f" {median:9.3f} s {row['tokens_per_second']:9.0f} tok/s "
        f"{flops / 1e12:7.1f} TFLOP/s ({row['share']:4.0%})",
        flush=True,
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prefill", description=__doc__)
    parser.add_argument("--length", default="2048,16384,131072", help="tokens, commas between")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--chunk", type=int, default=2048, help="tokens of a program")
    parser.add_argument("--over", default=",".join(OVER), help="ways to attend to the cache")
    parser.add_argument("--whole", action="store_true", help="also without chunks")
    parser.add_argument("--models", default="mlra_4,mla,gqa")
    parser.add_argument("--mesh", default="", help="as in tensor=2; several with ; between")
    parser.add_argument("--tiny", action="store_true", help="one narrow layer: does it run?")
    parser.add_argument("--output", type=Path, help="JSON, written after every point")
    flags = parser.parse_args(argv)
    device = jax.devices()[0]
    pool = limits.tiny_pool() if flags.tiny else limits.random_pool(0)
    matrix = limits.matrix_rate(pool, limits.launch_seconds())
    del pool
    print(f"{device.device_kind}, JAX {jax.__version__}, multiplies {matrix / 1e12:.0f} TFLOP/s")
    result = dict(device=device.device_kind, jax=jax.__version__, matrix=matrix, rows=[])
    ways = [None] * flags.whole + [over for over in flags.over.split(",") if over]
    for text in flags.mesh.split(";"):
        for name in flags.models.split(","):
            config = model_config(name, tiny=flags.tiny)
            decoder = random_tree(abstract_decoder(config, sharding.parse_mesh(text)))
            for length in map(parse_size, flags.length.split(",")):
                for over in ways:
                    row = dict(model=name, mesh=text, batch=flags.batch, length=length)
                    row |= dict(chunk=flags.chunk, over=over or "whole")
                    head = f"{name:8} {text or 'one device':12} {row['over']:7}"
                    print(f"{head}{flags.batch:3} x {length:8}", end="", flush=True)
                    try:
                        measure(row, decoder, over, matrix)
                    except Exception as error:  # One that does not run is no end of the others.
                        row["error"] = " ".join(str(error).split())[:300]
                        print(f"  {row['error'][:120]}", flush=True)
                    result["rows"].append(row)
                    if flags.output:
                        flags.output.write_text(json.dumps(result, indent=1) + "\n")
            del decoder
    return 0


if __name__ == "__main__":
    sys.exit(main())
