"""A step as the compiler makes it for a topology: memory and exchanges, kept in a cache.

The key is the lowered program itself with the devices and versions, so that what is found is never
that of another program.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mlra_jax import cache as kv
from mlra_jax import sharding
from mlra_jax.config import ModelConfig
from mlra_jax.decoder import Vocabulary, abstract_cache, abstract_decoder
from mlra_jax.files import whole_file
from mlra_jax.generation import programs
from mlra_jax.plan import program
from mlra_jax.plan.program import Collective
from mlra_jax.training.settings import Experiment
from mlra_jax.training.step import abstract_batch, abstract_state, make_train_step


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Bytes of one device, by the compiler; all 0 but `needed` where it found no room."""

    arguments: int
    """Weights, moments and batch; in decoding weights and cache."""
    outputs: int
    """That do not lie where arguments lay."""
    temporaries: int
    collectives: tuple[Collective, ...]
    seconds: float
    """That compiling took."""
    needed: int = 0
    """What it asked for where that was more than the chip has."""

    @property
    def fits(self) -> bool:
        return not self.needed

    @property
    def bytes(self) -> int:
        return self.needed or self.arguments + self.outputs + self.temporaries


def lower_training(experiment: Experiment, mesh: Mesh) -> Any:
    """The training step as users run it, lowered for a mesh of described devices."""
    step = make_train_step(experiment, mesh)
    return step.lower(abstract_state(experiment, mesh), abstract_batch(experiment, mesh))


def lower_decoding(config: ModelConfig, mesh: Mesh, batch: int, positions: int) -> Any:
    """The same for a decoding step of `batch` rows over a cache of `positions`."""
    tokens = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=sharding.named(mesh))
    decoder = abstract_decoder(config, mesh, Vocabulary(config.vocab_size))
    slots = kv.round_capacity(positions, mesh)
    return programs.step.lower(decoder, abstract_cache(config, mesh, batch, slots), tokens)


def compile_for(
    lowered: Any, mesh: Mesh, folder: Path | None, say: Callable[[str], None] = print
) -> Compiled:
    """Compiles, which takes a minute or more, or gives what is kept of that in `folder`."""
    path = folder and folder / f"{_key(lowered, mesh)}.json"
    if path and (kept := _read(path)):
        return kept
    say("compiling, a minute or more ...")
    made = _compile(lowered, mesh)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            json.dump(dataclasses.asdict(made), file)
    return made


def _compile(lowered: Any, mesh: Mesh) -> Compiled:
    began = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed = _asked_for(str(error))
        return Compiled(0, 0, 0, (), time.perf_counter() - began, needed)
    return of_program(compiled, mesh, round(time.perf_counter() - began, 1))


def of_program(compiled: Any, mesh: Mesh, seconds: float) -> Compiled:
    """What is to be known of a program that took so long to compile."""
    memory = compiled.memory_analysis()
    return Compiled(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        collectives=tuple(program.collectives(compiled.as_text(), mesh.devices, mesh.axis_names)),
        seconds=seconds,
    )


def _asked_for(message: str) -> int:
    """Bytes that the compiler says a program needs; 1 where it does not say how many."""
    found = re.search(r"\(([\d.]+)([KMGT]?)\) exceeds", message)
    scale = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    return round(float(found[1]) * scale[found[2]]) if found else 1


def _key(lowered: Any, mesh: Mesh) -> str:
    devices = [(d.device_kind, d.id, getattr(d, "slice_index", 0)) for d in mesh.devices.flat]
    where = repr((dict(mesh.shape), devices))
    parts = lowered.as_text(), where, _versions(), Path(program.__file__).read_text()
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _versions() -> str:
    def version(name):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return "none"

    return " ".join(f"{name} {version(name)}" for name in ("jax", "jaxlib", "libtpu"))


def _read(path: Path) -> Compiled | None:
    """None where there is none, or none that can be read."""
    try:
        values = json.loads(path.read_text())
        found = tuple(Collective(**c | {"axes": tuple(c["axes"])}) for c in values["collectives"])
        return Compiled(**values | {"collectives": found})
    except (OSError, ValueError, TypeError, KeyError):
        return None
