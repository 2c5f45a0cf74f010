"""Scores of given text against NumPy on the logits; text up to stop strings."""

import dataclasses

import numpy as np
import pytest
from flax import nnx

import mlra_jax
from mlra_jax.data.tokenizers import ByteTokenizer
from mlra_jax.decoder import Vocabulary
from mlra_jax.evaluate import generate_until, loglikelihood, rolling_windows

FORWARD = nnx.jit(lambda model, tokens_BT: model(tokens_BT))


@pytest.fixture(scope="module")
def model(released):
    loaded = mlra_jax.load_model(released("mlra_2"), dtype="float32")
    # The last six ids are padding.
    return dataclasses.replace(loaded, vocabulary=Vocabulary(90))


def draw(*lengths, vocab_size=90):
    rng = np.random.default_rng(sum(lengths))
    return tuple(rng.integers(0, vocab_size, n).tolist() for n in lengths)


def by_hand(model, context, continuation, max_length=64, num_tokens=90):
    tokens = (context + continuation)[-max_length - 1 :]
    # One length for all, so that one program is compiled: what follows changes nothing before it.
    padded = np.zeros((1, max_length), np.int32)
    padded[0, : len(tokens) - 1] = tokens[:-1]
    logits = np.asarray(FORWARD(model, padded), np.float64)[0, : len(tokens) - 1]
    logits = logits[-len(continuation) :]
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    greedy = logits[:, :num_tokens].argmax(-1).tolist() == list(continuation)
    return log_probs[np.arange(len(continuation)), continuation].sum(), greedy


def test_loglikelihood_equals_numpy_in_the_order_of_the_requests(model):
    requests = [draw(5, 3), draw(40, 7), draw(1, 1), draw(70, 4), draw(2, 30)]
    context = draw(11)[0]
    greedy = mlra_jax.generate(model, [context], max_new_tokens=4)[0]
    requests += [(context, greedy), (context, greedy[:-1] + [(greedy[-1] + 1) % 90])]
    seen = []
    found = loglikelihood(model, requests, batch=4, progress=seen.append)
    wanted = [by_hand(model, *request) for request in requests]
    assert np.allclose([f[0] for f in found], [w[0] for w in wanted], rtol=1e-5, atol=1e-5)
    assert [f[1] for f in found] == [w[1] for w in wanted]
    assert found[5][1] and not found[6][1]
    assert sum(seen) == len(requests)


def test_padding_is_never_the_greedy_token_and_always_part_of_the_sum(model):
    """With so few real ids that the likeliest of all is mostly padding."""
    model = dataclasses.replace(model, vocabulary=Vocabulary(8))
    context = draw(9)[0]
    padded = np.array([context + [0] * (64 - len(context))])
    logits = np.asarray(FORWARD(model, padded))[0, len(context) - 1]
    best, padding = int(logits[:8].argmax()), int(logits.argmax())
    assert padding >= 8
    requests = [(context, [best]), (context, [padding]), (context, [(best + 1) % 8])]
    found = loglikelihood(model, requests, batch=4)
    wanted = [by_hand(model, *request, num_tokens=8) for request in requests]
    assert [flag for _, flag in found] == [flag for _, flag in wanted] == [True, False, False]
    assert np.allclose([f[0] for f in found], [w[0] for w in wanted], rtol=1e-5)
    assert max(found)[0] == found[1][0]


def test_logits_in_parts_of_any_length_give_the_same(model, monkeypatch):
    """Also where the parts do not divide the tokens: the last one is filled up, and cut off."""
    requests = [draw(20, 12), draw(3, 29)]
    whole = loglikelihood(model, requests, batch=2)
    for positions in (5, 31):
        monkeypatch.setattr("mlra_jax.evaluate.scoring._LOGITS_AT_ONCE", positions * 2 * 96)
        found = loglikelihood(model, requests, batch=2)
        assert np.allclose([f[0] for f in found], [w[0] for w in whole], rtol=1e-6)
        assert [f[1] for f in found] == [w[1] for w in whole]


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 16, 21])
def test_rolling_windows_predict_each_token_once_with_all_the_context_that_fits(length):
    tokens, limit = list(range(100, 100 + length)), 8
    windows = list(rolling_windows(tokens, 7, limit))
    assert sum((continuation for _, continuation in windows), []) == tokens
    before = 0
    for context, continuation in windows:
        assert context == ([7] + tokens)[: before + 1][-len(context) :]
        fits = limit + 1 - len(continuation)
        assert len(context) == min(fits, before + 1)
        before += len(continuation)


def test_requests_that_cannot_be_scored(model):
    for request, message in (
        (([], [1]), "request 0 has no context"),
        (([1], []), "request 0 has no continuation"),
        (([1], [2] * 65), "continuation of 65 tokens, and the model sees 64"),
        (([1], [96]), "token 96, and the model knows 0 to 95"),
    ):
        with pytest.raises(ValueError, match=message):
            loglikelihood(model, [request])


class Letters(ByteTokenizer):
    """Ids of the small vocabulary as characters; 95 ends a text."""

    vocab_size, end_of_text = 96, 95

    def token_bytes(self, token):
        return b"" if token == self.end_of_text else bytes([token + 32])


def test_text_ends_before_the_first_stop_string(model):
    prompts = list(draw(9, 3, 14))
    whole = mlra_jax.generate(model, prompts, max_new_tokens=12)
    texts = ["".join(chr(t + 32) for t in row) for row in whole]
    settings = dict(max_new_tokens=12, batch=2)
    assert generate_until(model, Letters(), prompts, **settings) == texts
    # Two characters long, so that it falls across tokens.
    stop, other = texts[0][4:6], texts[2][7]
    found = generate_until(model, Letters(), prompts, until=[other, stop], **settings)
    wanted = []
    for text in texts:
        places = [text.find(s) for s in (stop, other) if s in text]
        wanted.append(text[: min(places)] if places else text)
    assert found == wanted and found != texts
    # What leaves no room loses its beginning.
    long = [prompts[2] * 5]
    assert generate_until(model, Letters(), long, max_length=30, **settings) == generate_until(
        model, Letters(), [long[0][-18:]], **settings
    )
