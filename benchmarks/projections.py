"""Checks and times products of a few rows on one Hopper GPU, beside XLA's own.

    python -m benchmarks.projections [--models=mlra_4,mla,gqa] [--rows=1,8,32] [--budget=SECONDS]

First each matrix of a layer by itself, then all of a layer's as one chain for 24 layers in a row.
XLA's product is `x @ w` with the weight as the model stores it and nothing fused; the kernel's has
norm, SwiGLU and residual in it. A point is a jitted loop of about 8 ms over as many copies of the
weights as outgrow the L2 cache; the median of five counts. The read bandwidth R is measured in the
same run. With a budget, what is not compiled by then is left out and said so.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import os
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.absorbed_decode import poison, streaming_sum
from mlra_jax.config import LatentConfig, preset
from mlra_jax.kernels.decode_projections import Heads, Step
from mlra_jax.kernels.decode_projections import api as projections
from mlra_jax.kernels.decode_projections.steps import ALIGN

_TOLERANCE = 1e-2
_BEYOND_L2 = 400e6
_BURST = 8e-3
_CUT = 132 * 64 * 128
_LAYERS = 24


@dataclasses.dataclass(frozen=True)
class Layer:
    """The products between one attention and the next, with the sizes of rows and weights."""

    steps: tuple[Step, ...]
    rows: dict[str, int]
    weights: dict[str, tuple[int, ...]]

    def only(self, step: Step) -> "Layer":
        """One step as a layer of its own."""
        columns = dict(self.rows)
        for earlier in self.steps:
            columns[earlier.into] = self.weights[earlier.weight][-2]
        rows = {name: columns[name] for name in (step.source, step.add) if name}
        return Layer((step,), rows, {step.weight: self.weights[step.weight]})

    def bytes(self) -> int:
        return sum(int(np.prod(shape)) * 2 for shape in self.weights.values())


def layer_of(name: str) -> Layer:
    """A published model's layer, from what attention gives to what the next attention takes."""
    config = preset(name)
    width, attention, eps = config.embed_dim, config.attention, config.norm_eps
    mlp = -(-config.mlp_dim // ALIGN) * ALIGN
    weights = dict(gate_up=(2, mlp, width), down=(width, mlp))
    tail = [
        Step("middle", "gate_up", "gated", norm=eps),
        Step("gated", "down", "hidden_out", add="middle"),
        Step("hidden_out", "in", "inputs", norm=eps),
    ]
    if not isinstance(attention, LatentConfig):
        values = attention.num_heads * attention.value_dim
        keys = 2 * attention.num_kv_heads * attention.head_dim
        weights |= {"out": (width, values), "in": (values + keys, width)}
        first = Step("attended", "out", "middle", add="hidden")
        return Layer((first, *tail), dict(attended=values, hidden=width), weights)
    heads, latent, branches = attention.num_heads, attention.latent_head_dim, attention.branches
    value, query = attention.value_dim, attention.query_dim
    small = attention.q_latent_dim, attention.latent_dim, attention.rope_dim
    weights |= {
        "value_up": (heads * value, branches * latent),
        "out": (width, heads * value),
        "in": (sum(small), width),
        "query_up": (heads * query, attention.q_latent_dim),
        "key_up": (branches * heads * latent, attention.nope_dim),
    }
    steps = (
        Step(
            "attended",
            "value_up",
            "values",
            heads=Heads(value, heads, latent, latent, heads * latent),
        ),
        Step("values", "out", "middle", add="hidden"),
        *tail,
        Step("inputs", "query_up", "queries", norm=eps),
        Step(
            "queries", "key_up", "absorbed", heads=Heads(latent, heads, query, attention.nope_dim)
        ),
    )
    return Layer(steps, dict(attended=branches * heads * latent, hidden=width), weights)


@functools.partial(jax.jit, static_argnames=("shape", "scale"))
def _draw(key, shape, scale):
    return jax.random.normal(key, shape, jnp.bfloat16) * jnp.bfloat16(scale)


class Source:
    """Random arrays, a new key for each."""

    def __init__(self, seed: int):
        self.key = jax.random.key(seed, impl="unsafe_rbg")

    def __call__(self, shape, scale=1.0):
        self.key, key = jax.random.split(self.key)
        return _draw(key, tuple(shape), float(scale))

    def rows(self, layer: Layer, count: int) -> dict:
        return {name: self((count, columns)) for name, columns in layer.rows.items()}

    def weights(self, layer: Layer) -> dict:
        return {name: self(s, s[-1] ** -0.5) for name, s in layer.weights.items()}


def copies_of(layer: Layer) -> int:
    return int(np.clip(np.ceil(_BEYOND_L2 / layer.bytes()), 2, 24))


def by_kernel(layer: Layer, rows: dict, weights: dict) -> jax.Array:
    [step] = layer.steps
    return projections.chain(rows, weights, layer.steps, implementation="mosaic_gpu")[step.into]


def by_xla(layer: Layer, rows: dict, weights: dict) -> jax.Array:
    """The product alone; weights as the model has them, `[K, N]` or `[heads, K, N]`."""
    [step] = layer.steps
    x = rows[step.source]
    if not step.heads:
        return x[:, : weights["w"].shape[0]] @ weights["w"]
    heads, inner = step.heads, layer.weights[step.weight][-1]
    if heads.jump and inner > heads.run:  # values: the sum over branches
        x = x.reshape(x.shape[0], -1, heads.count, heads.run)
        return jnp.einsum(
            "mbhk,hbkn->mhn", x, weights["w"].reshape(heads.count, -1, *x.shape[3:], heads.width)
        )
    x = jnp.stack([x[:, h * heads.stride :][:, :inner] for h in range(heads.count)], 1)
    return jnp.einsum(
        "mhk,rhkn->mrhn", x, weights["w"].reshape(-1, heads.count, inner, heads.width)
    )


def xla_weight(layer: Layer) -> Layer:
    [step] = layer.steps
    *halves, outputs, inner = layer.weights[step.weight]
    outputs *= 2 if halves else 1
    if step.heads:
        shape = (outputs // step.heads.width, inner, step.heads.width)
    else:
        shape = (inner, outputs)
    return dataclasses.replace(layer, weights={"w": shape})


def looped(op, copies: int, steps: int):
    """A loop over all copies of the weights; every turn depends on the one before."""

    def run(rows, weights):
        def turn(_, rows):
            outs = [op(rows, w) for w in weights]
            last = sum(out.reshape(out.shape[0], -1)[:, :64] for out in outs)
            # One small kernel for all copies.
            first = next(iter(rows))
            add = jnp.pad(last * jnp.bfloat16(1e-20), ((0, 0), (0, rows[first].shape[1] - 64)))
            return rows | {first: rows[first] + add}

        return lax.fori_loop(0, steps, turn, rows)

    return run


def seconds(call, repeats: int = 5) -> float:
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        time.sleep(4e-3)
        begin = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def read_bandwidth(source: Source) -> dict[str, float]:
    pool = source((2 * 10**9 // 2 // _CUT * _CUT,))
    readers = {
        "XLA, maximum": jnp.max,
        "TMA, column sums": lambda x: streaming_sum(x.reshape(-1, 128)),
    }
    found = {}
    for name, reader in readers.items():
        ten = functools.partial(lambda f: [f(pool) for _ in range(10)], jax.jit(reader))
        found[name] = 10 * pool.nbytes / seconds(ten)
    return found


def chained(layer: Layer, how: str, loops: int):
    """All layers' products in a row, `loops` times.

    Args:
      how: "chain", with another setting as in "chain@stages=5"; "separate", a launch for each
        step; or "xla".
    """
    last = layer.steps[-1].into
    width = layer.rows["attended"]

    def products(rows, weights):
        if how != "separate":
            name, *change = how.split("@")
            options = dict(implementation="reference" if name == "xla" else "mosaic_gpu")
            if change:
                field, value = change[0].split("=")
                options["config"] = functools.partial(dataclasses.replace, **{field: int(value)})
            return projections.chain(rows, weights, layer.steps, **options)
        found = dict(rows)
        for step in layer.steps:
            own = {name: found[name] for name in (step.source, step.add) if name}
            options = dict(implementation="mosaic_gpu")
            found |= projections.chain(own, {step.weight: weights[step.weight]}, [step], **options)
        return found

    def run(rows, weights):
        def turn(_, rows):
            for own in weights:
                found = products(rows, own)
                rows = dict(attended=found[last][:, :width], hidden=found["hidden_out"])
            return rows

        return lax.fori_loop(0, loops, turn, rows)

    return run


def structs(arrays: dict, count: int | None = None) -> dict:
    shape = lambda s: (count, s) if count else s
    return {n: jax.ShapeDtypeStruct(shape(s), jnp.bfloat16) for n, s in arrays.items()}


def error_of(layer: Layer, count: int, source: Source) -> float:
    """Largest relative Frobenius error of a step's result against the reference."""
    rows, weights = source.rows(layer, count), source.weights(layer)
    poison()
    found = projections.chain(rows, weights, layer.steps, implementation="mosaic_gpu")
    wanted = jax.jit(lambda r, w: projections.chain(r, w, layer.steps, implementation="reference"))(
        rows, weights
    )
    norm = lambda x: jnp.linalg.norm(x.astype(jnp.float32))
    gap = lambda n: norm(found[n].astype(jnp.float32) - wanted[n].astype(jnp.float32))
    return max(float(gap(n) / norm(wanted[n])) for n in wanted)


def compile_all(jobs: dict, until: float) -> dict:
    """{key: (function, arguments)} compiled side by side; what fails or is late is its reason."""

    def build(function, arguments):
        return jax.jit(function).lower(*arguments).compile()

    done = {}
    pool = concurrent.futures.ThreadPoolExecutor(12)
    futures = {key: pool.submit(build, *job) for key, job in jobs.items()}
    for key, future in futures.items():
        try:
            done[key] = future.result(timeout=max(0.1, until - time.time()))
        except concurrent.futures.TimeoutError:
            done[key] = "not compiled within the budget"
        except Exception as error:  # Compilers raise many types; the table says which row.
            done[key] = str(error).strip().split("\n")[0][:200]
    pool.shutdown(wait=False, cancel_futures=True)
    return done


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default="mlra_4,mla,gqa")
    parser.add_argument("--rows", default="8,1,32")
    parser.add_argument("--output", default="benchmarks/results/projections.json")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds in all")
    parser.add_argument("--how", default="chain,separate,xla", help="which layers are timed")
    parser.add_argument("--layers-only", action="store_true", help="leave out single matrices")
    options = parser.parse_args(argv)
    begin = time.time()
    # Joining weights that share their input would copy them in every step.
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_dot_merger_threshold_mb=0".strip()
    device = jax.devices()[0]
    if device.platform != "gpu" or str(getattr(device, "compute_capability", "")) != "9.0":
        print(f"projections: needs a Hopper GPU, found {device.device_kind}", file=sys.stderr)
        return 1
    seed = time.time_ns() % 2**31
    source = Source(seed)
    counts = [int(n) for n in options.rows.split(",")]
    layers = {name: layer_of(name) for name in options.models.split(",")}
    read = read_bandwidth(source)
    rate = max(read.values())
    print(
        f"{device.device_kind}, JAX {jax.__version__}:",
        *(f"{n} {v / 1e12:.2f}" for n, v in read.items()),
        "TB/s",
        flush=True,
    )

    rows, wrong = [], []

    def report(row):
        row["share"] = row["bytes"] / rate / row["us"] * 1e6 if "us" in row else None
        rows.append(row)
        numbers = f"{row['us']:7.1f} us {row['share']:4.0%} of R" if "us" in row else row["failed"]
        print(
            f"{row['model']:7} {row['matrix']:9} {row['rows']:3} rows {row['bytes'] / 1e6:7.1f} MB "
            f"{row['bytes'] / rate * 1e6:6.1f} us  {row['by']:9} {numbers}",
            flush=True,
        )
        content = dict(
            versions=dict(jax=jax.__version__, device=device.device_kind, seed=seed),
            read=read,
            errors=wrong,
            rows=rows,
        )
        Path(options.output).parent.mkdir(parents=True, exist_ok=True)
        Path(options.output).write_text(json.dumps(content, indent=1) + "\n")

    # What matters most comes first: whole layers, then the matrices.
    jobs, about = {}, {}
    for model, layer in layers.items():
        for count in counts:
            for how in options.how.split(","):
                loops = max(1, round(_BURST / (_LAYERS * layer.bytes() / rate)))
                key = (model, "layer", count, how)
                arguments = structs(layer.rows, count), [structs(layer.weights)] * _LAYERS
                jobs[key] = chained(layer, how, loops), arguments
                about[key] = layer, _LAYERS, loops
    for model, layer in layers.items():
        for count in [] if options.layers_only else counts:
            for step in layer.steps:
                single = layer.only(step)
                copies = copies_of(single)
                steps = max(1, round(_BURST / (copies * (single.bytes() / rate + 4e-6))))
                for by, op, of in (
                    ("kernel", by_kernel, single),
                    ("XLA", by_xla, xla_weight(single)),
                ):
                    key = (model, step.weight, count, by)
                    run = looped(functools.partial(op, single), copies, steps)
                    jobs[key] = run, (structs(of.rows, count), [structs(of.weights)] * copies)
                    about[key] = of, copies, steps
    compiled = compile_all(jobs, begin + 0.6 * options.budget)
    print(f"compiled after {time.time() - begin:.0f} s", flush=True)
    for model, layer in layers.items():
        for count in counts:
            error = error_of(layer, count, source)
            wrong.append(dict(model=model, rows=count, error=error))
            print(f"{model} {count} rows: largest relative error {error:.1e}", flush=True)
    weights, kept = None, None
    for key, (layer, copies, steps) in about.items():
        model, matrix, count, by = key
        row = dict(model=model, matrix=matrix, rows=count, by=by, bytes=layer.bytes())
        run = compiled[key]
        if isinstance(run, str) or time.time() - begin > options.budget:
            report(row | dict(failed=run if isinstance(run, str) else "out of budget"))
            continue
        if kept != (layer.weights, copies):
            weights = None
            weights = [source.weights(layer) for _ in range(copies)]
            kept = (layer.weights, copies)
        call = functools.partial(run, source.rows(layer, count), weights)
        row["us"] = seconds(call) / (copies * steps) * 1e6
        report(row)
    return 1 if any(w["error"] > _TOLERANCE for w in wrong) else 0


if __name__ == "__main__":
    sys.exit(main())
