"""What compiling gives is kept, and given again for the same program only."""

import dataclasses
from types import SimpleNamespace

import jax
import pytest

from mlra_jax.config import preset
from mlra_jax.plan import compiled, planning, topology
from mlra_jax.plan.compiled import Compiled, compile_for
from mlra_jax.plan.program import Collective
from mlra_jax.sharding import make_mesh
from mlra_jax.training.settings import DataSettings, Experiment

GIB = 2**30
NO_ROOM = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
    "required for HLO temporaries (15.77G) exceeds available HBM (15.75G). HLO module: jit_step."
)
TEXT = """ENTRY %main (a: f32[8]) -> f32[8] {
  ROOT %r = f32[8]{0} all-reduce(%a), channel_id=1, replica_groups={{0,1}}
}
"""


def lowered(name, made, error=None):
    """As a lowered program; `made` counts how often it is compiled."""
    memory = SimpleNamespace(
        argument_size_in_bytes=100,
        output_size_in_bytes=90,
        alias_size_in_bytes=80,
        temp_size_in_bytes=7,
    )

    def compile():
        made.append(name)
        if error:
            raise jax.errors.JaxRuntimeError(error)
        return SimpleNamespace(memory_analysis=lambda: memory, as_text=lambda: TEXT)

    return SimpleNamespace(as_text=lambda: name, compile=compile)


def test_the_same_program_is_compiled_once(tmp_path):
    made, said, mesh = [], [], make_mesh(fsdp=2)
    first = compile_for(lowered("a", made), mesh, tmp_path, said.append)
    assert (first.arguments, first.outputs, first.temporaries, first.bytes) == (100, 10, 7, 117)
    assert first.collectives == (Collective("all-reduce", ("fsdp",), 1, 1, 32),) and first.fits
    assert compile_for(lowered("a", made), mesh, tmp_path, said.append) == first
    assert made == ["a"] and len(said) == 1
    compile_for(lowered("b", made), mesh, tmp_path, said.append)
    compile_for(lowered("a", made), make_mesh(data=2), tmp_path, said.append)
    assert made == ["a", "b", "a"]
    for path in tmp_path.iterdir():
        path.write_text(path.read_text()[:50])
    assert compile_for(lowered("a", made), mesh, tmp_path, said.append) == first
    assert made == ["a", "b", "a", "a"]
    compile_for(lowered("a", made), mesh, None, said.append)
    assert len(made) == 5 and len(list(tmp_path.iterdir())) == 3


def test_what_the_compiler_has_no_room_for(tmp_path):
    made, mesh = [], make_mesh()
    found = compile_for(lowered("a", made, NO_ROOM), mesh, tmp_path)
    assert not found.fits and found.bytes == round(15.77 * GIB)
    assert compile_for(lowered("a", made, NO_ROOM), mesh, tmp_path) == found and made == ["a"]
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        compile_for(lowered("b", made, "INTERNAL: something else"), mesh, tmp_path)


def test_a_plan_without_room_says_how_much_was_asked(monkeypatch):
    full = topology.describe("h100:8")
    experiment = planning.fitted(
        Experiment(model=preset("mlra_4", remat="block"), data=DataSettings(source="x")),
        dict(data=1, fsdp=8, tensor=1, context=1),
        full,
    )
    monkeypatch.setattr(planning.compiled, "lower_training", lambda *_: None)
    found = Compiled(0, 0, 0, (), 1.0, needed=120 * GIB)
    monkeypatch.setattr(compiled, "compile_for", lambda *_: found)
    compiling = dataclasses.replace(full, compiles=True)
    made, estimate = (planning.plan(experiment, where, print) for where in (compiling, full))
    assert not made.fits and made.memory.bytes == 120 * GIB
    assert made.memory.parameters == estimate.memory.parameters
    assert made.times == estimate.times and made.collectives == estimate.collectives
