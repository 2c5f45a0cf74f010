"""What `model.remat=auto` chooses, by the compiler's figures of pretended steps."""

import dataclasses
from types import SimpleNamespace

import jax
import pytest

from mlra_jax import sharding
from mlra_jax.config import ConfigError
from mlra_jax.plan.topology import describe
from mlra_jax.training import compiling, fitting
from tests.training import tiny

GIB = 2**30


def choose(monkeypatch, sizes, limit, remat="auto", refused=(), options=""):
    """(the value of remat, the lines said), the step of each value taking `sizes` GiB."""

    def make_step(experiment, mesh):
        name = experiment.model.execution.remat

        def compile(compiler_options):
            assert compiler_options == ({"xla_a": "1", "xla_b": "x=y"} if options else None)
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
    experiment = dataclasses.replace(tiny.experiment(), model=model, xla_options=options)
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


@pytest.mark.parametrize("remat", ["auto", "none"])
def test_options_are_said_and_reach_the_compiler_in_every_form(monkeypatch, remat):
    options = "xla_a=1 xla_b=x=y"
    _, lines = choose(monkeypatch, SIZES, 50, remat=remat, options=options)
    assert lines[0] == f"XLA options: {options}"


KNOWN = "xla_gpu_dot_merger_threshold_mb"


def with_options(text):
    return dataclasses.replace(tiny.experiment(), xla_options=text)


def test_what_the_program_sets_is_what_this_jax_knows_and_the_setting_wins(monkeypatch):
    own = {"cpu": {"xla_no_such": "1", KNOWN: "7"}}
    monkeypatch.setattr(compiling, "_OF_SEVERAL", own)
    several = sharding.make_mesh(fsdp=2)
    assert compiling.options(with_options(""), several) == {KNOWN: "7"}
    assert compiling.options(with_options(f"{KNOWN}=3"), several) == {KNOWN: "3"}
    assert compiling.options(with_options(""), sharding.make_mesh()) == {}


def test_more_exchanges_are_under_way_where_engines_copy(monkeypatch):
    """Not where kernels carry them, nor against the setting."""
    limit = "xla_gpu_experimental_parallel_collective_overlap_limit"
    monkeypatch.setattr(compiling, "_refusal", lambda chosen: None)
    gpus = list(describe("h100:4").devices)
    made = lambda n: sharding.make_mesh(fsdp=n, devices=gpus)
    allowed = lambda text, n: compiling.options(with_options(text), made(n)).get(limit)
    assert [allowed("", n) for n in (1, 2, 4)] == [None, "16", "4"]
    assert allowed(f"{limit}=8", 2) == "8"
    of_heads = compiling.options(with_options(""), sharding.make_mesh(tensor=2, devices=gpus))
    assert of_heads == compiling._COPIED


def test_options_may_say_true_as_xlas_flags_do():
    text = "xla_cpu_enable_fast_math=false xla_cpu_enable_fast_min_max=true"
    chosen = compiling.options(with_options(text), sharding.make_mesh())
    assert compiling.compile_with(jax.jit(lambda: 1), (), chosen)() == 1


@pytest.mark.parametrize("option", ["xla_no_such=1", f"{KNOWN}=many"])
def test_an_option_that_this_jax_refuses_is_named(option):
    step = lambda experiment, mesh: jax.jit(lambda: 1)
    with pytest.raises(ConfigError, match=f"xla_options: JAX .*{option.split('=')[0]}") as error:
        fitting.compile_step(step, with_options(option), sharding.make_mesh(), (), print)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("item", ["latency", "gpu=1", "xla_gpu"])
def test_what_is_no_option_is_refused_before_anything_is_done(item):
    with pytest.raises(ConfigError, match=f"xla_options has '{item}'"):
        with_options(f"{KNOWN}=3 {item}")
