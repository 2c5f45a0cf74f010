"""What losses and gradients say of a run: steps that were skipped, spikes."""

import collections
import dataclasses
import math
import statistics
from collections.abc import Mapping

import jax

from mlra_jax.training.progress import Progress, TrainingError, check_finite

_MEMORY = 100
_FEWEST = 20
_SPREADS = 8.0
_PART = 0.05


class Health:
    """Judges every step, when its numbers are read anyway.

    A loss is a spike if it is above the median of the last 100 by more than 8 times their median
    distance from it, and by 5%.

    Args:
      budget: steps of the whole run that may be skipped.
      progress: of the run, which counts and reports.
    """

    def __init__(self, budget: int, progress: Progress):
        self._budget, self._progress = budget, progress
        self._unread: list[_Step] = []
        self._losses: collections.deque[float] = collections.deque(maxlen=_MEMORY)

    def note(self, step: int, batch: int, metrics: Mapping[str, jax.Array]) -> None:
        """Step `step` is begun, on the batch of that number from 0 on; waits for nothing."""
        self._unread.append(_Step(step, batch, metrics))

    def read(self) -> tuple[dict[str, float], bool]:
        """(the metrics of the last step, whether it counts); waits for it.

        The same on all processes.

        Raises:
          TrainingError: more steps are skipped than may be, or a learning rate is not finite.
        """
        unread, self._unread = self._unread, []
        skipped = 0
        for at, metrics in zip(unread, jax.device_get([x.metrics for x in unread]), strict=True):
            values = {name: float(value) for name, value in metrics.items()}
            bad = [name for name in ("loss", "gradient_norm") if not math.isfinite(values[name])]
            check_finite(at.step, {n: x for n, x in values.items() if n not in bad})
            if bad:
                skipped += 1
                self._skip(at, bad[0], values[bad[0]])
            else:
                self._judge(at, values["loss"])
        self._progress.settle(skipped)
        return values, not bad

    def _skip(self, at: "_Step", name: str, value: float) -> None:
        words = f"{name.replace('_', ' ')} is {value}"
        count = self._progress.done.skipped_steps + 1
        if count > self._budget:
            also = f", the last of {count} such steps (skip_budget={self._budget})"
            raise TrainingError(f"{words} at step {at.step}{also if count > 1 else ''}")
        self._progress.skipped(at.step, f"{words} (batch {at.batch})", at.batch, self._budget)

    def _judge(self, at: "_Step", loss: float) -> None:
        if len(self._losses) >= _FEWEST:
            middle = statistics.median(self._losses)
            spread = statistics.median(abs(x - middle) for x in self._losses)
            if loss - middle > max(_SPREADS * spread, _PART * middle):
                line = f"loss {loss:.4f} is a spike, the median is {middle:.4f} (batch {at.batch})"
                self._progress.report(line, {"spike_loss": loss, "batch": at.batch}, at.step)
        self._losses.append(loss)


@dataclasses.dataclass(frozen=True)
class _Step:
    step: int
    batch: int
    metrics: Mapping[str, jax.Array]
