"""What it costs to make an MLRA of a trained MLA or GQA, and the model with which to train on.

    python -m studies.branching --checkpoint=runs/mla --source=FILE [--branches=4]
                                [--turn=hadamard --destination=models/branched]

prints the loss of the MLA (a GQA becomes one first, `mlra_jax.convert.factored`) and of MLRAs made
of it (`mlra_jax.convert.branched`): each way to turn the latent, with scores multiplied by the
number of branches, by what each slice's share of the variance is of one (TPLA's own way, which
corrects norms, too) and by factors fitted to the text (least squares of the MLA's scores, weighted
by its attention). Turns and factors are taken from the first half of the text's windows, losses
from the second. `--destination` keeps one, fitted, to train on:
`python train.py --config=configs/fine_tune.py:models/branched --workdir=...`.
"""

import dataclasses
import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from mlra_jax import checkpoints, sharding
from mlra_jax import model as models
from mlra_jax.analysis.branches import text_tokens
from mlra_jax.analysis.subject import Subject, of_params, positive
from mlra_jax.command import Parser, run
from mlra_jax.config import GroupedConfig, ModelConfig
from mlra_jax.convert.branched import TURNS, branched, branched_config, turn
from mlra_jax.convert.factored import factored, factored_config
from mlra_jax.decoder import Decoder
from mlra_jax.evaluate.scoring import token_scores
from mlra_jax.files import check_absent

_BATCH = 4


class Seen(NamedTuple):
    """Of one layer and some text."""

    latent_BTC: np.ndarray
    """Of mean square 1, before the norm's weights."""
    q_BTHK: np.ndarray
    """Without rotary part, times the scale of scores."""
    weights_BHTS: np.ndarray


def look(subject: Subject, tokens_BT: np.ndarray) -> list[Seen]:
    """What each layer of an MLA makes of the text."""
    x_BTD, seen = subject.embed(tokens_BT), []
    for layer in tqdm(range(subject.config.num_layers), desc="layers"):
        x_BTD, found = _look(subject.block(layer), x_BTD)
        seen.append(Seen(*map(np.asarray, found)))
    return seen


def input_moments(subject: Subject, tokens_BT: np.ndarray) -> np.ndarray:
    """`[N, D, D]`: second moments of each layer's attention's input."""
    x_BTD, moments = subject.embed(tokens_BT), []
    for layer in tqdm(range(subject.config.num_layers), desc="inputs"):
        block = subject.block(layer)
        moments.append(second_moments(np.asarray(block.attention_norm(x_BTD))))
        x_BTD = block(x_BTD, models.positions(tokens_BT))
    return np.stack(moments)


@nnx.jit
def _look(block, x_BTD):
    attention = block.attention
    positions_BT = models.positions(x_BTD[..., 0])
    y = attention.inputs(block.attention_norm(x_BTD))
    latent_BTC = y["kv_down"] * jax.lax.rsqrt((y["kv_down"] ** 2).mean(-1, keepdims=True))
    q, k, v = attention.operands(y, positions_BT, positions_BT)
    scores_BHTS = attention.scale * jnp.einsum("bthk,bshk->bhts", q, k)
    visible = jnp.tril(jnp.ones(scores_BHTS.shape[-2:], bool))
    weights_BHTS = jax.nn.softmax(jnp.where(visible, scores_BHTS, -jnp.inf), axis=-1)
    o_BTHV = jnp.einsum("bhts,bshv->bthv", weights_BHTS, v)
    q_BTHK = attention.scale * q[..., : attention.config.nope_dim]
    return block._rest(x_BTD, attention.result(y, o_BTHV)), (latent_BTC, q_BTHK, weights_BHTS)


def second_moments(latent_BTC: np.ndarray) -> np.ndarray:
    """`[C, C]`, mean over tokens."""
    flat = latent_BTC.reshape(-1, latent_BTC.shape[-1]).astype(np.float64)
    return flat.T @ flat / len(flat)


def fitted_strengths(seen: Seen, k_up_HCK: np.ndarray, turn_CC: np.ndarray, branches: int):
    """`[R, H]`: by how much each branch's part of the scores comes nearest to all of them.

    `k_up_HCK` has the norm's weights in it.
    """
    asked_BTHC = jnp.einsum("bthk,hck,cu->bthu", seen.q_BTHK, k_up_HCK, turn_CC)
    turned_BTC = jnp.asarray(seen.latent_BTC @ turn_CC)
    parts_R = jnp.split(turned_BTC, branches, axis=-1)
    normed = [x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True)) for x in parts_R]
    product = lambda q, c: jnp.einsum("bthc,bsc->bhts", q, c)
    whole = _centred(product(asked_BTHC, turned_BTC), seen.weights_BHTS)
    found = []
    for q_BTHC, c_BTC in zip(jnp.split(asked_BTHC, branches, axis=-1), normed, strict=True):
        part = _centred(product(q_BTHC, c_BTC), seen.weights_BHTS)
        over = lambda x: (seen.weights_BHTS * x).sum((0, 2, 3))
        found.append(np.asarray(over(whole * part) / jnp.maximum(over(part**2), 1e-12)))
    return np.stack(found)


def _centred(scores_BHTS, weights_BHTS):
    """Softmaxes do not see what all scores have in common."""
    return scores_BHTS - (weights_BHTS * scores_BHTS).sum(-1, keepdims=True)


def loss(config: ModelConfig, params: dict, tokens_BT: np.ndarray) -> float:
    """Nats per token of rows of tokens, each read from its beginning."""
    decoder = Decoder.from_params(config, sharding.make_mesh(), jax.tree.map(jnp.asarray, params))
    batches = np.array_split(tokens_BT, max(1, len(tokens_BT) // _BATCH))
    scores = [np.asarray(token_scores(decoder, x[:, :-1], x[:, 1:])[0]) for x in batches]
    return -float(np.concatenate([x.ravel() for x in scores]).mean())


def convert(config: ModelConfig, params: dict, seen: list[Seen], branches: int, word: str):
    """(turns, fitted strengths, sizes of the slices) of all layers."""
    attention = params["layers"]["attention"]
    gains = np.asarray(attention["kv_norm"]["scale"])
    k_up = np.asarray(attention["k_up"]["kernel"]) * gains[:, None, :, None]
    factor = (config.embed_dim / config.attention.latent_dim) ** 0.5
    k_up = k_up * (factor if config.attention.scaled else 1.0)
    moments = [second_moments(layer.latent_BTC) for layer in seen]
    turns = [turn(word, branches, moments_CC) for moments_CC in moments]
    found = zip(seen, k_up, turns, strict=True)
    fitted = np.stack([fitted_strengths(*x, branches) for x in found])
    squares = [
        np.diag(U.T @ M @ U).reshape(branches, -1) for U, M in zip(turns, moments, strict=True)
    ]
    return np.stack(turns), fitted, np.sqrt(np.mean(squares, axis=-1))


def write(path: str, config: ModelConfig, params: dict, tokenizer: str | None) -> None:
    """A checkpoint that names the tokenizer as the one did that it was made of."""
    described = checkpoints.describe(dataclasses.replace(config, param_dtype="float32"), tokenizer)
    with checkpoints.make_manager(path) as manager:
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
        checkpoints.save(manager, 0, params=params, model=described)


def main(argv: list[str] | None = None) -> int:
    """Converts and compares; see `command.run` for the exit codes."""
    parser = Parser("studies.branching", __doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", required=True, help="training run or converted checkpoint of an MLA or GQA")
    add("--source", required=True, help="text or token file, its held-out end")
    add("--branches", type=positive, default=4, help="of the result")
    add("--latent_dim", type=positive, help="of all of them, for a GQA (default: 4 heads' width)")
    add("--rows", type=positive, default=16, help="windows of the text, half of them to fit")
    add("--length", type=positive, help="tokens of a window (default: the trained context)")
    add("--turn", choices=TURNS, default="hadamard", help="of what is kept")
    add("--destination", help="folder for the result, to train on")
    flags = parser.parse_args(argv)

    def work():
        found = checkpoints.open_checkpoint(flags.checkpoint)
        config, branches = found.model, flags.branches
        if flags.destination:
            check_absent(Path(flags.destination))
        grouped = isinstance(config.attention, GroupedConfig)
        made = factored_config(config, flags.latent_dim) if grouped else config
        branched_config(made, branches)
        _, shapes = models.structure(config, sharding.make_mesh())
        params = found.restore("params", shapes)
        subject = of_params("", config, params, found.tokenizer)
        length = flags.length or config.context_length
        tokens_BT = text_tokens(subject, flags.source, max(2, flags.rows), length)
        half = len(tokens_BT) // 2
        params = jax.device_get(params)
        if grouped:
            print(f"{'gqa':28}loss {loss(config, params, tokens_BT[half:]):.4f}", flush=True)
            params = factored(config, params, input_moments(subject, tokens_BT[:half]), made)
            config, subject = made, of_params("", made, jax.tree.map(jnp.asarray, params))
        seen = look(subject, tokens_BT[:half])
        print(f"{'mla':28}loss {loss(config, params, tokens_BT[half:]):.4f}", flush=True)
        for word in TURNS:
            turns, fitted, sizes = convert(config, params, seen, branches, word)
            alike = np.full_like(fitted, branches)
            for called, *factors in (
                ("x branches", alike),
                ("by shares", alike / sizes[..., None] ** 2, sizes),
                ("fitted", fitted),
            ):
                made = branched(config, params, branches, turns, *factors)
                of_made = loss(*made, tokens_BT[half:])
                print(f"{word + ', ' + called:28}loss {of_made:.4f}", flush=True)
            if word == flags.turn and flags.destination:
                write(flags.destination, *made, found.tokenizer)

    return run(parser, work)


if __name__ == "__main__":
    sys.exit(main())
