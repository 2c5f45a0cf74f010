"""The op: plain reference against NumPy, argument checks, choice of the kernel, tuned settings."""

import dataclasses
import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import truth
from absl import logging
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxprs import HIGHEST, products

from mlra_jax.kernels import target, tuning
from mlra_jax.kernels.absorbed_decode import (
    absorbed_decode,
    api,
    autotune,
    has_kernel,
    load_tuned,
    merge_partials,
    mosaic_tpu,
    save_tuned,
)
from mlra_jax.kernels.absorbed_decode.problem import Problem

SCALE = 0.11
decode = jax.jit(functools.partial(absorbed_decode, scale=SCALE))


def arguments(B=2, T=3, L=4, H=5, C=16, R=8, S=37, G=2, dtype=jnp.float32, seed=0):
    random = np.random.default_rng(seed)
    shapes = (B, T, L, H, C), (B, T, G, H, R), (B, S, L, C), (B, S, R)
    return tuple(jnp.asarray(random.standard_normal(shape, np.float32), dtype) for shape in shapes)


def expected(q, q_rope, latents, k_rope, lengths, starts):
    T, lengths = q.shape[1], np.asarray(lengths, np.int64)
    if lengths.ndim == 1:
        lengths = lengths[:, None] - T + 1 + np.arange(T)
    q_rope = q_rope if q_rope.ndim == 5 else q_rope[:, :, None]
    return truth.absorbed_decode(q, q_rope, latents, k_rope, lengths, starts, scale=SCALE)


def assert_close(actual, wanted, tolerance):
    out, lse = (np.asarray(x, np.float64) for x in actual)
    wanted_out, wanted_lse = wanted
    assert out.shape == wanted_out.shape and lse.shape == wanted_lse.shape
    assert not np.isnan(out).any() and not np.isnan(lse).any()
    hidden = np.isneginf(wanted_lse)
    assert (np.isneginf(lse) == hidden).all()
    assert not out[hidden].any()
    assert np.linalg.norm(out - wanted_out) <= tolerance * np.linalg.norm(wanted_out)
    np.testing.assert_allclose(lse[~hidden], wanted_lse[~hidden], atol=tolerance * 10)


@pytest.mark.parametrize(
    "lengths, starts",
    [
        ([2, 30], [0, 7]),
        ([36, 37], [36, 37]),
        # Beyond the end of the cache, all but the last queries still see less than all of it.
        ([38, 39], [0, 1]),
        ([40, 0], [35, 0]),
        ([2**31 - 1, -(2**31)], [-5, 3]),
        ([[0, 5, 37], [99, -1, 4]], [3, 2**31 - 1]),
        ([[38, 36, 1], [13, 14, 12]], [36, 13]),
    ],
)
def test_reference_follows_the_definition(lengths, starts):
    arrays = arguments()
    actual = decode(*arrays, jnp.array(lengths), jnp.array(starts))
    assert_close(actual, expected(*arrays, lengths, starts), 2e-6)


@pytest.mark.parametrize("values_only", [False, True])
@pytest.mark.parametrize("own_keys", [False, True])
def test_reference_with_keys_of_each_latent_and_values_only(values_only, own_keys):
    q, q_rope, latents, k_rope = arguments()
    if own_keys:
        k_rope = jnp.asarray(np.random.default_rng(1).standard_normal((2, 37, 4, 8), np.float32))
    arrays = None if values_only else q, q_rope, latents, k_rope
    lengths, starts = jnp.array([[0, 36, 37], [99, 9, 4]]), jnp.array([3, 7])
    wanted = truth.absorbed_decode(*arrays, lengths, starts, scale=SCALE)
    assert_close(decode(*arrays, lengths, starts), wanted, 2e-6)


def test_starts_default_to_the_first_position():
    arrays, lengths = arguments(), jnp.array([37, 5])
    for got, wanted in zip(
        decode(*arrays, lengths), decode(*arrays, lengths, jnp.zeros(2, int)), strict=True
    ):
        np.testing.assert_array_equal(got, wanted)


def test_scores_beyond_the_range_of_exp():
    q, *others = arguments()
    lengths, starts = [37, 20], [0, 19]
    for factor in (1000, -1000):
        out, lse = decode(factor * q, *others, jnp.array(lengths), jnp.array(starts))
        wanted, wanted_lse = expected(factor * q, *others, lengths, starts)
        assert np.linalg.norm(out - wanted) < 1e-3 * np.linalg.norm(wanted)
        np.testing.assert_allclose(lse, wanted_lse, rtol=1e-5)


def test_float32_products_are_not_rounded():
    bounds = jnp.array([37, 5]), jnp.array([0, 2])
    assert products(decode, *arguments(), *bounds) == {(HIGHEST, "float32")}
    narrow = arguments(dtype=jnp.bfloat16)
    assert products(decode, *narrow, *bounds) == {(None, "float32")}


@pytest.mark.parametrize("dtype, tolerance", [(jnp.bfloat16, 5e-3), (jnp.float16, 1e-3)])
def test_narrow_reference_is_near_float32_and_never_widens_the_cache(dtype, tolerance):
    B, S, L, C, R = 2, 211, 2, 24, 8
    q, q_rope, *cache = arguments(B=B, L=L, C=C, R=R, S=S, G=1, dtype=dtype)
    lengths, starts = jnp.array([211, 90]), jnp.array([0, 11])
    out, lse = decode(q, q_rope[:, :, 0], *cache, lengths, starts)
    assert out.dtype == dtype and lse.dtype == jnp.float32
    assert_close((out, lse), expected(q, q_rope, *cache, lengths, starts), tolerance)
    # Probabilities are narrowed, so only the LSE, of float32 products, is nearly exact.
    wanted_lse = expected(q, q_rope, *cache, lengths, starts)[1]
    np.testing.assert_allclose(lse, wanted_lse, rtol=2e-6)
    jaxpr = str(jax.make_jaxpr(decode)(q, q_rope, *cache, lengths, starts))
    assert f"f32[{B},{S},{L},{C}]" not in jaxpr and f"f32[{B},{S},{R}]" not in jaxpr


def test_parts_of_a_cache_merge_to_the_whole():
    q, q_rope, latents, k_rope = arguments()
    lengths, starts = jnp.array([[1, 0, 12], [20, 21, 37]]), jnp.array([0, 13])
    bounds = (0, 12), (12, 24), (24, 37)
    parts = [
        decode(q, q_rope, latents[:, a:b], k_rope[:, a:b], lengths - a, starts - a)
        for a, b in bounds
    ]
    merged = jax.jit(merge_partials)(*(jnp.stack(x) for x in zip(*parts, strict=True)))
    assert_close(merged, expected(q, q_rope, latents, k_rope, lengths, starts), 2e-6)


def test_inside_shard_map_with_checked_types():
    arrays = arguments(B=4)
    lengths, starts = jnp.array([1, 9, 30, 37]), jnp.array([0, 9, 7, 0])
    mesh = Mesh(np.array(jax.devices()[:4]), ("x",))
    sharded = jax.shard_map(
        functools.partial(absorbed_decode, scale=SCALE),
        mesh=mesh,
        in_specs=P("x"),
        out_specs=P("x"),
        check_vma=True,
    )
    actual = jax.jit(sharded)(*arrays, lengths, starts)
    assert_close(actual, expected(*arrays, lengths, starts), 2e-6)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"q": (3, 5, 16)}, "q needs 5 dimensions"),
        ({"q_rope": (2, 3, 8)}, "q_rope needs 4 or 5 dimensions"),
        ({"latents": (2, 37, 64)}, "latents needs 4 dimensions"),
        ({"k_rope": (2, 37)}, "k_rope needs 3 or 4 dimensions"),
        ({"k_rope": (2, 37, 2, 8)}, "k_rope has shape (2, 37, 2, 8), expected (2, 37, 4, 8)"),
        ({"lengths": ()}, "lengths needs 1 or 2 dimensions"),
        ({"starts": (2, 3)}, "starts needs 1 dimensions"),
        ({"q": (2, 3, 4, 0, 16)}, "no dimension may be 0"),
        ({"k_rope": (2, 37, 0)}, "no dimension may be 0"),
        ({"q_rope": (2, 3, 0, 5, 8)}, "no dimension may be 0"),
        ({"q_rope": (2, 3, 8, 5, 8)}, "the 4 latents do not divide among the 8 groups"),
        ({"latents": jnp.float16}, "latents is float16 but q is float32: cast one of them"),
        ({"q_rope": jnp.bfloat16}, "q_rope is bfloat16 but q is float32: cast one of them"),
        ({"starts": jnp.float32}, "starts is float32, expected int32"),
        ({"q_rope": (2, 3, 3, 5, 8)}, "the 4 latents do not divide among the 3 groups"),
        ({"q_rope": (2, 3, 5, 7)}, "q_rope has shape (2, 3, 5, 7), expected (2, 3, 5, 8)"),
        ({"latents": (2, 36, 4, 16)}, "latents has shape (2, 36, 4, 16), expected (2, 37, 4, 16)"),
        ({"k_rope": (1, 37, 8)}, "k_rope has shape (1, 37, 8), expected (2, 37, 8)"),
        ({"k_rope": (2, 0, 8)}, "no dimension may be 0"),
        ({"lengths": (3,)}, "lengths has shape (3,), expected (2,)"),
        ({"lengths": (2, 2)}, "lengths has shape (2, 2), expected (2, 3)"),
        ({"starts": (1,)}, "starts has shape (1,), expected (2,)"),
        ({"k_rope": jnp.bfloat16}, "k_rope is bfloat16 but q is float32: cast one of them"),
        ({"lengths": jnp.float32}, "lengths is float32, expected int32"),
        ({"q": jnp.int8}, "q is int8, expected bfloat16, float16 or float32"),
        ({"implementation": "cuda"}, "implementation is 'cuda', expected one of reference, "),
        ({"implementation": "mosaic_tpu"}, "implementation=mosaic_tpu cannot serve this call: "),
    ],
)
def test_bad_calls_end_in_one_line(changes, message):
    q, q_rope, latents, k_rope = arguments()
    call = dict(q=q, q_rope=q_rope, latents=latents, k_rope=k_rope)
    call |= dict(lengths=jnp.zeros(2, jnp.int32), starts=jnp.zeros(2, jnp.int32))
    implementation = changes.pop("implementation", None)
    for name, change in changes.items():
        if isinstance(change, tuple):
            call[name] = jnp.zeros(change, call[name].dtype)
        else:
            call[name] = call[name].astype(change)
    with pytest.raises(ValueError) as raised:
        absorbed_decode(*call.values(), scale=SCALE, implementation=implementation)
    assert str(raised.value).startswith(message) and "\n" not in str(raised.value)


def test_scale_must_be_static():
    with pytest.raises(ValueError, match="scale must be a Python number"):
        jax.jit(lambda scale: absorbed_decode(*arguments(), jnp.zeros(2, int), scale=scale))(1.0)


def fake_backend(monkeypatch, why_not=None):
    """A backend that says in `lse` with which config it was called."""

    def kernel(_, q_rope, *__, config, **___):
        return q_rope, jnp.full((1, 1, 1, 1), config.tile, jnp.float32)

    backend = types.SimpleNamespace(
        Config=mosaic_tpu.TpuConfig,
        supports=lambda problem: why_not,
        heuristic=lambda problem: mosaic_tpu.TpuConfig(128, 2, 1),
        candidates=lambda problem: [mosaic_tpu.TpuConfig(t, 2, 1) for t in (256, 384)],
        absorbed_decode=kernel,
    )
    monkeypatch.setattr(api, "_backend", lambda name: backend)


def tile_used(**keywords):
    _, lse = absorbed_decode(*arguments(), jnp.array([9, 9]), scale=SCALE, **keywords)
    return lse[0, 0, 0, 0]


@pytest.mark.parametrize(
    "platform, kind, kernel",
    [
        ("tpu", "TPU v5 lite", "mosaic_tpu"),
        ("tpu", "TPU7x", "mosaic_tpu"),
        ("gpu", "NVIDIA H100 80GB HBM3", "mosaic_gpu"),
        ("gpu", "NVIDIA H100 PCIe", "mosaic_gpu"),
        ("cuda", "NVIDIA H200", "mosaic_gpu"),
        ("gpu", "NVIDIA H800", "mosaic_gpu"),
        ("gpu", "NVIDIA H20", "mosaic_gpu"),
        ("gpu", "NVIDIA GH200 480GB", "mosaic_gpu"),
        ("gpu", "NVIDIA B200", "reference"),
        ("rocm", "AMD Instinct MI300X", "reference"),
        ("gpu", "NVIDIA A100-SXM4-80GB", "reference"),
        ("cpu", "cpu", "reference"),
    ],
)
def test_the_platform_chooses_the_kernel(monkeypatch, platform, kind, kernel):
    fake_backend(monkeypatch)
    device = types.SimpleNamespace(platform=platform, device_kind=kind)
    assert api._choose(None, device, None) == kernel
    monkeypatch.setattr(target, "device", lambda: device)
    assert has_kernel(*arguments()[:3]) == (kernel != "reference")
    fake_backend(monkeypatch, why_not="too wide")
    assert not has_kernel(*arguments()[:3])
    assert api._choose(None, device, PROBLEM) == "reference"


def test_has_kernel_asks_the_override_first(monkeypatch):
    fake_backend(monkeypatch)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arguments()[:3]]
    assert not has_kernel(*shapes)
    monkeypatch.setenv(api.OVERRIDE, "mosaic_tpu")
    assert has_kernel(*shapes)
    tpu = types.SimpleNamespace(platform="tpu", device_kind="TPU v5")
    monkeypatch.setattr(target, "device", lambda: tpu)
    monkeypatch.setenv(api.OVERRIDE, "reference")
    assert not has_kernel(*shapes)
    monkeypatch.setenv(api.OVERRIDE, "")
    assert has_kernel(*shapes)
    monkeypatch.setenv(api.OVERRIDE, "fastest")
    with pytest.raises(ValueError, match="MLRA_JAX_DECODE_KERNEL is 'fastest', expected one of"):
        has_kernel(*shapes)


def test_kernels_get_ends_and_starts_within_the_cache(monkeypatch):
    got = {}

    def kernel(q, q_rope, latents, k_rope, lengths_BT, starts_B, **keywords):
        got.update(keywords, q_rope=q_rope.shape, lengths=lengths_BT, starts=starts_B)
        got.update(k_rope=k_rope.shape)
        return q, jnp.zeros(q.shape[:4])

    fake_backend(monkeypatch)
    api._backend(None).absorbed_decode = kernel
    call = functools.partial(absorbed_decode, implementation="mosaic_tpu", scale=jnp.float32(2))
    q, q_rope, *cache = arguments(S=37)
    call(q, q_rope[:, :, 0], *cache, jnp.array([1, 39]), jnp.array([-1, 38]))
    assert got["q_rope"] == (2, 3, 1, 5, 8) and type(got["scale"]) is float and got["scale"] == 2
    assert got["lengths"].tolist() == [[0, 0, 1], [37, 37, 37]]
    assert got["starts"].tolist() == [0, 37]
    ends = jnp.array([[-1, 0, 1], [36, 37, 38]], jnp.int16)
    call(q, q_rope, *cache, ends)
    assert got["lengths"].tolist() == [[0, 0, 1], [36, 37, 37]]
    assert got["starts"].tolist() == [0, 0]
    assert got["lengths"].dtype == got["starts"].dtype == jnp.int32
    # One latent's own rotary key is one that all share.
    q, q_rope, latents, k_rope = arguments(L=1, G=1)
    call(q, q_rope, latents, k_rope[:, :, None], ends)
    assert got["k_rope"] == k_rope.shape


def test_an_override_that_cannot_serve_is_named(monkeypatch):
    fake_backend(monkeypatch, why_not="too wide")
    monkeypatch.setenv(api.OVERRIDE, "mosaic_gpu")
    with pytest.raises(ValueError, match="^MLRA_JAX_DECODE_KERNEL=mosaic_gpu cannot serve .*wide$"):
        tile_used()


def test_a_backend_that_cannot_be_imported_is_a_reason(monkeypatch):
    def missing(name):
        raise ImportError(f"no {name}")

    monkeypatch.setattr(api, "_backend", missing)
    tpu = types.SimpleNamespace(platform="tpu", device_kind="TPU v5")
    assert api._choose(None, tpu, PROBLEM) == "reference"
    with pytest.raises(ValueError, match=r"it cannot be imported \(no mosaic_gpu\)"):
        api._choose("mosaic_gpu", tpu, None)


def test_override_by_argument_and_by_environment(monkeypatch):
    fake_backend(monkeypatch)
    assert tile_used() != 128
    assert tile_used(implementation="mosaic_tpu") == 128
    assert tile_used(implementation="mosaic_tpu", config=mosaic_tpu.TpuConfig(256, 2, 1)) == 256
    monkeypatch.setenv(api.OVERRIDE, "mosaic_gpu")
    assert tile_used() == 128
    assert tile_used(implementation="reference") != 128
    monkeypatch.setenv(api.OVERRIDE, "")
    assert tile_used() != 128
    monkeypatch.setenv(api.OVERRIDE, "fastest")
    with pytest.raises(ValueError, match="MLRA_JAX_DECODE_KERNEL is 'fastest', expected one of"):
        tile_used()


def test_fallback_is_logged_once_per_reason(monkeypatch):
    lines = []
    log = lambda level, text, *args: lines.append((level, text % args))
    monkeypatch.setattr(logging, "log", log)
    api._log_once.cache_clear()
    for _ in range(2):
        tile_used()
    assert lines == [
        (logging.INFO, "absorbed decode runs in plain JAX: there is no kernel for cpu")
    ]
    lines.clear()
    monkeypatch.setattr(
        target, "device", lambda: types.SimpleNamespace(platform="tpu", device_kind="TPU v5")
    )
    plain = tile_used(implementation="reference")
    for reason in ("too wide", "too wide", "too long"):
        fake_backend(monkeypatch, why_not=reason)
        assert tile_used() == plain
    assert lines == [
        (logging.INFO, "absorbed decode runs in plain JAX: mosaic_tpu: too wide"),
        (logging.INFO, "absorbed decode runs in plain JAX: mosaic_tpu: too long"),
    ]


@pytest.mark.parametrize(
    "changes, level",
    [
        (dict(dtype="float32"), logging.WARNING),
        (dict(cache=4097), logging.WARNING),
        (dict(width=48), logging.INFO),
        (dict(dtype="float32", rope=24), logging.INFO),
    ],
)
def test_only_what_a_user_can_change_is_a_warning(monkeypatch, changes, level):
    pytest.importorskip(
        "mlra_jax.kernels.absorbed_decode.mosaic_gpu",
        reason="this jaxlib has no Mosaic GPU dialect",
    )
    lines = []
    monkeypatch.setattr(logging, "log", lambda level, text, *args: lines.append((level, args[0])))
    api._log_once.cache_clear()
    device = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H200")
    problem = dataclasses.replace(PROBLEM, device_kind=device.device_kind, **changes)
    assert api._choose(None, device, problem) == "reference"
    value = str(next(iter(changes.values())))
    assert [at for at, _ in lines] == [level] and value in lines[0][1]


def test_tuned_settings_are_measured_saved_and_used(monkeypatch, tmp_path):
    fake_backend(monkeypatch)
    monkeypatch.setattr(tuning, "_tuned", {})
    monkeypatch.setattr(tuning.time, "perf_counter", iter([0, 9] * 20 + [0, 1] * 20).__next__)
    best = autotune(*arguments(), jnp.array([9, 9]), scale=SCALE, implementation="mosaic_tpu")
    assert best == mosaic_tpu.TpuConfig(384, 2, 1)
    assert tile_used(implementation="mosaic_tpu") == 384
    path = tmp_path / "tuned.json"
    save_tuned(path)
    tuning._tuned.clear()
    assert tile_used(implementation="mosaic_tpu") == 128
    assert load_tuned(path) == 1
    assert tile_used(implementation="mosaic_tpu") == 384


PROBLEM = Problem("TPU v5 lite", 2, 3, 4, 5, 1, 128, 64, 4096, "bfloat16")


def test_settings_hold_for_the_problem_they_were_measured_on_and_no_other(monkeypatch):
    monkeypatch.setattr(tuning, "_tuned", {})
    settings = mosaic_tpu.TpuConfig(384, 2, 1)
    tuning.remember_tuned(api.OP, "mosaic_tpu", PROBLEM, settings)
    assert tuning.find_tuned(api.OP, "mosaic_tpu", dataclasses.replace(PROBLEM)) == vars(settings)
    assert tuning.find_tuned(api.OP, "mosaic_gpu", PROBLEM) is None
    for name, value in vars(PROBLEM).items():
        other = value + "x" if isinstance(value, str) else value + 1
        changed = dataclasses.replace(PROBLEM, **{name: other})
        assert tuning.find_tuned(api.OP, "mosaic_tpu", changed) is None


def test_the_problem_names_every_size_of_the_call(monkeypatch):
    device = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H200")
    monkeypatch.setattr(target, "device", lambda: device)
    seen = []
    monkeypatch.setattr(api, "_why_not", lambda name, problem: seen.append(problem))
    q, q_rope, latents, k_rope = arguments(B=2, T=3, L=4, H=5, C=16, R=8, S=37, G=2)
    fake_backend(monkeypatch)
    lengths = jnp.array([9, 9])
    wanted = Problem("NVIDIA H200", 2, 3, 4, 5, 2, 16, 8, 37, "float32")
    assert has_kernel(q, q_rope, latents) and seen == [wanted]
    own_keys = jnp.stack([k_rope] * 4, axis=2)
    for cache, queries, changes in (
        ((latents, k_rope), (q, q_rope), dict()),
        # A call without groups has one.
        ((latents, k_rope), (q, q_rope[:, :, 0]), dict(groups=1)),
        ((latents, own_keys), (None, q_rope), dict(rope_heads=4, values_only=True)),
        # One key of its own is one that is shared.
        (
            (latents[:, :, :1], own_keys[:, :, :1]),
            (q[:, :, :1], q_rope[:, :, :1]),
            dict(latents=1, groups=1),
        ),
    ):
        seen.clear()
        absorbed_decode(*queries, *cache, lengths, scale=1.0)
        autotune(*queries, *cache, lengths, scale=1.0)
        assert seen and set(seen) == {dataclasses.replace(wanted, **changes)}


def test_a_file_of_settings_keeps_all_and_adds_to_what_is_known(monkeypatch, tmp_path):
    path, other = tmp_path / "tuned.json", dataclasses.replace(PROBLEM, batch=7)
    monkeypatch.setattr(tuning, "_tuned", {})
    saved = [
        (api.OP, "mosaic_tpu", PROBLEM, 256),
        (api.OP, "mosaic_gpu", PROBLEM, 384),
        ("another_op", "mosaic_gpu", PROBLEM, 640),
        (api.OP, "mosaic_tpu", other, 512),
    ]
    for *key, tile in saved:
        tuning.remember_tuned(*key, mosaic_tpu.TpuConfig(tile, 2, 1))
    save_tuned(path)
    tuning._tuned.clear()
    kept = api.OP, "mosaic_gpu", other, 768
    for *key, tile in (kept, (*saved[1][:3], 128)):
        tuning.remember_tuned(*key, mosaic_tpu.TpuConfig(tile, 2, 1))
    assert load_tuned(path) == 4
    for *key, tile in (*saved, kept):
        assert tuning.find_tuned(*key) == dict(tile=tile, buffers=2, splits=1)
    assert tuning.find_tuned("another_op", "mosaic_gpu", other) is None
    # A file that cannot be read changes nothing.
    text = path.read_text()
    path.write_text(
        text[: text.rindex('"config"')] + text[text.rindex('"config"') :].replace("c", "k", 1)
    )
    tuning._tuned.clear()
    with pytest.raises(ValueError, match="tuned.json is not a file of tuned kernel settings"):
        load_tuned(path)
    assert not tuning._tuned
    with pytest.raises(FileNotFoundError):
        load_tuned(tmp_path / "missing.json")


def test_files_of_when_one_op_had_settings_are_read(monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "_tuned", {})
    # Sizes that came later are at their defaults, and not in the file.
    problem = {k: v for k, v in vars(PROBLEM).items() if k not in ("rope_heads", "values_only")}
    row = dict(implementation="mosaic_tpu", problem=problem, config=dict(tile=256))
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps(dict(format_version=1, tuned=[row])))
    assert load_tuned(path) == 1
    assert tuning.find_tuned("absorbed_decode", "mosaic_tpu", PROBLEM) == dict(tile=256)


def test_settings_of_another_version_are_left_aside_with_one_line(monkeypatch, tmp_path):
    fake_backend(monkeypatch)
    monkeypatch.setattr(tuning, "_tuned", {})
    lines = []
    monkeypatch.setattr(logging, "log", lambda level, text, *args: lines.append(text % args))
    api._log_once.cache_clear()
    problem = tuning._fields(Problem.of(*arguments(), jax.devices()[0].device_kind))
    path = tmp_path / "tuned.json"
    for settings in (dict(tile=384, stages=2), dict(tile=384, buffers=2, splits=0)):
        rows = [dict(implementation="mosaic_tpu", problem=problem, config=settings)]
        path.write_text(json.dumps({"format_version": 1, "tuned": rows}))
        load_tuned(path)
        assert [tile_used(implementation="mosaic_tpu") for _ in range(2)] == [128, 128]
    assert len(lines) == 2
    assert all(x.startswith("absorbed decode leaves tuned settings of mosaic_tpu") for x in lines)


@pytest.mark.parametrize("name", ["mosaic_tpu", "mosaic_gpu"])
def test_settings_of_the_kernels_survive_a_file(monkeypatch, tmp_path, name):
    backend = pytest.importorskip(
        f"mlra_jax.kernels.absorbed_decode.{name}", reason="this jaxlib lacks the kernel's dialect"
    )
    monkeypatch.setattr(tuning, "_tuned", {})
    problem = Problem("TPU v5 lite", 2, 1, 1, 24, 1, 128, 64, 4096, "bfloat16")
    last = backend.candidates(problem)[-1]
    assert last != backend.heuristic(problem)
    tuning.remember_tuned(api.OP, name, problem, last)
    save_tuned(tmp_path / "tuned.json")
    tuning._tuned.clear()
    load_tuned(tmp_path / "tuned.json")
    assert api._config(name, problem) == last


def test_nothing_to_tune_where_the_reference_serves():
    assert autotune(*arguments(), jnp.array([9, 9]), scale=SCALE) is None


def test_the_fastest_is_by_median_and_compiling_does_not_count(monkeypatch):
    took = {"spread": [1, 9, 2, 9, 2], "even": [3, 3, 3, 3, 3], "lucky": [0, 0, 4, 4, 4]}
    clock, calls = [0.0], []

    def run(candidate):
        times = iter([1000, *took[candidate]])

        def call():
            calls.append(candidate)
            clock[0] += next(times)
            return jnp.zeros(1)

        return call

    monkeypatch.setattr(tuning.time, "perf_counter", lambda: clock[0])
    assert tuning.fastest(took, run, repeats=5) == ("spread", 2)
    assert tuning.fastest(list(took)[1:], run, repeats=5) == ("even", 3)
    assert [calls.count(name) for name in took] == [6, 12, 12]


def test_autotuner_passes_over_what_does_not_run(monkeypatch):
    def run(candidate):
        if candidate == "broken":
            raise RuntimeError("out of memory\nand more")
        return lambda: jnp.zeros(1)

    lines = []
    monkeypatch.setattr(logging, "info", lambda text, *args: lines.append(text % args))
    monkeypatch.setattr(tuning.time, "perf_counter", iter([1.0, 1.00025]).__next__)
    assert tuning.fastest(["broken", "sound"], run, repeats=1)[0] == "sound"
    assert lines == [
        "autotune: broken does not run: out of memory",
        "autotune: sound takes 250.0 us",
    ]
    monkeypatch.setattr(tuning.time, "perf_counter", lambda: 0.0)
    with pytest.raises(ValueError, match="no candidate configuration runs on this device"):
        tuning.fastest(["broken"], run)
    # What fails only when it runs is passed over as well.
    late = lambda candidate: lambda: run(candidate)()
    assert tuning.fastest(["sound", "broken"], late, repeats=1)[0] == "sound"


@pytest.mark.parametrize("content", ["", "[]", json.dumps({"format_version": 2, "tuned": []})])
def test_a_damaged_file_of_settings_is_named(tmp_path, content):
    path = tmp_path / "tuned.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="tuned.json is not a file of tuned kernel settings") as e:
        load_tuned(path)
    assert "\n" not in str(e.value)
