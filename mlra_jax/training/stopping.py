"""The wish to stop: SIGTERM and Ctrl-C end a run after the step that is under way."""

import signal

import jax
from jax.experimental import multihost_utils


class StopSignals:
    """Notes signals while it is entered; a second one of a kind ends the process at once.

    With several processes, SIGTERM is left to jax.distributed, which tells all of them.
    """

    def __init__(self):
        several = jax.process_count() > 1
        self._numbers = [signal.SIGINT] if several else [signal.SIGINT, signal.SIGTERM]
        self._handlers = {number: signal.getsignal(number) for number in self._numbers}
        self._noted = False

    def __enter__(self) -> "StopSignals":
        for number in self._numbers:
            signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def after(self, step: int) -> bool:
        """Whether to stop after `step`: the same on all processes, each of which must ask."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._noted

    def _note(self, number: int, _) -> None:
        self._noted = True
        signal.signal(number, self._handlers[number])
