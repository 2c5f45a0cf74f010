"""Settings: what each may be, which name was meant, to dictionaries and back."""

import dataclasses
import inspect
import json
import math
import re
import runpy
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlra_jax.command import Parser
from mlra_jax.config import PRESETS, ConfigError, Execution, GroupedConfig, ModelConfig, preset
from mlra_jax.data.inputs import open_input
from mlra_jax.data.pipeline import ORDERS
from mlra_jax.data.prepare import prepare
from mlra_jax.data.tokenizers import get_tokenizer
from mlra_jax.settings_tree import closest
from mlra_jax.training.__main__ import read_settings
from mlra_jax.training.settings import DataSettings, Experiment, MeshSettings, OptimizerSettings

CONFIGS = Path(__file__).parents[2] / "configs"
MODEL = ModelConfig(
    attention=GroupedConfig(num_heads=4, num_kv_heads=2, head_dim=4),
    vocab_size=260,
    num_layers=1,
    embed_dim=16,
    mlp_dim=24,
    context_length=12,
)
EXPERIMENT = Experiment(model=MODEL, data=DataSettings(source="pydoc"))

LEAST = {
    "": dict.fromkeys(["steps", "log_every", "validate_every", "save_every", "keep"], 1)
    | {"loss_chunk": 1}
    | dict.fromkeys(
        ["seed", "virtual_cpu_devices", "save_minutes", "keep_every", "skip_budget"], 0
    ),
    "mesh": dict.fromkeys(["data", "fsdp", "tensor", "context"], 1),
    "data": dict.fromkeys(["global_batch", "accumulate", "validation_tokens", "cache_bytes"], 1),
    "optimizer": dict.fromkeys(
        ["peak_learning_rate", "warmup_steps", "final_fraction", "b1", "b2", "eps", "weight_decay"]
        + ["clip_norm"],
        0,
    ),
}
NUMBERS = [(part, name) for part, names in LEAST.items() for name in names]


def changed(part, name, value):
    """An experiment's dictionary with one setting changed, nothing else in its way."""
    values = EXPERIMENT.to_config_dict().to_dict()
    values["optimizer"]["warmup_steps"] = 0
    (values[part] if part else values)[name] = value
    return values


@pytest.mark.parametrize("part, name", NUMBERS)
def test_each_number_has_its_least_value_and_must_be_one(part, name):
    least, full = LEAST[part][name], f"{part}.{name}" if part else name
    allowed = 1e-30 if name == "eps" else least
    built = Experiment.from_dict(changed(part, name, allowed))
    assert getattr(getattr(built, part) if part else built, name) == allowed
    whole = isinstance(getattr(getattr(EXPERIMENT, part) if part else EXPERIMENT, name), int)
    floats, others = (math.nan, math.inf), (True, None, "3")
    for value in (least - 1, *(() if whole else floats)):
        with pytest.raises(ConfigError, match=f"^{full}={value} must be at least {least}$"):
            Experiment.from_dict(changed(part, name, value))
    kind = "whole number" if whole else "number"
    for value in (*others, *((*floats, 2.0) if whole else ())):
        with pytest.raises(ConfigError, match=f"^{full}={value!r} is not a {kind}$"):
            Experiment.from_dict(changed(part, name, value))


def test_every_number_is_in_the_table_above():
    parts = {"": Experiment, "mesh": MeshSettings, "data": DataSettings}
    for part, cls in (parts | {"optimizer": OptimizerSettings}).items():
        numbers = {f.name for f in dataclasses.fields(cls) if f.type in (int, float)}
        assert numbers - {"validation_fraction"} == LEAST[part].keys()


@pytest.mark.parametrize(
    "name, written, inside, outside",
    [
        ("b1", "[0, 1)", [0, 0.999, 1 - 1e-7], [1, 1.0, 1.5, 1 - 1e-9]),
        ("b2", "[0, 1)", [0, 0.999999], [1, 2, 0.99999999]),
        ("eps", "(0, inf)", [1e-37, 1e-8, 1], [0, 0.0, 1e-40, 1e-60]),
        ("clip_norm", "(0, inf)", [0, 0.0, 1e-30, 5], [1e-50, 1e39]),
        ("final_fraction", "[0, inf)", [0, 1, 2], [1e39]),
        ("peak_learning_rate", "[0, inf)", [0, 1], [1e40]),
        ("weight_decay", "[0, inf)", [0, 1], [1e300]),
    ],
)
def test_each_number_of_the_optimizer_has_its_range_in_float32(name, written, inside, outside):
    for value in inside:
        assert getattr(OptimizerSettings(**{name: value}), name) == value
    for value in outside:
        with pytest.raises(
            ConfigError, match=re.escape(f"optimizer.{name}={value} must lie in {written}")
        ):
            OptimizerSettings(**{name: value})
    # Every range is in the docstring behind the setting.
    source = inspect.getsource(OptimizerSettings)
    documented = re.search(rf'    {name}: .*\n    """([^"]*)"""', source).group(1)
    assert written in documented.replace("\n    ", " ")


def test_a_number_that_float32_changes_is_refused_with_what_becomes_of_it():
    with pytest.raises(ConfigError, match=r"\[0, 1\) \(float32 makes it 1\)$"):
        OptimizerSettings(b2=1 - 1e-9)
    with pytest.raises(ConfigError, match=r"\(0, inf\) \(float32 makes it 0\)$"):
        OptimizerSettings(eps=1e-42)
    with pytest.raises(ConfigError, match=r"\(0, inf\) \(float32 makes it inf\)$"):
        OptimizerSettings(clip_norm=1e39)


@pytest.mark.parametrize("name, limit", [("steps", 31), ("seed", 32)])
def test_counters_and_seeds_have_a_largest_value(name, limit):
    assert Experiment.from_dict(changed("", name, 2**limit - 1))
    with pytest.raises(ConfigError, match=rf"^{name}={2**limit} must lie in .*2\*\*{limit}\)$"):
        Experiment.from_dict(changed("", name, 2**limit))


@pytest.mark.parametrize("value", [0, 1, -0.1, 1.5, math.nan, "0.5", None, True])
def test_a_validation_fraction_lies_between_0_and_1(value):
    assert DataSettings(source="x", validation_fraction=1e-6).validation_fraction == 1e-6
    with pytest.raises(ConfigError, match="^data.validation_fraction="):
        DataSettings(source="x", validation_fraction=value)


def test_settings_that_contradict_each_other():
    with pytest.raises(ConfigError, match="^data.source is empty; give a text file"):
        DataSettings()
    for name in ("source", "validation", "tokenizer", "token_format"):
        for value in (None, 3, ["a.bin"]):
            with pytest.raises(ConfigError, match=f"^data.{name}=.* is not text$"):
                DataSettings(**{"source": "x", name: value})
    with pytest.raises(ConfigError, match="^data.token_format='int8' is none of header, uint16, u"):
        DataSettings(source="x", token_format="int8")
    warm = lambda steps: dataclasses.replace(EXPERIMENT, steps=steps)
    assert warm(2001).steps == 2001
    with pytest.raises(ConfigError, match="^optimizer.warmup_steps=2000 must be below steps=2000$"):
        warm(2000)
    data = DataSettings(source="x", global_batch=60, accumulate=5)
    mesh = MeshSettings(data=2, fsdp=3, tensor=7, context=11)
    split = dataclasses.replace(EXPERIMENT, data=data, mesh=mesh)
    assert (split.data.part_batch, split.tokens_per_step) == (12, 60 * 12)
    for change in (dict(data=3), dict(fsdp=4), dict(data=2, fsdp=12)):
        with pytest.raises(ConfigError, match="global_batch=60 does not divide.*multiple of"):
            dataclasses.replace(split, mesh=dataclasses.replace(mesh, **change))
    with pytest.raises(ConfigError, match="data.accumulate=4; choose a multiple of 24$"):
        dataclasses.replace(split, data=dataclasses.replace(data, accumulate=4))


def test_words_and_switches_are_checked():
    with pytest.raises(ConfigError, match="^data.order='backward' is none of shuffled, sequential"):
        DataSettings(source="pydoc", order="backward")
    for name in ("validate_first", "keep_best"):
        with pytest.raises(ConfigError, match=f"^{name}='no' is not True or False$"):
            dataclasses.replace(EXPERIMENT, **{name: "no"})


def test_the_defaults_are_the_papers_recipe():
    values = EXPERIMENT.to_config_dict().to_dict()
    assert values.pop("model") == MODEL.to_dict() and values.pop("init_from") == ""
    assert values == {
        "data": {
            "source": "pydoc",
            "order": "shuffled",
            "validation": "",
            "validation_fraction": 0.05,
            "validation_tokens": 10 * 2**20,
            "tokenizer": "",
            "token_format": "header",
            "global_batch": 480,
            "accumulate": 1,
            "cache_bytes": 2**30,
        },
        "mesh": {"data": 1, "fsdp": 1, "tensor": 1, "context": 1},
        "optimizer": {
            "peak_learning_rate": 1.6e-4,
            "warmup_steps": 2000,
            "final_fraction": 0.1,
            "b1": 0.9,
            "b2": 0.95,
            "eps": 1e-8,
            "weight_decay": 0.1,
            "clip_norm": 1.0,
            "moment_dtype": "",
        },
        "steps": 100_000,
        "seed": 0,
        "log_every": 10,
        "validate_every": 1000,
        "validate_first": False,
        "save_every": 1000,
        "save_minutes": 0.0,
        "keep": 2,
        "keep_every": 0,
        "skip_budget": 10,
        "keep_best": False,
        "loss_chunk": 512,
        "virtual_cpu_devices": 0,
        "xla_options": "",
    }


def test_names_that_do_not_exist_end_with_the_nearest():
    def message(*path, value=1):
        values = EXPERIMENT.to_config_dict().to_dict()
        part = values
        for name in path[:-1]:
            part = part[name]
        part[path[-1]] = value
        with pytest.raises(ConfigError) as error:
            Experiment.from_dict(values)
        return str(error.value)

    assert message("stpes") == "unknown setting stpes; did you mean steps?"
    assert message("data", "sorce") == "unknown setting data.sorce; did you mean data.source?"
    assert message("mesh", "tensors") == "unknown setting mesh.tensors; did you mean mesh.tensor?"
    assert message("optimizer", "peak_lr").endswith("did you mean optimizer.peak_learning_rate?")
    assert message("mesh", "zzz") == (
        "unknown setting mesh.zzz; there are mesh.data, mesh.fsdp, mesh.tensor, mesh.context"
    )
    assert message("model", "mlp_dmi").endswith("did you mean mlp_dim?")
    assert message("model", "attention", "head_dmi").endswith("did you mean attention.head_dim?")
    assert message("model", "attention", "kind", value="mla").startswith("attention.kind='mla'")
    assert closest("ab", ["x", "y"], "--") == "there are --x, --y"


@pytest.mark.parametrize("path", [("data",), ("model",), ("model", "mlp_dim")])
def test_what_is_missing_is_named(path):
    values = EXPERIMENT.to_config_dict().to_dict()
    part = values
    for name in path[:-1]:
        part = part[name]
    del part[path[-1]]
    with pytest.raises(ConfigError, match=f"{path[-1]} is missing"):
        Experiment.from_dict(values)
    # What has a default may be left out.
    del values["optimizer"], values["mesh"]["data"]
    part[path[-1]] = EXPERIMENT.to_config_dict().to_dict()[path[0]]
    if len(path) == 2:
        part[path[-1]] = MODEL.mlp_dim
    assert Experiment.from_dict(values) == EXPERIMENT


def test_the_command_line_may_override_and_not_add():
    config = EXPERIMENT.to_config_dict()
    config.optimizer.b1 = 0.5
    config.model.attention.num_kv_heads = 1
    built = Experiment.from_dict(config.to_dict())
    assert (built.optimizer.b1, built.model.attention.num_kv_heads) == (0.5, 1)
    with pytest.raises(AttributeError):
        config.stpes = 3
    with pytest.raises(TypeError):
        config.steps = "many"


SMALL, POSITIVE = st.integers(1, 5), st.floats(1e-6, 1e3)


@st.composite
def experiments(draw):
    mesh = MeshSettings(*(draw(SMALL) for _ in range(4)))
    accumulate, steps = draw(SMALL), draw(st.integers(1, 10**6))
    data = DataSettings(
        source=draw(st.text(min_size=1)),
        validation=draw(st.text()),
        validation_fraction=draw(st.floats(0.01, 0.99)),
        validation_tokens=draw(st.integers(1, 10**9)),
        tokenizer=draw(st.text()),
        global_batch=mesh.data * mesh.fsdp * accumulate * draw(SMALL),
        accumulate=accumulate,
        order=draw(st.sampled_from(ORDERS)),
    )
    optimizer = OptimizerSettings(
        draw(POSITIVE),
        draw(st.integers(0, steps - 1)),
        draw(POSITIVE),
        *(draw(st.floats(0, 0.999)) for _ in range(2)),
        *(draw(POSITIVE) for _ in range(3)),
    )
    return Experiment(
        preset(draw(st.sampled_from(PRESETS)), execution=Execution(remat=draw(st.booleans()))),
        data,
        mesh,
        optimizer,
        steps,
        draw(st.integers(0, 2**32 - 1)),
        *(draw(SMALL) for _ in range(8)),
        draw(st.integers(0, 8)),
        draw(st.booleans()),
        draw(st.booleans()),
    )


@given(experiments())
@settings(max_examples=50, deadline=None)
def test_any_experiment_comes_back_from_its_dictionary(experiment):
    values = experiment.to_config_dict().to_dict()
    assert Experiment.from_dict(values) == experiment
    assert Experiment.from_dict(json.loads(json.dumps(values))) == experiment


def load(file, *arguments):
    config = runpy.run_path(str(CONFIGS / file))["get_config"](*arguments)
    return Experiment.from_dict(config.to_dict())


def test_the_papers_runs():
    for name in PRESETS:
        assert load("paper.py", name).model == preset(name)
    assert load("paper.py") == (experiment := load("paper.py", "mlra_4"))
    assert experiment.tokens_per_step * experiment.steps == 98_304_000_000
    assert (experiment.data.source, experiment.data.tokenizer) == ("data/fineweb_edu", "gpt2")
    assert experiment.mesh == MeshSettings(fsdp=4, tensor=4)
    assert experiment.data.part_batch == 16
    assert experiment.optimizer == OptimizerSettings()
    # The meshes that its first lines recommend.
    for fsdp, tensor, accumulate in ((16, 4, 5), (32, 2, 1), (8, 1, 15)):
        data = dataclasses.replace(experiment.data, accumulate=accumulate)
        mesh = MeshSettings(fsdp=fsdp, tensor=tensor)
        dataclasses.replace(experiment, data=data, mesh=mesh)


def test_the_quickstart_needs_nothing_but_python():
    experiment = load("quickstart.py")
    assert (experiment.data.source, experiment.data.tokenizer) == ("pydoc", "bytes")
    assert experiment.model.attention.num_latents == experiment.mesh.tensor == 4
    assert experiment.virtual_cpu_devices == 8 == experiment.mesh.data * experiment.mesh.tensor
    assert experiment.steps == 450 and experiment.tokens_per_step == 8 * 256


def test_the_quickstart_takes_text_as_bytes_and_token_files_as_they_were_prepared(tmp_path):
    text = tmp_path / "a:b,c.txt"
    text.write_text("words " * 9)
    source = open_input(str(text))
    made = prepare(source, tmp_path, tokenizer=get_tokenizer("bytes"), name="made")[0]
    alone = tmp_path / "alone.bin"
    shutil.copy(made, alone)
    for source, tokenizer, vocab_size in (
        (text, "bytes", 264),
        (made, "bytes", 264),
        (alone, "gpt2", 50304),
    ):
        file = f"{CONFIGS}/quickstart.py:{source}"
        experiment = Experiment.from_dict(read_settings(Parser("x", ""), file, []).to_dict())
        assert (experiment.data.source, experiment.data.tokenizer) == (str(source), tokenizer)
        assert experiment.model.vocab_size == vocab_size
