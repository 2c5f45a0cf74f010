"""The plan of a training or decoding step on a topology: does it fit, and how long does it take."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from mlra_jax import model as models
from mlra_jax import sharding
from mlra_jax.config import ConfigError
from mlra_jax.plan import compiled, formula, roofline
from mlra_jax.plan.compiled import Compiled
from mlra_jax.plan.formula import Decoding
from mlra_jax.plan.program import Collective
from mlra_jax.plan.topology import Topology
from mlra_jax.training.fitting import FASTEST_FIRST, SHARE
from mlra_jax.training.settings import Experiment, MeshSettings
from mlra_jax.training.state import abstract_state

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Plan:
    """One step of an experiment, or of decoding from its model, on a topology."""

    experiment: Experiment
    decoding: Decoding | None
    topology: Topology
    memory: formula.Memory
    """Of one device. By the compiler's figures its whole; what of it is activations, by formula."""
    fits: bool
    work: formula.Work
    times: roofline.Times
    collectives: tuple[Collective, ...]
    seconds: float | None
    """That compiling took; None where all is by formula."""

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.decoding.rows if self.decoding else self.experiment.tokens_per_step

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.times.least

    @property
    def share_of_peak(self) -> float:
        """Of the matrix units, by the products that the step is for."""
        return self.work.model_flops / (self.times.least * self.topology.chip.flops)

    @property
    def chip_hours(self) -> tuple[float, float]:
        """Of the whole run: if everything overlaps, and if nothing does."""
        hours = self.experiment.steps * self.topology.size / 3600
        return self.times.least * hours, self.times.most * hours


def fitted(
    experiment: Experiment,
    sizes: dict[str, int] | None,
    topology: Topology,
    decoding: Decoding | None = None,
) -> Experiment:
    """The experiment on a mesh of these sizes, by default its own.

    Raises ConfigError where the mesh has not the topology's number of devices.
    """
    sizes = dataclasses.asdict(experiment.mesh) if sizes is None else sizes
    devices = math.prod(sizes.values())
    if devices != topology.size:
        described = ",".join(f"{axis}={n}" for axis, n in sizes.items() if n > 1) or "data=1"
        raise ConfigError(
            f"the mesh {described} has {devices} devices and {topology.slices} x {topology.name} "
            f"{topology.size}; give --mesh with a product of {topology.size}, or --search"
        )
    mesh = MeshSettings(**sizes)
    if not decoding:
        return dataclasses.replace(experiment, mesh=mesh)
    rows = mesh.data * mesh.fsdp
    if decoding.rows % rows:
        raise ConfigError(f"--decode: {decoding.rows} rows do not divide over data x fsdp={rows}")
    return for_decoding(experiment, mesh)


def for_decoding(experiment: Experiment, mesh: MeshSettings) -> Experiment:
    """The experiment on a mesh that need not divide its batch; weights as decoding reads them."""
    data = dataclasses.replace(experiment.data, global_batch=mesh.data * mesh.fsdp, accumulate=1)
    dtype = experiment.model.execution.dtype
    model = dataclasses.replace(experiment.model, param_dtype=dtype)
    return dataclasses.replace(experiment, mesh=mesh, data=data, model=model)


def plan(
    experiment: Experiment,
    topology: Topology,
    say: Say,
    cache: Path | None = None,
    decoding: Decoding | None = None,
) -> Plan:
    """The plan of an experiment whose mesh is the topology's size.

    With `remat=auto`, of the first form that a run there would take.

    Args:
      experiment: its mesh, batch and model.
      topology: TPUs are compiled for; what is said of GPUs is all by formula.
      say: prints one line of progress.
      cache: folder of what was compiled before.
      decoding: plan such a step of its model instead of a training step.

    Raises:
      ConfigError: sizes that do not divide over the mesh.
    """
    if decoding or experiment.model.execution.remat != "auto":
        return _planned(experiment, topology, say, cache, decoding)
    for remat in FASTEST_FIRST:
        form = with_remat(experiment, remat)
        last, limit = remat == FASTEST_FIRST[-1], SHARE * topology.chip.memory
        estimate = estimated(form, topology).memory.bytes
        if not last and topology.compiles and estimate > 1.5 * limit:
            say(f"remat={remat} does not fit: about {estimate / 2**30:.0f} GiB by formula")
            continue
        found = _planned(form, topology, say, cache, None)
        if last or (found.fits and found.memory.bytes <= limit):
            return found
        say(f"remat={remat} does not fit: {found.memory.bytes / 2**30:.1f} GiB")
    raise AssertionError("unreachable")


def with_remat(experiment: Experiment, remat: str) -> Experiment:
    return dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, remat=remat))


def parameters(experiment: Experiment) -> int:
    """Of the model; costs nothing."""
    _, shapes = models.structure(experiment.model, sharding.make_mesh())
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def estimated(
    experiment: Experiment,
    topology: Topology,
    decoding: Decoding | None = None,
    count: int | None = None,
) -> Plan:
    """The plan by formula alone; `count` is the number of parameters if it is known."""
    count = parameters(experiment) if count is None else count
    if decoding:
        work, memory, found = decoding.plan(experiment.model, experiment.mesh, count)
    else:
        training = formula.Training(experiment, count, in_loop=topology.chip.is_tpu)
        work, memory = training.work(), training.memory()
        found = training.collectives(topology.slices)
    return Plan(
        experiment=experiment,
        decoding=decoding,
        topology=topology,
        memory=memory,
        fits=memory.bytes <= SHARE * topology.chip.memory,
        work=work,
        times=roofline.times(work, found, topology.chip),
        collectives=tuple(found),
        seconds=None,
    )


def _planned(
    experiment: Experiment,
    topology: Topology,
    say: Say,
    cache: Path | None,
    decoding: Decoding | None,
) -> Plan:
    estimate = estimated(experiment, topology, decoding)
    sizes = dataclasses.asdict(experiment.mesh)
    topology.divides(experiment.model, sizes)
    if not topology.compiles:
        return estimate
    mesh = topology.mesh(sizes)
    if decoding:
        model = experiment.model
        lowered = compiled.lower_decoding(model, mesh, decoding.rows, decoding.positions)
    else:
        lowered = compiled.lower_training(experiment, mesh)
    found = compiled.compile_for(lowered, mesh, cache, say)
    memory = _memory(found, estimate.memory, experiment, mesh, decoding)
    made = dataclasses.replace(estimate, memory=memory, fits=found.fits, seconds=found.seconds)
    if not found.fits:  # There is no program whose exchanges could be read.
        return made
    times = roofline.times(estimate.work, found.collectives, topology.chip)
    return dataclasses.replace(made, times=times, collectives=found.collectives)


def _memory(
    found: Compiled,
    estimate: formula.Memory,
    experiment: Experiment,
    mesh: Mesh,
    decoding: Decoding | None,
) -> formula.Memory:
    """What the compiler says of it all, dealt to its kinds."""
    if not found.fits:
        rest = max(0, found.bytes - estimate.parameters - estimate.optimizer)
        kept = min(estimate.activations, rest)
        return dataclasses.replace(estimate, activations=kept, temporaries=rest - kept)
    if decoding:
        weights = found.arguments - estimate.optimizer
        rest = found.outputs + found.temporaries
        return formula.Memory(weights, estimate.optimizer, 0, rest)
    weights = held(abstract_state(experiment, mesh).params)
    kept = min(estimate.activations, found.temporaries)
    rest = found.outputs + found.temporaries - kept
    return formula.Memory(weights, found.arguments - weights, kept, rest)


def held(tree: Any) -> int:
    """Bytes on one device."""
    sizes = jax.tree.map(
        lambda x: x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)), tree
    )
    return sum(jax.tree.leaves(sizes))
