"""How large attention's values are: `mlra-variance --checkpoint=DIR | --preset=NAME,NAME,...`

Second moments (means of squares) of queries, keys, what is cached, scores, branch outputs and head
outputs. Fresh models are predicted by `predicted`, with and without the factors of the latent
family; of a run, every step that it kept is measured beside the prediction for its beginning.

Why there are factors (paper, section 3): a projection is a sum of as many products as its input is
wide. Projections of the normed stream, as rotary keys are, sum `d` of them; those of a latent sum
only `d_c / L` or `d_q`. `sqrt(d / width)` on the latent makes both alike, so that neither part of
the scores outweighs the other; `1/sqrt(R)` does the same for a sum over R branches.
"""

import dataclasses
import functools
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mlra_jax import sharding
from mlra_jax.analysis.subject import (
    Subject,
    add_flags,
    opened,
    output_folder,
    parse,
    positive,
    presets,
    scores,
    softmax,
    weighted,
)
from mlra_jax.attention import mechanism
from mlra_jax.checkpoints import finished_steps, open_checkpoint
from mlra_jax.command import Parser, run
from mlra_jax.config import (
    LatentConfig,
    ModelConfig,
    MultiMatrixConfig,
    TensorProductConfig,
    TiedConfig,
)
from mlra_jax.files import whole_figure, whole_file
from mlra_jax.layers import INIT_STDDEV

Moments = dict[str, float]
_DRAWS = 64
_CHOICES = 10_000


class _Projected(NamedTuple):
    """Second moments of what a fresh attention's weights make of a normed stream."""

    queries: float
    keys: list[float]
    """Of each branch, without rotary dimensions; values are as large."""
    rotary: float
    cached: Moments
    sources: list[int]
    """Dimensions of what both keys without rotary dimensions and values are made of."""
    factor: float = 1.0
    """Of the sum over branches, squared."""


def predicted(config: ModelConfig, length: int) -> Moments:
    """Second moments of a fresh model's first attention over `length` different tokens.

    The normed stream has moment 1, every weight is independent with variance 0.02² (TPA: those of
    Xavier), so that a sum of `n` products has `n` times theirs. Nothing is measured.
    """
    a = config.attention
    of = _projected(config)
    N, R = a.query_dim - a.rope_dim, a.rope_dim
    nope = [N * of.queries * keys / a.query_dim for keys in of.keys]
    rope = R * of.queries * of.rotary / a.query_dim
    outputs = [
        values * _gathered(scores, rope, (N, R, source), length)
        for values, scores, source in zip(of.keys, nope, of.sources, strict=True)
    ]
    found = {"queries": of.queries}
    if N:
        found |= {"keys, NoPE": fmean(of.keys), "scores, NoPE": fmean(nope)}
    found |= {"keys, RoPE": of.rotary, "scores, RoPE": rope, "values": fmean(of.keys)}
    found |= {"branch outputs": fmean(outputs), "head outputs": sum(outputs) * of.factor}
    return found | {f"cached {name}": moment for name, moment in of.cached.items()}


def _projected(config: ModelConfig) -> _Projected:
    a, D = config.attention, config.embed_dim
    dense = D * INIT_STDDEV**2
    match a:
        case LatentConfig():
            return _of_latents(a, D)
        case TensorProductConfig():
            A = lambda rank: D * 2 / ((a.num_heads + D) * rank)
            B = lambda rank: D * 2 / ((rank + D) * a.head_dim)
            keys, shared = A(a.rank) * B(a.rank) / a.rank, B(a.rank) / a.rank**2
            cached = {"k_a": A(a.rank), "k_b": shared, "v_a": A(a.rank), "v_b": shared}
            return _Projected(A(a.q_rank) * B(a.q_rank) / a.q_rank, [keys], keys, cached, [D])
        case MultiMatrixConfig():
            queries = a.q_latent_dim * INIT_STDDEV**2
        case _:
            queries = dense
    tied = isinstance(a, TiedConfig)
    cached = dict.fromkeys(("tied", "k_rope") if tied else ("k", "v"), dense)
    return _Projected(queries, [dense], dense, cached, [a.head_dim if tied else D])


def _of_latents(a: LatentConfig, D: int) -> _Projected:
    dense, n = D * INIT_STDDEV**2, a.num_branches
    calibrated = lambda width: D / width if a.scaled else 1.0
    projected = lambda width: width * INIT_STDDEV**2 * calibrated(width)
    sources, factor = [a.latent_head_dim] * a.branches, 1 / n if a.scaled else 1.0
    cached = {"latents": calibrated(a.latent_head_dim), "k_rope": dense}
    if a.base_dim:
        sources, cached = [*sources, a.base_dim], cached | {"base": calibrated(a.base_dim)}
    keys = [projected(width) for width in sources]
    if a.expanded:
        both = a.nope_dim * keys[0] + a.rope_dim * dense
        cached = {"k": both / a.query_dim, "v": keys[0]}
    if a.branch_gated:
        # Weights of mean 1 by a softmax over logits that are projections of the stream.
        logits = np.random.default_rng(0).normal(scale=np.sqrt(dense), size=(_CHOICES, n))
        factor *= n * float((_softmax(logits) ** 2).sum(-1).mean())
    return _Projected(projected(a.q_latent_dim), keys, dense, cached, sources, factor)


@functools.cache
def _gathered(nope: float, rope: float, sizes: tuple[int, int, int], length: int) -> float:
    """Of the second moment of values, what attention to 1 ... `length` of them leaves.

    Independent values averaged with weights w have Σ w² times their moment. But NoPE scores look in
    one direction of what keys and values are both made of, and there values lean as the weights do:
    (Σ w z)² for scores that are z times their deviation. A query's scores are normal, with the size
    of the query for their deviation. `sizes`: NoPE and rotary dimensions, and those of the source.
    """
    rng, (N, R, source) = np.random.default_rng(0), sizes
    shape = (_DRAWS, length, length)
    deviation = lambda moment, n: (
        np.sqrt(moment * rng.chisquare(n, (*shape[:2], 1)) / n) if n else 0
    )
    z = rng.normal(size=shape)
    w = _softmax(
        deviation(nope, N) * z + deviation(rope, R) * rng.normal(size=shape), np.tri(length)
    )
    squares, along = (w**2).sum(-1), (w * z).sum(-1) ** 2
    return float((squares + (along - squares) / source).mean())


def _softmax(scores: np.ndarray, visible: np.ndarray | float = 1.0) -> np.ndarray:
    odds = visible * np.exp(scores)
    return odds / odds.sum(-1, keepdims=True)


@nnx.jit
def _moments(attention, x_BTD):
    positions_BT = jnp.broadcast_to(jnp.arange(x_BTD.shape[1], dtype=jnp.int32), x_BTD.shape[:2])
    y = attention.inputs(x_BTD)
    q, k, v = attention.operands(y, positions_BT, positions_BT)
    parts = scores(attention, q, k)
    o_BTPV = weighted(softmax(parts.whole), v)
    R, seen = attention.config.rope_dim, np.tril_indices(x_BTD.shape[1])
    arrays = {"queries": q}
    if q.shape[-1] > R:
        arrays |= {"keys, NoPE": k[..., :-R], "scores, NoPE": parts.nope[..., *seen]}
    arrays |= {"keys, RoPE": k[..., -R:], "scores, RoPE": parts.rope[..., *seen], "values": v}
    arrays |= {"branch outputs": o_BTPV, "head outputs": attention._sum(y, o_BTPV)}
    cached = attention.prefill(x_BTD, positions_BT)[1]
    arrays |= {f"cached {name}": array for name, array in cached.items()}
    return {name: (array.astype(jnp.float32) ** 2).mean() for name, array in arrays.items()}


def at_initialisation(
    config: ModelConfig, *, length: int = 64, rows: int = 16, seed: int = 0
) -> Moments:
    """Measured second moments of a fresh model's first attention; as `predicted`, by name.

    Only the attention is made, so that the published sizes fit anywhere.
    """
    key = jax.random.key(seed)
    attention = mechanism(config.attention)(
        dataclasses.replace(config, dtype="float32"), mesh=sharding.make_mesh(), rngs=nnx.Rngs(key)
    )
    x_BTD = jax.random.normal(jax.random.fold_in(key, 1), (rows, length, config.embed_dim))
    x_BTD /= jnp.sqrt((x_BTD**2).mean(-1, keepdims=True))
    return {name: float(x) for name, x in _moments(attention, x_BTD).items()}


def of_layers(
    subject: Subject, *, length: int = 64, rows: int = 4, layers: int | None = None
) -> list[Moments]:
    """Measured second moments of each layer on random tokens, by name."""
    x_BTD, found = subject.embed(subject.tokens(rows, length)), []
    positions_BT = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    for layer in range(min(layers or subject.config.num_layers, subject.config.num_layers)):
        block = subject.block(layer)
        moments = _moments(block.attention, block.attention_norm(x_BTD))
        found.append({name: float(x) for name, x in moments.items()})
        x_BTD = _through(block, x_BTD, positions_BT)
    return found


@nnx.jit
def _through(block, x_BTD, positions_BT):
    return block(x_BTD, positions_BT)


def settings_of_factors(named: Mapping[str, ModelConfig]) -> dict[str, ModelConfig]:
    """The same models, and those of the latent family also with their factors the other way."""
    both = {}
    for name, config in named.items():
        both[name] = config
        if isinstance(config.attention, LatentConfig):
            scaled = not config.attention.scaled
            other = dataclasses.replace(config.attention, scaled=scaled)
            label = f"{name} {'with' if scaled else 'without'} factors"
            both[label] = dataclasses.replace(config, attention=other)
    return both


def table(named: Mapping[str, tuple[Moments, Moments]]) -> str:
    """Predicted and measured moments, and measured over predicted, for each model."""
    lines = []
    for name, (expected, found) in named.items():
        lines.append(f"{name:24}{'predicted':>12}{'measured':>12}{'ratio':>10}")
        for what, moment in expected.items():
            ratio = found[what] / moment
            lines.append(f"  {what:22}{moment:12.4g}{found[what]:12.4g}{ratio:10.4g}")
    return "\n".join(lines)


def save_fresh(named: Mapping[str, tuple[Moments, Moments]], folder: Path) -> None:
    """Writes `variance.json` and `variance.png`: circles are predicted, crosses measured."""
    figure, panels = _panels(_SHARED)
    for what, axes in panels.items():
        both = {name: (e[what], m[what]) for name, (e, m) in named.items() if what in e}
        for i, style in enumerate(("o", "x")):
            axes.plot([pair[i] for pair in both.values()], style, fillstyle="none", label=_KINDS[i])
        axes.set_xticks(range(len(both)), both, rotation=90, fontsize=7)
    rows = {n: dict(zip(_KINDS, pair, strict=True)) for n, pair in named.items()}
    _write(folder, rows, figure, panels)


def save_run(expected: Moments, steps: Mapping[int, list[Moments]], folder: Path) -> None:
    """The same two files for a run: a line for each layer over the steps, dashed the prediction."""
    figure, panels = _panels([what for what in _SHARED if what in expected])
    for what, axes in panels.items():
        for layer in range(len(next(iter(steps.values())))):
            values = [layers[layer][what] for layers in steps.values()]
            axes.plot(list(steps), values, "-o", markersize=3, label=f"layer {layer}")
        axes.axhline(expected[what], color="gray", linestyle="--", label="beginning, predicted")
        axes.set_xlabel("step")
    measured = {str(step): layers for step, layers in steps.items()}
    _write(folder, {_KINDS[0]: expected, _KINDS[1]: measured}, figure, panels)


_KINDS = ("predicted", "measured")
_SHARED = (
    "queries",
    "keys, NoPE",
    "keys, RoPE",
    "values",
    "scores, NoPE",
    "scores, RoPE",
    "branch outputs",
    "head outputs",
)


def _panels(names):
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(14, 8), layout="constrained")
    return figure, dict(zip(names, figure.subplots(2, 4).ravel(), strict=False))


def _write(folder: Path, numbers: Any, figure, panels) -> None:
    for what, axes in panels.items():
        axes.set(title=what, ylabel="second moment", yscale="log")
        axes.grid(alpha=0.3)
    next(iter(panels.values())).legend(fontsize=7)
    with whole_file(folder / "variance.json") as file:
        json.dump(numbers, file)
    whole_figure(folder / "variance.png", figure, dpi=110)


def main(argv: list[str] | None = None) -> int:
    """Measures as the flags say; see `command.run` for the exit codes."""
    parser = Parser("mlra_jax.analysis.variance", "Second moments, predicted and measured.")
    add_flags(parser)
    parser.add_argument("--length", type=positive, default=64, help="tokens in a row")
    flags = parse(parser, argv)
    if flags.preset is not None and flags.layers is not None:
        parser.error("--layers is of a checkpoint; of a fresh model the first layer is measured")

    def work():
        output = output_folder(flags.output)
        if flags.preset is not None:
            named = {}
            for name, config in settings_of_factors(presets(flags.preset)).items():
                found = at_initialisation(config, length=flags.length)
                named[name] = predicted(config, flags.length), found
                print(table({name: named[name]}), flush=True)
            if output:
                save_fresh(named, output)
            return
        chosen = open_checkpoint(flags.checkpoint, flags.step)
        wanted = finished_steps(flags.checkpoint) if flags.step is None else [chosen.step]
        expected, steps = predicted(chosen.model, flags.length), {}
        for step in wanted:
            subject = opened(flags.checkpoint, step)
            steps[step] = of_layers(subject, length=flags.length, layers=flags.layers)
            for layer, found in enumerate(steps[step]):
                print(table({f"step {step}, layer {layer}": (expected, found)}), flush=True)
        if output:
            save_run(expected, steps, output)

    return run(parser, work)


if __name__ == "__main__":
    sys.exit(main())
