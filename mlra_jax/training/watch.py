"""Where a run stands while it stands still: what takes many times as long as it mostly does."""

import collections
import contextlib
import dataclasses
import itertools
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
FIRST_SECONDS = 20.0
_MEMORY = 50
_ANSWER_SECONDS = 3.0
_PACKAGE = Path(mlra_jax.__file__).parent


class Watch:
    """Tells of a step, or of a pause between steps, that takes 10 times the median of the last 50
    of its kind, and 5 s at least. The first two of a kind are told of after 20 s.

    Process 0 looks, as all wait for each other; it asks the others where they stand, and names
    those that do not answer.

    Args:
      say: prints a line, on process 0.
      peers: the other processes, None if there are none.
    """

    def __init__(self, say: Callable[[str], None], peers: Peers | None = None):
        self._say, self._peers = say, peers
        self._main = threading.get_ident()
        self._left = threading.Event()
        self._seconds: dict[str, collections.deque[float]] = {}
        self._now: _Work | None = None
        self._step, self._spent = 0, 0.0
        self._told = ""

    def __enter__(self) -> "Watch":
        if self._peers is not None:
            self._peers.stand_at(self._here)
        if self._peers is None or self._peers.first:
            threading.Thread(target=self._look, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._turn()
        self._left.set()

    def begin(self, step: int) -> None:
        """The step before has ended, and this one begins."""
        self._turn()
        if self._step:
            self._ended("step", f"step {self._step}", self._spent)
        self._step, self._spent = step, 0.0
        self._now = self._work("computing")

    def goes_on(self, doing: str) -> None:
        """What the step is at now."""
        self._turn()
        self._now = self._work(doing)

    def pauses(self, doing: str) -> None:
        """What comes now is no part of a step, and is compared with its like."""
        self._turn()
        self._now = self._work(doing, pause=True)

    def _turn(self) -> None:
        """What the run was at until now is over."""
        if (now := self._now) is not None and now.pause:
            self._ended(now.kind, now.name, now.seconds)
        elif now is not None:
            self._spent = now.seconds

    def _ended(self, kind: str, name: str, seconds: float) -> None:
        memory = collections.deque[float](maxlen=_MEMORY)
        self._seconds.setdefault(kind, memory).append(seconds)
        if self._told == name:
            self._say(f"{name} has ended after {seconds:.0f} s")

    def _work(self, doing: str, pause: bool = False) -> "_Work":
        seconds = self._seconds.get(doing if pause else "step", ())
        # After a pause a step may be only begun, in no time; the next one ends both.
        pairs = [(a + b) / 2 for a, b in itertools.pairwise(seconds)]
        usual = statistics.median(pairs) if pairs else None
        spent = 0.0 if pause else self._spent
        return _Work(self._step, doing, pause, usual, time.monotonic(), spent)

    def _look(self) -> None:
        while not self._left.wait(LEAST_SECONDS / 10):
            now = self._now
            if now is not None and now.name != self._told and now.seconds > now.limit:
                self._tell(now)

    def _tell(self, work: "_Work") -> None:
        seconds = work.seconds
        stands = {0: self._here()}
        if self._peers is not None:
            stands |= self._peers.stands(_ANSWER_SECONDS)
        now = self._now
        if self._left.is_set() or now is None or now.name != work.name:
            return
        self._told = work.name
        usual = "too early to say what is usual"
        if work.usual is not None:
            usual = f"the median is {work.usual:.2g} s"
        self._say(f"{work.name} takes {seconds:.0f} s so far; {usual}")
        alike: dict[str, list[int]] = {}
        for index, text in stands.items():
            alike.setdefault(text or "no answer; it is stopped or its host hangs", []).append(index)
        for text, indices in alike.items():
            self._say(f"  process{'es' * (len(indices) > 1)} {_ranges(indices)}: {text}")

    def _here(self) -> str:
        """Where this process stands."""
        now = self._now
        doing = "before its first step" if now is None else f"step {now.step}, {now.doing}"
        return f"{doing}, {_place(self._main)}"


@dataclasses.dataclass(frozen=True)
class _Work:
    """What a run is at: a part of a step, or a pause after it."""

    step: int
    doing: str
    pause: bool
    usual: float | None
    """Median of the seconds that its like took; None where too few have ended."""
    since: float
    spent: float
    """Seconds that the step had taken by then."""

    @property
    def kind(self) -> str:
        return self.doing if self.pause else "step"

    @property
    def name(self) -> str:
        return f"{self.doing} after step {self.step}" if self.pause else f"step {self.step}"

    @property
    def seconds(self) -> float:
        return self.spent + time.monotonic() - self.since

    @property
    def limit(self) -> float:
        return FIRST_SECONDS if self.usual is None else max(TIMES * self.usual, LEAST_SECONDS)


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
