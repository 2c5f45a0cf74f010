"""The fastest form of a step that the memory of the devices has room for."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from mlra_jax.training.compiling import compile_with, options
from mlra_jax.training.settings import Experiment

FASTEST_FIRST = ("none", "products", "attention", "block")
"""What `model.remat=auto` tries; each takes less memory and more time than the one before."""
SHARE = 0.9
"""Of the memory, that a step may take: one piece is to be found for what is worked with."""


def memory_limit(mesh: Mesh) -> int:
    """Bytes that a device of the mesh has for arrays, the same on all processes; 0 is not known."""
    stats = [device.memory_stats() or {} for device in mesh.local_devices]
    limit = min(s.get("bytes_limit", 0) for s in stats)
    if jax.process_count() > 1:
        limit = int(multihost_utils.process_allgather(np.int64(limit >> 20)).min()) << 20
    return limit


def bytes_needed(program: Any) -> int:
    """That a compiled step takes of each device, its arguments included."""
    memory = program.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return held - memory.alias_size_in_bytes + memory.temp_size_in_bytes


def compile_step(
    make_step: Callable[[Experiment, Mesh], Any],
    experiment: Experiment,
    mesh: Mesh,
    arguments: tuple[Any, ...],
    say: Callable[[str], None],
) -> Any:
    """The compiled step; with `model.remat=auto`, the first of `FASTEST_FIRST` that fits.

    That changes neither the state nor what is stored. Where the devices do not say how much memory
    they have, as on CPUs, it is `block`.

    Args:
      make_step: (experiment, mesh) to a jitted step.
      experiment: what to train.
      mesh: of devices that are here.
      arguments: of the step, arrays or their shapes.
      say: prints one line that names the choice with its memory, and one with XLA's options.

    Raises:
      ConfigError: `xla_options` are not this JAX's.
    """
    model, limit = experiment.model, memory_limit(mesh)
    if chosen := options(experiment, mesh):
        say("XLA options: " + " ".join(f"{name}={value}" for name, value in chosen.items()))
    if model.execution.remat != "auto" or not limit:
        return compile_with(make_step(experiment, mesh), arguments, chosen)
    for remat in FASTEST_FIRST:
        last = remat == FASTEST_FIRST[-1]
        tried = dataclasses.replace(experiment, model=dataclasses.replace(model, remat=remat))
        try:
            program = compile_with(make_step(tried, mesh), arguments, chosen)
        except jax.errors.JaxRuntimeError as error:  # TPUs refuse to compile what does not fit.
            if last or "RESOURCE_EXHAUSTED" not in str(error):
                raise
            say(f"remat={remat} does not fit")
            continue
        needed = bytes_needed(program)
        figures = f"{needed / 2**30:.1f} of {limit / 2**30:.1f} GiB"
        if last or needed <= SHARE * limit:
            say(f"remat={remat}: {figures}")
            return program
        say(f"remat={remat} does not fit: {figures}")
    raise AssertionError("unreachable")
