"""What each branch attends to: `mlra-branches --checkpoint=DIR --output=DIR [--source=TEXT]`

For each layer and branch (other variants have one): the entropy of its attention, how far back it
looks, how much it overlaps with the other branches of the same heads, and how many directions of
its latent the up-projections read.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mlra_jax.analysis.subject import (
    Subject,
    add_common_flags,
    opened,
    output_folder,
    positive,
    scores,
    softmax,
    weighted,
)
from mlra_jax.command import Parser, run
from mlra_jax.config import LatentConfig
from mlra_jax.data.journal import one_tokenizer
from mlra_jax.data.pipeline import make_validation_batches
from mlra_jax.data.sources import load_source, token_files
from mlra_jax.data.tokenizers import get_tokenizer
from mlra_jax.files import whole_figure, whole_file


def read(
    subject: Subject, tokens_BT: np.ndarray, layers: int | None = None
) -> list[dict[str, Any]]:
    """What the branches of each layer do with a text; JSON-ready.

    Args:
      subject: from `opened`.
      tokens_BT: int32.
      layers: only the first so many.

    Returns:
      for each layer, by name:
        `entropy`: `[R, H]` by branch and head, of the attention of each query, in nats, less that
          of a query that looks at all it sees alike (0: looks at all alike; negative: at less).
        `distance`: `[R, H]`, mean number of tokens that it looks back.
        `first`: `[R, H]`, part of the attention that goes to the first token.
        `overlap`: `[R, R]`, the attention that two branches of a head have in common (1: the
          same), mean over heads.
        `key_spectrum`, `value_spectrum`: latent family, `[L, C]`: singular values of each latent's
          up-projections of all its heads, the largest 1; not of a base.
        `groups`: latent family, that many latents are a branch's.
    """
    x_BTD, found = subject.embed(tokens_BT), []
    for layer in range(min(layers or subject.config.num_layers, subject.config.num_layers)):
        block = subject.block(layer)
        x_BTD, seen = _attention(block, x_BTD)
        measured = {name: np.asarray(x, np.float64).tolist() for name, x in seen.items()}
        found.append(measured | _spectra(block.attention))
    return found


@nnx.jit
def _attention(block, x_BTD):
    attention, (B, T) = block.attention, x_BTD.shape[:2]
    positions_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    y = attention.inputs(block.attention_norm(x_BTD))
    q, k, v = attention.operands(y, positions_BT, positions_BT)
    weights = softmax(scores(attention, q, k).whole)
    H = attention.config.num_heads
    w_BRHTS = weights.reshape(B, -1, H, T, T)
    distance = jnp.maximum(positions_BT[0][:, None] - positions_BT[0], 0)
    # A first query has nothing to choose from.
    chosen = w_BRHTS[:, :, :, 1:]
    entropy = -jax.scipy.special.xlogy(chosen, chosen).sum(-1) - jnp.log(jnp.arange(2.0, T + 1))
    common = lambda w_BHTS: jnp.minimum(w_BRHTS, w_BHTS[:, None]).sum(-1).mean((0, 2, 3))
    seen = {
        "entropy": entropy.mean((0, 3)),
        "distance": (w_BRHTS * distance).sum(-1).mean((0, 3)),
        "first": chosen[..., 0].mean((0, 3)),
        "overlap": jax.lax.map(common, jnp.moveaxis(w_BRHTS, 1, 0)),
    }
    return block._rest(x_BTD, attention.result(y, weighted(weights, v))), seen


def _spectra(attention) -> dict[str, list]:
    a = attention.config
    if not isinstance(a, LatentConfig):
        return {}

    def spectrum(projection) -> list:
        kernel_PCK = np.asarray(projection.kernel[...], np.float64)
        by_latent = kernel_PCK.reshape(a.num_latents, -1, *kernel_PCK.shape[1:])
        flat_LCE = np.moveaxis(by_latent, 1, 2).reshape(a.num_latents, a.latent_head_dim, -1)
        values_LC = np.linalg.svd(flat_LCE, compute_uv=False)
        return (values_LC / values_LC[:, :1]).tolist()

    found = {"key_spectrum": spectrum(attention.k_up), "value_spectrum": spectrum(attention.v_up)}
    return found | {"groups": a.groups}


def effective_rank(spectrum: Sequence[float]) -> float:
    """exp of the entropy of the squared singular values: how many directions carry the product."""
    shares = np.square(spectrum) / np.square(spectrum).sum()
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def table(layers: Sequence[dict[str, Any]]) -> str:
    """A line for each layer and branch, means over heads (and latents); ranks are effective."""
    names = ("layer", "branch", "entropy", "distance", "first", "overlap", "key rank", "value rank")
    lines = ["".join(f"{name:>11}" for name in names)]
    for number, layer in enumerate(layers):
        R = len(layer["entropy"])
        for r in range(R):
            values = [np.mean(layer[name][r]) for name in ("entropy", "distance", "first")]
            others = [x for i, x in enumerate(layer["overlap"][r]) if i != r]
            values.append(np.mean(others) if others else None)
            for what in ("key_spectrum", "value_spectrum"):
                G = layer.get("groups", 0)
                latents = layer.get(what, [])[r * G : (r + 1) * G]
                values.append(np.mean([effective_rank(x) for x in latents]) if latents else None)
            cells = [f"{number:11}{r:11}", *("-" if x is None else f"{x:.2f}" for x in values)]
            lines.append("".join(f"{cell:>11}" for cell in cells))
    return "\n".join(lines)


def save(name: str, layers: Sequence[dict[str, Any]], folder: Path) -> None:
    """Writes `branches.json` and `branches.png`."""
    import matplotlib.figure

    with whole_file(folder / "branches.json") as file:
        json.dump({"model": name, "layers": list(layers)}, file)
    figure = matplotlib.figure.Figure(figsize=(13, 8), layout="constrained")
    panels = figure.subplots(2, 3).ravel()
    R = len(layers[0]["entropy"])
    for axes, what, title, unit in (
        (panels[0], "entropy", "entropy less that of a uniform look", "nats"),
        (panels[1], "distance", "distance looked back", "tokens"),
        (panels[2], "first", "attention that goes to the first token", "part of all attention"),
    ):
        for r in range(R):
            by_head = np.array([layer[what][r] for layer in layers])
            axes.plot(by_head.mean(1), "-o", markersize=3, color=f"C{r}", label=f"branch {r}")
            axes.fill_between(range(len(layers)), *np.quantile(by_head, (0.1, 0.9), 1), alpha=0.15)
        axes.set(xlabel="layer", ylabel=unit, title=title)
        axes.xaxis.get_major_locator().set_params(integer=True)
    panels[0].fill_between([], [], [], color="gray", alpha=0.3, label="10 to 90% of the heads")
    panels[0].legend(fontsize=8)
    overlap = np.mean([layer["overlap"] for layer in layers], 0)
    image = panels[3].imshow(overlap, vmin=0, vmax=1)
    panels[3].set(
        title="attention in common, mean of all layers",
        xlabel="branch",
        ylabel="branch",
        xticks=range(R),
        yticks=range(R),
    )
    figure.colorbar(image, ax=panels[3], label="part in common")
    for axes, what in zip(panels[4:], ("key_spectrum", "value_spectrum"), strict=True):
        for number, layer in enumerate(layers):
            for r, values in enumerate(layer.get(what, ())):
                label = "" if r else f"layer {number}"
                axes.plot(values, color=f"C{number % 10}", linewidth=0.8, label=label)
        axes.set(
            title=f"up-projections of latents to {what.removesuffix('_spectrum')}s",
            xlabel="number of the singular value",
            ylabel="singular value, of the largest",
        )
        axes.set_visible(bool(axes.lines))
    if panels[4].lines:
        panels[4].legend(fontsize=7, ncols=2)
    whole_figure(folder / "branches.png", figure, dpi=110)


def text_tokens(subject: Subject, source: str, rows: int, length: int) -> np.ndarray:
    """The beginning of a text's windows, int32 `[rows, length]`, as the model's tokenizer has it.

    Raises FileNotFoundError, ValueError, ConnectionError as `load_source` and `get_tokenizer`.
    """
    files = token_files(source)
    one_tokenizer(files, subject.tokenizer, "the checkpoint's", "give text, or files of that one")
    tokenizer = None if source.endswith(".bin") else get_tokenizer(subject.tokenizer or "gpt2")
    vocab_size = subject.config.vocab_size
    loaded = load_source(source, tokenizer=tokenizer, vocab_size=vocab_size)
    batches = make_validation_batches(
        loaded, tokenizer=None, vocab_size=vocab_size, context_length=length, global_batch=rows
    )
    return next(iter(batches))["inputs"]


def main(argv: list[str] | None = None) -> int:
    """Reads as the flags say; see `command.run` for the exit codes."""
    parser = Parser("mlra_jax.analysis.branches", "What each branch attends to.")
    parser.add_argument("--checkpoint", required=True, help="training run or converted checkpoint")
    add_common_flags(parser)
    parser.add_argument("--source", default="pydoc", help="text or token file, its held-out end")
    parser.add_argument("--rows", type=positive, default=4, help="pieces of the text")
    parser.add_argument("--length", type=positive, default=128, help="tokens of a piece")
    flags = parser.parse_args(argv)
    if flags.length < 2:
        parser.error("--length must be at least 2: a single token sees nothing but itself")

    def work():
        output = output_folder(flags.output)
        subject = opened(flags.checkpoint, flags.step)
        tokens_BT = text_tokens(subject, flags.source, flags.rows, flags.length)
        layers = read(subject, tokens_BT, flags.layers)
        print(table(layers))
        if output:
            save(subject.name, layers, output)

    return run(parser, work)


if __name__ == "__main__":
    sys.exit(main())
