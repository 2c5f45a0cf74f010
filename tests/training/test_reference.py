"""docs/settings.md and `--help` say what the dataclasses are: names, defaults, ranges."""

import dataclasses
import math
import re
from pathlib import Path

import pytest

from mlra_jax.config import ConfigError
from mlra_jax.settings_tree import flatten
from mlra_jax.training import reference
from mlra_jax.training.settings import DataSettings, Experiment
from tests.training import tiny

ROOT = Path(__file__).parents[2]
# The run's own and the model's, whose batch and steps stand in no other's way.
BASE = dataclasses.replace(
    tiny.experiment(),
    steps=100,
    data=DataSettings(source="pydoc", tokenizer="bytes", global_batch=60),
    mesh=type(tiny.experiment().mesh)(),
    optimizer=dataclasses.replace(tiny.experiment().optimizer, warmup_steps=0),
)
# Kinds of attention may have fields of one name: that of `BASE` counts.
SECTIONS = reference.all_settings()
LAST = f"`model.attention`, kind `{BASE.to_config_dict().model.attention.kind}`"
SETTINGS = {x.name: x for title in (*SECTIONS, LAST) for x in SECTIONS[title]}


def test_the_page_is_what_the_code_says():
    assert (ROOT / "docs/settings.md").read_text() == reference.markdown()


def test_every_setting_is_there_with_its_default():
    values = flatten(BASE.to_config_dict().to_dict())
    values.pop("model.attention.kind")
    assert values.keys() <= SETTINGS.keys()
    help_text = reference.text()
    for name in values:
        assert f"  --config.{name} (" in help_text and SETTINGS[name].meaning
    assert SETTINGS["optimizer.peak_learning_rate"].default == "0.00016"
    assert SETTINGS["mesh.data"].default == "1" and SETTINGS["model.num_layers"].default == ""


def accepted(name, value) -> bool:
    *path, last = name.split(".")
    values = BASE.to_config_dict().to_dict()
    part = values
    for step in path:
        part = part[step]
    part[last] = value
    try:
        Experiment.from_dict(values)
    except ConfigError as error:
        # Not for another setting's sake.
        assert re.search(rf"\b{last}\b", str(error)), error
        return False
    return True


NUMBERS = {
    name: SETTINGS[name].within
    for name, value in flatten(BASE.to_config_dict().to_dict()).items()
    if type(value) in (int, float)
}


@pytest.mark.parametrize("name", NUMBERS)
def test_ranges_are_those_that_the_code_keeps(name):
    within = NUMBERS[name]
    if found := re.fullmatch(r"from (\d) on", within):
        lower, upper, closed = int(found[1]), math.inf, True
    elif within == "above 0":
        lower, upper, closed = 0, math.inf, False
    else:
        low, high = within[1:-1].split(", ")
        # `2**32` is a power of a number.
        base, _, power = high.partition("**")
        lower, upper, closed = int(low), float(base) ** int(power or 1), within[0] == "["
    whole = isinstance(flatten(BASE.to_config_dict().to_dict())[name], int)
    assert not accepted(name, lower - 1)
    assert accepted(name, lower) == closed or name.startswith("model.attention.")
    if upper < math.inf:
        assert not accepted(name, int(upper) if whole else upper)
        assert whole or accepted(name, upper - 1e-3)
