"""Who else is told the numbers of a run, beside its files: a terminal, Weights & Biases."""

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

from mlra_jax.extras import install_line
from mlra_jax.files import whole_file
from mlra_jax.settings_tree import ConfigError
from mlra_jax.storage.paths import AnyPath, in_bucket
from mlra_jax.training import terminal
from mlra_jax.training.metrics import Watcher, read_metrics
from mlra_jax.training.tracing import Span


@dataclasses.dataclass(frozen=True)
class Watching:
    """What is left of a run, and where it is seen, beside the files of every run."""

    profile_steps: Span | None = None
    """Traced into `workdir/profile`."""
    wandb: str = ""
    """A project of Weights & Biases that is told all numbers; empty for none."""


NOBODY = Watching()


def watchers_of(
    watching: Watching,
    workdir: AnyPath,
    settings: Mapping[str, Any],
    step: int,
    say: Callable[[str], None],
) -> list[Watcher]:
    """Who is told the numbers of a run from `step` on. Raises ConfigError as `WandB` does."""
    found: list[Watcher] = []
    if sys.stdout.isatty() and (sys.stdout.encoding or "").lower().startswith("utf"):
        found.append(LiveCurve(read_metrics(workdir), say))
    if watching.wandb:
        found.append(WandB(watching.wandb, workdir, settings, step))
    return found


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

    def __init__(self, project: str, workdir: AnyPath, settings: Mapping[str, Any], step: int):
        wandb = _imported()
        kept = workdir / "wandb.json"
        known = json.loads(kept.read_text())["id"] if step and kept.exists() else None
        try:
            self._run = wandb.init(
                project=project,
                dir=None if in_bucket(workdir) else workdir,
                name=workdir.name,
                id=known,
                resume="allow" if known else None,
                config=dict(settings),
            )
        except wandb.errors.Error as error:
            raise ConfigError(
                f"--wandb={project}: {' '.join(str(error).split())}; WANDB_MODE=offline needs no "
                "account"
            ) from None
        with whole_file(kept) as file:
            file.write(json.dumps({"id": self._run.id}) + "\n")
        self._run.define_metric("*", step_metric="train_step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"train_step": step, **values})

    def close(self) -> None:
        self._run.finish()


def check_wandb(project: str) -> None:
    """Raises ConfigError where a project is named and the package is missing."""
    if project:
        _imported()


def _imported() -> Any:
    try:
        import wandb
    except ImportError:
        raise ConfigError(f"--wandb needs a package: {install_line('wandb')}") from None
    return wandb
