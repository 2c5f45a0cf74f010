"""Where a run stands while it stands still: steps that take many times as long as others."""

import collections
import contextlib
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import mlra_jax
from mlra_jax.training.peers import Peers

TIMES = 10
LEAST_SECONDS = 5.0
_FEWEST = 5
_MEMORY = 50
_ANSWER_SECONDS = 3.0
_PACKAGE = Path(mlra_jax.__file__).parent


class Watch:
    """Tells of a step that takes 10 times the median of the last 50, and 5 s at least.

    All processes notice that, as they wait for each other; each tells process 0 where it stands,
    which says so, and names those that do not answer.

    Args:
      say: prints a line, on process 0.
      peers: the other processes, None if there are none.
    """

    def __init__(self, say: Callable[[str], None], peers: Peers | None = None):
        self._say, self._peers = say, peers
        self._main = threading.get_ident()
        self._done = threading.Event()
        self._seconds: collections.deque[float] = collections.deque(maxlen=_MEMORY)
        self._step, self._doing, self._spent = 0, "", 0.0
        self._since: float | None = None
        self._told = 0

    def __enter__(self) -> "Watch":
        threading.Thread(target=self._look, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._done.set()

    def begin(self, step: int) -> None:
        """The step before has ended, and this one begins."""
        if self._step:
            self._seconds.append(self._elapsed())
        if self._told and self._told == self._step:
            self._say(f"step {self._step} has ended after {self._elapsed():.0f} s")
        self._step, self._spent, self._since = step, 0.0, None
        self.goes_on("computing")

    def goes_on(self, doing: str) -> None:
        """What the step is at now."""
        self._spent, self._doing, self._since = self._elapsed(), doing, time.monotonic()

    def rests(self) -> None:
        """What comes now is no part of a step and may last as long as it likes."""
        self._spent, self._since = self._elapsed(), None

    def _elapsed(self) -> float:
        since = self._since
        return self._spent + (0.0 if since is None else time.monotonic() - since)

    def _look(self) -> None:
        while not self._done.wait(LEAST_SECONDS / 10):
            step, seconds = self._step, list(self._seconds)
            if self._since is None or step == self._told or len(seconds) < _FEWEST:
                continue
            median = statistics.median(seconds)
            if (elapsed := self._elapsed()) > max(TIMES * median, LEAST_SECONDS):
                self._told = step
                self._tell(step, elapsed, median)

    def _tell(self, step: int, elapsed: float, median: float) -> None:
        here = f"step {step}, {self._doing}, {_place(self._main)}"
        stands = {0: here}
        if self._peers is not None:
            self._peers.stand(here)
            if self._done.wait(_ANSWER_SECONDS):
                return
            stands = self._peers.stands()
        self._say(f"step {step} takes {elapsed:.0f} s so far; the median is {median:.2g} s")
        alike: dict[str, list[int]] = {}
        for index, text in stands.items():
            alike.setdefault(text or "no answer; it is stopped or its host hangs", []).append(index)
        for text, indices in alike.items():
            self._say(f"  process{'es' * (len(indices) > 1)} {_ranges(indices)}: {text}")


def _place(thread: int) -> str:
    """Where a thread is: the innermost line of this package, and the innermost of all."""
    with contextlib.suppress(KeyError):
        stack = traceback.extract_stack(sys._current_frames()[thread])
        own = [frame for frame in stack if Path(frame.filename).is_relative_to(_PACKAGE)]
        shown = [own[-1], stack[-1]] if own and own[-1] is not stack[-1] else [stack[-1]]
        return " > ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in shown)
    return "ended"


def _ranges(numbers: list[int]) -> str:
    """`0-2, 5` of 0, 1, 2, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
