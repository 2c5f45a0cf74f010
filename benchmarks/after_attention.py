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
from mlra_jax.kernels.after_attention import AfterAttention, Attention, Layer, Shape
from mlra_jax.kernels.exchange import Exchange

_LAYERS, _TURNS, _TOKENS_PER_CALL = 3, 3, 8
_FACTORS, _EPS = (1.0, 1.25), (1e-6, 1e-5)
_SLOTS, _FIRST_SLOT = 40, 11
_SHAPES = {
    name: Shape(*sizes)
    for name, sizes in {
        "D 256": (256, 256, 128, 8, 256, 128, 64, 64, 64, 256),
        "D 384": (192, 384, 256, 8, 384, 192, 64, 64, 128, 384),
        "D 2048": (1088, 2048, 1408, 8, 1600, 1024, 512, 64, 128, 2304),
        "D 3072": (3072, 3072, 2560, 8, 1216, 1024, 128, 64, 128, 4608),
    }.items()
}


def layers_of(mesh, shape: Shape, num_layers: int = _LAYERS):
    """(as many layers of random numbers, each followed by an attention; the stream)."""
    axes, N, D = tuple(a for a in sharding.MODEL if mesh.shape[a] > 1), mesh.size, shape.stream
    K, F, E = (n * N for n in (shape.answer, shape.mlp, shape.entry))
    draw, whole, own = np.random.default_rng().standard_normal, PartitionSpec(), PartitionSpec(axes)
    specs = [PartitionSpec(*s) for s in ((axes,), (None, None, axes), (axes,))]
    last = PartitionSpec(None, axes)
    held = max(1, shape.latents // 2)  # An entry of several latents has others' as well.
    first = np.arange(N, dtype=np.int32) * held
    first = first % shape.latents if held < shape.latents else first
    scale = lambda width: _put(1 + 0.2 * draw(width), mesh, whole, "float32")
    matrix = lambda s, spec: _put(draw(s) / np.sqrt(s[0]), mesh, spec)
    B, R = shape.rows - 1, shape.rows
    slots = (_FIRST_SLOT + np.arange(N)[:, None] + 3 * np.arange(B)) % _SLOTS
    places = np.pad(slots + _SLOTS * np.arange(B), ((0, 0), (0, R - B)), constant_values=-1)
    places[:, 2] = -1
    angles = draw((shape.rope // 2, R)) * 3
    cos, sin = np.cos(angles), np.sin(angles)
    turns = np.stack([np.tile(cos, (2, 1)), np.concatenate([-sin, sin])])
    layers = [
        dict(
            answer=_put(draw((R, K)), mesh, PartitionSpec(None, axes)),
            layer=Layer(
                *map(matrix, [(K, D), (D, 2, F), (F, D)], specs),
                scales=(scale(D), scale(D)),
                factors=_FACTORS,
                eps=_EPS,
                of_answer=PartitionSpec(None, axes),
                of_weights=tuple(specs),
            ),
            attention=Attention(
                entry=matrix((D, E), last),
                query=matrix((shape.query, N * shape.heads, shape.nope + shape.rope), last),
                scales=(scale(shape.query), scale(max(N * held, shape.latents) * shape.latent)),
                turns=_put(turns, mesh, whole, "float32"),
                places=_put(places, mesh, own, "int32"),
                first=_put(first, mesh, own, "int32"),
                # Each device has rows of its own.
                latents=_put(np.zeros((N * B, _SLOTS, held, shape.latent)), mesh, own),
                k_rope=_put(np.zeros((N * B, _SLOTS, shape.rope)), mesh, own),
                factors=_FACTORS[::-1],
                eps=_EPS[::-1],
                of_query=last,
                of_latents=own,
                of_k_rope=own,
            ),
        )
        for _ in range(num_layers)
    ]
    x_RD = _put(draw((R, D)), mesh, whole)
    return layers, x_RD


def step_of(mesh, shape: Shape):
    """A function of what `layers_of` makes: (the stream, what follows) of each layer."""

    def step(layers, x_RD):
        exchange, found = Exchange(mesh, sharding.MODEL, *x_RD.shape), []
        launch, (_, D) = AfterAttention(exchange, shape), x_RD.shape
        zeros = jnp.zeros((mesh.size, *x_RD.shape))
        how = dict(factor=1.0, eps=1e-6, dtype="bfloat16")
        x_DR = exchange(zeros, x_RD, jnp.ones(D), **how)[0].T
        for i, layer in enumerate(layers):
            attention = layer["attention"] if i + 1 < len(layers) else None
            x_DR, following = launch(layer["answer"], x_DR, layer["layer"], attention)
            found.append((x_DR.T, following))
        return found

    return jax.jit(step)


def errors(mesh, shape: Shape) -> list[float]:
    """The largest relative errors of the stream and of what follows each layer."""
    layers, x_RD = layers_of(mesh, shape)
    found, worst, want = step_of(mesh, shape)(layers, x_RD), [], np.asarray(x_RD, np.float64)
    for i, (layer, (x, got)) in enumerate(zip(layers, found, strict=True)):
        layer = jax.tree.map(lambda x: np.asarray(x, np.float64), layer)
        want, following = _expected(want, layer["answer"], layer["layer"])
        if i + 1 < len(layers):
            following = _entered(following, layer["attention"], shape)
        pairs = zip((x, *jax.tree.leaves(got)), (want, *jax.tree.leaves(following)), strict=True)
        for y, expected in pairs:
            off = np.abs(np.asarray(y, np.float64) - expected).max() / np.abs(expected).max()
            worst.append(float(np.nan_to_num(off, nan=np.inf)))
    return worst


def _put(x, mesh, spec, dtype="bfloat16"):
    return jax.device_put(jnp.asarray(x, dtype), NamedSharding(mesh, spec))


def _normed(x, scale, factor, eps):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * scale * factor


def _expected(x, answer, layer):
    """(the stream, its norm)."""
    x = x + answer @ layer.out
    normed = _normed(x, layer.scales[0], layer.factors[0], layer.eps[0])
    gate, up = np.moveaxis(np.tensordot(normed, layer.widen, 1), 1, 0)
    x = x + (gate / (1 + np.exp(-gate)) * up) @ layer.narrow
    return x, _normed(x, layer.scales[1], layer.factors[1], layer.eps[1])


def _entered(x, attention, shape: Shape):
    """(queries but for their rotary parts, these, latents, rotary keys) of all devices."""
    a, N, half = attention, len(attention.places), shape.rope // 2
    cos, sin = a.turns.swapaxes(1, 2)
    turned = lambda x, cos, sin: x * cos + np.roll(x, half, axis=-1) * sin
    found, (B, held) = [], (len(a.latents) // N, a.latents.shape[2])
    entries, queries = np.split(a.entry, N, axis=1), np.split(a.query, N, axis=1)
    scales = a.scales[1].reshape(-1, shape.latent)
    for d, (entry, query) in enumerate(zip(entries, queries, strict=True)):
        q, c, k = np.split(x @ entry, [shape.query, shape.entry - shape.rope], axis=1)
        first = int(a.first[d])
        c = c.reshape(len(c), -1, shape.latent)
        c = c[:, first : first + held] if c.shape[1] > held else c
        c = _normed(c, scales[first : first + held], a.factors[1], a.eps[1])
        latents, keys = (
            np.zeros((B * _SLOTS, held, shape.latent)),
            np.zeros((B * _SLOTS, shape.rope)),
        )
        kept = a.places[d] >= 0
        places = a.places[d][kept].astype(int)
        latents[places], keys[places] = c[kept], turned(k, cos, sin)[kept]
        q = _normed(q, a.scales[0], a.factors[0], a.eps[0])
        nope, rope = np.split(np.tensordot(q, query, 1), [shape.nope], axis=-1)
        rope = turned(rope, cos[:, None], sin[:, None])
        cache = latents.reshape(B, _SLOTS, held, -1), keys.reshape(B, _SLOTS, -1)
        found.append((nope, rope, *cache))
    axes = 1, 1, 0, 0
    return [np.concatenate(x, axis) for x, axis in zip(zip(*found, strict=True), axes, strict=True)]


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
    lengths = jax.device_put(np.linspace(1000, 3, batch).astype(np.int32), place)
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
