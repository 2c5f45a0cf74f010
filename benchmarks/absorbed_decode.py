"""Checks and times absorbed decode on one Hopper GPU, beside what the chip can do.

    python -m benchmarks.absorbed_decode                 checks, times, table, JSON, two figures
    python -m benchmarks.absorbed_decode --quick         correctness only, small sizes

A point is timed as a jitted loop whose step feeds its output to the next step as queries, over as
many different caches as it takes to outgrow the L2 cache. Loops run for a few milliseconds with a
pause between them, so that the power limit does not decide the result; the median counts, and the
time of starting an empty loop is subtracted. The limits are measured in the same process.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import importlib.util
import json
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from tqdm import tqdm

from mlra_jax.kernels.absorbed_decode import reference
from mlra_jax.kernels.absorbed_decode.problem import Problem

_K = 1024
_TOLERANCE = 5e-3
_BEYOND_L2 = 400e6  # Bytes of cache that a loop goes through before it comes to the first again.
_BURST = 8e-3  # Seconds.
_GIGABYTES = 4
_CUT = 132 * 64 * 4096


@dataclasses.dataclass(frozen=True)
class Point:
    """One row of the table: `heads` per latent, `cache` positions per row of the batch."""

    group: str
    name: str
    cache: int
    batch: int = 1
    queries: int = 1
    latents: int = 1
    heads: int = 64
    groups: int = 1
    width: int = 128
    rope: int = 64
    ragged: bool = False
    dtype: str = "bfloat16"

    @property
    def grouped(self) -> bool:
        """Grouped-query attention on the same kernel: queries meet only the rotary keys."""
        return self.name.startswith("GQA")

    def ends(self) -> np.ndarray:
        """The cache length of every row."""
        if not self.ragged:
            return np.full([self.batch], self.cache)
        # From nothing to full, in an order that puts short beside long.
        ends = np.linspace(0, self.cache, self.batch).astype(int)
        return ends[np.random.default_rng(0).permutation(self.batch)]

    def bytes(self) -> int:
        """Bytes of cache that the queries see, read once."""
        return int(self.ends().sum()) * (self.latents * self.width + self.rope) * 2

    def problem(self, device_kind: str) -> Problem:
        fields = {f.name for f in dataclasses.fields(Problem)}
        own = {k: v for k, v in dataclasses.asdict(self).items() if k in fields}
        return Problem(device_kind=device_kind, **own)


def paper_points() -> list[Point]:
    shares = {
        "MLRA-4 4-way": dict(width=128),
        "MLA": dict(width=512),
        "GLA-2 2-way": dict(width=256, heads=32),
        "GQA 8-way": dict(width=128, rope=128, heads=8),
    }
    caches = [128 * _K, 256 * _K, 512 * _K, 1024 * _K, 2048 * _K]
    return [Point("paper", name, c, **size) for name, size in shares.items() for c in caches]


def model_points() -> list[Point]:
    points = []
    for batch, caches in (
        (1, (2 * _K, 16 * _K, 128 * _K)),
        (8, (2 * _K, 16 * _K, 128 * _K)),
        (64, (2 * _K, 4 * _K, 16 * _K)),
        (128, (2 * _K, 4 * _K)),
    ):
        for cache in caches:
            for latents in (1, 2, 4):
                points.append(
                    Point("24 heads", f"L={latents}", cache, batch, latents=latents, heads=24)
                )
    return points


def other_points() -> list[Point]:
    sizes = dict(batch=64, cache=4 * _K)
    return [
        Point("queries", "64 heads T=1", 2 * _K),
        Point("queries", "24 heads T=2", 128 * _K, queries=2, heads=24),
        Point("queries", "24 heads T=4", 128 * _K, queries=4, heads=24),
        Point("queries", "64 heads T=2", 128 * _K, queries=2),
        Point("queries", "64 heads T=4", 128 * _K, queries=4),
        Point("ragged", "24 heads L=1", **sizes, heads=24, ragged=True),
        Point("ragged", "24 heads L=4", **sizes, heads=24, latents=4, ragged=True),
        Point("ragged", "MLA 24 heads", **sizes, heads=24, width=512, ragged=True),
        Point("ragged", "12 heads G=2 T=2", 5000, 37, 2, 4, 12, 2, ragged=True),
    ]


def quick_points() -> list[Point]:
    return [
        Point("quick", "MLRA-4 4-way", 5000),
        Point("quick", "MLA", 5000, width=512),
        Point("quick", "GLA-2 2-way", 5000, heads=32, width=256),
        Point("quick", "GQA 8-way", 5000, heads=8, rope=128),
        Point("quick", "24 heads L=4", 1000, 8, latents=4, heads=24, ragged=True),
        Point("quick", "12 heads G=2 T=4", 1000, 5, 4, 4, 12, 2, ragged=True),
        Point("quick", "128 heads", 1000, 2, heads=128, ragged=True),
        Point("quick", "1 head, float16", 1000, 3, heads=1, ragged=True, dtype="float16"),
        Point("quick", "MLA T=2", 1000, 3, 2, heads=24, width=512, ragged=True),
    ]


def bounds(point: Point) -> tuple[jax.Array, jax.Array]:
    """Ends per query (the last sees the whole row) and starts; ragged rows are left-padded."""
    ends = point.ends()
    lengths = np.clip(ends[:, None] - np.arange(point.queries)[::-1], 0, None)
    starts = np.minimum(np.arange(point.batch) % 7, ends) if point.ragged else 0 * ends
    return jnp.asarray(lengths, jnp.int32), jnp.asarray(starts, jnp.int32)


def caches_of(point: Point) -> int:
    stored = point.batch * point.cache * (point.latents * point.width + point.rope) * 2
    return int(np.clip(np.ceil(_BEYOND_L2 / stored), 1, 16))


def shapes(point: Point):
    B, T, L, H, S = point.batch, point.queries, point.latents, point.heads, point.cache
    q = [(B, T, L, H, point.width), (B, T, point.groups, H, point.rope)]
    return q, [(B, S, L, point.width), (B, S, point.rope)]


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _cut(pool, first, shape, dtype):
    flat = lax.dynamic_slice_in_dim(pool, first, int(np.prod(shape)))
    return flat.reshape(shape).astype(dtype)


def draw(point: Point, pool: jax.Array):
    """Queries and caches from a pool of random numbers, every array from another place of it."""
    places = np.random.default_rng()

    def take(shape):
        most = pool.size - int(np.prod(shape))
        return _cut(pool, int(places.integers(0, most, endpoint=True)), shape, point.dtype)

    q_shapes, c_shapes = shapes(point)
    q, q_rope = map(take, q_shapes)
    if point.grouped:
        q = jnp.zeros_like(q)
    return q, q_rope, [tuple(map(take, c_shapes)) for _ in range(caches_of(point))]


def scale_of(point: Point) -> float:
    return (point.rope if point.grouped else point.width + point.rope) ** -0.5


def looped(op, steps: int):
    """op's result for the first cache, and what a loop over all caches makes of its queries."""
    op = jax.jit(op)

    def run(q, q_rope, caches, lengths, starts):
        first = op(q, q_rope, *caches[0], lengths, starts)

        def step(_, q):
            for cache in caches:
                q = op(q, q_rope, *cache, lengths, starts)[0]
            return q

        return first, lax.fori_loop(0, steps, step, first[0])

    return run


def exact(q, q_rope, latents, k_rope, lengths, starts, *, scale):
    """Float32 attention, one block of the cache at a time: nothing in common with the kernels."""
    B, T, L, H, _ = q.shape
    G, S, block = q_rope.shape[2], latents.shape[1], 1000 if latents.shape[1] % 2048 else 2048
    wide = lambda x: x.astype(jnp.float32)
    einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)

    def step(carry, first):
        top, total, acc = carry
        c = wide(lax.dynamic_slice_in_dim(latents, first, block, axis=1))
        r = wide(lax.dynamic_slice_in_dim(k_rope, first, block, axis=1))
        s = einsum("btlhc,bslc->btlhs", wide(q), c).reshape(B, T, L // G, G, H, block)
        s = s + einsum("btghr,bsr->btghs", wide(q_rope), r)[:, :, None]
        position = first + jnp.arange(block)
        seen = (position >= starts[:, None, None]) & (position < lengths[..., None])
        s = s.reshape(B, T, L, H, block) * scale
        s = jnp.where(seen[:, :, None, None], s, -jnp.inf)
        new_top = jnp.maximum(top, s.max(-1))
        finite = jnp.where(jnp.isfinite(new_top), new_top, 0)
        p = jnp.exp(s - finite[..., None])
        fade = jnp.exp(top - finite)
        acc = acc * fade[..., None] + einsum("btlhs,bslc->btlhc", p, c)
        return (new_top, total * fade + p.sum(-1), acc), None

    top = jnp.full(q.shape[:-1], -jnp.inf, jnp.float32)
    carry = (top, jnp.zeros_like(top), jnp.zeros(q.shape, jnp.float32))
    (top, total, acc), _ = lax.scan(step, carry, jnp.arange(0, S, block))
    return acc / jnp.where(total == 0, 1, total)[..., None], top + jnp.log(total)


def poison() -> None:
    """Leaves NaN in the memory that the next outputs will be given."""
    jax.block_until_ready(jnp.full([1 << 28], jnp.nan, jnp.float32))


def error_of(result, truth) -> float:
    """Relative Frobenius error of the outputs; infinite where finiteness of the LSE differs."""
    (out, lse), (true_out, true_lse) = result, truth
    true_out = true_out.astype(jnp.float32)
    error = jnp.linalg.norm((out.astype(jnp.float32) - true_out).ravel())
    seen = jnp.isfinite(true_lse)
    lse_error = jnp.where(seen, jnp.abs(lse - true_lse), 0).max()
    agree = (jnp.isfinite(lse) == seen).all() & (lse_error < 1e-2)
    return float(jnp.where(agree, error / jnp.linalg.norm(true_out.ravel()), jnp.inf))


def seconds(call, repeats: int) -> list[float]:
    """Host-clock times of `repeats` calls with a pause before each."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        time.sleep(4e-3)
        begin = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - begin)
    return times


def streaming_sum(x: jax.Array) -> jax.Array:
    """Sum over the rows of bfloat16 [N, 128] with the same copies as the decode kernel, no more."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    ctas, rows, stages = 132, 64, 12
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


def limits(pool: jax.Array) -> dict[str, float]:
    """Bytes per second read and copied, FLOP per second of a matrix product, empty loop's time."""
    readers = {
        "XLA, maximum": jnp.max,
        "XLA, row sums": lambda x: jnp.sum(x.reshape(-1, 4096), axis=1, dtype=jnp.float32),
        "TMA, column sums": lambda x: streaming_sum(x.reshape(-1, 128)),
    }
    small = jnp.ones([64, 128], jnp.bfloat16)
    empty = jax.jit(lambda q: lax.fori_loop(0, 2, lambda _, q: q * jnp.bfloat16(0.5), q))
    found = dict(start=statistics.median(seconds(lambda: empty(small), 30)))

    def pace(function, x):
        # Ten calls queued at once, so that starting them hides behind the one that runs.
        function = jax.jit(function)
        times = seconds(lambda: [function(x) for _ in range(10)], 10)
        return statistics.median((t - found["start"]) / 10 for t in times)

    for name, reader in readers.items():
        found[f"read ({name})"] = pool.nbytes / pace(reader, pool)
    found["read"] = max(v for name, v in found.items() if name.startswith("read"))
    found["copy"] = 2 * pool.nbytes / pace(lambda x: x + jnp.bfloat16(1), pool)
    square = lax.slice(pool, [0], [8192 * 8192]).reshape(8192, 8192)
    found["matrix"] = 2 * 8192**3 / pace(lambda a: a @ a.T, square)
    return found


def attention_by_library(point: Point, library: str):
    """GQA's share by a library: "cudnn" and "xla" of jax.nn, or tokamax's own choice."""
    if library == "tokamax":
        import tokamax

        attention = tokamax.dot_product_attention
    else:
        attention = functools.partial(jax.nn.dot_product_attention, implementation=library)

    def op(q, q_rope, latents, k_rope, lengths, starts):
        del q, lengths, starts  # The whole cache is visible at these points.
        queries = q_rope[:, :, 0]
        out = attention(queries, k_rope[:, :, None], latents)  # The latents are the values.
        # The loop feeds the first result on; the second keeps the op's signature.
        return out[:, :, None], jnp.zeros(out.shape[:-1], jnp.float32)[:, :, None]

    def chained(q, q_rope, *rest):
        # The next step's queries must depend on this step's output, or the loop is empty.
        return op(q, q_rope + q * q_rope.dtype.type(1e-9), *rest)

    return chained


def kernel_op(point: Point, device_kind: str):
    from mlra_jax.kernels.absorbed_decode import mosaic_gpu

    problem = point.problem(device_kind)
    reason = mosaic_gpu.supports(problem)
    if reason:
        raise ValueError(f"{point}: {reason}")
    config = mosaic_gpu.heuristic(problem)
    op = functools.partial(mosaic_gpu.absorbed_decode, scale=scale_of(point), config=config)
    if not point.grouped:
        return op

    def grouped(q, q_rope, latents, k_rope, lengths, starts):
        out, lse = op(
            jnp.zeros_like(q), q_rope + q * q.dtype.type(1e-9), latents, k_rope, lengths, starts
        )
        return out, lse

    return grouped


def compile_all(jobs: dict, workers: int) -> dict:
    """Compiles {(point, name): function} side by side; a failure becomes its first line."""

    def build(key, function):
        point, name = key
        q_shapes, c_shapes = shapes(point)
        struct = lambda shape: jax.ShapeDtypeStruct(shape, point.dtype)
        caches = [tuple(map(struct, c_shapes))] * caches_of(point)
        lengths = jax.ShapeDtypeStruct((point.batch, point.queries), jnp.int32)
        starts = jax.ShapeDtypeStruct((point.batch,), jnp.int32)
        if name == "exact":  # Only its numbers matter, so no time goes into choosing products.
            args = (*map(struct, q_shapes), *caches[0], lengths, starts)
            return jax.jit(function).lower(*args).compile({"xla_gpu_autotune_level": 0})
        args = (*map(struct, q_shapes), caches, lengths, starts)
        return jax.jit(function).lower(*args).compile()

    done = {}
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(build, *job): job[0] for job in jobs.items()}
        waiting = concurrent.futures.as_completed(futures)
        for future in tqdm(waiting, total=len(futures), desc="compile", file=sys.stderr):
            try:
                done[futures[future]] = future.result()
            except Exception as error:  # Compilers raise many types; the table says which row.
                done[futures[future]] = str(error).strip().split("\n")[0][:200]
    return done


def steps_for(point: Point, limit: dict, slower: float) -> int:
    """Loop steps that take about one burst, if an op is `slower` times slower than it could be."""
    expected = slower * (point.bytes() / limit["read"] + 8e-6)
    return max(1, round(_BURST / (expected * caches_of(point))))


def programs(point: Point, limit: dict, kind: str, quick: bool) -> dict:
    """{name: (function, loop steps)} of what is compiled for a point."""
    scale = scale_of(point)
    found = dict(kernel=(kernel_op(point, kind), 0 if quick else steps_for(point, limit, 1)))
    if not quick and point.grouped:
        libraries = ["cudnn", "xla"]
        if importlib.util.find_spec("tokamax"):
            libraries.append("tokamax")
        for name in libraries:
            found[name] = attention_by_library(point, name), steps_for(point, limit, 4)
    elif not quick and point.group == "paper" and point.cache in (128 * _K, 1024 * _K):
        op = functools.partial(reference.absorbed_decode, scale=scale)
        found["xla"] = op, steps_for(point, limit, 8)
    found = {name: (looped(op, steps), steps) for name, (op, steps) in found.items()}
    return found | dict(exact=(functools.partial(exact, scale=scale), 0))


def measure_point(point: Point, limit: dict, pool: jax.Array, runs: dict, quick: bool) -> dict:
    """Checks and times one point; `runs` has its compiled programs with their loop steps."""
    row = dataclasses.asdict(point) | dict(bytes=point.bytes())
    row["floor_us"] = point.bytes() / limit["read"] * 1e6
    failed = {name: run for name, (run, _) in runs.items() if isinstance(run, str)}
    row |= {f"{name}_failed": reason for name, reason in failed.items()}
    if "kernel" in failed or "exact" in failed:
        return row
    q, q_rope, caches = draw(point, pool)
    rest = bounds(point)
    poison()
    result, _ = jax.block_until_ready(runs["kernel"][0](q, q_rope, caches, *rest))
    row["error"] = error_of(result, runs["exact"][0](q, q_rope, *caches[0], *rest))
    for name, (run, steps) in runs.items():
        if quick or name == "exact" or name in failed:
            continue
        call = lambda run=run: run(q, q_rope, caches, *rest)[1]
        times = seconds(call, 9 if name == "kernel" else 3)
        per_op = sorted((t - limit["start"]) / (steps * len(caches) + 1) for t in times)
        row[f"{name}_us"] = statistics.median(per_op) * 1e6
        row[f"{name}_spread_us"] = [per_op[0] * 1e6, per_op[-1] * 1e6]
    if not quick:
        row["fraction"] = row["floor_us"] / row["kernel_us"]
    return row


def measure(points: list[Point], limit: dict, pool: jax.Array, quick: bool) -> list[dict]:
    kind = jax.devices()[0].device_kind
    wanted = {point: programs(point, limit, kind, quick) for point in points}
    jobs = {(point, name): f for point in points for name, (f, _) in wanted[point].items()}
    compiled = compile_all(jobs, workers=16)
    rows = []
    for point in tqdm(points, desc="measure", file=sys.stderr):
        runs = {name: (compiled[point, name], n) for name, (_, n) in wanted[point].items()}
        rows.append(measure_point(point, limit, pool, runs, quick))
    return rows


def failure_of(row: dict) -> str:
    return row.get("kernel_failed") or row.get("exact_failed") or f"error {row['error']:.1e}"


def table(rows: list[dict]) -> str:
    lines = [
        f"{'group':9} {'point':18} {'batch':>5} {'context':>8} {'MB':>8} {'floor':>7} "
        f"{'kernel':>7} {'of floor':>8} {'TB/s':>5} {'XLA':>8} {'cuDNN':>7} {'tokamax':>7} "
        f"{'error':>8}"
    ]
    for row in rows:
        head = f"{row['group']:9} {row['name']:18} {row['batch']:5} {row['cache']:8} "
        if "error" not in row:
            lines.append(head + "failed: " + failure_of(row))
            continue
        number = lambda key, form, row=row: format(row[key], form) if key in row else "-"
        rate = row["bytes"] / row["kernel_us"] / 1e6 if "kernel_us" in row else 0
        lines.append(
            head + f"{row['bytes'] / 1e6:8.1f} {row['floor_us']:7.1f} "
            f"{number('kernel_us', '.1f'):>7} {number('fraction', '.0%'):>8} {rate:5.2f} "
            f"{number('xla_us', '.1f'):>8} {number('cudnn_us', '.1f'):>7} "
            f"{number('tokamax_us', '.1f'):>7} {row['error']:8.1e}"
        )
    return "\n".join(lines)


def targets(rows: list[dict], limit: dict) -> list[str]:
    """What issue and paper ask for, each with what was measured."""
    by = {(r["name"], r["cache"]): r for r in rows if r["group"] == "paper" and "kernel_us" in r}
    lines = []
    for (name, cache), row in by.items():
        if name in ("MLRA-4 4-way", "MLA"):
            most = row["bytes"] / (0.85 * limit["read"]) * 1e6 + 6
            verdict = "met" if row["kernel_us"] <= most else "missed"
            lines.append(
                f"{name} {cache // _K}K: {row['kernel_us']:.1f} of {most:.1f} us: {verdict}"
            )
    for cache in sorted({c for _, c in by}):
        ours = by.get(("MLRA-4 4-way", cache))
        for other in ("MLA", "GQA 8-way"):
            if ours and (other, cache) in by:
                ratio = by[other, cache]["kernel_us"] / ours["kernel_us"]
                lines.append(f"{other} / MLRA-4 at {cache // _K}K: {ratio:.2f}")
    for row in rows:
        if row["group"] == "queries" and row["cache"] == 2 * _K:
            verdict = "met" if row["kernel_us"] <= 9 else "missed"
            lines.append(f"2K, batch 1: {row['kernel_us']:.1f} of 9 us: {verdict}")
        if row["batch"] == 64 and row["cache"] == 4 * _K and row["group"] == "24 heads":
            verdict = "met" if row["fraction"] >= 0.8 else "missed"
            lines.append(f"batch 64 x 4K {row['name']}: {row['fraction']:.0%} of 80%: {verdict}")
    return lines


def figures(rows: list[dict], limit: dict, folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in rows if r["group"] == "paper" and "kernel_us" in r]
    names = list(dict.fromkeys(r["name"] for r in rows))
    for kind in ("time", "bandwidth"):
        figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
        for i, name in enumerate(names):
            mine = [r for r in rows if r["name"] == name]
            x = [r["cache"] / _K for r in mine]
            if kind == "time":
                axes.plot(x, [r["kernel_us"] for r in mine], f"C{i}o-", label=name)
                axes.plot(x, [r["floor_us"] for r in mine], f"C{i}:", linewidth=1)
            else:
                y = [r["bytes"] / r["kernel_us"] / 1e6 for r in mine]
                axes.plot(x, y, f"C{i}o-", label=name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(x, [f"{int(v)}K" if v < _K else f"{int(v) // _K}M" for v in x])
        axes.set_xlabel("context (tokens)")
        if kind == "time":
            axes.set_yscale("log")
            axes.set_ylabel("time per call (µs); dotted: bytes / read bandwidth")
        else:
            axes.axhline(limit["read"] / 1e12, color="gray", linestyle=":", label="read bandwidth")
            axes.set_ylim(0)
            axes.set_ylabel("cache read (TB/s)")
        axes.set_title("Absorbed decode, batch 1, one query token, one device's share")
        axes.legend()
        figure.savefig(folder / f"absorbed_decode_{kind}.png", dpi=110)
        plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", default="benchmarks/results", help="folder for JSON, figures")
    parser.add_argument("--quick", action="store_true", help="correctness only")
    parser.add_argument(
        "--only", help="only points whose group or name contains one of these, with commas between"
    )
    options = parser.parse_args(argv)
    device = jax.devices()[0]
    if device.platform != "gpu" or str(getattr(device, "compute_capability", "")) != "9.0":
        message = f"absorbed_decode: this benchmark needs a Hopper GPU, found {device.device_kind}"
        print(message, file=sys.stderr)
        return 1

    seed = time.time_ns() % 2**31
    key = jax.random.key(seed, impl="unsafe_rbg")
    size = 1 << 24 if options.quick else _GIGABYTES * 10**9 // 2 // _CUT * _CUT
    pool = jax.jit(lambda k: jax.random.normal(k, [size], jnp.bfloat16))(key)
    if options.quick:
        limit = dict(read=4.5e12)
        rows = measure(quick_points(), limit, pool, quick=True)
        print(table(rows))
    else:
        limit = limits(pool)
        points = paper_points() + model_points() + other_points()
        if options.only:
            wanted = options.only.split(",")
            points = [p for p in points if any(w in f"{p.group} {p.name}" for w in wanted)]
        rows = measure(points, limit, pool, quick=False)
        versions = dict(jax=jax.__version__, device=device.device_kind, seed=seed)
        print(table(rows))
        print()
        for name, value in limit.items():
            unit = "us" if name == "start" else "TFLOP/s" if name == "matrix" else "TB/s"
            print(f"{name}: {value * (1e6 if unit == 'us' else 1e-12):.2f} {unit}")
        print("\n".join(targets(rows, limit)))
        folder = Path(options.output)
        folder.mkdir(parents=True, exist_ok=True)
        content = dict(versions=versions, limits=limit, rows=rows)
        (folder / "absorbed_decode.json").write_text(json.dumps(content, indent=1) + "\n")
        if any(r["group"] == "paper" for r in rows):
            figures(rows, limit, folder)
    wrong = [r for r in rows if not r.get("error", 1) < _TOLERANCE]
    for row in wrong:
        print(f"WRONG {row['group']} {row['name']} {row['cache']}: {failure_of(row)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
