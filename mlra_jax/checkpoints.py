"""Checkpoint folders that describe themselves: `<folder>/checkpoints/<step>/<item>`.

Items: `params` (nested dict of arrays, layers stacked along the first axis) and `model` (JSON:
format version, model config, tokenizer name) always; `optimizer`, `iterator` and `progress` in a
training run. Orbax writes a step under a temporary name and renames it when all of it is there and
can be read, so a folder whose name is a number is a finished checkpoint; a half-written one is
never looked at. Everything in it has a checksum that reading verifies (`checksums.py`).
"""

import contextlib
import dataclasses
import inspect
import json
import logging
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from mlra_jax import checksums
from mlra_jax.config import ConfigError, ModelConfig
from mlra_jax.data.tokenizers import RANKS_FILE, meet_ranks
from mlra_jax.settings_tree import flatten
from mlra_jax.storage import paths
from mlra_jax.storage.paths import AnyPath, PathLike

FORMAT_VERSION = 1
SUBFOLDER = "checkpoints"
# Orbax takes these in a path for patterns: what it wrote is not found again, or is a neighbour's.
_PATTERN_CHARACTERS = "[]*?\\"


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or of another model; one line with the remedy."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One finished step of a checkpoint folder."""

    folder: AnyPath
    """The step's own folder, `<folder>/checkpoints/<step>`."""
    step: int
    model: ModelConfig
    tokenizer: str | None

    def restore(self, item: str, abstract: Any) -> Any:
        """Reads the arrays of `item` straight to where `abstract` says they go.

        Args:
          item: `params` or `optimizer`.
          abstract: a tree of `jax.ShapeDtypeStruct` with shardings. Each process reads the
            parts that its own devices hold. Another dtype than the stored one is cast to
            while reading; beside the result, about the largest array is in memory.

        Raises:
          CheckpointError: a file is missing or damaged, or the stored arrays have other names or
            shapes than `abstract`.
        """
        with _one_line(self.folder, item):
            stored = ocp.PyTreeCheckpointHandler().metadata(self.folder / item).tree
            _check_same_arrays(self.folder / item, stored, abstract)
            # A read that is larger than the limit is refused, so it is that of the largest array,
            # which is counted in the wider of its two dtypes: as stored or as asked for.
            # Without one, all arrays are in memory as stored before the first of them is cast.
            asked = _by_name(abstract)
            largest = max(
                math.prod(x.shape) * max(np.dtype(d).itemsize for d in (x.dtype, asked[name].dtype))
                for name, x in _by_name(stored).items()
            )
            handler = ocp.StandardCheckpointHandler(restore_concurrent_gb=1.1 * largest / 1e9)
            with ocp.Checkpointer(handler) as reader:
                return reader.restore(self.folder / item, abstract)

    def read_json(self, item: str) -> Any:
        """Reads a JSON item: `model`, `iterator` or `progress`."""
        with _one_line(self.folder, item):
            return json.loads((self.folder / item / "metadata").read_text())

    def has(self, item: str) -> bool:
        return (self.folder / item).is_dir()


def describe(model: ModelConfig, tokenizer: str | None) -> dict[str, Any]:
    """The `model` item of a checkpoint."""
    return {"format_version": FORMAT_VERSION, "model": model.to_dict(), "tokenizer": tokenizer}


def writable_path(folder: PathLike) -> AnyPath:
    """The absolute path of a folder in which a checkpoint can be written and found again.

    Raises CheckpointError if it has a character that file patterns are made of. Reading is not
    affected: a folder may be renamed afterwards.
    """
    path = paths.path(folder).absolute()
    found = next((c for c in _PATTERN_CHARACTERS if c in str(path)), None)
    if found:
        raise CheckpointError(
            f"checkpoints cannot be written to {path}: the path has a {found}; choose one "
            f"without {' '.join(_PATTERN_CHARACTERS)}"
        )
    return path


class Manager(ocp.CheckpointManager):
    """Writes the checkpoints of a folder in the background; those before the last `keep` go.

    With `keep_every`, those of its multiples stay. A step counts, and older ones go, when it has
    been found readable. Creates the folder; removes what an interrupted save left behind. Where a
    save fails, nothing of it is written any more when that is raised.

    Args:
      handlers: leaf type to the Orbax handler that writes it; by default those of arrays.

    Raises:
      CheckpointError: as `writable_path`, before anything is written.
    """

    def __init__(
        self,
        folder: PathLike,
        keep: int | None = None,
        keep_every: int = 0,
        handlers: Mapping[type, ocp.type_handlers.TypeHandler] | None = None,
    ):
        path = writable_path(folder) / SUBFOLDER
        path.parent.mkdir(parents=True, exist_ok=True)
        self._arrays, self._step, self._failure = checksums.ArrayHandler(), -1, None
        self._writes: list[ocp.future.Future] = []
        handlers = handlers or {jax.Array: self._arrays, np.ndarray: self._arrays}
        registry = ocp.type_handlers.create_type_handler_registry(*handlers.items())
        policies = ocp.checkpoint_managers
        stay = [policies.EveryNSteps(keep_every)] if keep_every else []
        stay += [policies.LatestN(keep)] if keep else []
        tree = lambda: ocp.PyTreeCheckpointHandler(use_zarr3=True, type_handler_registry=registry)
        items = {name: tree() for name in ("params", "optimizer")}
        items |= {name: ocp.JsonCheckpointHandler() for name in ("model", "iterator", "progress")}
        for handler in items.values():
            _note(handler, self._writes)
        super().__init__(
            path,
            item_handlers=items,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(stay) if keep else None,
                cleanup_tmp_directories=True,
                # In the background, a folder that cannot be made leaves threads that wait for it.
                async_options=ocp.AsyncOptions(
                    create_directories_asynchronously=False,
                    post_finalization_callback=self._seal,
                ),
            ),
        )

    def save(self, step: int, *args, **kwargs) -> bool:
        """As Orbax's."""
        self.wait_until_finished()
        self._step = step
        self._writes.clear()
        with self._all_ended():
            return super().save(step, *args, **kwargs)

    def wait_until_finished(self) -> None:
        """As Orbax's."""
        with self._all_ended():
            super().wait_until_finished()

    def poll(self) -> bool:
        """Whether the last save is done, without waiting for it; raises what it failed with."""
        # Known here before Orbax's threads end, which may wait for other processes.
        if failure := self._failure or self._arrays.failure:
            with self._all_ended():
                raise failure
        if done := not self.is_saving_in_progress():
            self.wait_until_finished()
        return done

    @contextlib.contextmanager
    def _all_ended(self) -> Iterator[None]:
        """Orbax raises the first error while other threads write on, into what is then removed or
        another save's. None of them waits for another process."""
        try:
            yield
        except BaseException:
            for write in self._writes:
                with contextlib.suppress(Exception):
                    write.result()
            raise

    def _seal(self) -> None:
        """On process 0, when all is written and before the step has its name."""
        try:
            # In a bucket nothing is renamed: a step has its name, and counts when it is marked.
            suffix = "" if paths.in_bucket(self.directory) else ocp.path.step.TMP_DIR_SUFFIX
            checksums.seal(paths.path(self.directory) / f"{self._step}{suffix}")
        except Exception as error:
            self._failure = error
            raise


def _note(handler: ocp.AsyncCheckpointHandler, writes: list[ocp.future.Future]) -> None:
    """Has what a handler begins to write in the background put into `writes`."""
    begin = handler.async_save

    async def async_save(*args, **kwargs):
        begun = await begin(*args, **kwargs)
        writes.extend(begun)
        return begun

    handler.async_save = async_save


def make_manager(folder: PathLike, *, keep: int | None = None, keep_every: int = 0) -> Manager:
    """`Manager(folder, keep, keep_every)`."""
    return Manager(folder, keep, keep_every)


def save(
    manager: ocp.CheckpointManager,
    step: int,
    *,
    params: Mapping[str, Any],
    model: Mapping[str, Any],
    optimizer: Any = None,
    **json_items: Any,
) -> None:
    """Begins to write a checkpoint; `manager.wait_until_finished()` waits for it.

    Args:
      manager: from `make_manager`.
      step: the step's number.
      params: nested dict of arrays. They may be donated as soon as this returns.
      model: from `describe`.
      optimizer: tree of arrays, in a training run.
      **json_items: anything JSON can say, `iterator` and `progress` in a training run.
    """
    items = {"params": ocp.args.PyTreeSave(params), "model": ocp.args.JsonSave(dict(model))}
    if optimizer is not None:
        items["optimizer"] = ocp.args.PyTreeSave(optimizer)
    items |= {name: ocp.args.JsonSave(value) for name, value in json_items.items()}
    manager.save(step, args=ocp.args.Composite(**items))


def finished_steps(folder: PathLike) -> list[int]:
    """The steps of `folder` that were written completely, ascending; none if there is no folder."""
    path = paths.path(folder) / SUBFOLDER
    return sorted(ocp.utils.checkpoint_steps(path)) if path.is_dir() else []


def open_checkpoint(folder: PathLike, step: int | None = None) -> Checkpoint:
    """Opens the latest finished step of `folder`, or `step`.

    Raises:
      CheckpointError: nothing there, no finished step, a damaged description, or a format of a
        newer version.
    """
    if not paths.path(folder).exists():
        raise CheckpointError(f"no checkpoint: {folder} does not exist")
    steps = finished_steps(folder)
    if not steps and _is_release(paths.path(folder)):
        raise CheckpointError(
            f"{folder} has weights as they are released: convert them first, python -m "
            f"mlra_jax.convert --source={folder} --destination=DIR, and name that DIR"
        )
    if not steps:
        raise CheckpointError(f"no finished checkpoint in {folder} (looked for {SUBFOLDER}/<step>)")
    if step is not None and step not in steps:
        raise CheckpointError(f"{folder} has no step {step}; it has {', '.join(map(str, steps))}")
    step = steps[-1] if step is None else step
    path = paths.path(folder).absolute() / SUBFOLDER / str(step)
    with _one_line(path, "model"):
        checksums.verify(path)
        described = json.loads((path / "model" / "metadata").read_text())
        version, values = described["format_version"], described["model"]
        tokenizer = described["tokenizer"]
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}; this program reads {FORMAT_VERSION}"
        )
    try:
        model = ModelConfig.from_dict(values)
    except (ConfigError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{path}/model describes no model of this program: {e}") from e
    # Those of a run's best weights lie beside its checkpoints.
    for above in path.parents[1:3]:
        meet_ranks(tokenizer, above / RANKS_FILE)
    return Checkpoint(folder=path, step=step, model=model, tokenizer=tokenizer)


def _is_release(folder: AnyPath) -> bool:
    return any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "pytorch_model*.bin"))


def check_same_model(
    checkpoint: Checkpoint, model: ModelConfig, tokenizer: str | None, workdir: PathLike
) -> None:
    """Raises CheckpointError naming the first setting in which a workdir's model is another one.

    How the model is computed (`Execution`) may differ; what it is may not.
    """
    stored = flatten({"model": checkpoint.model.identity(), "tokenizer": checkpoint.tokenizer})
    wanted = flatten({"model": model.identity(), "tokenizer": tokenizer})
    for name in sorted(stored.keys() | wanted.keys()):
        old, new = stored.get(name, "absent"), wanted.get(name, "absent")
        if old != new:
            raise CheckpointError(
                f"{workdir} holds another model: {name} is {old!r} there and {new!r} here; "
                "use another workdir or the settings of that run"
            )


def _by_name(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _check_same_arrays(path: AnyPath, stored: Any, abstract: Any) -> None:
    """Orbax's own complaint runs over many lines; this one names the first array that differs."""
    have, want = (
        {name: tuple(leaf.shape) for name, leaf in _by_name(tree).items()}
        for tree in (stored, abstract)
    )
    for name in sorted(have.keys() | want.keys()):
        if name not in want:
            raise CheckpointError(f"{path} has an array {name} that the model does not have")
        if name not in have:
            raise CheckpointError(f"{path} has no array {name}, which the model needs")
        if have[name] != want[name]:
            raise CheckpointError(
                f"{path}: {name} has shape {list(have[name])} there and {list(want[name])} here"
            )


@contextlib.contextmanager
def _one_line(folder: AnyPath, item: str):
    """Turns whatever the readers raise on a missing or damaged file into one line.

    The readers are many coroutines and threads; those that the first error leaves unfinished would
    report themselves around that line, as exceptions nobody can catch.
    """
    hook, logger = sys.unraisablehook, logging.getLogger("asyncio")
    level = logger.level
    sys.unraisablehook = lambda report: None if _is_aftermath(report) else hook(report)
    logger.setLevel(logging.CRITICAL)
    damaged = False
    try:
        yield
    except CheckpointError:
        raise
    except Exception as e:
        damaged = True
        reason = f"{item} is damaged ({_reason(e)})"
        if paths.is_refusal(e):
            raise CheckpointError(
                f"checkpoint {folder}: {item} cannot be read ({_reason(e)}); look after the rights "
                "and the network"
            ) from None
        if not (folder / item).exists():
            reason = f"{item} is missing"
        elif isinstance(e, checksums.DamageError):
            reason = str(e)
        others = [str(s) for s in finished_steps(folder.parent.parent) if str(s) != folder.name]
        remedy = f"delete {folder} to go on from step {others[-1]}" if others else "copy it again"
        # Without `from`: the cause's frames would keep the unfinished coroutines alive. The hook
        # stays, since threads may still report.
        raise CheckpointError(f"checkpoint {folder}: {reason}; {remedy}") from None
    finally:
        if not damaged:
            sys.unraisablehook = hook
            logger.setLevel(level)


def _is_aftermath(report) -> bool:
    return inspect.iscoroutine(report.object) or "Event loop is closed" in str(report.exc_value)


def _reason(e: Exception) -> str:
    """The head of an error's first line: TensorStore appends its whole specification."""
    first = (str(e).splitlines() or [""])[0].split(" [")[0].split(" See full TensorStore")[0]
    return f"{type(e).__name__}: {first}"[:240]
