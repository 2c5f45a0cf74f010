"""The wish to stop: a signal or a maintenance event ends a run after the step that is under way."""

import contextlib
import os
import signal
import threading
import urllib.request
from pathlib import Path

import jax
from jax.experimental import multihost_utils

_ASK_SECONDS = 10.0
_METADATA = "metadata.google.internal"
# What a machine of Google Cloud says of itself, and the answers that mean its end.
_ENDINGS = {"maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE", "preempted": "TRUE"}


class StopSignals:
    """Notes signals while it is entered; a second one of a kind ends the process at once.

    With several processes, SIGTERM is left to jax.distributed, which tells all of them; Ctrl-C at
    one becomes a SIGTERM. So does, on machines of Google Cloud, the news that the machine will be
    taken away; a run that is started again in spite of it goes on until that happens.
    """

    def __init__(self):
        self._several = jax.process_count() > 1
        self._numbers = [signal.SIGINT] if self._several else [signal.SIGINT, signal.SIGTERM]
        self._handlers = {number: signal.getsignal(number) for number in self._numbers}
        self._noted, self._left = False, threading.Event()

    def __enter__(self) -> "StopSignals":
        for number in self._numbers:
            signal.signal(number, self._note)
        if (host := _metadata_host()) is not None:
            threading.Thread(target=self._ask, args=(host,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._left.set()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def after(self, step: int) -> bool:
        """Whether to stop after `step`: the same on all processes, each of which must ask."""
        if self._several:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._noted

    def _note(self, number: int, _) -> None:
        self._noted = True
        signal.signal(number, self._handlers[number])
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)

    def _ask(self, host: str) -> None:
        """Sends this process a SIGTERM when there is news that the machine will end."""
        known = _endings(host)
        while not self._left.wait(_ASK_SECONDS):
            if _endings(host) - known:
                os.kill(os.getpid(), signal.SIGTERM)
                return


def _metadata_host() -> str | None:
    """Whom to ask about this machine; None where it is none of Google Cloud."""
    with contextlib.suppress(OSError):
        if "Google" in Path("/sys/class/dmi/id/product_name").read_text():
            return os.environ.get("GCE_METADATA_HOST", _METADATA)
    return os.environ.get("GCE_METADATA_HOST")


def _endings(host: str) -> set[str]:
    """What a machine says of its own end."""
    return {what for what, ending in _ENDINGS.items() if _answer(host, what) == ending}


def _answer(host: str, what: str) -> str:
    request = urllib.request.Request(
        f"http://{host}/computeMetadata/v1/instance/{what}", headers={"Metadata-Flavor": "Google"}
    )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with contextlib.suppress(OSError), direct.open(request, timeout=5) as answer:
        return answer.read().decode().strip()
    return ""
