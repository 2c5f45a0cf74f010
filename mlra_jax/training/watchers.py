"""Who else is told the numbers of a run, beside its files: a terminal, Weights & Biases."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlra_jax.settings_tree import ConfigError
from mlra_jax.training import terminal
from mlra_jax.training.metrics import Watcher, read_metrics


class LiveCurve:
    """Prints the losses so far as a curve after each validation.

    Args:
      lines: of metrics, of the run before this start.
      say: prints it.
    """

    def __init__(self, lines: list[dict[str, float]], say: Callable[[str], None]):
        self._say = say
        self._curves: dict[str, list[tuple[float, float]]] = {"training": [], "validation": []}
        for line in lines:
            self._take(line["step"], line)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._take(step, values)
        # A point is no curve.
        if "validation_loss" in values and len(self._curves["validation"]) > 1:
            self._say(terminal.draw(self._curves))

    def close(self) -> None:
        pass

    def _take(self, step: int, values: Mapping[str, float]) -> None:
        for curve, name in (("training", "loss"), ("validation", "validation_loss")):
            if name in values:
                self._curves[curve].append((step, values[name]))


def for_terminal(workdir: Path, say: Callable[[str], None]) -> list[Watcher]:
    """A curve where stdout is a terminal that has the characters for it."""
    shown = sys.stdout.isatty() and (sys.stdout.encoding or "").lower().startswith("utf")
    return [LiveCurve(read_metrics(workdir), say)] if shown else []


class WandB:
    """A run of Weights & Biases that goes on when the workdir's does; WANDB_MODE=offline writes it
    to `workdir/wandb`.

    Args:
      project: its name there.
      workdir: of the run; keeps the id.
      settings: of the experiment.
      step: done before this start.

    Raises:
      ConfigError: the package is missing, or the service refuses.
    """

    def __init__(self, project: str, workdir: Path, settings: dict[str, Any], step: int):
        wandb = imported()
        kept = workdir / "wandb.json"
        known = json.loads(kept.read_text())["id"] if step and kept.exists() else None
        try:
            self._run = wandb.init(
                project=project,
                dir=workdir,
                name=workdir.name,
                id=known,
                resume="allow" if known else None,
                config=settings,
            )
        except wandb.errors.Error as error:
            raise ConfigError(
                f"--wandb={project}: {' '.join(str(error).split())}; WANDB_MODE=offline needs no "
                "account"
            ) from None
        kept.write_text(json.dumps({"id": self._run.id}) + "\n")
        self._run.define_metric("*", step_metric="train_step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"train_step": step, **values})

    def close(self) -> None:
        self._run.finish()


def imported() -> Any:
    """The package. Raises ConfigError where it is missing."""
    try:
        import wandb
    except ImportError:
        raise ConfigError("--wandb needs a package: pip install 'mlra-jax[wandb]'") from None
    return wandb
