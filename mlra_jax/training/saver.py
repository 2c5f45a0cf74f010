"""The checkpoints of a run, by one run at a time; which was the last good one, and the best one."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import jax
import numpy as np
from jax.experimental import multihost_utils

from mlra_jax import checkpoints, snapshots
from mlra_jax.files import LOCK_FILE, AnyLock, DestinationError, only_writer, reason
from mlra_jax.storage.paths import AnyPath
from mlra_jax.training.progress import Done, TrainingError
from mlra_jax.training.settings import Experiment
from mlra_jax.training.state import TrainState

_MESSAGE_BYTES = 1024
BEST_FOLDER = "best"


class _Background:
    """Writes the checkpoints of a folder, made if it does not exist, one after the other.

    What fails is a TrainingError of one line: where it is asked for, and once.
    """

    def __init__(self, folder: AnyPath, keep: int, keep_every: int = 0):
        self._folder = folder
        self._manager = checkpoints.make_manager(folder, keep=keep, keep_every=keep_every)
        self._writing: int | None = None
        self._failed = False

    def __enter__(self) -> Self:
        return self

    def poll(self) -> None:
        """Raises TrainingError if a save in the background has failed; else never waits."""
        if self._writing is not None:
            with self._told():
                if self._manager.poll():
                    self._writing = None

    def finish(self) -> None:
        """Waits for the last save. Raises TrainingError if it fails."""
        if self._writing is not None:
            with self._told():
                self._manager.wait_until_finished()
            self._writing = None

    def _begin(self, step: int, **items: Any) -> None:
        self._writing = step
        with self._told():
            checkpoints.save(self._manager, step, **items)

    def _close(self) -> None:
        # What failed here may keep other processes waiting for ever, and this one for them.
        if not self._failed:
            self.finish()
            self._manager.close()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._failed = True
            folder = self._folder / checkpoints.SUBFOLDER / str(self._writing)
            raise TrainingError(f"checkpoint {folder}: {reason(error)}") from None


class Saver(_Background):
    """Writes the checkpoints of a run while it is entered, and waits for them at the end.

    An error of one line that ends the run goes on as a TrainingError that names the last good
    checkpoint.

    Args:
      workdir: their folder, made if it does not exist.
      experiment: which says how many stay, and after how many minutes one is due.
      description: the `model` item of each.
      lock: of the workdir, on process 0; it must be held at every save.
    """

    def __init__(
        self,
        workdir: AnyPath,
        experiment: Experiment,
        description: dict[str, Any],
        lock: AnyLock | None,
    ):
        super().__init__(workdir, experiment.keep, experiment.keep_every)
        self._description, self._lock = description, lock
        self._seconds, self._latest = 60 * experiment.save_minutes, time.monotonic()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        try:
            self._close()
        except TrainingError as failure:
            error = error or failure
        if not isinstance(error, OSError | ValueError):
            return
        told = str(error)
        if isinstance(error, OSError) and error.filename:
            told = f"{error.filename}: {reason(error)}"
        if "\n" not in told:
            raise TrainingError(f"{told}; last good checkpoint: {self._last_good()}") from None

    @contextlib.contextmanager
    def reserving(
        self, state: TrainState, best: bool, say: Callable[[str], None]
    ) -> Iterator[None]:
        """Meanwhile makes ready the memory that saves go through, with `best` those of `Best` too;
        ends when that is done, before an array of the state is donated."""
        twice = state.params if best else ()
        leaves = jax.tree.leaves((state.params, state.optimizer, twice))
        with ThreadPoolExecutor(1) as beside:
            reserved = beside.submit(snapshots.reserve, leaves, say)
            yield
        reserved.result()

    def save(self, state: TrainState, position: dict, done: Done) -> None:
        """Begins to write step `done.step`; its arrays may be donated when this returns."""
        self.finish()
        if self._lock is not None:
            self._lock.check()
        self._latest = time.monotonic()
        self._begin(
            done.step,
            params=state.params,
            optimizer=state.optimizer,
            model=self._description,
            iterator=position,
            progress=dataclasses.asdict(done),
        )

    def due(self) -> bool:
        """Whether `save_minutes` have gone by since the last save: by the clock of process 0, the
        same on all processes, each of which must ask."""
        if not self._seconds:
            return False
        due = np.bool_(time.monotonic() - self._latest >= self._seconds)
        several = jax.process_count() > 1
        return bool(multihost_utils.broadcast_one_to_all(due) if several else due)

    def _last_good(self) -> str:
        steps = checkpoints.finished_steps(self._folder)
        if not steps:
            return "none was saved before"
        return str(self._folder / checkpoints.SUBFOLDER / str(steps[-1]))


class Best(_Background):
    """Keeps the weights of the lowest validation loss in `workdir/best`, a checkpoint like others.

    Only better ones take their place, also when the run is stopped and goes on.
    """

    def __init__(self, workdir: AnyPath, description: dict[str, Any]):
        super().__init__(workdir / BEST_FOLDER, keep=1)
        self._description = description
        self._lowest = math.inf
        if checkpoints.finished_steps(self._folder):
            found = checkpoints.open_checkpoint(self._folder)
            self._lowest = found.read_json("progress")["validation_loss"]

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        try:
            self._close()
        except TrainingError:
            if error is None:
                raise

    def beaten_by(self, loss: float) -> bool:
        return loss < self._lowest

    def save(self, step: int, params: Any, loss: float) -> None:
        """Begins to write the weights of step `step`; they may be donated when this returns."""
        self.finish()
        self._lowest = loss
        # Of a run that was killed and goes on from before them: Orbax would keep those.
        for later in checkpoints.finished_steps(self._folder):
            if later >= step:
                self._manager.delete(later)
        progress = {"step": step, "validation_loss": loss}
        self._begin(step, params=params, model=self._description, progress=progress)


@contextlib.contextmanager
def only_run(workdir: AnyPath) -> Iterator[AnyLock | None]:
    """Keeps other runs out of a workdir, which is made; gives the lock on process 0.

    Raises:
      DestinationError: another run has it; on all processes of this run.
    """
    with contextlib.ExitStack() as until_the_end:
        lock, refusal = None, ""
        if jax.process_index() == 0:
            try:
                workdir.mkdir(parents=True, exist_ok=True)
                lock = until_the_end.enter_context(only_writer(workdir / LOCK_FILE, workdir))
            except (DestinationError, OSError) as error:
                refusal = str(error)
        if refusal := _of_process_0(refusal):
            raise DestinationError(refusal)
        yield lock


def _of_process_0(text: str) -> str:
    """The text that process 0 has, on all."""
    if jax.process_count() == 1:
        return text
    encoded = text.encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES, b"\0")
    told = multihost_utils.broadcast_one_to_all(np.frombuffer(encoded, np.uint8))
    return bytes(np.asarray(told, np.uint8)).rstrip(b"\0").decode(errors="replace")
