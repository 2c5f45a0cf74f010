"""Perplexity, time and memory of long streams by cache policy, on a trained model.

    python -m benchmarks.long_streams --checkpoint=DIR --tokens=FILE.bin [--length=64K] [--rows=4]
                                      [--policies=full,window:2048,ladder:2048] [--output=FOLDER]
    python -m benchmarks.long_streams --input=FOLDER/long_streams.json [--output=FOLDER]

The last tokens of the file are rows of one stream each: `length` tokens and the one behind them.
Each is read on in chunks, as prompts are, under every policy; beside them stands what the model
gives in windows of its trained context, each from its beginning. `FOLDER/long_streams.json` and
`.png` have the perplexity of each stretch of so many tokens, the milliseconds a token and the bytes
that the device holds behind each chunk, where it counts them. A step is one token of each row with
the cache as it is at the end.
"""

import functools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from benchmarks.models import bytes_per_device, parse_size, peak_gigabytes
from mlra_jax import cache as kv
from mlra_jax.command import Parser, run
from mlra_jax.data import token_file
from mlra_jax.decoder import Decoder
from mlra_jax.evaluate.scoring import token_scores
from mlra_jax.files import whole_figure, whole_file
from mlra_jax.generation import programs
from mlra_jax.loading import load_model

_STEPS = 20


@functools.partial(jax.jit, donate_argnames="cache")
def _score(decoder: Decoder, cache: kv.Cache, tokens_BT: jax.Array, targets_BT: jax.Array):
    """(loss of each target, the cache with the tokens)."""
    x_BTD, cache = decoder.read(tokens_BT, cache)
    logits_BTV = decoder.logits(x_BTD)
    target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BTV, axis=-1) - target_BT, cache


def stream(decoder: Decoder, tokens_BT: np.ndarray, word: str, chunk: int) -> dict[str, Any]:
    """Reads the rows under a policy (`full` keeps all): losses, times, bytes. JSON-ready."""
    B, T = tokens_BT.shape[0], tokens_BT.shape[1] - 1
    policy = None if word == "full" else kv.parse_policy(word)
    capacity = policy.slots if policy else kv.round_capacity(T + _STEPS, decoder.mesh)
    _, cache = programs.empty(decoder, batch=B, capacity=capacity)
    held = bytes_per_device(cache)
    part = jax.ShapeDtypeStruct((B, chunk), jnp.int32)
    compiled = _score.lower(decoder, cache, part, part).compile()
    losses, seconds, in_use, filled = [], [], [], 0
    for start in tqdm(range(0, T, chunk), desc=word, unit="chunk"):
        began = time.perf_counter()
        if policy and filled + chunk > policy.slots:
            cache = programs.make_room(decoder, cache, policy=policy, new=chunk)
            filled -= policy.dropped
        pair = (tokens_BT[:, start + i : start + i + chunk] for i in (0, 1))
        loss_BT, cache = compiled(decoder, cache, *pair)
        losses.append(np.asarray(loss_BT, np.float64))
        seconds.append(time.perf_counter() - began)
        in_use.append((jax.devices()[0].memory_stats() or {}).get("bytes_in_use"))
        filled += chunk
    if policy:
        cache = programs.make_room(decoder, cache, policy=policy, new=_STEPS + 1)
    steps = []
    for _ in range(_STEPS + 1):
        began = time.perf_counter()
        logits_BV, cache = programs.step(decoder, cache, tokens_BT[:, 0])
        jax.block_until_ready(logits_BV)
        steps.append(time.perf_counter() - began)
    return dict(
        policy=word,
        losses=np.concatenate(losses, axis=1).mean(0).tolist(),
        milliseconds_per_token=[1e3 * s / (B * chunk) for s in seconds],
        milliseconds_per_step=1e3 * statistics.median(steps[1:]),
        cache_bytes=held,
        bytes_in_use=in_use,
        chunk_GB=peak_gigabytes(compiled),
    )


def in_windows(decoder: Decoder, tokens_BT: np.ndarray, window: int) -> list[float]:
    """The losses of the same targets, each window read from its beginning."""
    found = []
    for start in tqdm(range(0, tokens_BT.shape[1] - 1, window), desc="windows"):
        pair = (tokens_BT[:, start + i : start + i + window] for i in (0, 1))
        found.append(-np.asarray(token_scores(decoder, *pair)[0], np.float64).mean(0))
    return np.concatenate(found).tolist()


def by_stretch(losses: list[float], stretch: int) -> list[float]:
    """The perplexity of each stretch of the stream."""
    whole = len(losses) // stretch * stretch
    return np.exp(np.reshape(losses[:whole], (-1, stretch)).mean(1)).tolist()


def summary(results: list[dict[str, Any]], windows: list[float]) -> str:
    """A line for each policy: perplexity over the stream beside that in windows."""
    lines = [
        f"{'':16}{'perplexity':>12}{'to windows':>12}{'ms/token first, last':>24}{'ms/step':>9}"
        f"{'cache MB':>10}"
    ]
    for result in results:
        count = min(len(result["losses"]), len(windows))
        ours, theirs = (np.exp(np.mean(x[:count])) for x in (result["losses"], windows))
        times, step = result["milliseconds_per_token"], result["milliseconds_per_step"]
        # The first chunk still waits for the host.
        first, last = (statistics.median(x) for x in (times[1:5] or times, times[-4:]))
        lines.append(
            f"{result['policy']:16}{ours:12.3f}{ours / theirs:12.4f}{first:16.4f}{last:8.4f}"
            f"{step:9.2f}{result['cache_bytes'] / 1e6:10.1f}"
        )
    return "\n".join(lines)


def draw(found: dict[str, Any], path: Path) -> None:
    """Perplexity, time and memory by position, of what `long_streams.json` holds."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(14, 4.5), layout="constrained")
    perplexity, times, memory = figure.subplots(1, 3)
    read = found["chunk"] * len(found["policies"][0]["milliseconds_per_token"])
    ends = lambda values: np.linspace(0, read, len(values) + 1)[1:]
    for i, result in enumerate(found["policies"]):
        style: dict = dict(color=f"C{i}", label=result["policy"])
        values = result["perplexity"]
        perplexity.plot(ends(values), values, "o-", markersize=3, **style)
        values = result["milliseconds_per_token"]
        times.plot(ends(values), values, **style)
        values = result["bytes_in_use"]
        if None not in values:
            memory.plot(ends(values), np.array(values) / 1e6, **style)
    style = dict(color="grey", linestyle="--", label="in windows of the trained context")
    perplexity.plot(ends(found["windows"]), found["windows"], **style)
    perplexity.set_ylabel(f"perplexity of {read // len(found['windows'])} tokens")
    times.set_ylabel("ms a token of a row; peaks: a program is compiled")
    memory.set_ylabel("MB in use on the device")
    for axes in (perplexity, times, memory):
        axes.set(xlabel="tokens", yscale="log")
        axes.grid(alpha=0.3)
    perplexity.legend(fontsize=8)
    whole_figure(path, figure)


def main(argv: list[str] | None = None) -> int:
    parser = Parser("benchmarks.long_streams", "Long streams by cache policy.")
    add = parser.add_argument
    add("--checkpoint", help="folder of a training run")
    add("--tokens", help=".bin file; its end is read")
    add("--length", type=parse_size, default=65536, help="tokens of a row, 64K")
    add("--rows", type=int, default=4, help="streams side by side")
    add("--policies", default="full,window:2048,ladder:2048", help="joined by commas")
    add("--dtype", help="of the products")
    add("--output", default="runs/long_streams", help="folder for the results")
    add("--input", help="long_streams.json of an earlier run, to draw it again")
    flags = parser.parse_args(argv)
    if not flags.input and not (flags.checkpoint and flags.tokens):
        parser.error("give --checkpoint and --tokens, or --input")

    def work():
        folder = Path(flags.output)
        folder.mkdir(parents=True, exist_ok=True)
        if flags.input:
            return draw(json.loads(Path(flags.input).read_text()), folder / "long_streams.png")
        decoder = load_model(flags.checkpoint, dtype=flags.dtype)
        words, window = flags.policies.split(","), decoder.config.context_length
        given = [kv.parse_policy(word) for word in words if word != "full"]
        chunk = min([policy.dropped for policy in given] + [window])
        tokens, wanted = token_file.read(Path(flags.tokens)), flags.rows * (flags.length + 1)
        if len(tokens) < wanted:
            raise ValueError(
                f"--tokens={flags.tokens} has {len(tokens):,} tokens and --length={flags.length} "
                f"--rows={flags.rows} wants {wanted:,}"
            )
        if flags.length % window or flags.length % chunk:
            raise ValueError(
                f"--length={flags.length} is to be a multiple of the trained context of {window} "
                f"and of the chunk of {chunk}, a quarter of a policy's slots at most"
            )
        tokens_BT = np.asarray(tokens[-wanted:], np.int32).reshape(flags.rows, -1)
        windows = in_windows(decoder, tokens_BT, window)
        results = []
        for word in words:
            results.append(stream(decoder, tokens_BT, word, chunk))
            device = jax.devices()[0].device_kind
            found = dict(device=device, jax=jax.__version__, rows=flags.rows, chunk=chunk)
            with whole_file(folder / "long_streams.json") as file:
                stretches = [
                    result | {"losses": None, "perplexity": by_stretch(result["losses"], window)}
                    for result in results
                ]
                found |= dict(windows=by_stretch(windows, window), policies=stretches)
                json.dump(found, file, indent=1)
            draw(found, folder / "long_streams.png")
        print(summary(results, windows))

    return run(parser, work)


if __name__ == "__main__":
    sys.exit(main())
