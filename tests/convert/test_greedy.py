"""Greedy decoding of every released variant, and the ids that are never drawn."""

import dataclasses

import numpy as np
import pytest
from flax import nnx

import mlra_jax
from mlra_jax.decoder import Vocabulary

from .files import FOLDERS

NEW = 9

forward = nnx.jit(lambda model, tokens_BT: model(tokens_BT))


def prompts(lengths, vocab_size, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, length).tolist() for length in lengths]


def argmax_of_whole_passes(model, rows):
    """The most likely next token, `NEW` times, each from a pass over all tokens before it."""
    rows = [list(row) for row in rows]
    begun = [len(row) for row in rows]
    for _ in range(NEW):
        tokens_BT = np.zeros((len(rows), max(begun) + NEW), np.int32)
        for filled, row in zip(tokens_BT, rows, strict=True):
            filled[: len(row)] = row
        logits_BTV = np.asarray(forward(model, tokens_BT))
        for row, logits_TV in zip(rows, logits_BTV, strict=True):
            row.append(int(logits_TV[len(row) - 1].argmax()))
    return [row[length:] for row, length in zip(rows, begun, strict=True)]


@pytest.mark.parametrize("name", FOLDERS)
def test_greedy_is_the_argmax_of_whole_passes_alone_and_in_a_ragged_batch(released, name):
    model = mlra_jax.load_model(released(name), dtype="float32")
    batch = prompts((13, 3, 22), model.config.vocab_size)
    wanted = argmax_of_whole_passes(model, batch)
    assert len({token for row in wanted for token in row}) > 3
    assert mlra_jax.generate(model, batch, max_new_tokens=NEW) == wanted
    for prompt, tokens in zip(batch, wanted, strict=True):
        assert mlra_jax.generate(model, [prompt], max_new_tokens=NEW) == [tokens]


def test_padding_of_the_vocabulary_is_never_drawn(released):
    loaded = mlra_jax.load_model(released("mlra_4"), dtype="float32")
    batch = prompts((5, 9, 7, 2), 11)

    def drawn(num_tokens, temperature):
        model = dataclasses.replace(loaded, vocabulary=Vocabulary(num_tokens))
        settings = dict(max_new_tokens=40, temperature=temperature, seed=3)
        return {t for row in mlra_jax.generate(model, batch, **settings) for t in row}

    # So hot that every id is about as likely as the others.
    assert max(drawn(96, 1e6)) >= 50
    assert drawn(11, 1e6) == set(range(11))
    assert max(drawn(11, 0.0)) < 11
    model = dataclasses.replace(loaded, vocabulary=Vocabulary(11))
    with pytest.raises(ValueError, match="token 11, and the model knows 0 to 10"):
        mlra_jax.generate(model, [[11]], max_new_tokens=1)
