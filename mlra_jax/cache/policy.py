"""Streams of any length in a cache of fixed size: which slots stay when a row is full.

A quarter of the slots is given up at a time, and what stays moves together: a token's position is
its slot, so that no distance is longer than the cache, however long the stream (as attention sinks
need it, arXiv 2309.17453). The first few tokens, on which attention rests, always stay.

`window` gives up what is oldest behind them. `ladder` (LaCache, arXiv 2507.14204) gives up half of
the older half, in runs. Each layer keeps other runs than the layer before, like the rungs of a
ladder, so that all layers together lose nothing at once. What stays is halved again each time: the
older a span is, the fewer of its tokens are left.
"""

import dataclasses
import math

import numpy as np

from mlra_jax.config import ConfigError

WORDS = ("window", "ladder")
_SINKS, _RUN, _STEP = 4, 32, 32
"""Tokens that always stay; most slots of a run; what the number of slots is a multiple of."""


@dataclasses.dataclass(frozen=True)
class Policy:
    """`word` is one of `WORDS`, `slots` those of each row."""

    word: str
    slots: int

    @property
    def dropped(self) -> int:
        """Slots of a full row that are given up, and the most tokens that may come at a time."""
        return self.slots // 4

    def kept(self, layer: int, num_layers: int) -> np.ndarray:
        """int32 `[slots - dropped]`: the slots of a full row that stay in a layer, ascending."""
        slots_S = np.arange(self.slots, dtype=np.int32)
        older_S = slots_S - _SINKS
        if self.word == "window":
            gone_S = (older_S >= 0) & (older_S < self.dropped)
        else:
            period = math.gcd(2 * self.dropped, 2 * _RUN)
            # A rung is an eighth of the period; the layers are spread over the eight of them.
            shift = 8 * layer // num_layers * period // 8
            gone_S = (older_S >= 0) & (older_S < 2 * self.dropped)
            gone_S &= (older_S - shift) % period >= period // 2
        return slots_S[~gone_S]


def parse_policy(text: str) -> Policy:
    """The policy that a command line's `ladder:8192` means.

    Raises ConfigError for another word or a number of slots that cannot be.
    """
    word, _, slots = text.partition(":")
    if word not in WORDS or not slots.isdecimal() or int(slots) < 1 or int(slots) % _STEP:
        raise ConfigError(
            f"cache policy {text!r} is none of {', '.join(f'{word}:SLOTS' for word in WORDS)} "
            f"with a multiple of {_STEP} slots, as in ladder:8192"
        )
    return Policy(word, int(slots))
