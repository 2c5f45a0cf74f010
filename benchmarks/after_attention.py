"""A layer behind its attention in one launch: whether it is right, and what a step gains by it.

    python -m benchmarks.after_attention [--mesh=tensor=4] [--model=mlra_4]
                                         [--points=8x128K,1x2K] [--output=FILE.json] [--tiny]

Right: launches of layers of random numbers on all GPUs, beside float64, one after the other in one
step, at sizes that do not divide evenly and at the paper's. What it gains: milliseconds a token of
steps with and without it, by turns in one process, and the kernels of the last turn; both compute
the same logits but for rounding, which is printed too.
"""

import argparse
import contextlib
import functools
import json
import sys
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from benchmarks import limits
from benchmarks.decode_worker import compile_step, measure
from benchmarks.models import model_config, parse_points, random_tree
from benchmarks.timing import compile_all
from mlra_jax import sharding
from mlra_jax.cache import Cache
from mlra_jax.decoder import abstract_cache, abstract_decoder
from mlra_jax.kernels import after_attention
from mlra_jax.kernels.after_attention import AfterAttention, Layer, Shape
from mlra_jax.kernels.exchange import Exchange

_LAYERS, _TURNS, _TOKENS_PER_CALL = 3, 3, 8
_FACTORS, _EPS = (1.0, 1.25), (1e-6, 1e-5)
_SHAPES = {
    "D 256": Shape(answer=256, stream=256, mlp=128, entry=192, rows=8),
    "D 384": Shape(answer=192, stream=384, mlp=256, entry=320, rows=8),
    "D 2048": Shape(answer=1088, stream=2048, mlp=1408, entry=832, rows=8),
    "D 3072": Shape(answer=3072, stream=3072, mlp=2560, entry=1216, rows=8),
}


def errors(mesh, shape: Shape) -> list[float]:
    """The largest relative errors of the stream and of what follows each layer."""
    axes = tuple(a for a in sharding.MODEL if mesh.shape[a] > 1)
    K, D, F, E = (n * mesh.size for n in (shape.answer, 1, shape.mlp, shape.entry))
    D *= shape.stream // mesh.size
    draw, whole = np.random.default_rng().standard_normal, PartitionSpec()
    specs = [PartitionSpec(*s) for s in ((axes,), (None, None, axes), (axes,), (None, axes))]
    layers = [
        dict(
            answer=_put(draw((shape.rows, K)), mesh, PartitionSpec(None, axes)),
            scales=[_put(1 + 0.2 * draw(D), mesh, whole, "float32") for _ in range(2)],
            weights=[
                _put(draw(s) / np.sqrt(s[0]), mesh, spec)
                for s, spec in zip([(K, D), (D, 2, F), (F, D), (D, E)], specs, strict=True)
            ],
        )
        for _ in range(_LAYERS)
    ]
    x_RD = _put(draw((shape.rows, D)), mesh, whole)

    @jax.jit
    def step(layers, x_RD):
        exchange, found = Exchange(mesh, sharding.MODEL, *x_RD.shape), []
        launch = AfterAttention(exchange, shape)
        zeros = jnp.zeros((mesh.size, *x_RD.shape))
        how = dict(factor=1.0, eps=1e-6, dtype="bfloat16")
        x_DR = exchange(zeros, x_RD, jnp.ones(D), **how)[0].T
        for i, layer in enumerate(layers):
            *others, entry = layer["weights"]
            entry = entry if i + 1 < _LAYERS else None
            how = dict(factors=_FACTORS, eps=_EPS, scales=tuple(layer["scales"]))
            how |= dict(of_answer=PartitionSpec(None, axes), of_weights=tuple(specs))
            x_DR, y = launch(layer["answer"], x_DR, Layer(*others, entry=entry, **how))
            found.append((x_DR.T, y))
        return found

    worst, want = [], np.asarray(x_RD, np.float64)
    for i, (layer, (x, y)) in enumerate(zip(layers, step(layers, x_RD), strict=True)):
        want, following = _expected(want, jax.tree.map(lambda x: np.asarray(x, np.float64), layer))
        if i + 1 < _LAYERS:
            parts = np.asarray(y, np.float64).reshape(mesh.size, -1, *y.shape[1:]).sum(1)
            y = np.concatenate(parts, axis=-1)
            following = following @ np.asarray(layer["weights"][3], np.float64)
        for got, expected in ((x, want), (y, following)):
            off = np.abs(np.asarray(got, np.float64) - expected).max() / np.abs(expected).max()
            worst.append(float(np.nan_to_num(off, nan=np.inf)))
    return worst


def _put(x, mesh, spec, dtype="bfloat16"):
    return jax.device_put(jnp.asarray(x, dtype), NamedSharding(mesh, spec))


def _expected(x, layer):
    def normed(x, i):
        mean = np.mean(x**2, axis=-1, keepdims=True)
        return x / np.sqrt(mean + _EPS[i]) * layer["scales"][i] * _FACTORS[i]

    out, widen, narrow, _ = layer["weights"]
    x = x + layer["answer"] @ out
    gate, up = np.moveaxis(np.tensordot(normed(x, 0), widen, 1), 1, 0)
    x = x + (gate / (1 + np.exp(-gate)) * up) @ narrow
    return x, normed(x, 1)


def _ways():
    """What each way of making a step is traced in, by name."""
    never = mock.patch.object(after_attention, "supports", lambda *_: "not now")
    for way, traced in (("apart", never), ("at once", contextlib.nullcontext())):
        jax.clear_caches()
        yield way, traced


def logits_apart(decoder, batch: int) -> tuple[float, float]:
    """(the largest logit, the largest difference) of a step by both ways on the same cache."""
    shapes = abstract_cache(decoder.config, decoder.mesh, batch, 2048)
    place = shapes.lengths.sharding
    lengths = jax.device_put(np.full(batch, 1000, np.int32), place)
    cache = Cache(random_tree(shapes.layers), lengths)
    tokens = jax.device_put(np.arange(batch, dtype=np.int32)[:, None], place)
    found = []
    for _, traced in _ways():
        with traced:
            logits, _ = jax.jit(lambda d, t, c: d.step(t, c))(decoder, tokens, cache)
        found.append(np.asarray(logits, np.float32)[..., : decoder.vocabulary.num_tokens])
    return float(np.abs(found[0]).max()), float(np.abs(found[0] - found[1]).max())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.after_attention",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--mesh", default="tensor=4")
    parser.add_argument("--model", default="mlra_4")
    parser.add_argument("--points", default="8x128K,1x2K", help="batch x context")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--tiny", action="store_true", help="a toy model, to try the program")
    flags = parser.parse_args(argv)
    mesh, points = sharding.parse_mesh(flags.mesh), parse_points(flags.points)
    shapes = abstract_decoder(model_config(flags.model, "", flags.tiny), mesh)
    result = dict(mesh=flags.mesh, model=flags.model, jax=jax.__version__)
    result["device"] = jax.devices()[0].device_kind
    result["errors"] = {}
    for name, shape in tqdm(
        list(_SHAPES.items())[: 2 if flags.tiny else None], desc="right?", file=sys.stderr
    ):
        result["errors"][name] = errors(mesh, shape)
        tqdm.write(f"{name}: at most {max(result['errors'][name]):.1e}")
    one = sharding.named(sharding.make_mesh())
    like = jax.ShapeDtypeStruct(limits.pool_shape(), jnp.bfloat16, sharding=one)
    pool = limits.tiny_pool() if flags.tiny else random_tree(like)
    read = limits.read_bandwidth(pool, limits.launch_seconds(), None)["read"]
    del pool
    decoder, steps = random_tree(shapes), {}
    for way, traced in _ways():
        make = functools.partial(compile_step, shapes, per_call=_TOKENS_PER_CALL)
        with traced:
            made = compile_all({point: functools.partial(make, *point) for point in points})
        steps |= {(way, point): step for point, step in made.items()}
    result["logits"] = {batch: logits_apart(decoder, batch) for batch in {b for b, _ in points}}
    for batch, (most, apart) in result["logits"].items():
        tqdm.write(f"{batch} rows: logits up to {most:.2g} differ by {apart:.1e} at most")
    result["rows"] = []
    on_gpu = sharding.platform(mesh) == "gpu"
    for turn, point, way in tqdm(
        [(t, p, w) for t in range(_TURNS) for p in points for w in ("apart", "at once")],
        desc="steps",
        file=sys.stderr,
    ):
        row = measure(decoder, steps[way, point], read, on_gpu and turn + 1 == _TURNS)
        result["rows"].append(row | dict(way=way, batch=point[0], context=point[1], turn=turn))
        tqdm.write(f"{point[0]} x {point[1]}, {way}: {row['milliseconds']:.3f} ms a token")
        if flags.output:
            flags.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
