"""What the command lines share: errors in one line, a clean end when interrupted."""

import argparse
import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator

import jax
from absl import logging
from tqdm import tqdm


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the flags in one line, exit code 2."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists the flags)\n")


def run(program: str, work: Callable[[], object], done: str) -> int:
    """Runs `work` on the host's CPU and returns the exit code; prints `done` at the end."""
    # Accelerators stay free for others.
    jax.config.update("jax_platforms", "cpu")
    logging.set_verbosity(logging.ERROR)
    # Ends like Ctrl-C does: what was written so far is removed.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        work()
    except (ValueError, OSError) as error:
        print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{program}: interrupted, nothing written", file=sys.stderr)
        return 130
    print(done)
    return 0


def _interrupt(*_):
    raise KeyboardInterrupt


@contextlib.contextmanager
def progress_bar(text: str, total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A bar of bytes on stderr; gives the function to tell it how many more are done.

    While it is there, Ctrl-C (and SIGTERM, where a handler is set) takes effect when that function
    is called: not in the middle of the array libraries, which would go on writing in the
    background. A second Ctrl-C takes effect at once.
    """
    asked: list[int] = []
    handlers = {}

    def ask(number, frame):
        asked.append(number)
        signal.signal(number, handlers[number])

    def update(done: int) -> None:
        bar.update(done)
        if asked:
            raise RuntimeError("interrupted")

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if callable(signal.getsignal(number)):
                handlers[number] = signal.signal(number, ask)
    # Cleared at its end, so that an error is the only line left.
    bar = tqdm(
        desc=text,
        total=total,
        unit="B",
        unit_scale=True,
        disable=quiet,
        mininterval=0.5,
        leave=False,
    )
    try:
        with bar:
            yield update
    except Exception:
        if not asked:
            raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if asked:
        raise KeyboardInterrupt
