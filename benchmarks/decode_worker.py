"""One process of `python -m benchmarks.decode`: one model on one mesh, or one device's share.

It is started with a `Part` as JSON, compiles the steps of all points, says so, and waits for a line
on stdin, its turn: then nothing else runs on its devices, and it measures one point after the
other. Until then it holds next to nothing of their memory, and everything is free when it has
ended. Each message is one line of JSON on stdout: `{"compiled": ...}` for each program,
`{"ready": ...}`, `{"row": ...}` for each point.
"""

import dataclasses
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import limits
from benchmarks.models import (
    bytes_per_device,
    compile_random,
    model_config,
    peak_gigabytes,
    positions_of,
    random_tree,
    require_fit,
)
from benchmarks.prefill import default_over, prefill
from benchmarks.profile import profile
from benchmarks.timing import compile_all
from mlra_jax import sharding
from mlra_jax.cache import Cache, round_capacity
from mlra_jax.command import claim_gpu_memory, say
from mlra_jax.decoder import Decoder, abstract_cache, abstract_decoder
from mlra_jax.generation import Sampling, programs
from mlra_jax.generation.sampling import draws

_STEPS, _RUNS, _CHUNK = 32, 5, 2048
# Tracing is Python's: one thread after the other, so that the first programs are at the compiler
# while the next are traced.
_TRACING = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Part:
    """What one process measures."""

    model: str
    mesh: str
    """As in `tensor=4`; empty for one device."""
    share: str
    """As in `4` or `4x2`: one device's share of so many ways instead."""
    points: list[tuple[int, int, int]]
    """(batch, context, tokens of a program)."""
    profiled: list[tuple[int, int]]
    """(batch, context) of which kernels are wanted."""
    first_token: bool = False
    tiny: bool = False

    def row(self, point: tuple[int, int, int]) -> dict:
        """What a row of the table says of a point before it is measured."""
        batch, context, per_call = point
        row = dict(model=self.model, mesh=self.mesh, share=self.share, batch=batch)
        return row | dict(context=context, tokens_per_call=per_call)


@dataclasses.dataclass(frozen=True)
class Step:
    """A compiled program of `per_call` steps at a point."""

    program: Any
    shapes: Cache
    context: int
    """Positions that this mesh keeps."""
    per_call: int
    compile_seconds: float

    @property
    def steps(self) -> int:
        """Of a run: at least 32, in whole programs."""
        return _steps(self.per_call)


def _steps(per_call: int) -> int:
    return -(-_STEPS // per_call) * per_call


def compile_step(decoder: Decoder, batch: int, context: int, per_call: int) -> Step:
    """The step of a decoder of shapes; raises MemoryError where it does not fit."""
    config, mesh = decoder.config, decoder.mesh
    # The caches fill up around the context, which is their mean.
    capacity = round_capacity(context + _RUNS * _steps(per_call), mesh)
    shapes = abstract_cache(config, mesh, batch, capacity)
    require_fit((bytes_per_device(decoder.weights) + bytes_per_device(shapes.layers)) / 1e9)
    compile_random(shapes.layers)
    tokens = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=sharding.named(mesh))
    with _TRACING:
        began = time.perf_counter()
        if per_call == 1:
            lowered = programs.step.lower(decoder, shapes, tokens)
        else:
            given = draws(Sampling(), 0, batch), np.int32(0)
            several = dict(count=per_call, num_tokens=decoder.vocabulary.num_tokens)
            lowered = programs.several.lower(decoder, shapes, tokens, *given, **several)
    program = lowered.compile()
    seconds = time.perf_counter() - began
    require_fit(peak_gigabytes(program))
    return Step(program, shapes, context, per_call, seconds)


def measure(decoder: Decoder, step: Step, read: float, profiled: bool) -> dict:
    """One point: time of a token and its floor at `read` bytes a second; its kernels, if asked."""
    shapes, steps, mesh = step.shapes, step.steps, decoder.mesh
    batch = len(shapes.lengths)
    settings, num_tokens = draws(Sampling(), 0, batch), decoder.vocabulary.num_tokens
    tokens = jax.device_put(np.arange(batch, dtype=np.int32), sharding.named(mesh))
    begin = max(step.context - _RUNS * steps // 2, 0)
    lengths = jax.device_put(np.full(batch, begin, np.int32), shapes.lengths.sharding)
    cache = Cache(random_tree(shapes.layers), lengths)

    def run(count=steps):
        nonlocal cache, tokens
        for n in range(0, count, step.per_call):
            if step.per_call == 1:
                logits, cache = step.program(decoder, cache, tokens)
                tokens = programs.draw(logits, tokens, settings, np.int32(n), num_tokens=num_tokens)
            else:
                _, tokens, cache = step.program(decoder, cache, tokens, settings, np.int32(n))
        return tokens

    # As `generate` does, the next tokens are asked for before these are there.
    asked, ended = run(4), []
    for _ in range(_RUNS + 1):
        following = run()
        jax.block_until_ready(asked)
        ended.append(time.perf_counter())
        asked = following
    jax.block_until_ready(asked)
    seconds = np.diff(ended) / steps
    share = step.context / shapes.capacity
    held = bytes_per_device(decoder.weights) + share * bytes_per_device(shapes.layers)
    milliseconds = 1e3 * float(np.median(seconds))
    row = dict(
        milliseconds=milliseconds,
        spread=[1e3 * float(seconds.min()), 1e3 * float(seconds.max())],
        floor=1e3 * held / read,
        ratio=milliseconds * read / held / 1e3,
        read=read,
        tokens_per_second=batch / milliseconds * 1e3,
        compile_seconds=step.compile_seconds,
        peak_GB=peak_gigabytes(step.program),
    )
    if profiled:
        found = profile(lambda: run(step.per_call))
        row["kernels"] = sum(k.launches for k in found.kernels) / step.per_call
        row["graphs"] = found.graphs / step.per_call / mesh.size
        row["busy_milliseconds"] = found.milliseconds / step.per_call
        row["exchanging"] = found.exchanging
        row["longest"] = [dataclasses.astuple(k) for k in found.kernels[:24]]
    return row


def first_token(decoder: Decoder, batch: int, context: int) -> dict:
    """Seconds of prefilling so many tokens, compiled before, and of compiling that."""
    over = None if context <= _CHUNK else default_over(decoder)
    once, compiling, _ = prefill(decoder, batch, context, _CHUNK, over)
    jax.block_until_ready(once())
    began = time.perf_counter()
    jax.block_until_ready(once())
    return dict(first_token_seconds=time.perf_counter() - began, prefill_compile_seconds=compiling)


def work(part: Part, tell: Callable[[dict], None], turn: Callable[[], object]) -> None:
    """Compiles, calls `turn`, which comes back when it is this process's, and measures.

    Where it gives nothing, as the end of stdin does, nobody waits for rows any more.
    """
    config = model_config(part.model, part.share, part.tiny)
    shapes = abstract_decoder(config, sharding.parse_mesh(part.mesh))
    where = sharding.named(sharding.make_mesh())
    pool_shape = limits.tiny_pool().shape if part.tiny else limits.pool_shape()
    pool_shape = jax.ShapeDtypeStruct(pool_shape, jnp.bfloat16, sharding=where)

    def step_of(point):
        batch, context, per_call = point
        try:
            return compile_step(shapes, batch, positions_of(part.share, context), per_call)
        finally:
            tell(dict(compiled=point))

    compiled = compile_all(
        {point: lambda point=point: step_of(point) for point in part.points}
        | {"weights": lambda: compile_random((shapes, pool_shape))}
        | {"readers": lambda: limits.readers(pool_shape)}
    )
    tell(dict(ready=dict(device=jax.devices()[0].device_kind, jax=jax.__version__)))
    if not turn():
        return
    began = time.perf_counter()
    steps = {point: compiled[point] for point in part.points}
    for point, error in steps.items():
        if isinstance(error, str):
            tell(dict(row=part.row(point) | dict(error=error)))
    steps = {point: step for point, step in steps.items() if isinstance(step, Step)}
    if not steps:
        return
    pool = random_tree(pool_shape)
    ways = compiled["readers"] if isinstance(compiled["readers"], dict) else None
    read = limits.read_bandwidth(pool, limits.launch_seconds(), ways)["read"]
    del pool
    decoder = random_tree(shapes)
    # The largest first: smaller caches find room in what it leaves to the allocator.
    for point in sorted(steps, key=lambda point: -peak_gigabytes(steps[point].program)):
        row, step = part.row(point), steps.pop(point)
        try:
            row |= measure(decoder, step, read, point[:2] in part.profiled)
            if part.first_token:
                row |= first_token(decoder, point[0], step.context)
        except Exception as error:  # One that does not run is no end of the others.
            row["error"] = " ".join(str(error).split())[:300]
        tell(dict(row=row | dict(turn_seconds=time.perf_counter() - began)))


def main() -> int:
    # What libraries print is no message.
    messages = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    given = json.loads(sys.argv[1])
    for name in ("points", "profiled"):
        given[name] = [tuple(point) for point in given[name]]
    # Others that wait hold none either.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    claim_gpu_memory(0.93)
    work(Part(**given), lambda message: say(json.dumps(message), messages), sys.stdin.readline)
    # The next one waits for the memory, and there is nothing to save.
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
