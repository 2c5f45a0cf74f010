"""What of a run is written while it goes on: its state, and the weights that validated best."""

import math
from pathlib import Path
from typing import Any

from mlra_jax import checkpoints
from mlra_jax.training.state import TrainState

BEST_FOLDER = "best"


class Saver:
    """Writes the checkpoints of a run while it is entered, and waits for them at the end.

    Args:
      workdir: their folder, made if it does not exist.
      keep: how many stay.
      description: the `model` item of each.
      last: the step that is there already and was restored.
    """

    def __init__(self, workdir: Path, keep: int, description: dict[str, Any], last: int | None):
        self.last = last
        self._folder, self._description = workdir / checkpoints.SUBFOLDER, description
        self._manager = checkpoints.make_manager(workdir, keep=keep)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *_) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    @property
    def last_good(self) -> str | None:
        """The folder of the last checkpoint."""
        return None if self.last is None else str(self._folder / str(self.last))

    def save(self, step: int, state: TrainState, position: dict, seconds: float) -> None:
        """Begins to write step `step`; its arrays may be donated when this returns."""
        checkpoints.save(
            self._manager,
            step,
            params=state.params,
            optimizer=state.optimizer,
            model=self._description,
            iterator=position,
            progress={"step": step, "seconds": seconds},
        )
        self.last = step


class Best:
    """Keeps the weights of the lowest validation loss in `workdir/best`, a checkpoint like others.

    Only better ones take their place, also when the run is stopped and goes on.
    """

    def __init__(self, workdir: Path, description: dict[str, Any]):
        self._folder, self._description = workdir / BEST_FOLDER, description
        self._manager = checkpoints.make_manager(self._folder, keep=1)
        self._lowest = math.inf
        if checkpoints.finished_steps(self._folder):
            found = checkpoints.open_checkpoint(self._folder)
            self._lowest = found.read_json("progress")["validation_loss"]

    def __enter__(self) -> "Best":
        return self

    def __exit__(self, *_) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    def beaten_by(self, loss: float) -> bool:
        return loss < self._lowest

    def save(self, step: int, params: Any, loss: float) -> None:
        """Begins to write the weights of step `step`; they may be donated when this returns."""
        self._lowest = loss
        # Of a run that was killed and goes on from before them: Orbax would keep those.
        for later in checkpoints.finished_steps(self._folder):
            if later >= step:
                self._manager.delete(later)
        progress = {"step": step, "validation_loss": loss}
        model = self._description
        checkpoints.save(self._manager, step, params=params, model=model, progress=progress)
