"""What losses say of a run, judged when they are read anyway."""

import math

import numpy as np
import pytest

from mlra_jax.training.health import Health
from mlra_jax.training.progress import Done, Progress, TrainingError


class Written(list):
    def write(self, step, values):
        self.append({"step": step, **values})


def judged(losses, read_every, budget=0):
    """(lines, numbers) of a run whose steps gave these losses."""
    lines, written = [], Written()
    progress = Progress(
        steps=len(losses), done=Done(), tokens_per_step=1, full_rate=None,
        say=lines.append, writer=written,
    )  # fmt: skip
    health = Health(budget, progress)
    for step, loss in enumerate(losses, 1):
        progress.count()
        health.note(step, step - 1, {"loss": np.float32(loss), "gradient_norm": np.float32(1)})
        if step % read_every == 0:
            values, good = health.read()
            assert good == math.isfinite(loss) and (not good or values["loss"] == np.float32(loss))
            progress.restart_interval()
    return lines, written


def falling(step):
    return 3 - 0.004 * step + 0.05 * (step % 5)


@pytest.mark.parametrize("read_every", [1, 7])
def test_a_spike_is_logged_with_its_batch(read_every):
    """Far above what the last losses spread; a falling loss, and one that spreads, are none."""
    losses = [falling(step) for step in range(1, 141)]
    losses[32] += 2
    losses[120] += 1.5
    lines, written = judged(losses, read_every)
    assert [(line["step"], line["batch"]) for line in written] == [(33, 32), (121, 120)]
    for (step, before), line in zip(((33, 32), (121, 100)), lines, strict=True):
        median = np.median(losses[step - 1 - before : step - 1])
        want = f"loss {losses[step - 1]:.4f} is a spike, the median is {median:.4f}"
        assert line == f"step {step}/140  {want} (batch {step - 1})"


def test_no_loss_is_a_spike_before_there_are_some_to_compare_it_with():
    assert judged([3.0] * 10 + [9.0] + [3.0] * 8, 1) == ([], [])
    # A loss that hardly moves: 5% above it are nothing to speak of.
    assert judged([3.0] * 30 + [3.14] + [3.0] * 8, 1) == ([], [])


def test_every_step_counts_against_the_budget_whenever_it_is_read():
    losses = [3.0, math.nan, 3.0, math.inf, 3.0, 3.0]
    lines, written = judged(losses, 6, budget=2)
    assert lines == [
        "step 2/6  skipped: loss is nan (batch 1), 1 of at most 2",
        "step 4/6  skipped: loss is inf (batch 3), 2 of at most 2",
    ]
    assert [(line["skipped_steps"], line["batch"]) for line in written] == [(1, 1), (2, 3)]
    for budget, message in (
        (1, r"^loss is inf at step 4, the last of 2 such steps \(skip_budget=1\)$"),
        (0, "^loss is nan at step 2$"),
    ):
        with pytest.raises(TrainingError, match=message):
            judged(losses, 6, budget)
