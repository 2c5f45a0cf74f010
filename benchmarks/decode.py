"""Times whole decoding steps of the published 2.9B models beside what their bytes take.

    python -m benchmarks.decode [--mesh=tensor=2] [--models=mlra_4,mla] [--points=1x2K,8x128K]
                                [--shares=4,8,4x2] [--tokens_per_call=1,8] [--profile]
                                [--first_token] [--output=FILE.json] [--figures=FOLDER]
    python -m benchmarks.decode --input=FILE.json --figures=FOLDER

A step is the compiled program that `generate` runs: embedding, layers, head, greedy draw; weights
and caches are random, which does not change the time. Steps follow each other as they do there, the
host one ahead; the median of several runs of 32 counts. The floor is one device's weights and cache
over the read bandwidth measured in the same process.

`--shares` times one device's share of so many ways (of a tensor axis, `4x2` also of a context axis)
on one device: its weights and its cache. What devices exchange is left out.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from benchmarks import limits
from benchmarks.models import (
    bytes_per_device,
    model_config,
    parse_points,
    peak_gigabytes,
    positions_of,
    random_tree,
    require_fit,
)
from benchmarks.prefill import default_over, prefill
from benchmarks.profile import profile
from mlra_jax import sharding
from mlra_jax.cache import Cache, round_capacity
from mlra_jax.decoder import Decoder, abstract_cache, abstract_decoder
from mlra_jax.files import whole_figure
from mlra_jax.generation import Sampling, programs
from mlra_jax.generation.sampling import draws

_STEPS, _RUNS, _CHUNK = 32, 5, 2048
MODELS = "mlra_4,mlra_2,mla,gla_2,gqa"
POINTS = "1x2K,1x16K,1x128K,8x2K,8x128K,32x2K,32x32K,128x1K,128x4K"


def measure(
    decoder: Decoder, batch: int, context: int, read: float, per_call: int, profiled: bool
) -> dict:
    """One point: time of a step, floor, compile time; with `profiled` its kernels too.

    `context` is the number of positions that this mesh keeps.
    """
    config, mesh = decoder.config, decoder.mesh
    steps = -(-_STEPS // per_call) * per_call
    # The caches fill up around the context, which is their mean.
    shapes = abstract_cache(config, mesh, batch, round_capacity(context + _RUNS * steps, mesh))
    settings, num_tokens = draws(Sampling(), 0, batch), decoder.vocabulary.num_tokens
    tokens = jax.device_put(np.arange(batch, dtype=np.int32), sharding.named(mesh))
    several = dict(count=per_call, num_tokens=num_tokens)
    began = time.perf_counter()
    if per_call == 1:
        lowered = programs.step.lower(decoder, shapes, tokens)
    else:
        n = np.int32(0)
        lowered = programs.several.lower(decoder, shapes, tokens, settings, n, **several)
    step = lowered.compile()
    compiling = time.perf_counter() - began
    require_fit(step)

    begin = max(context - _RUNS * steps // 2, 0)
    lengths = jnp.full(batch, begin, jnp.int32, device=shapes.lengths.sharding)
    cache = Cache(random_tree(shapes.layers), lengths)

    def run(count=steps):
        nonlocal cache, tokens
        for n in range(0, count, per_call):
            if per_call == 1:
                logits, cache = step(decoder, cache, tokens)
                tokens = programs.draw(logits, tokens, settings, np.int32(n), num_tokens=num_tokens)
            else:
                _, tokens, cache = step(decoder, cache, tokens, settings, np.int32(n))
        return tokens

    jax.block_until_ready(run(4))
    seconds = []
    for _ in range(_RUNS):
        began = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append((time.perf_counter() - began) / steps)
    share = context / shapes.capacity
    held = bytes_per_device(decoder.weights) + share * bytes_per_device(shapes.layers)
    milliseconds = 1e3 * statistics.median(seconds)
    row = dict(
        milliseconds=milliseconds,
        spread=[1e3 * min(seconds), 1e3 * max(seconds)],
        floor=1e3 * held / read,
        ratio=milliseconds * read / held / 1e3,
        tokens_per_second=batch / milliseconds * 1e3,
        compile_seconds=compiling,
        peak_GB=peak_gigabytes(step),
    )
    if profiled:
        found = profile(lambda: run(per_call))
        row["kernels"] = sum(k.launches for k in found.kernels) / per_call
        row["graphs"] = found.graphs / per_call / mesh.size
        row["busy_milliseconds"] = found.milliseconds / per_call
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


def line(row: dict) -> str:
    where = f"1/{row['share']} of it" if row["share"] else row["mesh"] or "one device"
    name = f"{row['model']:8} {where:20} {row['batch']:4} x {row['context']:7}"
    name += f" by {row['tokens_per_call']}" if row["tokens_per_call"] > 1 else ""
    if "error" in row:
        return f"{name}  {row['error'][:120]}"
    text = (
        f"{name} {row['milliseconds']:8.3f} ms {row['floor']:8.3f} floor {row['ratio']:5.2f}x "
        f"{row['tokens_per_second']:9.0f} tok/s  {row['peak_GB']:6.2f} GB  "
        f"compile {row['compile_seconds']:5.1f} s"
    )
    if "kernels" in row:
        text += f"  {row['kernels']:.0f} kernels {row['graphs']:.1f} graphs"
        text += f" {row['exchanging']:.0%} exchanging"
    if "first_token_seconds" in row:
        text += f"  first token {row['first_token_seconds']:.2f} s"
    return text


def figures(runs: list[dict], folder: Path) -> None:
    """Time against context and throughput against batch, where two points make a line."""
    import matplotlib.figure

    rows = [row for run in runs for row in run["rows"]]
    rows = [row for row in rows if "error" not in row and row.get("tokens_per_call", 1) == 1]
    devices = ", ".join(dict.fromkeys(run["device"] for run in runs))
    folder.mkdir(parents=True, exist_ok=True)
    for name, x, y, rest, label in (
        ("time", "context", "milliseconds", "batch", "time per decoding step (ms)"),
        ("throughput", "batch", "tokens_per_second", "context", "tokens per second"),
    ):
        lines: dict[str, list[dict]] = {}
        for row in sorted(rows, key=lambda row: (row["model"], row[rest], row[x])):
            where = f"one of {row['share']} devices" if row.get("share") else row["mesh"]
            of_line = filter(None, (row["model"], where, f"{rest} {in_words(row[rest])}"))
            lines.setdefault(", ".join(of_line), []).append(row)
        lines = {key: mine for key, mine in lines.items() if len({r[x] for r in mine}) > 1}
        if not lines:
            continue
        figure = matplotlib.figure.Figure(figsize=(9, 4.5), layout="constrained")
        axes = figure.subplots()
        for i, (key, mine) in enumerate(lines.items()):
            at = [r[x] for r in mine]
            axes.plot(at, [r[y] for r in mine], f"C{i % 10}o-", label=key)
            floors = [r["floor"] if name == "time" else 1e3 * r["batch"] / r["floor"] for r in mine]
            axes.plot(at, floors, f"C{i % 10}:", linewidth=1)
        axes.plot([], [], ":", color="gray", label="limit: reading weights and cache")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.set_xlabel("context (tokens)" if name == "time" else "batch (prompts)")
        ticks = sorted({r[x] for mine in lines.values() for r in mine})
        axes.set_xticks(ticks, [in_words(t) for t in ticks])
        axes.xaxis.minorticks_off()
        axes.set_ylabel(label)
        axes.set_title(f"Decoding steps, {devices}")
        axes.grid(alpha=0.3)
        figure.legend(loc="outside right upper", fontsize="small")
        whole_figure(folder / f"decode_{name}.png", figure, dpi=110)


def in_words(number: int) -> str:
    """2048 as 2K, as points are given."""
    return f"{number // 1024}K" if number % 1024 == 0 else str(number)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.decode",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--mesh", default="", help="as in tensor=2; several with ; between")
    add("--models", default=MODELS)
    add("--points", default=POINTS, help="batch x context, commas between")
    add("--shares", default="", help="one device's share instead, as in 4,8,4x2")
    add("--tokens_per_call", default="1", help="tokens of a program, commas between")
    add("--profile", action="store_true", help="kernels, graphs and exchanges of each point")
    add("--first_token", action="store_true", help="also prefill each context")
    add("--tiny", action="store_true", help="one narrow layer: does it run?")
    add("--output", type=Path, help="JSON, written after every point")
    add("--figures", type=Path, help="folder for figures of all points")
    add("--input", type=Path, help="JSON of an earlier run to draw; nothing is measured")
    flags = parser.parse_args(argv)
    result = json.loads(flags.input.read_text()) if flags.input else run(flags)
    if flags.figures:
        figures(result if isinstance(result, list) else [result], flags.figures)
    return 0


def run(flags: argparse.Namespace) -> dict:
    """All points that the flags ask for."""
    device = jax.devices()[0]
    pool = limits.tiny_pool() if flags.tiny else limits.random_pool(0)
    read = limits.read_bandwidth(pool, limits.launch_seconds())["read"]
    del pool
    print(f"{device.device_kind}, JAX {jax.__version__}, reads {read / 1e12:.2f} TB/s", flush=True)
    result = dict(device=device.device_kind, jax=jax.__version__, read=read, rows=[])
    where = [(text, "") for text in flags.mesh.split(";")]
    if flags.shares:
        where = [("", share) for share in flags.shares.split(",")]
    points = parse_points(flags.points)
    calls = [int(n) for n in flags.tokens_per_call.split(",")]
    models = flags.models.split(",")
    bar = tqdm(total=len(models) * len(where) * len(points) * len(calls), file=sys.stderr)
    for mesh, share in where:
        for name in models:
            config = model_config(name, share, flags.tiny)
            decoder = random_tree(abstract_decoder(config, sharding.parse_mesh(mesh)))
            for (batch, context), per_call in ((p, n) for p in points for n in calls):
                row = dict(model=name, mesh=mesh, share=share, batch=batch, context=context)
                row["tokens_per_call"] = per_call
                kept = positions_of(share, context)
                try:
                    row |= measure(decoder, batch, kept, read, per_call, flags.profile)
                    if flags.first_token:
                        row |= first_token(decoder, batch, kept)
                except Exception as error:  # Out of memory at one point is no end of the others.
                    row["error"] = " ".join(str(error).split())[:300]
                result["rows"].append(row)
                tqdm.write(line(row))
                bar.update()
                if flags.output:
                    flags.output.write_text(json.dumps(result, indent=1) + "\n")
            del decoder
    return result


if __name__ == "__main__":
    sys.exit(main())
