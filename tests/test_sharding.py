"""Where every parameter lies, in exact bytes, and what no mesh can split."""

import dataclasses
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import traverse_util
from hypothesis import assume, given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from mlra_jax import model as models
from mlra_jax import sharding
from mlra_jax.config import ConfigError
from mlra_jax.plan.topology import describe
from mlra_jax.sharding import make_mesh, parse_mesh

MODEL, BATCH = ("tensor", "context"), ("data", "fsdp")
# The mesh axes of each dimension, by hand; a stacked parameter has its layers before them.
COMMON = {
    "embed.embedding": (MODEL, "fsdp"),
    "final_norm.scale": (None,),
    "layers.attention_norm.scale": (None, None),
    "layers.mlp_norm.scale": (None, None),
    "layers.mlp.gate.kernel": (None, "fsdp", MODEL),
    "layers.mlp.up.kernel": (None, "fsdp", MODEL),
    "layers.mlp.down.kernel": (None, MODEL, "fsdp"),
    "layers.attention.out.kernel": (None, MODEL, None, "fsdp"),
}
BY_HEAD, WITHIN_HEAD = (None, "fsdp", MODEL, None), (None, "fsdp", None, MODEL)
WHOLE_HEADS = (None, "fsdp", None, None)
LATENT = {
    "q_down": (None, "fsdp", MODEL),
    "q_norm": (None, None),
    "q_up": (None, "fsdp", MODEL, None),
    "kv_down": (None, "fsdp", MODEL),
    "kv_norm": (None, None),
    "k_rope": (None, "fsdp", None),
    "k_up": (None, MODEL, "fsdp", None),
    "v_up": (None, MODEL, "fsdp", None),
}
OF_FOUR = {name: LATENT for name in tiny.LATENT} | {
    "mlra_2_gated": LATENT | {"gate": BY_HEAD},
    "mha": {"q": BY_HEAD, "k": BY_HEAD, "v": BY_HEAD},
    "gqa": {"q": BY_HEAD, "k": BY_HEAD, "v": BY_HEAD},
    # Two key heads over four devices: split within each head.
    "gqa_gated": {"q": BY_HEAD, "gate": BY_HEAD, "k": WITHIN_HEAD, "v": WITHIN_HEAD},
    # ... unless its width of 10 does not divide either.
    "mqa": {"q": BY_HEAD, "k": WHOLE_HEADS, "v": WHOLE_HEADS},
    "gta": {"q": BY_HEAD, "kv": BY_HEAD, "k_rope": (None, "fsdp", None)},
    "mfa": {
        "q_down": (None, "fsdp", MODEL),
        "q_norm": (None, None),
        "q_up": (None, "fsdp", MODEL, None),
        "k": (None, "fsdp", MODEL),
        "v": (None, "fsdp", MODEL),
    },
    "tpa": {f"{n}_a": BY_HEAD for n in "qkv"} | {f"{n}_b": WITHIN_HEAD for n in "qkv"},
}
"""Attention parameters where tensor and context together are four devices."""


def parameters(config, mesh):
    """{path: (shape, partition spec, bytes on one device)}."""
    _, shapes = models.structure(config, mesh)
    found = {}
    for path, x in traverse_util.flatten_dict(shapes).items():
        held = math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        found[".".join(path)] = (x.shape, x.sharding.spec, held)
    return found


@pytest.mark.parametrize("sizes", [(1, 2, 4, 1), (1, 2, 2, 2), (2, 1, 1, 4), (1, 1, 4, 1)])
@pytest.mark.parametrize("name", tiny.ATTENTIONS)
def test_each_parameter_lies_where_it_should_and_nowhere_twice(name, sizes):
    mesh = make_mesh(*sizes)
    want = COMMON | {
        f"layers.attention.{n}.{'scale' if n.endswith('norm') else 'kernel'}": axes
        for n, axes in OF_FOUR[name].items()
    }
    found = parameters(tiny.config(name, 2), mesh)
    assert found.keys() == want.keys()
    ways = lambda axes: math.prod(
        mesh.shape[a] for a in ([axes] if isinstance(axes, str) else axes or ())
    )
    for path, (shape, spec, held) in found.items():
        assert tuple(spec) == tuple(P(*want[path])), path
        assert held * math.prod(map(ways, want[path])) == 4 * math.prod(shape), path


def test_eight_devices_split_key_heads_within_each_head_or_not_at_all():
    mesh = make_mesh(tensor=4, context=2)
    spec = lambda name, part: tuple(
        parameters(tiny.config(name), mesh)[f"layers.attention.{part}.kernel"][1]
    )
    assert spec("mha", "k") == BY_HEAD and spec("tpa", "k_a") == BY_HEAD
    # Widths of 12 and 10 do not divide over 8 devices.
    assert spec("gqa", "v") == spec("gta", "kv") == spec("tpa", "v_b") == WHOLE_HEADS
    assert spec("mfa", "k") == (None, "fsdp", None)


def test_what_activations_and_caches_are_split_over():
    spec = sharding.spec
    assert spec("batch", "length", None) == P(BATCH, None, None)
    assert spec("batch", "length", "heads", "head_dim") == P(BATCH, None, MODEL, None)
    assert spec("batch", "length", "vocab") == P(BATCH, None, MODEL)
    assert spec("batch", "length", "mlp") == P(BATCH, None, MODEL)
    assert spec("batch", "cache_length", "cache_latent", None) == P(
        BATCH, ("context",), ("tensor",), None
    )
    assert spec("layer", "rope", "norm", "head_dim", "length") == P(*[None] * 5)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    assert sharding.named(mesh, "batch", None).shard_shape((8, 5)) == (2, 5)
    sizes = [sharding.size(mesh, axes) for axes in (BATCH, ("tensor",), MODEL, ("context",), ())]
    assert sizes == [4, 2, 2, 1, 1]
    assert sharding.platform(mesh) == "cpu"


NAMES = [None, "length", "layer", "head_dim", *dict(sharding.RULES)]


@given(st.lists(st.sampled_from(NAMES), max_size=4, unique_by=lambda n: n or object()))
def test_no_mesh_axis_splits_two_dimensions_and_none_is_left_unused(names):
    over = sharding.mesh_axes(*names)
    assert len(over) == len(names)
    used = list(itertools.chain(*over))
    assert len(used) == len(set(used))
    rows = lambda name: [axes for logical, axes in sharding.RULES if logical == name]
    rank = lambda name, axes: sharding.RULES.index((name, axes))
    for name, axes in zip(names, over, strict=True):
        assert axes in [*rows(name), ()]
        for better in rows(name)[: rows(name).index(axes) if axes else None]:
            # Another dimension has what this one would rather have, by an earlier row.
            takers = [(n, a) for n, a in zip(names, over, strict=True) if set(a) & set(better)]
            assert any(rank(n, a) < rank(name, better) for n, a in takers if (n, a) != (name, axes))


@given(
    shape=st.lists(st.integers(1, 96), min_size=3, max_size=3),
    names=st.lists(
        st.sampled_from(NAMES), min_size=3, max_size=3, unique_by=lambda n: n or object()
    ),
    sizes=st.tuples(*[st.sampled_from([1, 2, 4, 8])] * 4),
)
def test_any_size_over_any_mesh_is_split_evenly_or_refused(shape, names, sizes):
    assume(math.prod(sizes) <= 8)
    mesh = make_mesh(*sizes)
    ways = [math.prod(mesh.shape[a] for a in axes) for axes in sharding.mesh_axes(*names)]
    wrong = [i for i in range(3) if shape[i] % ways[i]]
    if wrong:
        with pytest.raises(ConfigError) as error:
            sharding.check_divides("this", shape, names, mesh.shape)
        message = str(error.value)
        assert "\n" not in message and "(this) does not divide over" in message
        assert any(message.startswith(f"{names[i]}={shape[i]} ") for i in wrong)
    else:
        sharding.check_divides("this", shape, names, mesh.shape)
        want = tuple(n // w for n, w in zip(shape, ways, strict=True))
        assert sharding.named(mesh, *names).shard_shape(tuple(shape)) == want


@given(st.tuples(*[st.integers(-1, 9)] * 4))
def test_meshes_of_any_sizes(sizes):
    wanted = math.prod(sizes)
    if min(sizes) < 1:
        name = next(n for n, s in zip(sharding.MESH_AXES, sizes, strict=True) if s < 1)
        with pytest.raises(ConfigError, match=f"mesh axis {name}=.* must be at least 1"):
            make_mesh(*sizes)
    elif wanted > 8:
        with pytest.raises(ConfigError, match=f"needs {wanted} devices and there are 8"):
            make_mesh(*sizes)
    else:
        mesh = make_mesh(*sizes)
        assert tuple(mesh.shape.items()) == tuple(zip(sharding.MESH_AXES, sizes, strict=True))
        assert len(set(mesh.devices.flat)) == wanted
        text = ",".join(f"{n}={s}" for n, s in mesh.shape.items())
        assert parse_mesh(text).shape == mesh.shape


def test_meshes_by_name():
    sizes = lambda text: tuple(parse_mesh(text).shape.values())
    assert sizes("tensor=4, context=2") == (1, 1, 4, 2)
    assert sizes("fsdp=2,data=3") == (3, 2, 1, 1)
    assert sizes("") == (1, 1, 1, 1)
    devices = jax.devices()[3:5]
    assert list(parse_mesh("data=2", devices).devices.flat) == devices
    assert list(make_mesh(devices=devices).devices.flat) == devices[:1]


@pytest.mark.parametrize("text", ["tensors=2", "tensor", "tensor=", "tensor=-1", "tensor=x", "=2"])
def test_meshes_that_no_text_should_give(text):
    with pytest.raises(ConfigError, match="is not one of data, fsdp, tensor, context with a size"):
        parse_mesh(text)


def test_a_parameter_that_does_not_divide_is_named():
    config = tiny.config("mlra_4", mlp_dim=54)
    words = r"^mlp=54 \(layers.mlp.\w+.kernel\) does not divide over tensor=2 x context=2; choose"
    with pytest.raises(ConfigError, match=words):
        models.structure(config, make_mesh(tensor=2, context=2))


def test_a_mesh_that_names_an_axis_twice_is_refused():
    with pytest.raises(ConfigError, match=r"--mesh=data=2,data=4 names data twice; give each axis"):
        parse_mesh("data=2, data=4")


def test_what_is_gathered_travels_once_and_its_gradient_to_where_it_belongs():
    """Rounded as it is asked to be, its gradient not rounded."""
    mesh, axes = sharding.make_mesh(fsdp=2, tensor=2), ("embed", "mlp")
    w_DF = jax.random.normal(jax.random.key(0), (64, 128))
    x_BD = jax.random.normal(jax.random.key(1), (16, 64))

    def loss(w_DF, x_BD):
        whole_DF = sharding.gathered(w_DF, mesh, axes, sharding.BATCH, "bfloat16")
        return (jnp.tanh(x_BD @ whole_DF) @ whole_DF.T).sum()

    split = jax.device_put(w_DF, sharding.named(mesh, *axes))
    rows = jax.device_put(x_BD, sharding.named(mesh, "batch", None))
    step = jax.jit(jax.value_and_grad(loss)).lower(split, rows).compile()
    assert len(re.findall(r"\[64,64\]\S* all-gather\(", step.as_text())) == 1
    got, gradient = step(split, rows)
    assert gradient.sharding.is_equivalent_to(split.sharding, 2)
    rounded = w_DF.astype(jnp.bfloat16).astype(jnp.float32)
    plain = lambda w_DF: (jnp.tanh(x_BD @ w_DF) @ w_DF.T).sum()
    want, slope = jax.value_and_grad(plain)(rounded)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-4)
    alone = sharding.make_mesh()
    assert sharding.gathered(w_DF, alone, axes, sharding.BATCH, "bfloat16") is w_DF


@pytest.mark.parametrize("axes", [("embed", "mlp"), ("vocab", "embed")])
def test_gpus_copy_in_a_training_step_what_they_gather_in_others(monkeypatch, axes):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    w = jax.device_put(jax.random.normal(jax.random.key(0), (8, 12)), sharding.named(mesh, *axes))
    monkeypatch.setattr(sharding, "copies", lambda mesh, axes: True)
    gathered = lambda w: sharding.gathered(w, mesh, axes, sharding.BATCH, "bfloat16")
    made = []
    for f, how in ((gathered, "all-gather"), (lambda w: jax.vjp(gathered, w)[0], "all-to-all")):
        program = jax.jit(f).lower(w).compile()
        assert set(re.findall("all-[a-z-]+[a-z]", program.as_text())) == {how}
        made.append(program(w))
    assert made[0].sharding.is_equivalent_to(made[1].sharding, 2)
    np.testing.assert_array_equal(*made)


def test_parts_are_taken_in_the_turns_in_which_they_are_summed():
    """Of each device's own share: that of the device before it first, its own last."""
    mesh = sharding.make_mesh(fsdp=4)
    x = jax.random.normal(jax.random.key(0), (4, 8, 12))
    turns = sharding.parts_in_turn(x, mesh, "batch")
    for device, share in enumerate(np.asarray(x)):
        for back, part in enumerate(turns, 1):
            whose = (device - back) % 4
            np.testing.assert_array_equal(part[device], share[:, 3 * whose : 3 * whose + 3])
    own = lambda turn, _, *parts: parts[turn].sum(0)
    split = [sharding.spec("batch")] * 4
    summed = sharding.summed_in_turn(own, mesh, ("vocab", "embed"), turns, split)
    np.testing.assert_allclose(summed, x.sum(0), rtol=1e-5, atol=1e-6)


def test_two_gpus_of_one_process_copy_what_fsdp_splits():
    """Neither processors of other kinds, other processes or more of them, nor what is whole."""
    up, gpus = ("embed", "mlp"), list(describe("h100:4").devices)
    made = lambda devices=gpus, **axes: sharding.make_mesh(**axes, devices=devices)
    pair = made(gpus[:2], fsdp=2)
    assert sharding.copies(pair, up) and not sharding.copies(pair, ("norm", "mlp"))
    for other in (made(tensor=2), made(fsdp=2, tensor=2), made(fsdp=4), made(None, fsdp=2)):
        assert not sharding.copies(other, up)
    gpus[1] = dataclasses.replace(gpus[1], process_index=1)
    assert not sharding.copies(made(fsdp=2), up)


def test_two_gpus_of_one_process_copy_activations_where_they_split_heads():
    gpus = list(describe("h100:4").devices)
    made = lambda **axes: sharding.make_mesh(**axes, devices=gpus)
    assert sharding.has_copies(made(tensor=2)) and sharding.copies_heads(made(tensor=2))
    for other in (dict(fsdp=2), dict(fsdp=2, tensor=2), dict(tensor=4), dict(data=2), {}):
        assert not sharding.copies_heads(made(**other))
    assert not sharding.copies_heads(sharding.make_mesh(tensor=2))
    gpus[1] = dataclasses.replace(gpus[1], process_index=1)
    assert not sharding.has_copies(made(tensor=2))


def test_each_device_pads_its_own_part_and_cuts_its_own_gradient():
    mesh, axes = sharding.make_mesh(fsdp=2, tensor=4), ("embed", "mlp")
    w_DF = jax.device_put(np.arange(1.0, 25).reshape(2, 12), sharding.named(mesh, *axes))
    pad = lambda w_DF: sharding.padded(w_DF, mesh, axes, "mlp", 5)
    both = jax.jit(lambda w_DF: (pad(w_DF), jax.grad(lambda w: (pad(w) ** 2).sum())(w_DF)))
    program = both.lower(w_DF).compile()
    assert not re.search("all-|collective|reduce-scatter", program.as_text())
    padded_DF, slope_DF = program(w_DF)
    want_DWf = np.pad(np.asarray(w_DF).reshape(2, 4, 3), ((0, 0), (0, 0), (0, 2)))
    np.testing.assert_array_equal(padded_DF, want_DWf.reshape(2, 20))
    np.testing.assert_array_equal(slope_DF, 2 * w_DF)
    for same in (
        sharding.padded(w_DF, mesh, axes, "mlp", 3),
        sharding.padded(w_DF, mesh, axes, "vocab", 5),
    ):
        assert same is w_DF
