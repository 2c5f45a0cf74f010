"""Sizes that cannot be are refused, each in one line; the others survive JSON."""

import dataclasses
import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from mlra_jax.config import (
    PRESETS,
    ConfigError,
    GroupedConfig,
    LatentConfig,
    ModelConfig,
    MultiMatrixConfig,
    TensorProductConfig,
    TiedConfig,
    preset,
)
from mlra_jax.execution import DTYPES, Execution

few = st.integers(1, 6)
wide = st.integers(1, 4096)


@st.composite
def attentions(draw):
    heads, kv_heads, flag = draw(few), draw(few), st.booleans()
    heads *= kv_heads
    return draw(
        st.one_of(
            st.builds(
                LatentConfig,
                num_heads=st.just(heads),
                groups=st.just(kv_heads),
                branches=st.just(2),
                latent_dim=few.map(lambda n: n * kv_heads * 2),
                q_latent_dim=wide,
                nope_dim=wide,
                rope_dim=wide.map(lambda n: 2 * n),
                gated=flag,
                scaled=flag,
            ),
            st.builds(
                GroupedConfig,
                num_heads=st.just(heads),
                num_kv_heads=st.just(kv_heads),
                head_dim=wide.map(lambda n: 2 * n),
                gated=flag,
            ),
            st.builds(TiedConfig, st.just(heads), st.just(kv_heads), wide.map(lambda n: 4 * n)),
            st.builds(MultiMatrixConfig, few, wide.map(lambda n: 2 * n), wide),
            st.builds(TensorProductConfig, few, wide.map(lambda n: 2 * n), few, few),
        )
    )


models = st.builds(
    ModelConfig,
    attention=attentions(),
    vocab_size=wide,
    num_layers=few,
    embed_dim=wide,
    mlp_dim=wide,
    context_length=wide,
    norm_eps=st.floats(1e-12, 1.0),
    rope_base=st.floats(1.0, 1e9),
    zero_init=st.booleans(),
    param_dtype=st.sampled_from(DTYPES),
    execution=st.builds(Execution, dtype=st.sampled_from(DTYPES), remat=st.booleans()),
)


@given(models)
def test_a_config_survives_json(config):
    values = json.loads(json.dumps(config.to_dict()))
    assert ModelConfig.from_dict(values) == config
    assert ModelConfig.from_dict(values).to_dict() == config.to_dict()


@given(models, models)
def test_different_configs_have_different_dicts(one, other):
    assert (one == other) == (one.to_dict() == other.to_dict())


def test_every_attention_is_told_apart_and_keeps_its_defaults():
    kinds = {name: tiny.config(name).to_dict()["attention"] for name in tiny.ATTENTIONS}
    assert {a["kind"] for a in kinds.values()} == {
        "latent",
        "grouped",
        "tied",
        "multi_matrix",
        "tensor_product",
    }
    values = tiny.config("gqa").to_dict()
    del values["attention"]["gated"], values["norm_eps"], values["zero_init"]
    config = ModelConfig.from_dict(values)
    assert (config.attention.gated, config.norm_eps, config.zero_init) == (False, 1e-6, True)
    assert (config.rope_base, config.context_length) == (10000.0, 2048)
    assert (config.param_dtype, Execution()) == ("float32", Execution("bfloat16", "auto"))


def test_how_a_model_is_computed_is_no_part_of_its_identity():
    config = tiny.config("gta")
    other = dataclasses.replace(config, execution=Execution("float16", remat=False))
    assert config != other and config.identity() == other.identity()
    how = dict(dtype="float16", remat="none", unroll=0, float32_stream=False)
    how["attention_kernel"] = "auto"
    assert other.to_dict() == config.identity() | how
    assert ModelConfig.from_dict(config.identity()).execution == Execution()
    with pytest.raises(ConfigError, match="^dtype='int8' is none of float32, bfloat16, float16$"):
        ModelConfig.from_dict(config.to_dict() | {"dtype": "int8"})


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.dtype("bfloat16"), ml_dtypes.bfloat16])
def test_a_dtype_is_kept_by_name(dtype):
    config = preset("mha", dtype=dtype, param_dtype=dtype)
    assert config == preset("mha", dtype="bfloat16", param_dtype="bfloat16")
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_caller_keeps_what_is_given():
    values = tiny.config("mla").to_dict()
    before = json.dumps(values)
    ModelConfig.from_dict(values)
    assert json.dumps(values) == before


REFUSED = {
    "mla": [
        ("rope_dim", 5, "rope_dim=5 must be even"),
        ("latent_dim", 0, "latent_dim=0 must be at least 1"),
        ("q_latent_dim", -3, "q_latent_dim=-3 must be at least 1"),
        ("nope_dim", 10.0, "nope_dim=10.0 is not a whole number"),
        ("num_heads", True, "num_heads=True is not a whole number"),
        ("branches", 5, r"latent_dim=48 does not divide into 5 latent heads \(groups=1 x branc"),
    ],
    "gla_2": [
        ("num_heads", 9, "num_heads=9 does not divide into groups=2"),
        ("num_kv_heads", 3, "num_kv_heads=3 must divide num_heads=8 and be a multiple of groups=2"),
        ("num_kv_heads", 1, "num_kv_heads=1 must divide"),
        ("base_dim", -1, "base_dim=-1 must be at least 0"),
        ("branch_gated", True, "branch_gated needs branches to choose from"),
        ("expanded", True, "expanded needs num_kv_heads, groups=1, branches=1 and base_dim=0"),
    ],
    "mlra_2_gated": [("head_gated", True, "gated and head_gated exclude each other")],
    "gqa": [
        ("num_heads", 6, "num_heads=6 does not divide into num_kv_heads=4"),
        ("head_dim", 7, "head_dim=7 must be even"),
    ],
    "gta": [
        ("num_kv_heads", 3, "num_heads=8 does not divide into num_kv_heads=3"),
        ("head_dim", 10, "head_dim=10 must be a multiple of 4"),
    ],
    "mfa": [
        ("head_dim", 9, "head_dim=9 must be even"),
        ("q_latent_dim", 0, "q_latent_dim=0 must be"),
    ],
    "tpa": [
        ("head_dim", 9, "head_dim=9 must be even"),
        ("rank", 0, "rank=0 must be at least 1"),
        ("q_rank", "5", "q_rank='5' is not a whole number"),
    ],
}


@pytest.mark.parametrize(
    "name, field, value, words",
    [(name, *case) for name, cases in REFUSED.items() for case in cases],
)
def test_sizes_of_an_attention_that_cannot_be(name, field, value, words):
    with pytest.raises(ConfigError, match=words) as error:
        dataclasses.replace(tiny.ATTENTIONS[name], **{field: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("attention", None, "attention=None is none of latent, grouped"),
        *(
            (name, 0, f"{name}=0 must be at least 1")
            for name in ("vocab_size", "num_layers", "embed_dim", "mlp_dim", "context_length")
        ),
        ("vocab_size", 2**31, r"vocab_size=2147483648 must lie in \[1, 2\*\*31\)"),
        ("num_layers", 10**400, "num_layers must be below"),
        ("norm_eps", 0.0, r"norm_eps=0.0 must lie in \(0, inf\)"),
        ("norm_eps", 1e-50, r"norm_eps=1e-50 must lie in \(0, inf\) \(float32 makes it 0\)"),
        ("norm_eps", float("nan"), "norm_eps=nan must be"),
        ("rope_base", float("inf"), "rope_base=inf must be"),
        ("rope_base", 1e39, r"must lie in \[1, inf\) \(float32 makes it inf\)"),
        ("rope_base", 0.5, r"rope_base=0.5 must lie in \[1, inf\)"),
        ("rope_base", "1e4", "rope_base='1e4' is not a number"),
        ("zero_init", "no", "zero_init='no' is not True or False"),
        ("remat", 0, "remat=0 is none of auto, none, block"),
        ("param_dtype", None, "param_dtype=None is none of float32"),
    ],
)
def test_sizes_of_a_model_that_cannot_be(field, value, words):
    with pytest.raises(ConfigError, match=words) as error:
        dataclasses.replace(tiny.config("mla"), **{field: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda v: v.pop("mlp_dim"), "model setting mlp_dim is missing"),
        (lambda v: v["attention"].pop("rope_dim"), "model setting attention.rope_dim is missing"),
        (lambda v: v.update(mlp_dims=3), r"unknown model setting mlp_dims; did you mean mlp_dim\?"),
        (lambda v: v.update(zzz=3), "unknown model setting zzz$"),
        (
            lambda v: v["attention"].update(gatd=True),
            r"unknown model setting attention.gatd; did you mean attention.gated\?",
        ),
        (lambda v: v["attention"].update(kind="lateral"), "attention.kind='lateral' is none of la"),
        (lambda v: v.pop("attention"), "attention.kind=None is none of latent, grouped, tied"),
    ],
)
def test_dicts_that_are_no_model(change, words):
    values = tiny.config("mla").to_dict()
    change(values)
    with pytest.raises(ConfigError, match=words):
        ModelConfig.from_dict(values)


def test_derived_widths():
    a = tiny.ATTENTIONS["mlra_2"]
    assert (a.num_latents, a.latent_head_dim, a.query_dim, a.value_dim) == (4, 12, 16, 10)
    for name in tiny.OTHERS:
        a = tiny.OTHERS[name]
        assert a.query_dim == a.value_dim == a.head_dim
    assert tiny.OTHERS["gta"].rope_dim == 6


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json_and_take_changes(name):
    assert ModelConfig.from_dict(json.loads(json.dumps(preset(name).to_dict()))) == preset(name)
    changed = preset(name, num_layers=2, zero_init=False)
    assert changed == dataclasses.replace(preset(name), num_layers=2, zero_init=False)


def test_execution_is_given_whole_or_by_its_fields():
    made = ModelConfig(GroupedConfig(2, 2, 4), 50, 1, 8, 8, dtype="float32", remat=False)
    assert made.execution == Execution("float32", remat=False)
    assert dataclasses.replace(made, dtype="bfloat16").execution == Execution(remat=False)
    assert preset("mla", remat=False) == preset("mla", execution=Execution(remat=False))
    with pytest.raises(TypeError, match="remta"):
        ModelConfig(GroupedConfig(2, 2, 4), 50, 1, 8, 8, remta=False)
