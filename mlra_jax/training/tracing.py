"""A trace of some steps of a run, for TensorBoard and Perfetto."""

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from mlra_jax.settings_tree import ConfigError
from mlra_jax.storage.paths import AnyPath, in_bucket

FOLDER = "profile"
"""In the workdir; in the current folder where the workdir is in a bucket."""


class Span(NamedTuple):
    """Steps of a run, counted from 1; both ends are of it."""

    first: int
    last: int

    @classmethod
    def of(cls, text: str | None) -> "Span | None":
        """Of `20-22` or `20`; None of None. Raises ConfigError."""
        if text is None:
            return None
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
        span = cls(int(found[1]), int(found[2] or found[1])) if found else cls(0, 0)
        if not 1 <= span.first <= span.last:
            raise ConfigError(f"--profile_steps={text}: give steps from 1 on, as 20-22 or 20")
        return span


@contextlib.contextmanager
def traced(
    compute: Callable[..., Any], done: int, span: Span | None, workdir: AnyPath, say: Callable
) -> Iterator[Callable[..., Any]]:
    """Gives `compute`, a step of a run, which is traced in the steps of `span`.

    The trace begins before the first of them and ends when the last is done on the devices; each
    process writes its own. A run that ends in between leaves what it has; one that begins behind
    the first traces nothing, and says so.

    Args:
      compute: called once for each step.
      done: steps before.
      span: None to trace nothing.
      workdir: of the run.
      say: prints a line.
    """
    if span is None:
        yield compute
        return
    # The profiler writes to disks only.
    folder = Path(FOLDER) if in_bucket(workdir) else workdir / FOLDER
    # Those of one host would write the same files.
    if jax.process_count() > 1:
        folder /= f"process_{jax.process_index()}"
    step, tracing = done, False

    def stop():
        nonlocal tracing
        tracing = False
        jax.profiler.stop_trace()
        say(f"steps {span.first} to {step}: tensorboard --logdir={folder}    (with xprof)")

    def run(*arguments):
        nonlocal step, tracing
        step += 1
        if step == span.first:
            jax.profiler.start_trace(str(folder), create_perfetto_trace=True)
            tracing = True
        result = compute(*arguments)
        if tracing and step == span.last:
            jax.block_until_ready(result)
            stop()
        return result

    if done >= span.first:
        say(f"step {span.first} is done already: nothing is traced")
    try:
        yield run
    finally:
        if tracing:
            stop()
        elif step < span.first:
            say(f"step {span.first} was not reached: nothing is traced")
