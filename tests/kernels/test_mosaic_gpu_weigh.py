"""`weigh_parts`, which the interpreter cannot run, with NumPy in place of MLIR's dialects.

It is written in the GPU's own instructions, one thread's view of them. Here every value is an array
over the threads of a CTA, so calling the function runs it.
"""

import contextlib
import functools
import types

import jax.numpy as jnp
import numpy as np
import pytest

join = pytest.importorskip(
    "mlra_jax.kernels.absorbed_decode.mosaic_gpu.join",
    reason="this jaxlib has no Mosaic GPU dialect",
)

WARPS = join.WARPS
THREADS = np.arange(32 * WARPS, dtype=np.uint32)
F32, I32 = np.float32, np.uint32


class Memory:
    """A buffer that notes which threads read which of its elements."""

    def __init__(self, array):
        self.type = types.SimpleNamespace(shape=array.shape, element_type=array.dtype)
        self.flat, self.read, self.dropped = array.reshape(-1), [], []


class Threads:
    """What of MLIR's dialects `weigh_parts` uses, for all threads at once."""

    def __init__(self):
        self.active = [np.ones(len(THREADS), bool)]

    @contextlib.contextmanager
    def when(self, condition):
        self.active.append(self.active[-1] & condition)
        yield
        self.active.pop()

    def load(self, kind, pointer):
        memory, places = pointer
        width = kind[1] if isinstance(kind, tuple) else 1
        assert (places % width == 0).all(), "a misaligned load"
        places = places[:, None].astype(np.int64) + np.arange(width)
        assert places.max() < len(memory.flat), "a read out of bounds"
        memory.read.append(places)
        return memory.flat[places] if width > 1 else memory.flat[places[:, 0]]

    def store(self, value, pointer):
        memory, places = pointer
        width = value.shape[1] if value.ndim > 1 else 1
        places = places[:, None].astype(np.int64) + np.arange(width)
        memory.flat[places[self.active[-1]]] = value.reshape(len(THREADS), width)[self.active[-1]]

    def inline_asm(self, kind, operands, text, constraints, **_):
        if text.startswith("ex2.approx.ftz.f32"):
            return np.exp2(operands[0])
        assert text == "discard.global.L2 [$0], 128;"
        memory, places = operands[0]
        memory.dropped += [(thread, places[thread]) for thread in THREADS[self.active[-1]]]

    def install(self, monkeypatch):
        space = types.SimpleNamespace
        predicates = space(ult=np.less, eq=np.equal)
        insert = lambda x, v, _, at: np.where(np.arange(v.shape[1]) == at[0], x[:, None], v)
        fakes = dict(
            arith=space(
                constant=lambda kind, x: np.full(len(THREADS), x, kind),
                addi=np.add, muli=np.multiply, remui=np.remainder, divui=np.floor_divide,
                minui=np.minimum, addf=np.add, subf=np.subtract, mulf=np.multiply,
                maximumf=np.maximum, CmpIPredicate=predicates,
                cmpi=lambda predicate, a, b: predicate(a, b),
                select=np.where, extf=lambda kind, x: x.astype(kind[2]),
            ),
            vector=space(
                broadcast=lambda kind, x: np.repeat(x[:, None], kind[1], axis=1),
                extract=lambda v, _, at: v[:, at[0]],
                insert=insert,
            ),
            llvm=space(load=self.load, store=self.store, inline_asm=self.inline_asm),
            mlir_math=space(fma=lambda a, b, c: a * b + c),
            mgpu=space(
                thread_idx=lambda: THREADS,
                when=self.when,
                utils=space(
                    memref_ptr=lambda memory: memory,
                    getelementptr=lambda memory, index, kind: (memory, index[0]),
                    shfl_bfly=lambda x, distance: x[THREADS ^ distance],
                ),
            ),
            ir=space(
                IntegerType=space(get_signless=lambda bits: {32: I32}[bits]),
                F32Type=space(get=lambda: F32),
                VectorType=space(get=lambda shape, kind: ("vector", *shape, kind)),
                MemRefType=lambda kind: kind,
                Type=space(parse=str),
            ),
        )  # fmt: skip
        for name, fake in fakes.items():
            monkeypatch.setattr(join, name, fake)
        call = lambda **_: lambda f: functools.partial(f, None)
        monkeypatch.setattr(join.plgpu, "inline_mgpu", call)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 32, 33, 132])
def test_parts_are_weighed_by_their_share_and_dropped_once(monkeypatch, count, dtype):
    random = np.random.default_rng(count)
    parts = random.standard_normal((count, 128), F32).astype(jnp.dtype(dtype))
    lses = random.uniform(-3, 3, count).astype(F32)
    # Differences beyond the range of exp2, and parts that saw nothing, the first part among them.
    lses[random.permutation(count)[: count // 3]] += random.choice([-300, 0, 300])
    lses[: count // 2 : 3] = -np.inf
    buffers = (
        Memory(parts),
        Memory(lses),
        Memory(np.full(WARPS * 128, np.nan, F32)),
        Memory(np.full(2 * WARPS, np.nan, F32)),
    )
    Threads().install(monkeypatch)
    join.weigh_parts(*buffers)

    sums = buffers[2].flat.reshape(WARPS, 128).astype(np.float64)
    tops, totals = buffers[3].flat.reshape(2, WARPS).astype(np.float64)
    # In units of each warp's own greatest, so that no later difference overflows.
    assert np.isfinite(tops).all() and (totals <= count / WARPS + 2).all()
    assert (totals[tops > -1e29] >= 1 - 1e-6).all() and not totals[tops < -1e29].any()
    top = lses.max()
    weights = np.exp2(np.float64(lses) - top)
    fade = np.exp2(tops - top)
    np.testing.assert_allclose(fade @ totals, weights.sum(), rtol=1e-6)
    np.testing.assert_allclose(
        fade @ sums, weights @ parts.astype(np.float64), rtol=1e-5, atol=1e-5 * weights.sum()
    )

    # Lines of 64 elements are dropped whole, each once, and by the one warp that reads of it.
    dropped = sorted(place for _, place in buffers[0].dropped)
    assert dropped == list(range(0, count * 128, 64))
    warp_of_line = {place // 64: thread // 32 for thread, place in buffers[0].dropped}
    for places in buffers[0].read:
        for thread, place in enumerate(places[:, 0]):
            # The last part is read again by those that have none of their own left.
            assert warp_of_line[place // 64] == thread // 32 or place // 128 == count - 1


def test_a_row_that_no_part_saw_weighs_nothing(monkeypatch):
    parts, lses = np.ones((5, 128), jnp.bfloat16), np.full(5, -np.inf, F32)
    sums, statistics = np.full(WARPS * 128, np.nan, F32), np.full(2 * WARPS, np.nan, F32)
    Threads().install(monkeypatch)
    join.weigh_parts(*map(Memory, (parts, lses, sums, statistics)))
    assert not sums.any() and not statistics[WARPS:].any()
    assert np.isfinite(statistics).all()
