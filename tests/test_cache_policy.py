"""Caches of fixed size for streams of any length: what they keep, and what is made of it."""

import numpy as np
import pytest
import tiny
from tiny import random_model

from mlra_jax import cache as kv
from mlra_jax.config import ConfigError
from mlra_jax.decoder import Decoder
from mlra_jax.generation import Stream, generate, padding, programs
from mlra_jax.sharding import make_mesh

SLOTS, STEPS = 32, 40
LENGTHS = (70, 9)
"""Of prompts: one is many chunks, beyond the cache, the other ends in the second."""


def decodable(name="mlra_4", **sizes):
    return Decoder.from_model(random_model(tiny.config(name), make_mesh(**sizes)))


def kept_tokens(policy, prompt, longest, made):
    """What a one-layer model's cache holds at each token that is drawn, by hand."""
    kept, row, held = policy.kept(0, 1), [], []

    def add(tokens, new):
        nonlocal row
        if len(row) + new > SLOTS:
            row = [row[slot] for slot in kept if slot < len(row)]
        row = [*row, *tokens]

    for start in range(0, longest, policy.dropped):
        add(prompt[start : start + policy.dropped], policy.dropped)
    held.append(row)
    for token in made[:-1]:
        add([token], 1)
        held.append(row)
    return held


@pytest.mark.parametrize(
    "name, word, sizes",
    [
        ("mlra_4_base_gated", "ladder", dict(tensor=2)),
        ("gqla_expanded", "window", {}),
        ("tpa", "ladder", {}),
    ],
)
def test_a_long_text_is_made_as_if_what_is_kept_were_all(name, word, sizes, monkeypatch):
    monkeypatch.setattr(padding, "_BUCKET", 1)
    policy, model = kv.parse_policy(f"{word}:{SLOTS}"), decodable(name, **sizes)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, tiny.VOCAB, n).tolist() for n in LENGTHS]
    steps = programs.step._cache_size()
    made = generate(model, prompts, max_new_tokens=STEPS, cache_policy=f"{word}:{SLOTS}")
    assert programs.step._cache_size() <= steps + 1
    held = [
        row
        for prompt, tokens in zip(prompts, made, strict=True)
        for row in kept_tokens(policy, prompt, max(LENGTHS), tokens)
    ]
    assert max(map(len, held)) == SLOTS
    whole = np.zeros((len(held), SLOTS), np.int32)
    for row, tokens in zip(whole, held, strict=True):
        row[: len(tokens)] = tokens
    logits = np.asarray(model(whole))[np.arange(len(held)), [len(row) - 1 for row in held]]
    assert logits.argmax(-1).tolist() == sum(made, [])


def test_the_window_keeps_the_first_tokens_and_the_last():
    kept = kv.parse_policy("window:64").kept(3, 8)
    assert kept.tolist() == [*range(4), *range(4 + 16, 64)]


@pytest.mark.parametrize("layers", [2, 3, 24])
def test_the_layers_of_a_ladder_keep_different_halves_of_the_older_half(layers):
    policy = kv.parse_policy("ladder:256")
    kept = [policy.kept(layer, layers) for layer in range(layers)]
    for slots in kept:
        assert len(slots) == 256 - policy.dropped == 192
        assert set(range(4)) < set(slots) and set(range(132, 256)) < set(slots)
        assert (np.diff(slots) > 0).all()
        # Whole runs of 32, but for the ends.
        assert np.count_nonzero(np.diff(slots) > 1) <= 3
    assert set().union(*kept) == set(range(256)), "together they lose nothing"
    assert len({tuple(slots) for slots in kept}) == min(layers, 8)


def test_what_stays_is_thinned_by_rounds():
    policy, held, spans = kv.parse_policy("ladder:256"), [], []
    for token in range(256 + 20 * 64):
        if len(held) == 256:
            held = [held[slot] for slot in policy.kept(1, 2)]
        held.append(token)
    newest = held[-1]
    spans = [sum(newest - 64 * (i + 1) < t <= newest - 64 * i for t in held) for i in range(2, 8)]
    assert held[:4] == [0, 1, 2, 3] and spans[0] == 64
    assert spans[-1] <= 16 and sorted(spans, reverse=True) == spans


@pytest.mark.parametrize("text", ["ladder", "ladder:", "ladder:0", "ladder:100", "rope:64", "64"])
def test_policies_that_cannot_be(text):
    with pytest.raises(ConfigError, match="is none of window:SLOTS, ladder:SLOTS") as error:
        kv.parse_policy(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(cache_length=64), "leave cache_length out"),
        (dict(tokens_per_call=9), "do not go together: at most 8"),
    ],
)
def test_settings_that_contradict_a_policy(changes, words):
    with pytest.raises(ValueError, match=words):
        Stream(decodable(), [[1]], max_new_tokens=2, cache_policy="window:32", **changes)


def test_cut_rows_are_refused():
    with pytest.raises(ValueError, match="context=2 cuts them: use a mesh with context=1"):
        Stream(decodable(context=2), [[1]], max_new_tokens=2, cache_policy="window:32")
