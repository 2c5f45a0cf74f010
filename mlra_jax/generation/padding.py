"""Prompts of unequal length as one batch."""

from collections.abc import Sequence

import numpy as np

_BUCKET = 64


def pad(prompts: Sequence[Sequence[int]], num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens int32 `[B, T]` filled up on the right, lengths int32 `[B]`).

    T is rounded up so that prompts of similar length share a compiled program. Raises ValueError
    for no prompt, an empty one, or a token outside `0 ... num_tokens - 1`.
    """
    if not len(prompts):
        raise ValueError("no prompts: give at least one list of tokens")
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            raise ValueError(
                f"prompt {i} is text, and a list of tokens is expected: "
                "mlra_jax.loading.tokenizer_of(model).encode(text) gives it"
            )
        if not len(prompt):
            raise ValueError(f"prompt {i} is empty: give it at least one token")
        wrong = next((t for t in prompt if not 0 <= t < num_tokens), None)
        if wrong is not None:
            raise ValueError(
                f"prompt {i} has token {wrong}, and the model knows 0 to {num_tokens - 1}: "
                "was it encoded with another tokenizer?"
            )
    lengths = np.array([len(p) for p in prompts], np.int32)
    tokens = np.zeros((len(prompts), -(-lengths.max() // _BUCKET) * _BUCKET), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, lengths
