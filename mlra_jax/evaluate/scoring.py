"""Log-probabilities of given tokens, and text up to a stop string."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from mlra_jax import sharding
from mlra_jax.data.tokenizers import StreamDecoder, Tokenizer
from mlra_jax.decoder import Decoder
from mlra_jax.generation import Sampling, Stream

# float32 logits that one device holds at a time.
_LOGITS_AT_ONCE = 1 << 26
_SHORTEST = 32

Tokens = Sequence[int]
Progress = Callable[[int], object]


class Kept(Protocol):
    """Answers by request, from this call or earlier ones: a dictionary, or `stored.Answers`."""

    def get(self, request: Any) -> Any:
        """The answer, None if there is none."""

    def update(self, answers: Mapping[Any, Any]) -> None:
        """Keeps these, too."""


def token_scores(
    model: Decoder, inputs_BT: np.ndarray, targets_BT: np.ndarray
) -> tuple[jax.Array, jax.Array]:
    """(log-probability of each target, whether greedy decoding gives it), on their way.

    Probabilities are over the whole vocabulary, its padding included, as in training; greedy
    decoding never takes padding.

    Args:
      model: from `load_model` or `Decoder.from_model`.
      inputs_BT, targets_BT: int32 `[B, T]`; B a multiple of the devices that split the batch.

    Returns:
      float32 `[B, T]` and bool `[B, T]`, whole on every device.
    """
    B, T = inputs_BT.shape
    rows = B // sharding.size(model.mesh, sharding.BATCH)
    vocabulary = -(-model.config.vocab_size // sharding.size(model.mesh, sharding.MODEL))
    chunks = -(-T * rows * vocabulary // _LOGITS_AT_ONCE)
    placed = jax.device_put((inputs_BT, targets_BT), sharding.named(model.mesh, "batch", "length"))
    return _token_scores(model, *placed, chunks=chunks)


@functools.partial(jax.jit, static_argnames="chunks")
def _token_scores(model, inputs_BT, targets_BT, *, chunks):
    B, T = inputs_BT.shape
    chunk = -(-T // chunks)
    pad = chunks * chunk - T

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, chunks, chunk, *x.shape[2:]), 1, 0)

    def join(x):
        whole = jnp.moveaxis(x, 0, 1).reshape(B, chunks * chunk)[:, :T]
        return sharding.constrain(whole, model.mesh, None, None)

    def score(arrays):
        x_BTD, targets_BT = arrays
        logits_BTV = model.logits(x_BTD)
        target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
        real_V = jnp.arange(logits_BTV.shape[-1]) < model.vocabulary.num_tokens
        real_BTV = jnp.where(real_V, logits_BTV, -jnp.inf)
        greedy_BT = jnp.argmax(real_BTV, axis=-1) == targets_BT
        return target_BT - jax.nn.logsumexp(logits_BTV, axis=-1), greedy_BT

    scores = jax.lax.map(score, (cut(model.hidden(inputs_BT)), cut(targets_BT)))
    return join(scores[0]), join(scores[1])


def check_batch(model: Decoder, batch: int) -> None:
    """Raises ValueError when `batch` rows do not divide over the devices that split a batch."""
    ways = sharding.size(model.mesh, sharding.BATCH)
    if batch < 1 or batch % ways:
        raise ValueError(
            f"a batch of {batch} does not divide over the {ways} devices that split the batch; "
            f"give a multiple of {ways}"
        )


def loglikelihood(
    model: Decoder,
    requests: Sequence[tuple[Tokens, Tokens]],
    *,
    batch: int = 8,
    max_length: int | None = None,
    progress: Progress | None = None,
    kept: Kept | None = None,
) -> list[tuple[float, bool]]:
    """log p(continuation | context) in nats, and whether greedy decoding would continue so.

    Requests run longest first in batches of about one length; the answers come in the order of the
    requests. A context that is too long loses its beginning.

    Args:
      model: as for `token_scores`.
      requests: (context, continuation) as token lists, neither empty.
      batch: sequences at a time.
      max_length: tokens that the model sees, by default its `context_length`.
      progress: told the number of answers, batch by batch.
      kept: answers that are there are not computed again, new ones are put there batch by batch.
        The batches are the same as without: what is gone on with ends with the same numbers.

    Raises:
      ValueError: an empty context or continuation, a continuation longer than `max_length`, a token
        outside the vocabulary, a batch that does not divide over the mesh, a score that is not
        finite.
    """
    check_batch(model, batch)
    max_length = max_length or model.config.context_length
    sequences = []
    for i, (context, continuation) in enumerate(requests):
        if not len(context) or not len(continuation):
            raise ValueError(
                f"request {i} has no {'continuation' if len(context) else 'context'}: "
                "give at least one token (end-of-text where there is no context)"
            )
        if len(continuation) > max_length:
            raise ValueError(
                f"request {i} has a continuation of {len(continuation)} tokens, and the model sees "
                f"{max_length}: cut it with rolling_windows"
            )
        sequences.append([*context, *continuation][-max_length - 1 :])
        _check_tokens(i, sequences[-1], model.config.vocab_size)

    names = [(tuple(context), tuple(rest)) for context, rest in requests]
    answers = [_known(kept, name) for name in names]
    groups = _score_groups(model, sequences, answers, batch, max_length, progress)
    for group, scores in _ahead(groups):
        log_probs_BT, greedy_BT = (np.asarray(x) for x in scores)
        for row, i in enumerate(group):
            end = len(sequences[i]) - 1
            part = slice(end - len(requests[i][1]), end)
            log_prob = float(log_probs_BT[row, part].sum(dtype=np.float64))
            if not math.isfinite(log_prob):
                raise ValueError(
                    f"the score of request {i} is not finite: the weights are damaged, or float16 "
                    "is too narrow for them"
                )
            answers[i] = log_prob, bool(greedy_BT[row, part].all())
        _note(kept, group, names, answers, progress)
    return answers


def _score_groups(model, sequences, answers, batch, max_length, progress):
    for group in _unanswered([len(s) for s in sequences], answers, batch, progress):
        longest = len(sequences[group[0]]) - 1
        tokens_BT = np.zeros((batch, min(_bucket(longest), max_length) + 1), np.int32)
        for row, i in zip(tokens_BT, group, strict=False):
            row[: len(sequences[i])] = sequences[i]
        yield group, token_scores(model, tokens_BT[:, :-1], tokens_BT[:, 1:])


def _known(kept: Kept | None, name: Any) -> Any:
    answer = None if kept is None else kept.get(name)
    return tuple(answer) if isinstance(answer, list) else answer


def _note(kept: Kept | None, group: list[int], names: list, answers: list, progress) -> None:
    """A batch is done."""
    if kept is not None:
        kept.update({names[i]: answers[i] for i in group})
    if progress:
        progress(len(group))


def _unanswered(
    lengths: Sequence[int], answers: Sequence, batch: int, progress: Progress | None
) -> Iterator[list[int]]:
    """The batches of all, each without what is answered in it."""
    for group in _batches(lengths, batch):
        left = [i for i in group if answers[i] is None]
        if progress and len(left) < len(group):
            progress(len(group) - len(left))
        if left:
            yield left


def rolling_windows(
    tokens: Tokens, prefix: int, max_length: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Cuts a long text into requests that predict each of its tokens once.

    Windows of `max_length` tokens follow one another, each after the one token before it (`prefix`
    before the first); the last one, if shorter, sees as many earlier tokens as fit.
    """
    sequence = [prefix, *tokens]
    for start in range(0, len(tokens), max_length):
        continuation = sequence[start + 1 : start + 1 + max_length]
        first = max(0, start + len(continuation) - max_length)
        yield sequence[first : start + 1], continuation


def generate_until(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[Tokens],
    *,
    until: Sequence[str] = (),
    max_new_tokens: int = 256,
    batch: int = 8,
    max_length: int | None = None,
    sampling: Sampling | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    kept: Kept | None = None,
) -> list[str]:
    """The text that follows each prompt, up to and without the first of the strings `until`.

    End-of-text ends it too. A prompt that leaves no room for the new tokens loses its beginning.

    Args:
      model: as for `token_scores`.
      tokenizer: the model's.
      prompts: token lists, none empty.
      until: stop strings, wherever they fall between the tokens.
      max_new_tokens: at most so many, below `max_length`.
      batch, max_length, progress: see `loglikelihood`.
      sampling, seed: by default greedy.
      kept: as for `loglikelihood`; sampled texts are not kept.

    Raises:
      ValueError: as `mlra_jax.generate`.
    """
    check_batch(model, batch)
    room = (max_length or model.config.context_length) - max_new_tokens
    if room < 1:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} leaves no room for a prompt in the "
            f"{room + max_new_tokens} tokens that the model sees"
        )
    prompts = [list(prompt)[-room:] for prompt in prompts]
    if kept is not None and sampling is not None and not sampling.greedy:
        kept = None
    names = [(tuple(prompt), tuple(until), max_new_tokens) for prompt in prompts]
    texts = [_known(kept, name) for name in names]
    for group in _unanswered([len(p) for p in prompts], texts, batch, progress):
        rows = [_Row(tokenizer, until) for _ in group]
        steps = Stream(
            model,
            # The batch is always full, so that its size is compiled once.
            [prompts[i] for i in group + [group[-1]] * (batch - len(group))],
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
        )
        for tokens_B in steps:
            for row, token in zip(rows, tokens_B, strict=False):
                row.push(token)
            if all(row.ended for row in rows):
                break
        for i, row in zip(group, rows, strict=True):
            texts[i] = row.close()
        _note(kept, group, names, texts, progress)
    return texts


class _Row:
    """The text of one row until a stop string."""

    def __init__(self, tokenizer: Tokenizer, until: Sequence[str]):
        self.tokenizer, self.until = tokenizer, [stop for stop in until if stop]
        self.decoder, self.text, self.ended = StreamDecoder(tokenizer), "", False

    def push(self, token: int) -> None:
        if not self.ended:
            self._add(self.decoder.push(token))
            self.ended = self.ended or token == self.tokenizer.end_of_text

    def close(self) -> str:
        if not self.ended:
            self._add(self.decoder.flush())
        return self.text

    def _add(self, text: str) -> None:
        self.text += text
        found = [at for stop in self.until if (at := self.text.find(stop)) >= 0]
        if found:
            self.text, self.ended = self.text[: min(found)], True


def _batches(lengths: Sequence[int], batch: int) -> Iterator[list[int]]:
    """Indices, the longest first: running out of memory shows at once, and lengths are alike."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for start in range(0, len(order), batch):
        yield order[start : start + batch]


def _bucket(length: int) -> int:
    """`length` rounded up to 2 or 3 times a power of two: few programs, little padding."""
    size = _SHORTEST
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def _ahead(items: Iterator) -> Iterator:
    """The same items, each when the next one has been asked for: the device never waits."""
    pending = None
    for item in items:
        if pending is not None:
            yield pending
        pending = item
    if pending is not None:
        yield pending


def _check_tokens(request: int, tokens: Tokens, vocab_size: int) -> None:
    wrong = next((t for t in tokens if not 0 <= t < vocab_size), None)
    if wrong is not None:
        raise ValueError(
            f"request {request} has token {wrong}, and the model knows 0 to {vocab_size - 1}: "
            "was it encoded with another tokenizer?"
        )
