"""A run from its settings to its last checkpoint: prepare, resume, step, validate, save, stop."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mlra_jax import checkpoints, costs, sharding
from mlra_jax.checkpoints import Checkpoint, CheckpointError
from mlra_jax.config import ModelConfig
from mlra_jax.data.sources import Source, describe
from mlra_jax.data.tokenizers import RANKS_FILE, keep_ranks
from mlra_jax.settings_tree import ConfigError
from mlra_jax.storage import paths
from mlra_jax.storage.paths import AnyPath, PathLike
from mlra_jax.training import record, start
from mlra_jax.training.feed import Batch, Feed, TrainBatches, ValidationBatches, load_data
from mlra_jax.training.fitting import compile_step
from mlra_jax.training.health import Health
from mlra_jax.training.hosts import by_host
from mlra_jax.training.metrics import MetricsWriter, plot_losses
from mlra_jax.training.peers import Peers
from mlra_jax.training.progress import Done, Progress
from mlra_jax.training.saver import Best, Saver, only_run
from mlra_jax.training.settings import Experiment, MeshSettings
from mlra_jax.training.state import TrainState, abstract_state, create_state
from mlra_jax.training.step import make_train_step, make_validation_step
from mlra_jax.training.stopping import StopSignals
from mlra_jax.training.tracing import traced
from mlra_jax.training.watch import Watch
from mlra_jax.training.watchers import NOBODY, Watching, watchers_of

Compute = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]


def train(
    experiment: Experiment,
    workdir: PathLike,
    say: Callable[[str], None] = print,
    peers: Peers | None = None,
    watching: Watching = NOBODY,
) -> bool:
    """Trains, or goes on where the last finished checkpoint of `workdir` stands.

    Leaves in `workdir`: `checkpoints/`, `best/` if asked, `experiment.json`, `metrics.jsonl`,
    `tensorboard/`, `loss_curve.png`. With several processes all must see it. SIGTERM and Ctrl-C
    save and return False, the end True. Losses, data and checkpoints depend on the settings alone.

    Args:
      experiment: what to train.
      workdir: a folder, made if it does not exist.
      say: prints one line of progress.
      peers: the other processes, if there are some.
      watching: what else is left of the run, and where else it is seen.

    Raises:
      ConfigError, CheckpointError, FileNotFoundError, ValueError: wrong settings, data, or
        workdir; nothing has been written then.
      DestinationError: another run writes the workdir.
      TrainingError: too many steps were not finite, or a file could not be written.
    """
    first = jax.process_index() == 0
    say = say if first else lambda line: None
    workdir = _checked_workdir(workdir)
    mesh = _checked_mesh(experiment.mesh)
    model, abstract = experiment.model, abstract_state(experiment, mesh)
    tokenizer, source, batches, held_out = _opened(experiment, mesh)
    if experiment.init_from and not checkpoints.finished_steps(workdir):
        start.open_weights(experiment, tokenizer)  # Refused before the workdir is made.
    with contextlib.ExitStack() as until_the_end:
        enter = until_the_end.enter_context
        enter(contextlib.closing(batches))
        lock = enter(only_run(workdir))
        state, done = _found(experiment, workdir, tokenizer, abstract, batches, say)
        changes = record.changes(workdir, experiment) if done.step else []
        description = checkpoints.describe(model, tokenizer)
        if first:
            keep_ranks(tokenizer, workdir / RANKS_FILE)
        saver = enter(Saver(workdir, experiment, description, lock))
        best = enter(Best(workdir, description)) if experiment.keep_best else None
        stop = enter(StopSignals())
        if ended := done.step >= experiment.steps:
            say(f"{workdir} is already at step {done.step} of {experiment.steps}")
        for line in changes:
            say(f"{'not taken' if ended else 'from here on'}: {line}")
        if not ended:
            writer = enter(_begin(workdir, experiment, done, watching, say)) if first else None
            for line in describe(source, experiment.data.validation_tokens):
                say(line)
            state = create_state(experiment, mesh) if state is None else state
            batch = next(batches)
            with saver.reserving(state, experiment.keep_best, say):
                compute = _compiled(experiment, mesh, state, batch, say)
            compute = enter(traced(compute, done.step, watching.profile_steps, workdir, say))
            progress = _progress(experiment, done, _full_rate(model, mesh, state), say, writer)
            loop = _Loop(
                due=_Due.of(experiment),
                compute=compute,
                batches=batches,
                validate=_validation(experiment, mesh, held_out),
                saver=saver,
                best=best,
                progress=progress,
                health=Health(experiment.skip_budget, progress),
                watch=enter(Watch(say, peers)),
                stop=stop,
            )
            if experiment.validate_first and done.step == 0:
                loop.check(state)
                progress.restart_interval()
            if not (ended := loop.run(state, batch)):
                say(f"stopped and saved at step {progress.step}; the same command resumes")
        if first:
            say(f"loss curve: {plot_losses(workdir, model.vocab_size)}")
    return ended


def mean_loss(
    validate: Callable[[Any, Batch], tuple[jax.Array, jax.Array]],
    params: Any,
    batches: Iterable[Batch],
) -> tuple[float, int]:
    """(nats per token, tokens): over all tokens that count, however the batches divide them."""
    sums = np.zeros(2)
    for batch in batches:
        sums += np.asarray(jax.device_get(validate(params, batch)), np.float64)
    return float(sums[0] / sums[1]), int(sums[1])


def _validation(
    experiment: Experiment, mesh: Mesh, held_out: ValidationBatches
) -> Callable[[Any], tuple[float, int]]:
    validate = make_validation_step(experiment, mesh)
    return lambda params: mean_loss(validate, params, held_out)


@dataclasses.dataclass(frozen=True)
class _Due:
    """After which steps something is done besides; after the last, everything."""

    steps: int
    log_every: int
    validate_every: int
    save_every: int
    keep_every: int

    @classmethod
    def of(cls, experiment: Experiment) -> "_Due":
        return cls(*(getattr(experiment, field.name) for field in dataclasses.fields(cls)))

    def after(self, step: int) -> tuple[bool, bool, bool]:
        """Whether to log, to validate, to save."""
        each = (self.log_every, self.validate_every, self.save_every)
        log, validate, save = (step == self.steps or step % every == 0 for every in each)
        return log, validate, save or (self.keep_every > 0 and step % self.keep_every == 0)


@dataclasses.dataclass(frozen=True)
class _Loop:
    """The steps of a run from where it stands to the last, or to a signal."""

    due: _Due
    compute: Compute
    batches: TrainBatches
    validate: Callable[[Any], tuple[float, int]]
    saver: Saver
    best: Best | None
    progress: Progress
    health: Health
    watch: Watch
    stop: StopSignals

    def run(self, state: TrainState, batch: Batch) -> bool:
        """Whether the last step is done, False if a signal came before; `batch` is the first."""
        owed = False
        writers = [self.saver, self.best] if self.best else [self.saver]
        while True:
            self.watch.begin(self.progress.step + 1)
            state, metrics = self.compute(state, batch)
            step, position = self.progress.count(), self.batches.get_state()
            self.health.note(step, position["next_batch"] - 1, metrics)
            for writer in writers:
                writer.poll()
            last, stop = step == self.due.steps, self.stop.after(step)
            log, check, save = self.due.after(step)
            save |= stop or owed
            if log or check or save:
                values, good = self.health.read()
                # Weights that gave no finite loss take a good checkpoint's place at the end only.
                owed = save and not (good or stop or last)
                save &= not owed
            if log:
                self.watch.pauses("writing metrics")
                self.progress.log(values | by_host(self.progress.step_seconds))
                save |= good and self.saver.due()
            # What is written for a step is on the disk before its checkpoint, which is where a
            # killed run goes on.
            loss = self.check(state) if check else math.inf
            best = self.best if self.best and self.best.beaten_by(loss) else None
            if save or best:
                self.watch.pauses("saving")
                with self.progress.timed("save_seconds"):
                    self.progress.sync()
                    if best:
                        best.save(step, state.params, loss)
                    if save:
                        self.saver.save(state, position, self.progress.done)
            if last or stop:
                self.watch.pauses("waiting for the last save")
                for writer in writers:
                    writer.finish()
                return last
            self.watch.goes_on("waiting for input")
            with self.progress.timed("input_seconds"):
                batch = next(self.batches)
            if log or check or save:
                self.progress.restart_interval()

    def check(self, state: TrainState) -> float:
        """The mean loss over what is held out, which is reported."""
        self.watch.pauses("validating")
        loss, tokens = self.validate(state.params)
        self.progress.validated(loss, tokens)
        return loss


def _checked_workdir(workdir: PathLike) -> AnyPath:
    path = paths.path(workdir).absolute()
    if path.exists() and not path.is_dir():
        raise ConfigError(f"workdir {workdir} is a file; name a folder")
    return path


def _checked_mesh(settings: MeshSettings) -> Mesh:
    mesh = sharding.make_mesh(**dataclasses.asdict(settings))
    if jax.process_count() > 1 and mesh.size != jax.device_count():
        raise ConfigError(
            f"the mesh has {mesh.size} devices and the {jax.process_count()} processes have "
            f"{jax.device_count()}; with several processes it must use all"
        )
    return mesh


def _opened(
    experiment: Experiment, mesh: Mesh
) -> tuple[str, Source, TrainBatches, ValidationBatches]:
    """(the tokenizer's name, the tokens, batches to train on, those to validate on)."""
    model, data = experiment.model, experiment.data
    tokenizer, source = load_data(data, model.vocab_size)
    batches = Feed(mesh, data.global_batch, model).train(source, experiment.seed, data.order)
    held_out = Feed(mesh, data.part_batch, model).validation(source, data.validation_tokens)
    return tokenizer, source, batches, held_out


def _found(
    experiment: Experiment,
    workdir: AnyPath,
    tokenizer: str,
    abstract: TrainState,
    batches: TrainBatches,
    say: Callable[[str], None],
) -> tuple[TrainState | None, Done]:
    """What to go on with and what is done: the workdir's, or another run's weights, or None."""
    if checkpoints.finished_steps(workdir):
        found = checkpoints.open_checkpoint(workdir)
        if not (found.has("optimizer") and found.has("iterator") and found.has("progress")):
            raise CheckpointError(
                f"{found.folder} has weights but no training state to go on from; to start anew "
                f"with them, take another workdir and --config.init_from={found.folder.parents[1]}"
            )
        checkpoints.check_same_model(found, experiment.model, tokenizer, workdir)
        state, done = _restore(found, abstract, batches)
        say(f"resuming {workdir} from step {done.step}")
        return state, done
    if experiment.init_from:
        found = start.open_weights(experiment, tokenizer)
        say(start.described(found, experiment))
        return start.state_from(found, experiment, abstract), Done(began=time.time())
    return None, Done(began=time.time())


def _restore(
    found: Checkpoint, abstract: TrainState, batches: TrainBatches
) -> tuple[TrainState, Done]:
    """The state of a checkpoint, and what was done up to it; sets the data's place."""
    done = Done.of(found.read_json("progress"))
    batches.set_state(found.read_json("iterator"))
    step = jax.jit(lambda: jnp.int32(done.step), out_shardings=abstract.step.sharding)()
    state = TrainState(
        step=step,
        params=found.restore("params", abstract.params),
        optimizer=found.restore("optimizer", abstract.optimizer),
    )
    return state, done


def _begin(
    workdir: AnyPath,
    experiment: Experiment,
    done: Done,
    watching: Watching,
    say: Callable[[str], None],
) -> contextlib.closing[MetricsWriter]:
    """Writes down the settings; the metrics file goes on behind what is done and is closed at exit,
    with all who are told the same."""
    record.write(workdir, experiment, done.step)
    writer = MetricsWriter(workdir, done.step, say)
    settings = experiment.to_config_dict().to_dict()
    for watcher in watchers_of(watching, workdir, settings, done.step, say):
        writer.tell(watcher)
    return contextlib.closing(writer)


def _compiled(
    experiment: Experiment,
    mesh: Mesh,
    state: TrainState,
    batch: Batch,
    say: Callable[[str], None],
) -> Compute:
    """The compiled step; says what it is of and how long that took."""
    began = time.monotonic()
    compute = compile_step(make_train_step, experiment, mesh, (state, batch), say)
    say(
        f"{_parameters(state):,} parameters on {_described(mesh)}, "
        f"{experiment.tokens_per_step:,} tokens a step, "
        f"compiled in {time.monotonic() - began:.0f} s"
    )
    if sharding.platform(mesh) == "cpu":
        # Many CPU devices share few threads: more than one step under way could starve another.
        return lambda state, batch: jax.block_until_ready(compute(state, batch))
    before: dict[str, jax.Array] = {}

    def begin(state, batch):
        """Begins a step when the one before the last is done: the devices never wait for the host,
        which knows how long a step takes."""
        nonlocal before
        state, metrics = compute(state, batch)
        jax.block_until_ready(before)
        before = metrics
        return state, metrics

    return begin


def _described(mesh: Mesh) -> str:
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    return f"{axes or 'one device'} ({sharding.platform(mesh)})"


def _progress(
    experiment: Experiment,
    done: Done,
    full_rate: float | None,
    say: Callable[[str], None],
    writer: MetricsWriter | None,
) -> Progress:
    return Progress(
        steps=experiment.steps,
        done=done,
        tokens_per_step=experiment.tokens_per_step,
        full_rate=full_rate,
        say=say,
        writer=writer,
    )


def _full_rate(model: ModelConfig, mesh: Mesh, state: TrainState) -> float | None:
    """Tokens per second if all devices did nothing but the model's products, at their peak."""
    peak = costs.peak_flops(mesh.devices.flat[0].device_kind)
    per_token = costs.flops_per_token(model, _parameters(state))
    return peak and peak * mesh.size / per_token


def _parameters(state: TrainState) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(state.params))
