"""What changes when positions move: `mlra-equivariance --checkpoint=DIR | --preset=NAME,NAME,...`

Scores should depend on positions through differences alone (docs/equivariance.md): the rotary part
(RoPE) by the difference of query and key, the other part (NoPE) not at all. Each layer is measured
by itself, the logits through all of them, and a mechanism that is made otherwise is named.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mlra_jax.analysis.subject import (
    Subject,
    add_flags,
    fresh,
    opened,
    output_folder,
    parse,
    positive,
    presets,
    scores,
    softmax,
    weighted,
)
from mlra_jax.command import Parser, run
from mlra_jax.files import whole_figure, whole_file
from mlra_jax.layers import rotate

SHIFTS = (1, 10, 100, 1_000, 10_000, 100_000, 1_000_000)
DTYPES = ("float32", "bfloat16")
ALONE = 17
"""By how much queries' or keys' positions move by themselves."""
TOLERANCE = 1e-5
"""Above this a change in float32 is none of rounding."""
_PROBE = 61
_CONTENT_TOLERANCE = 1e-4
"""Taking a rotation back rounds angles of many turns once more."""
_PAD = 5


class Move(NamedTuple):
    """What is added to positions, and by how many slots each row is padded on the left."""

    query: np.ndarray
    key: np.ndarray
    pads_B: np.ndarray


class Seen(NamedTuple):
    """Of one layer, the real tokens alone: scores and weights `[B, P, T, T]`, invisible ones 0."""

    nope: jax.Array
    rope: jax.Array
    output_BTHV: jax.Array
    mass_P: tuple[jax.Array, jax.Array]
    """Of the attention, what stays in place if the scores are only NoPE, and only RoPE."""
    x_BTD: jax.Array
    """The block's output, in the frame of its input."""


def moves(rows: int) -> dict[str, Move]:
    """By name; the first changes nothing. Which of them must change nothing: `kept`."""
    still = np.zeros(rows, np.int32)
    move = lambda query, key, pads=still: Move(np.int32(query), np.int32(key), pads)
    return (
        {"none": move(0, 0)}
        | {f"all +{shift:,}": move(shift, shift) for shift in SHIFTS}
        | {
            "padded left": move(0, 0, np.arange(rows, dtype=np.int32) * _PAD),
            f"queries +{ALONE}": move(ALONE, 0),
            f"keys +{ALONE}": move(0, ALONE),
        }
    )


def kept(name: str) -> bool:
    """Whether a move of this name must change nothing."""
    return name.startswith(("all", "padded"))


def measure(
    subject: Subject,
    *,
    length: int = 32,
    rows: int = 4,
    layers: int | None = None,
    dtypes: Sequence[str] = DTYPES,
) -> dict[str, Any]:
    """How much each move changes, by dtype, move, layer and head; JSON-ready.

    Changes are norms of differences: of a part of the scores over the norm of the scores, of head
    outputs and logits over their own. Padding compares the real tokens alone.

    Args:
      subject: from `fresh`, `opened` or `of_params`.
      length: tokens in a row.
      rows: rows; the second is padded by 5 slots, the third by 10 and so on.
      layers: only the first so many, whose output is taken for the last.
      dtypes: of the products; violations are looked for in float32.

    Returns:
      `findings`, a line for each violation; `dtypes`: by name, `moves` (by name: `logits`, and for
      each layer `nope` and `rope` by branch head and `outputs` by head) and `layers` (`nope_mass`
      and `rope_mass` by branch head).
    """
    count = min(layers or subject.config.num_layers, subject.config.num_layers)
    tokens_BT = subject.tokens(rows, length + (rows - 1) * _PAD)
    findings: list[str] = []
    found = {
        dtype: _through_layers(subject.in_dtype(dtype), tokens_BT, length, count, findings)
        for dtype in dtypes
    }
    moved = found["float32"]["moves"] if "float32" in found else {}
    outside = max((x["logits"] for name, x in moved.items() if kept(name)), default=0)
    if outside > TOLERANCE and not findings:
        findings.append(
            f"logits change by {outside:.1e} though every layer by itself keeps its scores: "
            "positions enter elsewhere, as in the embedding"
        )
    return {"model": subject.name, "findings": findings, "dtypes": found}


def _through_layers(
    subject: Subject, tokens_BT: np.ndarray, length: int, count: int, findings: list[str]
) -> dict[str, Any]:
    """The measurements in the subject's dtype; float32's add to the findings."""
    still, *moved = (ways := moves(len(tokens_BT)))
    x_BTD = subject.embed(tokens_BT)
    own = {name: _padded(x_BTD, move.pads_B) for name, move in ways.items()}
    measured, masses = {name: [] for name in moved}, []
    for layer in range(count):
        block = subject.block(layer)
        base = _see(block, x_BTD, ways[still], length)
        for name in moved:
            alone = _see(block, _padded(x_BTD, ways[name].pads_B), ways[name], length)
            measured[name].append(_numbers(_change(base, alone)))
        own = {name: _see(block, x, ways[name], length).x_BTD for name, x in own.items()}
        masses.append(_numbers(dict(zip(("nope_mass", "rope_mass"), base.mass_P, strict=True))))
        if subject.config.execution.dtype == "float32":
            findings += _violations(layer, _contents(block, x_BTD))
        x_BTD = base.x_BTD
    logits = {
        name: _logits(subject.embed, subject.final_norm, own.pop(name), move.pads_B, length)
        for name, move in ways.items()
    }
    change = {n: float(_norm(logits[n] - logits[still]) / _norm(logits[still])) for n in moved}
    return {
        "moves": {name: {"logits": change[name], "layers": measured[name]} for name in moved},
        "layers": masses,
    }


def _padded(x_BTD, pads_B):
    """Each row moved to the right; its filling comes in on the left."""
    return jax.vmap(lambda x, pad: jnp.roll(x, pad, axis=0))(x_BTD, pads_B)


def _real(x, pads_B, length, axes):
    """The slots of the real tokens, along each of the axes (the row's own, without batch)."""

    def of_row(x, pad):
        for axis in axes:
            x = jax.lax.slice_in_dim(jnp.roll(x, -pad, axis), 0, length, axis=axis)
        return x

    return jax.vmap(of_row)(x, pads_B)


@nnx.jit(static_argnames="length")
def _see(block, x_BTD, move, length):
    """One block on rows whose slots count from 0, in positions that `move` has moved."""
    attention = block.attention
    slots_BT = jnp.broadcast_to(jnp.arange(x_BTD.shape[1], dtype=jnp.int32), x_BTD.shape[:2])
    y = attention.inputs(block.attention_norm(x_BTD))
    q, k, v = attention.operands(y, slots_BT + move.query, slots_BT + move.key)
    parts = scores(attention, q, k)
    weights = softmax(parts.whole, move.pads_B)
    o_BTPV = weighted(weights, v)
    visible = jnp.tril(jnp.ones((length, length), bool))
    cut = lambda x: _real(x, move.pads_B, length, (1, 2)) * visible
    by_part = [jnp.minimum(weights, softmax(x, move.pads_B)).sum(-1) for x in parts]
    return Seen(
        *map(cut, parts),
        _real(attention._sum(y, o_BTPV), move.pads_B, length, (0,)),
        tuple(_real(x, move.pads_B, length, (1,)).mean((0, 2)) for x in by_part),
        block._rest(x_BTD, attention.result(y, o_BTPV)),
    )


@jax.jit
def _change(base: Seen, moved: Seen) -> dict[str, jax.Array]:
    of_scores = _norm(base.nope + base.rope, (0, 2, 3))
    return {
        "nope": _norm(moved.nope - base.nope, (0, 2, 3)) / of_scores,
        "rope": _norm(moved.rope - base.rope, (0, 2, 3)) / of_scores,
        "outputs": _norm(
            moved.output_BTHV.astype(jnp.float32) - base.output_BTHV.astype(jnp.float32), (0, 1, 3)
        )
        / _norm(base.output_BTHV, (0, 1, 3)),
    }


@nnx.jit(static_argnames="length")
def _logits(embed, final_norm, x_BTD, pads_B, length):
    return embed.logits(final_norm(_real(x_BTD, pads_B, length, (0,))))


def _norm(x, axes=None):
    return jnp.sqrt((x.astype(jnp.float32) ** 2).sum(axes))


def _numbers(arrays: dict[str, jax.Array]) -> dict[str, list[float]]:
    """Three digits of each: what is read is an order of magnitude."""
    return {n: [float(f"{v:.3g}") for v in np.asarray(x)] for n, x in arrays.items()}


class Content(NamedTuple):
    """What is left of queries or keys when their rotation is taken back, after and before a move.

    It must not know of positions: then, and only then, rotations meet in differences.
    """

    change: float
    """Norm of the difference over the norm; 0 where all is well."""
    shared: float
    """Part of that difference that is the same for all tokens of a position."""
    turned: float
    """Change of the rotary dimensions as they are, which a move must turn."""


@nnx.jit
def _content(block, x_BTD):
    """(change, shared, turned) of queries and of keys."""
    attention = block.attention
    R = attention.config.rope_dim
    y = attention.inputs(block.attention_norm(x_BTD))
    here_BT = jnp.broadcast_to(jnp.arange(x_BTD.shape[1], dtype=jnp.int32), x_BTD.shape[:2])
    there_BT = here_BT + _PROBE

    def content(x_BTPK, positions_BT):
        turned_back = rotate(x_BTPK[..., -R:], -positions_BT, attention.rope_base)
        return jnp.concatenate([x_BTPK[..., :-R], turned_back], axis=-1)

    found = []
    for here, there in zip(
        attention.operands(y, here_BT, here_BT)[:2],
        attention.operands(y, there_BT, there_BT)[:2],
        strict=True,
    ):
        base = content(here, here_BT)
        change = content(there, there_BT) - base
        turned = _norm(there[..., -R:] - here[..., -R:]) / _norm(here[..., -R:])
        shared = _norm(change.mean(0)) ** 2 * change.shape[0] / _norm(change) ** 2
        found.append((_norm(change) / _norm(base), shared, turned))
    return found


def _contents(block, x_BTD) -> dict[str, Content]:
    return {
        side: Content(*map(float, values))
        for side, values in zip(("queries", "keys"), _content(block, x_BTD), strict=True)
    }


def _violations(layer: int, contents: dict[str, Content]) -> list[str]:
    found = []
    for side, content in contents.items():
        if content.change <= _CONTENT_TOLERANCE:
            continue
        if content.turned <= TOLERANCE:
            why = "are not rotated by their positions; a slot of the cache may stand for them"
        elif content.shared > 0.5:
            why = "have absolute positions added to what they are made of"
        else:
            why = "are made of something that was rotated before a projection or compression"
        found.append(f"layer {layer}: {side} {why}")
    return found


def table(report: dict[str, Any]) -> str:
    """The largest change over layers and heads for each move, and the findings."""
    lines = [f"{report['model']}", f"{'':14}{'float32':>36}{'':4}{'bfloat16':>36}"]
    heading = "".join(f"{name:>9}" for name in ("NoPE", "RoPE", "outputs", "logits"))
    lines.append(f"{'positions':14}{heading}{'':4}{heading}")
    for move in report["dtypes"]["float32"]["moves"]:
        cells = []
        for measured in report["dtypes"].values():
            change = measured["moves"][move]
            largest = [
                max(max(layer[part]) for layer in change["layers"])
                for part in ("nope", "rope", "outputs")
            ]
            cells.append(
                "".join(f"{x:9.1e}" if x else f"{0:9}" for x in (*largest, change["logits"]))
            )
        lines.append(f"{move:14}{cells[0]}{'':4}{cells[1]}")
    layers = report["dtypes"]["float32"]["layers"]
    nope, rope = (
        np.mean([np.mean(layer[name]) for layer in layers]) for name in ("nope_mass", "rope_mass")
    )
    lines.append(
        f"of the attention, {nope:.0%} stays in place by NoPE scores alone, {rope:.0%} by RoPE's"
    )
    lines += [f"VIOLATION: {line}" for line in report["findings"]]
    return "\n".join(lines)


def save(reports: Sequence[dict[str, Any]], folder: Path) -> None:
    """Writes `equivariance.json` and `equivariance.png`."""
    import matplotlib.figure

    with whole_file(folder / "equivariance.json") as file:
        json.dump(list(reports), file)
    figure = matplotlib.figure.Figure(figsize=(11, 4.5), layout="constrained")
    change, mass = figure.subplots(1, 2)
    for i, report in enumerate(reports):
        for dtype, style in zip(DTYPES, ("-", "--"), strict=True):
            moved = report["dtypes"][dtype]["moves"]
            change.loglog(
                SHIFTS,
                [max(moved[f"all +{shift:,}"]["logits"], 1e-9) for shift in SHIFTS],
                style,
                color=f"C{i % 10}",
                label=report["model"] if style == "-" else None,
            )
        layers = report["dtypes"]["float32"]["layers"]
        for name, style in (("nope_mass", "-o"), ("rope_mass", "--o")):
            mass.plot([np.mean(x[name]) for x in layers], style, color=f"C{i % 10}", markersize=3)
    change.set(
        xlabel="added to all positions",
        ylabel="change of the logits (norm)",
        title="logits when positions move",
    )
    mass.set(
        xlabel="layer",
        ylabel="attention that stays in place",
        ylim=(0, 1.05),
        title="scores with one of their parts alone",
    )
    mass.xaxis.get_major_locator().set_params(integer=True)
    named = ((change, DTYPES, ("-", "--")), (mass, ("NoPE part", "RoPE part"), ("-o", "--o")))
    for axes, names, styles in named:
        for name, style in zip(names, styles, strict=True):
            axes.plot([], [], style, color="gray", markersize=3, label=name)
        axes.legend(fontsize=7, handlelength=3.5)
        axes.grid(alpha=0.3)
    whole_figure(folder / "equivariance.png", figure)


def main(argv: list[str] | None = None) -> int:
    """Measures as the flags say; see `command.run` for the exit codes."""
    parser = Parser("mlra_jax.analysis.equivariance", "What changes when positions move.")
    add_flags(parser)
    parser.add_argument("--length", type=positive, default=32, help="tokens in a row")
    parser.add_argument("--rows", type=positive, default=4, help="rows of random tokens")
    flags = parse(parser, argv)
    if flags.rows < 3:
        parser.error("--rows must be at least 3, to tell tokens from positions")

    def work():
        output = output_folder(flags.output)
        if flags.checkpoint is not None:
            subjects = iter([opened(flags.checkpoint, flags.step)])
        else:
            named = presets(flags.preset, zero_init=False)
            subjects = (fresh(name, config) for name, config in named.items())
        reports = []
        for subject in subjects:
            reports.append(
                measure(subject, length=flags.length, rows=flags.rows, layers=flags.layers)
            )
            print(table(reports[-1]), flush=True)
        if output:
            save(reports, output)

    return run(parser, work)


if __name__ == "__main__":
    sys.exit(main())
