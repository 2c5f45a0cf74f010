"""What `model.remat=auto` chooses, by the compiler's figures of pretended steps."""

import dataclasses
from types import SimpleNamespace

import jax
import pytest

from mlra_jax import sharding
from mlra_jax.training import fitting
from tests.training import tiny

GIB = 2**30


def choose(monkeypatch, sizes, limit, remat="auto", refused=()):
    """(the value of remat, the lines said), the step of each value taking `sizes` GiB."""

    def make_step(experiment, mesh):
        name = experiment.model.execution.remat

        def compile():
            if name in refused:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: hbm")
            memory = SimpleNamespace(
                argument_size_in_bytes=3 * GIB,
                output_size_in_bytes=3 * GIB,
                alias_size_in_bytes=2 * GIB,
                temp_size_in_bytes=(sizes.get(name, 0) - 4) * GIB,
            )
            return SimpleNamespace(name=name, memory_analysis=lambda: memory)

        return SimpleNamespace(lower=lambda *_: SimpleNamespace(compile=compile))

    monkeypatch.setattr(fitting, "memory_limit", lambda mesh: limit * GIB)
    model = dataclasses.replace(tiny.experiment().model, remat=remat)
    experiment = dataclasses.replace(tiny.experiment(), model=model)
    lines = []
    mesh = sharding.make_mesh()
    program = fitting.compile_step(make_step, experiment, mesh, (), lines.append)
    return program.name, lines


SIZES = {"none": 60, "products": 40, "attention": 30, "block": 20}


@pytest.mark.parametrize(
    "limit, chosen",
    [(100, "none"), (67, "none"), (66, "products"), (34, "attention"), (33, "block"), (9, "block")],
)
def test_the_first_that_leaves_a_tenth_free_is_taken(monkeypatch, limit, chosen):
    name, lines = choose(monkeypatch, SIZES, limit)
    assert name == chosen
    assert lines[-1] == f"remat={chosen}: {SIZES[chosen]}.0 of {limit}.0 GiB"
    tried = list(SIZES)[: list(SIZES).index(chosen)]
    assert lines[:-1] == [f"remat={n} does not fit: {SIZES[n]}.0 of {limit}.0 GiB" for n in tried]


def test_what_the_compiler_refuses_does_not_fit(monkeypatch):
    name, lines = choose(monkeypatch, SIZES, 100, refused=("none", "products"))
    assert name == "attention" and lines[0] == "remat=none does not fit"
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        choose(monkeypatch, SIZES, 100, refused=SIZES)


def test_a_value_that_is_given_and_a_device_that_says_no_limit_try_nothing(monkeypatch):
    assert choose(monkeypatch, SIZES, 10, remat="none") == ("none", [])
    assert choose(monkeypatch, SIZES, 0) == ("auto", [])


def test_the_virtual_devices_of_a_cpu_say_no_limit():
    assert fitting.memory_limit(sharding.make_mesh(data=2)) == 0
