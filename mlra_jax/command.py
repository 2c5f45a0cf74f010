"""What the command lines share: errors in one line, a clean end when interrupted."""

import argparse
import signal
import sys
from collections.abc import Callable

import jax
from absl import logging


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
