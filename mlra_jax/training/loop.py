"""A run from its settings to its last checkpoint: prepare, resume, step, validate, save, stop."""

import contextlib
import dataclasses
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from mlra_jax import checkpoints, sharding
from mlra_jax.checkpoints import CheckpointError
from mlra_jax.config import ConfigError
from mlra_jax.data.pipeline import make_train_iterator, make_validation_batches
from mlra_jax.data.sources import Source, load_source
from mlra_jax.data.tokenizers import get_tokenizer
from mlra_jax.training.metrics import (
    MetricsWriter,
    flops_per_token,
    format_duration,
    peak_flops,
    plot_losses,
)
from mlra_jax.training.settings import Experiment
from mlra_jax.training.state import TrainState, abstract_state, create_state
from mlra_jax.training.step import make_train_step, make_validation_step


class TrainingError(ValueError):
    """A run that cannot go on; one line."""


def train(experiment: Experiment, workdir: str | Path, say: Callable[[str], None] = print) -> None:
    """Trains, or goes on where the last finished checkpoint of `workdir` stands.

    Leaves in `workdir`: `checkpoints/`, `experiment.json`, `metrics.jsonl`, `tensorboard/`,
    `loss_curve.png`. With several processes all must see the same `workdir`. SIGTERM and Ctrl-C
    save and return. Losses, data order and checkpoints depend on the settings only, not on where a
    run was interrupted.

    Args:
        experiment: what to train.
        workdir: a folder, made if it does not exist.
        say: prints one line of progress.

    Raises:
        ConfigError, CheckpointError, FileNotFoundError, ValueError: wrong settings, data, or
            workdir; nothing has been written then.
        TrainingError: the loss was not finite.
    """
    workdir = _checked_workdir(workdir)
    mesh = sharding.make_mesh(**dataclasses.asdict(experiment.mesh))
    if jax.process_count() > 1 and mesh.size != jax.device_count():
        raise ConfigError(
            f"the mesh has {mesh.size} devices and the {jax.process_count()} processes have "
            f"{jax.device_count()}; with several processes it must use all"
        )
    abstract = abstract_state(experiment, mesh)
    tokenizer_name, source = _load_data(experiment)
    batches = _train_batches(experiment, mesh, source)
    validation = _validation_batches(experiment, mesh, source)

    state, seconds = None, 0.0
    if checkpoints.finished_steps(workdir):
        found = checkpoints.open_checkpoint(workdir)
        checkpoints.check_same_model(found, experiment.model, tokenizer_name, workdir)
        state, seconds = _restore(found, abstract, batches)
        say(f"resuming {workdir} from step {found.step}")

    run = _Run(experiment, mesh, workdir, tokenizer_name, say if jax.process_index() == 0 else None)
    with run.open(resumed_step=0 if state is None else int(state.step), seconds=seconds):
        state = create_state(experiment, mesh) if state is None else state
        run.train(state, batches, validation)


def batch_share(mesh: Mesh, rows: int, process: int) -> tuple[int, int]:
    """(index, count): of `count` equal parts of a batch of `rows`, the one that `process` feeds.

    Processes whose devices hold the same rows feed the same part. Where processes overlap in part,
    each feeds everything.
    """
    of_process: dict[int, set[int]] = {}
    for device, (row_slice,) in sharding.named(mesh, "batch").devices_indices_map((rows,)).items():
        of_process.setdefault(device.process_index, set()).update(range(rows)[row_slice])
    parts = sorted({tuple(sorted(part)) for part in of_process.values()})
    if sum(map(len, parts)) != rows or len({len(part) for part in parts}) != 1:
        return 0, 1
    return parts.index(tuple(sorted(of_process[process]))), len(parts)


def _checked_workdir(workdir: str | Path) -> Path:
    if "://" in str(workdir):
        raise ConfigError(f"workdir {workdir} is an address; mount the bucket and give its path")
    path = Path(workdir).absolute()
    if path.exists() and not path.is_dir():
        raise ConfigError(f"workdir {workdir} is a file; name a folder")
    return path


def _load_data(experiment: Experiment) -> tuple[str, Source]:
    data, vocab_size = experiment.data, experiment.model.vocab_size
    tokenizer, name, unreachable = None, data.tokenizer, None
    try:
        tokenizer = get_tokenizer(data.tokenizer)
        name = tokenizer.name
    except ConnectionError as e:
        unreachable = e  # token files need no tokenizer
    try:
        source = load_source(
            data.source,
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            validation=data.validation or None,
            validation_fraction=data.validation_fraction,
        )
    except ValueError as e:
        raise (unreachable if unreachable and "give a tokenizer" in str(e) else e) from None
    return name, source


def _data_arguments(experiment: Experiment, mesh: Mesh, rows: int) -> dict:
    index, count = batch_share(mesh, rows, jax.process_index())
    return dict(
        tokenizer=None,
        vocab_size=experiment.model.vocab_size,
        context_length=experiment.model.context_length,
        global_batch=rows,
        process_index=index,
        process_count=count,
    )


def _train_batches(experiment: Experiment, mesh: Mesh, source: Source):
    arguments = _data_arguments(experiment, mesh, experiment.data.global_batch)
    return make_train_iterator(source, seed=experiment.seed, prefetch=2, **arguments)


def _validation_batches(experiment: Experiment, mesh: Mesh, source: Source):
    arguments = _data_arguments(experiment, mesh, experiment.data.part_batch)
    return make_validation_batches(
        source, max_tokens=experiment.data.validation_tokens, **arguments
    )


def _restore(found, abstract: TrainState, batches) -> tuple[TrainState, float]:
    """The state of a checkpoint, and the seconds the run had taken; sets the data's place."""
    if not (found.has("optimizer") and found.has("iterator") and found.has("progress")):
        raise CheckpointError(
            f"{found.folder} has weights but no training state to go on from; use another workdir"
        )
    progress = found.read_json("progress")
    batches.set_state(found.read_json("iterator"))
    step = jax.jit(lambda: jnp.int32(progress["step"]), out_shardings=abstract.step.sharding)()
    state = TrainState(
        step=step,
        params=found.restore("params", abstract.params),
        optimizer=found.restore("optimizer", abstract.optimizer),
    )
    return state, progress["seconds"]


class _Run:
    """What the loop needs besides the state: compiled steps, files, clock, the wish to stop."""

    def __init__(self, experiment: Experiment, mesh: Mesh, workdir: Path, tokenizer: str, say):
        self.experiment, self.mesh, self.workdir = experiment, mesh, workdir
        self.description = checkpoints.describe(experiment.model, tokenizer)
        self.say = say or (lambda line: None)
        self.is_first = jax.process_index() == 0
        self.stop_signal: int | None = None
        self.last_saved: int | None = None
        self.writer: MetricsWriter | None = None

    @contextlib.contextmanager
    def open(self, resumed_step: int, seconds: float):
        """Begins to write to the workdir; ends what is being written, whatever happens."""
        self.first_step, self.seconds_before = resumed_step, seconds
        self.last_saved = resumed_step or None
        self.manager = checkpoints.make_manager(self.workdir, keep=self.experiment.keep)
        try:
            if self.is_first:
                settings = json.dumps(self.experiment.to_config_dict().to_dict(), indent=2)
                (self.workdir / "experiment.json").write_text(settings + "\n")
                self.writer = MetricsWriter(self.workdir, resumed_step)
            with self._catch_signals():
                yield
        finally:
            self.manager.wait_until_finished()
            self.manager.close()
            if self.writer:
                self.writer.close()

    @contextlib.contextmanager
    def _catch_signals(self) -> Iterator[None]:
        """With several processes, SIGTERM is left to jax.distributed, which tells all of them."""
        caught = [signal.SIGINT] if jax.process_count() > 1 else [signal.SIGINT, signal.SIGTERM]

        def note(number, _):
            self.stop_signal = number
            signal.signal(number, before[number])  # a second one ends the run at once

        before = {number: signal.getsignal(number) for number in caught}
        for number in caught:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _should_stop(self, step: int) -> bool:
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.stop_signal is not None

    def train(self, state: TrainState, batches, validation) -> None:
        experiment, step = self.experiment, self.first_step
        if step >= experiment.steps:
            self.say(f"{self.workdir} is already at step {step} of {experiment.steps}")
        else:
            stopped = self._steps(state, step, batches, validation)
            if stopped:
                self.say(f"stopped and saved at step {self.last_saved}; the same command resumes")
        if self.is_first:
            path = plot_losses(self.workdir, experiment.model.vocab_size)
            self.say(f"loss curve: {path}")

    def _steps(self, state: TrainState, step: int, batches, validation) -> bool:
        """True if a signal ended it before the last step."""
        experiment = self.experiment
        batch = self._put(next(batches))
        began = time.monotonic()
        compute = make_train_step(experiment, self.mesh).lower(state, batch).compile()
        validate = make_validation_step(experiment, self.mesh)
        self._describe(state, time.monotonic() - began)
        # Many CPU devices share few threads: more than one step under way could starve another.
        one_at_a_time = sharding.platform(self.mesh) == "cpu"

        self.clock = interval_began = time.monotonic()
        interval_steps, stop = 0, False
        while step < experiment.steps and not stop:
            state, metrics = compute(state, batch)
            step, interval_steps = step + 1, interval_steps + 1
            position = batches.get_state()
            if one_at_a_time:
                jax.block_until_ready(metrics)
            stop = self._should_stop(step)
            last = step == experiment.steps
            log, check, save = (
                last or step % every == 0
                for every in (
                    experiment.log_every,
                    experiment.validate_every,
                    experiment.save_every,
                )
            )
            save |= stop
            if log or check or save:
                values = self._checked(step, metrics)
            if log:
                seconds = time.monotonic() - interval_began
                self._log(step, values, interval_steps * experiment.tokens_per_step / seconds)
            # What is written for a step is on the disk before its checkpoint, which is where a
            # killed run goes on.
            if check:
                self._validate(step, validate, state.params, validation)
            if save:
                self._save(step, state, position)
            if not (last or stop):
                batch = self._put(next(batches))
            if log or check or save:
                interval_began, interval_steps = time.monotonic(), 0
        return stop and step < experiment.steps

    def _put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """This process's rows -> arrays over the whole mesh."""
        where = sharding.named(self.mesh, "batch", "length")
        rows = self.experiment.data.global_batch
        if "weights" in batch:
            rows = self.experiment.data.part_batch
        shape = (rows, self.experiment.model.context_length)
        return {
            name: jax.make_array_from_process_local_data(where, array, shape)
            for name, array in batch.items()
        }

    def _describe(self, state: TrainState, compile_seconds: float) -> None:
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        axes = " x ".join(f"{name} {size}" for name, size in self.mesh.shape.items() if size > 1)
        self.say(
            f"{self.parameters:,} parameters on {axes or 'one device'} "
            f"({sharding.platform(self.mesh)}), {self.experiment.tokens_per_step:,} tokens a step, "
            f"compiled in {compile_seconds:.0f} s"
        )

    def _checked(self, step: int, metrics) -> dict[str, float]:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        for name, value in values.items():
            if not math.isfinite(value):
                good = self.workdir / checkpoints.SUBFOLDER / str(self.last_saved)
                raise TrainingError(
                    f"{name.replace('_', ' ')} is {value} at step {step}; last good checkpoint: "
                    + (str(good) if self.last_saved is not None else "none was saved before")
                )
        return values

    def _log(self, step: int, values: dict[str, float], tokens_per_second: float) -> None:
        experiment, elapsed = self.experiment, time.monotonic() - self.clock
        rate = tokens_per_second
        line = f"step {step}/{experiment.steps}  loss {values['loss']:.4f}  {rate:,.0f} tokens/s"
        values = values | {"tokens": step * experiment.tokens_per_step, "tokens_per_second": rate}
        peak = peak_flops(self.mesh.devices.flat[0].device_kind)
        if peak:
            flops = rate * flops_per_token(experiment.model, self.parameters)
            values["model_flops_utilization"] = flops / peak / self.mesh.size
            line += f"  MFU {values['model_flops_utilization']:.1%}"
        left = elapsed / (step - self.first_step) * (experiment.steps - step)
        self.say(f"{line}  {format_duration(left)} left")
        if self.writer:
            self.writer.write(step, values | {"seconds": self.seconds_before + elapsed})

    def _validate(self, step: int, validate, params, validation) -> None:
        sums = np.zeros(2)
        for batch in validation:
            sums += np.asarray(jax.device_get(validate(params, self._put(batch))), np.float64)
        loss = float(sums[0] / sums[1])
        self.say(f"step {step}/{self.experiment.steps}  validation loss {loss:.4f}")
        if self.writer:
            self.writer.write(step, {"validation_loss": loss, "validation_tokens": int(sums[1])})

    def _save(self, step: int, state: TrainState, position) -> None:
        checkpoints.save(
            self.manager,
            step,
            params=state.params,
            optimizer=state.optimizer,
            model=self.description,
            iterator=position,
            progress={
                "step": step,
                "seconds": self.seconds_before + time.monotonic() - self.clock,
            },
        )
        self.last_saved = step
