"""Where a run stands and how fast it is: lines for people, numbers for the metrics file."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping

from mlra_jax.training.metrics import MetricsWriter


class TrainingError(ValueError):
    """A run that cannot go on; one line."""


class Progress:
    """Counts the steps of one start of a run and reports them.

    Args:
      steps: of the whole run.
      step: done before this start.
      seconds: that those took.
      tokens_per_step: of all devices together.
      full_rate: tokens per second at the peak of all devices, None if that is not known.
      say: prints a line.
      writer: of the metrics file, None for a process that does not write.
    """

    def __init__(
        self,
        *,
        steps: int,
        step: int,
        seconds: float,
        tokens_per_step: int,
        full_rate: float | None,
        say: Callable[[str], None],
        writer: MetricsWriter | None,
    ):
        self.step = step
        self._steps, self._first_step, self._seconds_before = steps, step, seconds
        self._tokens_per_step, self._full_rate = tokens_per_step, full_rate
        self._say, self._writer = say, writer
        self._began = self._interval_began = time.monotonic()
        self._interval_step = step
        self._waits = {"input_seconds": 0.0, "save_seconds": 0.0}

    @property
    def seconds(self) -> float:
        """That the steps of all starts took, validation and saving included."""
        return self._seconds_before + time.monotonic() - self._began

    @property
    def step_seconds(self) -> float:
        """That each step since the last pause took."""
        return (time.monotonic() - self._interval_began) / (self.step - self._interval_step)

    def count(self) -> int:
        """One more step is done; its number."""
        self.step += 1
        return self.step

    @contextlib.contextmanager
    def timed(self, wait: str) -> Iterator[None]:
        """Counts what it encloses as `input_seconds` or `save_seconds` of the next line."""
        began = time.monotonic()
        yield
        self._waits[wait] += time.monotonic() - began

    def restart_interval(self) -> None:
        """What was done since the last steps, a pause to report or save, is not their speed."""
        self._interval_began, self._interval_step = time.monotonic(), self.step

    def log(self, values: Mapping[str, float]) -> None:
        """Reports the metrics of the step that is done, and the speed since the last pause."""
        now = time.monotonic()
        tokens = (self.step - self._interval_step) * self._tokens_per_step
        rate = tokens / (now - self._interval_began)
        line = f"loss {values['loss']:.4f}  {rate:,.0f} tokens/s"
        values = dict(values, tokens=self.step * self._tokens_per_step, tokens_per_second=rate)
        if self._full_rate:
            values["model_flops_utilization"] = rate / self._full_rate
            line += f"  MFU {values['model_flops_utilization']:.1%}"
        pace = (now - self._began) / (self.step - self._first_step)
        left = format_duration(pace * (self._steps - self.step))
        values |= self._waits
        self._waits = dict.fromkeys(self._waits, 0.0)
        values["seconds"] = self._seconds_before + now - self._began
        self._report(f"{line}  {left} left", values)

    def validated(self, loss: float, tokens: int) -> None:
        """Reports the mean loss over so many held-out tokens."""
        values = {"validation_loss": loss, "validation_tokens": tokens}
        self._report(f"validation loss {loss:.4f}", values)

    def _report(self, line: str, values: Mapping[str, float]) -> None:
        self._say(f"step {self.step}/{self._steps}  {line}")
        if self._writer is not None:
            self._writer.write(self.step, values)


def check_finite(step: int, values: Mapping[str, float]) -> None:
    """Raises TrainingError for the first metric that is not a number or without bound."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise TrainingError(f"{name.replace('_', ' ')} is {value} at step {step}")


def format_duration(seconds: float) -> str:
    """`1:02:03`, `2:03`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
