"""The TPU kernel: interpreted numerics, and what the ahead-of-time TPU compiler makes of it."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import truth
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, SingleDeviceSharding
from sharded_step import sharded_step

from mlra_jax.kernels.absorbed_decode import api, mosaic_tpu
from mlra_jax.kernels.absorbed_decode.mosaic_tpu import TpuConfig
from mlra_jax.kernels.absorbed_decode.problem import Problem

SCALE = 0.09
MIB = 2**20


# --- Numerics, interpreted on CPU ---


def take_latent_plainly(tiles_ref, buffer, latent):
    if len(tiles_ref.shape) == 3:
        return tiles_ref[buffer]
    heads_first = mosaic_tpu._heads_first(tiles_ref.shape[1])
    return tiles_ref[buffer, latent] if heads_first else tiles_ref[buffer, :, latent]


@pytest.fixture
def interpreted(monkeypatch):
    """Runs the kernel in the TPU interpreter: NaN in memory never written, reads out of bounds and
    races are errors, copies land only when waited for."""
    if jax.__version_info__ < (0, 12):
        pytest.skip("the TPU interpreter of JAX before 0.12 knows padded layouts on TPUs only")
    # The interpreter cannot bitcast a reference; what this stands in for has its own test below.
    monkeypatch.setattr(mosaic_tpu, "take_latent", take_latent_plainly)
    # Memory beyond the last position is there, as padding of the TPU's layout, but holds NaN.
    interpreter = pltpu.InterpretParams(buffer_bounds="padded", detect_races=True)
    v5e = AbstractMesh((), (), abstract_device=AbstractDevice("TPU v5 lite", 1, "tpu"))

    def run(config, *arrays):
        # Seconds of compilation count here, those of execution do not.
        fast = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
        kernel = functools.partial(mosaic_tpu.absorbed_decode, scale=SCALE, config=config)
        with jax.sharding.use_abstract_mesh(v5e), pltpu.force_tpu_interpret_mode(interpreter):
            return jax.jit(kernel, compiler_options=fast)(*arrays)

    yield run
    pltpu.reset_tpu_interpret_mode_state()


def shapes_of(B, T, L, H, C, S, G=1, R=64, N=1):
    """Of the arguments; rotary keys of each latent for N > 1."""
    k_rope = (B, S, N, R) if N > 1 else (B, S, R)
    return (B, T, L, H, C), (B, T, G, H, R), (B, S, L, C), k_rope


def arguments(values_only=False, **sizes):
    random = np.random.default_rng(sizes["S"])
    arrays = [
        random.standard_normal(s, np.float32).astype(jnp.bfloat16) for s in shapes_of(**sizes)
    ]
    # Scores of hundreds in the first head: exp of them is beyond float32.
    arrays[values_only][:, :, :, 0] *= 256
    return [None, *arrays[1:]] if values_only else arrays


# Ends and starts on, before and behind the edges of tiles of 128; a row's last end is not always
# its greatest.
EDGES = [
    ([127, 128], 0),
    ([128, 127], 0),
    ([129, 128], 0),
    ([126, 129], 127),
    ([129, 130], 128),
    ([131, 129], 129),
    ([255, 256], 1),
    ([257, 255], 127),
    ([256, 257], 128),
    ([120, 121], 119),
    ([0, 0], 0),
    ([1, 0], 0),
    ([333, 332], 0),
    ([300, 299], 299),
]


@pytest.mark.parametrize(
    "sizes, config, rows",
    [
        # One latent as in MLRA-4's 4-way share.
        (
            dict(B=len(EDGES), T=2, L=1, H=5, C=128, S=333, G=1),
            TpuConfig(tile=128, buffers=3, splits=1),
            EDGES,
        ),
        # Eight queries, some of which see nothing; one tile is more than the cache; two groups:
        # latent l takes its rotary query from group l % 2.
        (
            dict(B=2, T=8, L=2, H=3, C=256, S=201, G=2),
            TpuConfig(tile=256, buffers=2, splits=1),
            [
                ([0, 1, 2, 7, 4, 5, 6, 3], 3),
                ([194, 195, 196, 201, 198, 199, 200, 197], 150),
            ],
        ),
        # MLRA-2 on one device: two branches of two groups.
        (
            dict(B=3, T=2, L=4, H=12, C=128, S=150, G=2),
            TpuConfig(tile=128, buffers=4, splits=1),
            [([149, 150], 0), ([1, 2], 1), ([129, 128], 0)],
        ),
        # Rows cut for two cores, whose partial results are merged; MLA's width. The rows' tiles are
        # an even number, an odd one, a single one and none.
        (
            dict(B=5, T=1, L=1, H=16, C=512, S=400, G=1),
            TpuConfig(tile=128, buffers=2, splits=2),
            [([400], 0), ([90], 0), ([384], 0), ([129], 100), ([0], 0)],
        ),
        # More query rows than are computed at once.
        (
            dict(B=1, T=2, L=1, H=70, C=128, S=140, G=1),
            TpuConfig(tile=128, buffers=2, splits=1),
            [([140, 127], 0)],
        ),
        # Keys and values by head: heads before positions, positions before heads, one wide head.
        (
            dict(B=2, T=2, L=3, H=3, C=128, S=203, G=3, R=128, N=3, values_only=True),
            TpuConfig(tile=128, buffers=2, splits=1),
            [([201, 203], 0), ([130, 129], 7)],
        ),
        (
            dict(B=2, T=1, L=2, H=6, C=128, S=203, G=2, R=128, N=2, values_only=True),
            TpuConfig(tile=128, buffers=2, splits=1),
            [([203], 0), ([130], 129)],
        ),
        (
            dict(B=2, T=1, L=1, H=6, C=256, S=203, G=1, R=256, values_only=True),
            TpuConfig(tile=128, buffers=2, splits=1),
            [([203], 0), ([130], 129)],
        ),
    ],
    ids=["edges", "T8-L2-G2", "L4-G2", "splits-MLA", "rows", "heads-first", "grouped", "wide-head"],
)
def test_numerics(interpreted, sizes, config, rows):
    arrays = arguments(**sizes)
    # Nothing outside of what a row sees may matter, whatever it holds.
    for b, (ends, start) in enumerate(rows):
        for i in (2, 3):
            unseen = np.ones(sizes["S"], bool)
            unseen[start : max(ends)] = False
            arrays[i][b, unseen] = np.nan
    bounds = [np.array(x, np.int32) for x in zip(*rows, strict=True)]
    out, lse = interpreted(config, *arrays, *bounds)
    assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    out, lse = np.asarray(out, np.float32), np.asarray(lse)
    wanted_out, wanted_lse = truth.absorbed_decode(*arrays, *bounds, scale=SCALE)
    hidden = np.isneginf(wanted_lse)
    assert (np.isneginf(lse) == hidden).all() and not out[hidden].any()
    # Every row by itself: a short one must not hide behind the long ones.
    for got, wanted in zip(out, wanted_out, strict=True):
        assert np.linalg.norm(got - wanted) <= 5e-3 * np.linalg.norm(wanted)
    np.testing.assert_allclose(lse[~hidden], wanted_lse[~hidden], atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("L, C", [(2, 128), (2, 256), (4, 128), (8, 128)])
def test_latents_are_taken_out_of_packed_words(L, C):
    tiles = jax.random.normal(jax.random.key(0), (2, 128, L, C), jnp.bfloat16)

    def kernel(tiles_ref, out_ref):
        for latent in range(L):
            out_ref[latent] = mosaic_tpu.take_latent(tiles_ref, 1, latent)

    shape = jax.ShapeDtypeStruct((L, 128, C), jnp.bfloat16)
    taken = pl.pallas_call(kernel, out_shape=shape, interpret=True)(tiles)
    np.testing.assert_array_equal(taken, jnp.swapaxes(tiles[1], 0, 1))


@pytest.mark.parametrize("latents, ends", [(1, (264, 128, 136)), (2, (260, 127, 129))])
def test_copies_move_what_is_visible_once(interpreted, monkeypatch, latents, ends):
    """Counts the bytes of every copy from HBM that the kernel starts."""
    moved = []
    original = pltpu.make_async_copy

    def counted(source, target, semaphore):
        copy = original(source, target, semaphore)
        row, *window = source.transforms[-1].indices
        extent = [w.size for w in window]
        start = copy.start

        def start_counted():
            jax.debug.callback(lambda b, *n: moved.append((int(b), np.prod(n) * 2)), row, *extent)
            start()

        object.__setattr__(copy, "start", start_counted)
        return copy

    monkeypatch.setattr(pltpu, "make_async_copy", counted)
    sizes = dict(B=6, T=1, L=latents, H=8, C=128, S=384, G=1)
    interpreted(
        TpuConfig(tile=128, buffers=3, splits=1),
        *arguments(**sizes),
        jnp.array([[384], [0], [260], [127], [129], [256]]),
        jnp.array([0, 0, 130, 0, 0, 128]),
    )
    jax.effects_barrier()
    per_row = [sum(n for b, n in moved if b == row) for row in range(6)]
    # Copies begin at multiples of 128 positions. The last ends at one of 8 (a single latent), where
    # the row ends (several) or at a multiple of 128 (the rotary keys, which all latents share).
    width = latents * 128
    assert per_row == [
        384 * (width + 64) * 2,
        0,
        (ends[0] - 128) * width * 2 + (384 - 128) * 64 * 2,
        ends[1] * width * 2 + 128 * 64 * 2,
        ends[2] * width * 2 + 256 * 64 * 2,
        128 * (width + 64) * 2,
    ]


# --- Compiled ahead of time for TPUs that are not here ---

# Bytes of VMEM per core, which no kernel may exceed.
CHIPS = {
    "v4:2x2x1": 16 * MIB,
    "v5e:2x2": 128 * MIB,
    "v5p:2x2x1": 64 * MIB,
    "v6e:2x2": 128 * MIB,
    "tpu7x:2x2x1": 64 * MIB,
}


@functools.cache
def devices_of(topology):
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:
        pytest.skip(f"no ahead-of-time TPU compiler for {topology}: {str(error).splitlines()[0]}")


def compile_decode(device, values_only=False, **sizes):
    here = SingleDeviceSharding(device)
    array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=here)
    arrays = [array(*shape) for shape in shapes_of(**sizes)]
    if values_only:
        arrays[0] = None
    problem = Problem.of(*arrays, device.device_kind)
    assert mosaic_tpu.supports(problem) is None
    config = mosaic_tpu.heuristic(problem)
    kernel = functools.partial(mosaic_tpu.absorbed_decode, scale=SCALE, config=config)
    B, T = sizes["B"], sizes["T"]
    bounds = array(B, T, dtype=jnp.int32), array(B, dtype=jnp.int32)
    compiled = jax.jit(kernel).lower(*arrays, *bounds)
    return compiled.compile(), problem, config


def instructions(compiled):
    """(opcode, elements of the largest result) of every instruction of the optimized program."""
    for line in compiled.as_text().splitlines():
        if match := re.match(r"\s*(?:ROOT )?%\S+ = (.*?) ([\w-]+)\(", line):
            shapes = re.findall(r"\w+\[([\d,]+)\]", match[1])
            sizes = [np.prod([int(n) for n in shape.split(",")]) for shape in shapes]
            yield match[2], max(sizes, default=0)


MLRA4_SHARE = dict(B=1, T=1, L=1, H=64, C=128, S=131072)
PRODUCT_SIZES = {
    "MLRA-4 4-way": MLRA4_SHARE,
    "MLRA-4 4-way, 24 heads": MLRA4_SHARE | dict(H=24),
    "MLA": MLRA4_SHARE | dict(C=512),
    "MLRA-4 1-way": MLRA4_SHARE | dict(L=4, H=24),
}


# Every chip, and all sizes for one: what differs between chips is the size of tiles.
COMPILED = [("v5e:2x2", name) for name in PRODUCT_SIZES]
COMPILED += [("v4:2x2x1", "MLRA-4 1-way"), ("v5p:2x2x1", "MLA"), ("v6e:2x2", "MLRA-4 1-way")]
COMPILED += [("tpu7x:2x2x1", "MLA")]
# Keys and values by head.
HEADS = dict(B=1, T=1, S=131072, values_only=True)
BY_HEAD = {
    "MQA": HEADS | dict(L=1, H=24, C=128, R=128),
    "GQA 3-way": HEADS | dict(L=2, H=4, C=128, G=2, R=128, N=2),
    "GQA": HEADS | dict(L=6, H=4, C=128, G=6, R=128, N=6),
    "MHA": HEADS | dict(S=32768, L=24, H=1, C=128, G=24, R=128, N=24),
    "GTA": HEADS | dict(L=6, H=4, C=128, G=6, values_only=False),
    "MFA": HEADS | dict(L=1, H=24, C=256, R=256),
}
COMPILED += [("v5e:2x2", name) for name in BY_HEAD] + [("v5p:2x2x1", "GQA"), ("v6e:2x2", "MHA")]


@pytest.mark.parametrize("topology, name", COMPILED)
def test_compiles_for_every_chip_and_reads_the_cache_once(topology, name):
    sizes = dict(G=1, R=64, N=1, values_only=False) | (PRODUCT_SIZES | BY_HEAD)[name]
    device = devices_of(topology)[0]
    compiled, problem, config = compile_decode(device, **sizes)
    S, values, keys = sizes["S"], sizes["L"] * sizes["C"], sizes["N"] * sizes["R"]
    cache_bytes = S * (values + keys) * 2

    # The arguments have no padding, and nothing of their size exists beside them.
    memory = compiled.memory_analysis()
    assert cache_bytes < memory.argument_size_in_bytes < cache_bytes + MIB / 2
    assert memory.temp_size_in_bytes < MIB
    smaller = S * min(values, keys)
    moving = [op for op, size in instructions(compiled) if size >= smaller]
    assert set(moving) <= {"parameter", "bitcast"}
    cost, rows = compiled.cost_analysis(), -(-sizes["H"] // 8) * 8
    assert cache_bytes < cost["bytes accessed"] < cache_bytes * 1.01
    asked = 0 if sizes["values_only"] else values
    flops = 2 * S * rows * (asked + values + max(sizes["G"], sizes["N"]) * sizes["R"])
    assert cost["flops"] == pytest.approx(flops, rel=1e-3)
    assert cost["transcendentals"] == pytest.approx(S * sizes["L"] * rows, rel=1e-3)

    assert mosaic_tpu.vmem_bytes(problem, config) <= CHIPS[topology] // 2
    kernel = next(x for x in compiled.as_text().splitlines() if "tpu_custom_call" in x)
    used = re.search(
        r'"used_scoped_memory_configs":\[\{"memory_space":"1".*?"size":"(\d+)"', kernel
    )
    # What is counted is enough, and not far more than the compiler takes.
    counted = mosaic_tpu.vmem_bytes(problem, config)
    assert 0.45 * counted < int(used[1]) <= min(counted, CHIPS[topology])


def test_compiles_at_odd_sizes_and_at_two_million_tokens():
    device = devices_of("v5e:2x2")[0]
    compile_decode(device, B=3, T=8, L=2, H=12, C=256, S=4001, G=2)
    # 2**32 elements: offsets beyond what 32 bits count.
    compile_decode(device, B=4, T=1, L=1, H=16, C=512, S=2**21)


def test_compiles_for_the_fewest_and_the_most_query_rows():
    device = devices_of("v5p:2x2x1")[0]
    compile_decode(device, B=1, T=1, L=1, H=1, C=512, S=130)
    compile_decode(device, B=1, T=8, L=1, H=128, C=512, S=4096)


@pytest.mark.parametrize("chip", ["TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x"])
@pytest.mark.parametrize(
    "latents, width", [(1, 128), (2, 128), (4, 128), (1, 256), (2, 256), (1, 512)]
)
def test_serves_every_member_and_number_of_heads(chip, latents, width):
    for queries in (1, 8):
        for heads in range(1, 129):
            problem = Problem(chip, 3, queries, latents, heads, 1, width, 64, 4001, "bfloat16")
            assert mosaic_tpu.supports(problem) is None
            config = mosaic_tpu.heuristic(problem)
            assert mosaic_tpu.vmem_bytes(problem, config) <= mosaic_tpu._chip(problem).vmem // 2


@pytest.mark.parametrize("chip", ["TPU v2", "TPU v3"])
def test_chips_without_bfloat16_are_left_to_the_reference(chip):
    problem = Problem(chip, 1, 1, 1, 24, 1, 128, 64, 4096, "bfloat16")
    assert api._choose(None, AbstractDevice(chip, 1, "tpu"), problem) == "reference"


@pytest.mark.parametrize("latents", [4, 16, 24])
def test_donated_cache_is_updated_and_read_in_place(latents):
    """A decode step over four TPUs: new entry into the cache, then attention, under shard_map."""
    mesh = Mesh(np.array(devices_of("v5e:2x2")), ("tensor",))
    B, C, R, S = 2, 128, 64, 32768
    # Which kernel serves follows from the mesh, not from the host's CPU.
    step, arrays = sharded_step(mesh, B=B, T=1, L=latents, H=24, C=C, R=R, S=S, scale=SCALE)
    compiled = step.lower(*arrays).compile()
    assert "tpu_custom_call" in compiled.as_text()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == B * S * (latents // 4 * C + R) * 2
    assert memory.temp_size_in_bytes < MIB
    touching = {op for op, size in instructions(compiled) if size >= B * S * R}
    in_place = {"dynamic-update-slice", "fusion"}
    assert touching <= {"parameter", "bitcast", "tuple"} | in_place


PROBLEM = Problem("TPU v5 lite", 1, 1, 1, 24, 1, 128, 64, 4096, "bfloat16")


@pytest.mark.parametrize(
    "changes, reason",
    [
        (dict(dtype="float16"), "bfloat16"),
        (dict(dtype="float32"), "bfloat16"),
        (dict(width=96), "latent width 96"),
        (dict(width=129), "latent width 129"),
        (dict(rope=24), "rotary width 24 is no multiple of 16"),
        (dict(rope=144), "rotary width 144"),
        (dict(latents=8, width=256), "8 latents of width 256"),
        (dict(rope_heads=4, latents=4), "rotary width 64 of 4 heads is no multiple of 128"),
        (dict(latents=3), None),
        (dict(latents=24), None),
        (dict(latents=4, width=256), "4 latents of width 256"),
        (dict(heads=1025), "more than 1024 rows"),
        (dict(heads=1, queries=65), "65 queries are more than 64"),
        (dict(heads=1, queries=64), None),
        (dict(heads=513, queries=2), "2 queries x 513 heads are more than 1024 rows"),
        (dict(heads=128, queries=8, width=512, device_kind="TPU v4"), "do not fit in VMEM"),
        (dict(device_kind="TPU v3"), "does not on TPU v3"),
        (dict(rope=16), None),
        (dict(rope=128), None),
        (dict(width=384), None),
        (dict(latents=2, width=512), None),
        (dict(heads=512, queries=2), None),
    ],
)
def test_says_what_it_cannot_serve(changes, reason):
    why_not = mosaic_tpu.supports(dataclasses.replace(PROBLEM, **changes))
    if reason is None:
        assert why_not is None
    else:
        assert reason in why_not and "\n" not in why_not


@pytest.mark.parametrize(
    "settings", [(127, 2, 1), (64, 2, 1), (0, 2, 1), (200, 2, 1), (128, 1, 1), (128, 2, 0)]
)
def test_settings_that_cannot_be_are_refused(settings):
    with pytest.raises(ValueError, match="tile must be a multiple of 128, buffers >= 2, splits"):
        TpuConfig(*settings)


LONG = dict(cache=131072)


@pytest.mark.parametrize(
    "changes, chosen",
    [
        # Tiles of the bytes that a chip wants, halved until two make a row.
        (LONG, (2048, 4, 1)),
        (dict(cache=4096), (2048, 3, 1)),
        (dict(cache=4095), (1024, 5, 1)),
        (dict(cache=130), (256, 3, 1)),
        (LONG | dict(width=512), (1024, 3, 1)),
        (LONG | dict(latents=4), (1024, 3, 1)),
        # Enough of them in flight, but no more than the batch has.
        (dict(cache=1000, batch=1), (256, 5, 1)),
        (dict(cache=1000, batch=64), (256, 23, 1)),
        (dict(cache=2000, batch=2, latents=2, groups=2, width=256), (512, 5, 1)),
        # By chip, its other name, and for one that nobody knows.
        (LONG | dict(device_kind="TPU v4"), (2048, 3, 2)),
        (LONG | dict(device_kind="TPU v5e"), (2048, 4, 1)),
        (LONG | dict(device_kind="TPU v5"), (4096, 3, 2)),
        (LONG | dict(device_kind="TPU v5p"), (4096, 3, 2)),
        (LONG | dict(device_kind="TPU v6 lite"), (4096, 4, 1)),
        (LONG | dict(device_kind="TPU v6e"), (4096, 4, 1)),
        (LONG | dict(device_kind="TPU7x"), (4096, 7, 1)),
        (LONG | dict(device_kind="TPU of tomorrow", width=512), (512, 5, 1)),
        # Fewer buffers, then shorter tiles, where half of VMEM is too little.
        (LONG | dict(device_kind="TPU v4", width=512, heads=384), (256, 2, 2)),
    ],
)
def test_heuristic(changes, chosen):
    assert mosaic_tpu.heuristic(dataclasses.replace(PROBLEM, **changes)) == TpuConfig(*chosen)


@pytest.mark.parametrize(
    "sizes",
    [
        dict(B=1, T=1, L=1, H=24, C=128, S=4096, G=1),
        dict(B=3, T=2, L=4, H=12, C=128, S=1000, G=2),
        dict(B=2, T=8, L=1, H=128, C=512, S=4001, G=1),
    ],
)
def test_vmem_is_counted_as_the_kernel_asks_for_it(monkeypatch, sizes):
    B, T, L, H, C, S, G = sizes.values()
    problem = Problem("TPU v5", B, T, L, H, G, C, 64, S, "bfloat16")
    asked = {}

    def call(kernel, *, grid_spec, out_shape, compiler_params, **_):
        specs = [*grid_spec.in_specs, *grid_spec.out_specs]
        dtypes = [jnp.bfloat16] * 4 + [x.dtype for x in out_shape]
        blocks = [
            2 * np.prod([n for n in spec.block_shape if n]) * dtype.dtype.itemsize
            for spec, dtype in zip(specs, map(jnp.empty, [()] * 6, dtypes), strict=True)
            if spec.block_shape
        ]
        scratch = [
            np.prod(x.shape) * jnp.dtype(x.dtype).itemsize
            for x in grid_spec.scratch_shapes
            if getattr(x, "memory_space", None) == pltpu.VMEM
        ]
        assert len(blocks) == 4 and len(scratch) == 4
        asked.update(bytes=sum(blocks) + sum(scratch), limit=compiler_params.vmem_limit_bytes)
        return lambda *_: [jnp.zeros(x.shape, x.dtype) for x in out_shape]

    monkeypatch.setattr(pl, "pallas_call", call)
    for config in mosaic_tpu.candidates(problem):
        kernel = functools.partial(mosaic_tpu.absorbed_decode, scale=SCALE, config=config)
        shapes = (B, T, L, H, C), (B, T, G, H, 64), (B, S, L, C), (B, S, 64)
        arrays = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes]
        bounds = [jax.ShapeDtypeStruct(s, jnp.int32) for s in ((B, T), (B,))]
        jax.eval_shape(kernel, *arrays, *bounds)
        # Beside what is asked for live at least the scores of a block of rows.
        scores = 4 * config.tile * min(T * H, 128)
        counted = mosaic_tpu.vmem_bytes(problem, config)
        assert asked["bytes"] + scores <= counted <= asked["limit"]
        more = dataclasses.replace(config, buffers=config.buffers + 1)
        tile = config.tile * (L * C + 64) * 2
        assert mosaic_tpu.vmem_bytes(problem, more) - counted == tile


@pytest.mark.parametrize("device_kind", [*mosaic_tpu._CHIPS, "TPU of tomorrow"])
def test_every_candidate_fits_and_the_heuristic_is_one(device_kind):
    for sizes in (*PRODUCT_SIZES.values(), dict(B=64, T=8, L=1, H=128, C=512, S=4001)):
        problem = Problem(
            device_kind, groups=1, rope=64, dtype="bfloat16", **dict(zip(
                ("batch", "queries", "latents", "heads", "width", "cache"), sizes.values(),
                strict=True,
            ))
        )  # fmt: skip
        if mosaic_tpu.supports(problem):
            continue
        configs = mosaic_tpu.candidates(problem)
        assert configs[0] == mosaic_tpu.heuristic(problem)
        # Enough is on its way to keep this chip's memory busy, if it fits.
        first, chip = configs[0], mosaic_tpu._chip(problem)
        more = dataclasses.replace(first, buffers=first.buffers + 1)
        flying = (first.buffers - 1) * first.tile * 2 * (problem.latents * problem.width + 64)
        assert flying >= chip.flight or mosaic_tpu.vmem_bytes(problem, more) > chip.vmem // 2
        assert all(mosaic_tpu.vmem_bytes(problem, c) <= chip.vmem // 2 for c in configs)
        assert all(c.splits == first.splits for c in configs)
        # No setting that fits is left out.
        for tile, buffers in itertools.product((256, 512, 1024, 2048, 4096), (2, 4, 8)):
            config = TpuConfig(tile, buffers, first.splits)
            fits = mosaic_tpu.vmem_bytes(problem, config) <= chip.vmem // 2
            assert configs.count(config) == fits
