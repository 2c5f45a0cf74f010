"""Where a run stands and how fast it is: lines for people, numbers for the metrics file."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping

from mlra_jax.training.metrics import MetricsWriter


class TrainingError(ValueError):
    """A run that cannot go on; one line."""


@dataclasses.dataclass(frozen=True)
class Done:
    """What a run has done, over all of its starts; the item `progress` of a checkpoint."""

    step: int = 0
    """Updates, those that were skipped included."""
    seconds: float = 0.0
    """That they took, validation and saving included."""
    useful_seconds: float = 0.0
    """Of steps that count: without skipped ones, validation, saving and what a kill has undone."""
    skipped_steps: int = 0
    """Whose loss or gradients were not finite."""
    began: float = 0.0
    """When the run was started first, in seconds since 1970."""

    @classmethod
    def of(cls, item: Mapping[str, float]) -> "Done":
        """That of a checkpoint. One of an earlier version has only step and seconds: all of its
        time counts."""
        seconds = item["seconds"]
        return cls(**{"useful_seconds": seconds, "began": time.time() - seconds} | item)


class Progress:
    """Counts the steps of one start of a run and reports them.

    Args:
      steps: of the whole run.
      done: before this start.
      tokens_per_step: of all devices together.
      full_rate: tokens per second at the peak of all devices, None if that is not known.
      say: prints a line.
      writer: of the metrics file, None for a process that does not write.
    """

    def __init__(
        self,
        *,
        steps: int,
        done: Done,
        tokens_per_step: int,
        full_rate: float | None,
        say: Callable[[str], None],
        writer: MetricsWriter | None,
    ):
        self.step = done.step
        self._steps, self._before = steps, done
        self._useful, self._skipped = done.useful_seconds, done.skipped_steps
        self._tokens_per_step, self._full_rate = tokens_per_step, full_rate
        self._say, self._writer = say, writer
        self._began = self._interval_began = time.monotonic()
        self._interval_step = self.step
        self._waits = {"input_seconds": 0.0, "save_seconds": 0.0}

    @property
    def done(self) -> Done:
        """What the run has done by now."""
        return Done(
            step=self.step,
            seconds=self._before.seconds + time.monotonic() - self._began,
            useful_seconds=self._useful,
            skipped_steps=self._skipped,
            began=self._before.began,
        )

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

    def settle(self, skipped: int) -> None:
        """The steps since the last pause have ended, but for `skipped` of them usefully."""
        steps = self.step - self._interval_step
        seconds = time.monotonic() - self._interval_began
        self._useful += seconds * (steps - skipped) / steps

    def skipped(self, step: int, why: str, batch: int, budget: int) -> None:
        """Counts and reports a step that changed nothing."""
        self._skipped += 1
        line = f"skipped: {why}, {self._skipped} of at most {budget}"
        self.report(line, {"skipped_steps": self._skipped, "batch": batch}, step)

    def restart_interval(self) -> None:
        """What was done since the last steps, a pause to report or save, is not their speed."""
        self._interval_began, self._interval_step = time.monotonic(), self.step

    def log(self, values: Mapping[str, float]) -> None:
        """Reports the metrics of the step that is done, and the speed since the last pause.

        What is not finite is left out of the file.
        """
        now = time.monotonic()
        tokens = (self.step - self._interval_step) * self._tokens_per_step
        rate = tokens / (now - self._interval_began)
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        values |= {"tokens": self.step * self._tokens_per_step, "tokens_per_second": rate}
        line = f"loss {values.get('loss', math.nan):.4f}  {rate:,.0f} tokens/s"
        if self._full_rate:
            values["model_flops_utilization"] = rate / self._full_rate
            line += f"  MFU {values['model_flops_utilization']:.1%}"
        pace = (now - self._began) / (self.step - self._before.step)
        left = format_duration(pace * (self._steps - self.step))
        values |= self._waits
        self._waits = dict.fromkeys(self._waits, 0.0)
        values["seconds"] = self._before.seconds + now - self._began
        values["goodput"] = self._useful / max(time.time() - self._before.began, values["seconds"])
        values["skipped_steps"] = self._skipped
        self.report(f"{line}  {left} left", values)

    def validated(self, loss: float, tokens: int) -> None:
        """Reports the mean loss over so many held-out tokens."""
        values = {"validation_loss": loss, "validation_tokens": tokens}
        self.report(f"validation loss {loss:.4f}", values)

    def sync(self) -> None:
        """What was reported is in the metrics file, also in a bucket, when this ends."""
        if self._writer is not None:
            self._writer.sync()

    def report(self, line: str, values: Mapping[str, float], step: int | None = None) -> None:
        """A line about a step, the latest if no other is named, and its numbers."""
        step = self.step if step is None else step
        self._say(f"step {step}/{self._steps}  {line}")
        if self._writer is not None:
            self._writer.write(step, values)


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
