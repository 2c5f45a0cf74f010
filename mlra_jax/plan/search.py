"""Meshes, parts of a batch and forms of the backward pass, ranked by the time that they would take.

All are estimated by formula; the most promising are compiled, until enough of them are known to
fit.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

from mlra_jax.config import ConfigError
from mlra_jax.plan.formula import Decoding
from mlra_jax.plan.planning import (
    Plan,
    Say,
    estimated,
    for_decoding,
    parameters,
    plan,
    with_remat,
)
from mlra_jax.plan.topology import Topology
from mlra_jax.training.fitting import FASTEST_FIRST
from mlra_jax.training.settings import Experiment, MeshSettings

LOSS_CHUNKS = (512, 2048, 8192)
_SLACK = 1.25
"""The formula's memory may be so far from the compiler's."""


def search(
    experiment: Experiment,
    topology: Topology,
    say: Say,
    cache: Path | None = None,
    decoding: Decoding | None = None,
    keep: int = 3,
    tries: int = 12,
) -> list[Plan]:
    """The plans that fit, the fastest first, by the sum of the times of all resources.

    Args:
      experiment: whose batch, model and recipe stay as they are.
      topology: for which.
      say: prints a line of progress for each that is compiled.
      cache: folder of what was compiled before.
      decoding: search for such a step instead.
      keep: how many to find.
      tries: how many to compile at most.

    Raises:
      ConfigError: nothing fits, or no mesh of that size divides the model and the batch.
    """
    ranked = sorted(_candidates(experiment, topology, decoding), key=lambda p: p.times.most)
    limit = topology.chip.memory * (_SLACK if topology.compiles else 1)
    promising = [p for p in ranked if p.memory.bytes <= limit]
    say(f"{len(ranked):,} ways by formula, {len(promising):,} of them may fit")
    found: list[Plan] = []
    too_large: list[Plan] = []
    impossible: set[MeshSettings] = set()
    for candidate in promising:
        if len(found) == keep or len(found) + len(too_large) == tries:
            break
        mesh = candidate.experiment.mesh
        if mesh in impossible or any(_asks_more(candidate, other) for other in too_large):
            continue
        try:
            topology.divides(candidate.experiment.model, dataclasses.asdict(mesh))
        except ConfigError:
            impossible.add(mesh)
            continue
        say(f"{len(found)} of {keep} found; trying {name(candidate)}")
        made = plan(candidate.experiment, topology, say, cache, decoding)
        size = f"{made.memory.bytes / 2**30:.1f} GiB"
        say(f"  {size}, {made.times.least:.3g} s" if made.fits else f"  does not fit: {size}")
        (found if made.fits else too_large).append(made if made.fits else candidate)
    if {p.experiment.mesh for p in ranked} <= impossible:
        raise ConfigError(
            f"no mesh of {topology.size} devices divides the model and its batch of "
            f"{experiment.data.global_batch}; another data.global_batch may"
        )
    if not found:
        raise ConfigError(
            f"nothing fits {topology.slices} x {topology.name}; take more chips, a smaller batch "
            "or optimizer.moment_dtype=bfloat16"
        )
    return sorted(found, key=lambda p: p.times.most)


def name(found: Plan) -> str:
    """What distinguishes a plan from others of the same run."""
    sizes = dataclasses.asdict(found.experiment.mesh)
    mesh = ",".join(f"{axis}={n}" for axis, n in sizes.items() if n > 1) or "one device"
    if found.decoding:
        return mesh
    e = found.experiment
    return (
        f"{mesh} accumulate={e.data.accumulate} remat={e.model.execution.remat} "
        f"loss_chunk={e.loss_chunk}"
    )


def _asks_more(candidate: Plan, refused: Plan) -> bool:
    """Whether a plan cannot fit, as another of the same mesh that asks for less did not."""
    same = candidate.experiment.mesh == refused.experiment.mesh
    return same and candidate.memory.bytes >= refused.memory.bytes


def _candidates(
    experiment: Experiment, topology: Topology, decoding: Decoding | None
) -> Iterator[Plan]:
    count = parameters(experiment)
    for mesh in _meshes(topology, decoding):
        over = mesh.data * mesh.fsdp
        if decoding:
            if decoding.rows % over == 0:
                yield estimated(for_decoding(experiment, mesh), topology, decoding, count)
            continue
        if experiment.data.global_batch % over:
            continue
        rows = experiment.data.global_batch // over
        parts = [n for n in range(1, rows + 1) if rows % n == 0]
        length = experiment.model.context_length
        chunks = sorted({min(n, length) for n in (*LOSS_CHUNKS, experiment.loss_chunk)})
        for accumulate, remat, chunk in itertools.product(parts, FASTEST_FIRST, chunks):
            form = dataclasses.replace(
                with_remat(experiment, remat),
                mesh=mesh,
                loss_chunk=chunk,
                data=dataclasses.replace(experiment.data, accumulate=accumulate),
            )
            yield estimated(form, topology, None, count)


def _meshes(topology: Topology, decoding: Decoding | None) -> Iterator[MeshSettings]:
    """Of all devices; whether they divide the model is seen when it is compiled."""
    size = topology.size
    divisors = [n for n in range(1, size + 1) if size % n == 0]
    for tensor in divisors:
        for other in (n for n in divisors if size % (tensor * n) == 0):
            data = size // (tensor * other)
            if decoding:  # weights stay where they are: no fsdp
                mesh = MeshSettings(data=data, tensor=tensor, context=other)
                crosses = data % topology.slices == 0
            else:
                mesh = MeshSettings(data=data, fsdp=other, tensor=tensor)
                crosses = data % topology.slices == 0 or other % topology.slices == 0
            if crosses:
                yield mesh
