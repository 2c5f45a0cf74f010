"""The backward pass of causal attention of grouped heads on Hopper GPUs.

A CTA keeps a block of keys and values and goes over the queries of several heads that share them,
so that the gradients of keys and values add up in registers. A warpgroup copies; each of two others
has half of the keys:

    sᵀ = k qᵀ            pᵀ = exp(scale sᵀ - lse)       dv += pᵀ do
    dpᵀ = v doᵀ          dsᵀ = pᵀ (dpᵀ - delta)         dk += dsᵀ q

and, of what both found, dq += ds k for half of the columns, which the copy engine adds up in device
memory in float32 (FlashAttention-2, arXiv 2307.08691, algorithm 2).
"""

import dataclasses
import functools
import math
import types
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mlra_jax.kernels import target
from mlra_jax.kernels.causal_attention import hopper

# Queries and keys of a block, warpgroups that multiply, and keys of each.
_QUERIES, _KEYS, _MULTIPLIERS, _ROWS = 64, 128, 2, 64
_WIDTHS = 192, 128
# Query heads of a program: more spare starts, fewer stay together in the L2 cache.
_HEADS = 2
# Of so many programs' queries, keys and sums the L2 cache holds what they are at.
_SIDE_BY_SIDE = 8
_WGMMA, _COLUMN = hopper.WGMMA, hopper.COLUMN


def serves(q_BTHK: Any, k_BTJK: Any, v_BTJV: Any) -> bool:
    """Whether `backward` takes these shapes."""
    grouped = q_BTHK.shape[2] // k_BTJK.shape[2] % _HEADS == 0
    whole = q_BTHK.shape[1] % _KEYS == 0
    widths = k_BTJK.shape[3], v_BTJV.shape[3]
    return grouped and whole and widths == _WIDTHS and q_BTHK.dtype == jnp.bfloat16


SERVED = (
    f"bfloat16, lengths that {_KEYS} divides, keys of {_WIDTHS[0]} and values of {_WIDTHS[1]}, and "
    "an even number of query heads to a key/value head"
)


# A function of its own in a program, so that all layers compile one.
@functools.partial(jax.jit, static_argnames="scale")
@target.int32_indices
def backward(
    q_BTHK: jax.Array,
    k_BTJK: jax.Array,
    v_BTJV: jax.Array,
    do_BTHV: jax.Array,
    lse_BHT: jax.Array,
    delta_BHT: jax.Array,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of queries, keys and values, float32.

    Args:
      q_BTHK, k_BTJK, v_BTJV, do_BTHV: bfloat16; what was attended and the gradient of the result.
      lse_BHT: float32, the binary logarithms of the sums of exp(scores).
      delta_BHT: float32, the products of the results and their gradients.
      scale: of the scores.
    """
    (B, T, H, K), (J, V) = q_BTHK.shape, v_BTJV.shape[2:]
    # The order in which a model with absorbed projections makes gradients and wants them.
    do_GBTJV = do_BTHV.reshape(B, T, J, H // J, V).transpose(3, 0, 1, 2, 4)
    shapes = (H // J, B, T, J, K), (B, T, J, K), (B, T, J, V)
    # Otherwise the zeros of all layers would be there at once.
    do_GBTJV, zero = lax.optimization_barrier((do_GBTJV, jnp.float32(0)))
    sums = [jax.new_ref(jnp.full(shape, zero)) for shape in shapes]
    _launch(B, T, H, J, K, V, q_BTHK.dtype, scale)(
        q_BTHK, k_BTJK, v_BTJV, do_GBTJV, lse_BHT, delta_BHT, *sums
    )
    dq_GBTJK, dk_BTJK, dv_BTJV = map(jax.freeze, sums)
    return scale * dq_GBTJK.transpose(1, 2, 3, 0, 4).reshape(q_BTHK.shape), dk_BTJK, dv_BTJV


def _launch(B, T, H, J, K, V, dtype, scale):
    group, units = H // J, B * H // _HEADS
    side, blocks = math.gcd(units, _SIDE_BY_SIDE), T // _KEYS
    names = "q", "k", "v", "do", "lse", "delta", "dq", "dk", "dv"

    def body(*refs, **memory):
        # What is side by side has the same keys and then the next ones, the longest programs first.
        at, wg = lax.axis_index("cta"), lax.axis_index("wg")
        divide = lambda x, by: (lax.div(x, jnp.int32(by)), lax.rem(x, jnp.int32(by)))
        at, unit = divide(at, side)
        at, block = divide(at, blocks)
        batch, unit = divide(at * side + unit, H // _HEADS)
        shared, first_head = divide(unit * _HEADS, group)
        program = _Program(
            **dict(zip(names, refs, strict=True)),
            memory=types.SimpleNamespace(**memory),
            batch=batch,
            shared=shared,
            block=block,
            first_head=first_head,
            group=group,
            first=block * (_KEYS // _QUERIES),
            blocks=T // _QUERIES,
            scale=scale,
        )
        pl.when(wg == _MULTIPLIERS)(functools.partial(_load, program))
        for me in range(_MULTIPLIERS):
            pl.when(wg == me)(functools.partial(_multiply, program, me))

    return plgpu.kernel(
        body,
        out_type=(),
        grid=(units * blocks,),
        grid_names=("cta",),
        num_threads=_MULTIPLIERS + 1,
        thread_name="wg",
        kernel_name="causal_attention_backward",
        scratch_types=_memory(K, V, dtype),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            reduction_scratch_bytes=0,
        ),
    )


def _memory(K: int, V: int, dtype) -> dict[str, Any]:
    f32, barrier = jnp.float32, plgpu.Barrier
    return dict(
        q_smem=hopper.swizzled((2, _QUERIES, K), dtype, 64),
        do_smem=hopper.swizzled((2, _QUERIES, V), dtype, 128),
        lse_smem=plgpu.SMEM((2, _QUERIES), f32),
        delta_smem=plgpu.SMEM((2, _QUERIES), f32),
        k_smem=hopper.swizzled((1, _KEYS, K), dtype, 64),
        v_smem=hopper.swizzled((1, _KEYS, V), dtype, 128),
        ds_smem=hopper.swizzled((1, _KEYS, _QUERIES), dtype, 64),
        # Sums on their way to device memory: each multiplier's half of the columns, or 64 of them.
        sums_smem=plgpu.RefUnion(
            hopper.swizzled((_MULTIPLIERS, _QUERIES, K // 2), f32, 128),
            hopper.swizzled((2 * _MULTIPLIERS - 1, _ROWS, 64), f32, 128),
        ),
        kv_full=barrier(num_arrivals=2),
        q_full=barrier(num_arrivals=2, num_barriers=2),
        do_full=barrier(num_arrivals=2, num_barriers=2),
        empty=barrier(num_arrivals=_MULTIPLIERS, num_barriers=2),
        ds_full=barrier(num_arrivals=_MULTIPLIERS),
        ds_empty=barrier(num_arrivals=_MULTIPLIERS),
    )


@dataclasses.dataclass(frozen=True)
class _Program:
    """What the warpgroups of a CTA share.

    Attributes:
      q, k, v, do, lse, delta: the arguments, in device memory.
      dq, dk, dv: what sums are added to there.
      memory: shared memory and barriers by name, of `_memory`.
      batch, shared, block: row, key/value head and block of its keys.
      first_head: the first of its heads of queries in the group.
      group: query heads to a key/value head.
      first, blocks: the first block of queries that sees the keys, and their number in all.
      scale: of the scores.
    """

    q: Any
    k: Any
    v: Any
    do: Any
    lse: Any
    delta: Any
    dq: Any
    dk: Any
    dv: Any
    memory: types.SimpleNamespace
    batch: jax.Array
    shared: jax.Array
    block: jax.Array
    first_head: jax.Array
    group: int
    first: jax.Array
    blocks: int
    scale: float

    def over_queries(self, step, carry):
        """`step(n, i, head, carry)` for block i of each head's queries."""

        def place_and_step(n, state):
            i, head, carry = state
            carry = step(n, i, head, carry)
            last = i == self.blocks - 1
            return jnp.where(last, self.first, i + 1), head + last.astype(jnp.int32), carry

        steps = _HEADS * (self.blocks - self.first)
        state = self.first, self.first_head, carry
        return lax.fori_loop(0, steps, place_and_step, state)[2]


def _load(program: _Program) -> None:
    plgpu.set_max_registers(24, action="decrease")
    p, memory = program, program.memory
    keys = pl.ds(p.block * _KEYS, _KEYS)
    plgpu.copy_gmem_to_smem(p.k.at[p.batch, keys, p.shared], memory.k_smem.at[0], memory.kv_full)
    plgpu.copy_gmem_to_smem(p.v.at[p.batch, keys, p.shared], memory.v_smem.at[0], memory.kv_full)

    def load(n, i, head, _):
        slot, rows = lax.rem(n, jnp.int32(2)), pl.ds(i * _QUERIES, _QUERIES)
        of_all = p.shared * p.group + head
        pl.when(n > 1)(lambda: plgpu.barrier_wait(memory.empty.at[slot]))
        for source, to, full in (
            (p.q.at[p.batch, rows, of_all], memory.q_smem, memory.q_full),
            (p.lse.at[p.batch, of_all, rows], memory.lse_smem, memory.q_full),
            (p.do.at[head, p.batch, rows, p.shared], memory.do_smem, memory.do_full),
            (p.delta.at[p.batch, of_all, rows], memory.delta_smem, memory.do_full),
        ):
            plgpu.copy_gmem_to_smem(source, to.at[slot], full.at[slot])

    p.over_queries(load, None)


def _multiply(program: _Program, me: int) -> None:
    plgpu.set_max_registers(240, action="increase")
    p, memory = program, program.memory
    plgpu.barrier_wait(memory.kv_full)
    widths = p.k.shape[-1], p.v.shape[-1]
    zeros = [plgpu.layout_cast(jnp.zeros((_ROWS, x), jnp.float32), _WGMMA) for x in widths]
    dk, dv = p.over_queries(functools.partial(_step, program, me), tuple(zeros))
    halves, pieces = memory.sums_smem
    keys = pl.ds(p.block * _KEYS + me * _ROWS, _ROWS)
    # Of three places of 64 columns the first and the last are each multiplier's own.
    for x, smem, to in (
        (dk * p.scale, halves.at[me], p.dk),
        (dv, pieces.at[me * _MULTIPLIERS], p.dv),
    ):
        width = smem.shape[-1]
        for column in range(0, x.shape[1], width):
            part = x[:, column : column + width]
            _add(smem, part, to.at[p.batch, keys, p.shared, pl.ds(column, width)])
    plgpu.wait_smem_to_gmem(0)


def _add(smem, x, to) -> None:
    """Adds to device memory by way of shared memory, as soon as that is free."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    smem[...] = x
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(smem, to, reduction_op="add")


def _step(program: _Program, me: int, n, i, head, sums):
    """The gradients with those of a block of queries."""
    p, memory, dtype = program, program.memory, program.k.dtype
    slot, zero = lax.rem(n, jnp.int32(2)), hopper.zero(n)
    mine, half = pl.ds(me * _ROWS, _ROWS), p.k.shape[-1] // 2
    columns = pl.ds(me * half, half)
    q, do, ds_smem = memory.q_smem.at[slot], memory.do_smem.at[slot], memory.ds_smem.at[zero]
    scores = plgpu.ACC((_ROWS, _QUERIES), jnp.float32)
    row = lambda ref: lax.broadcast_in_dim(
        plgpu.load(ref.at[slot], layout=_COLUMN, optimized=False), scores.shape, [1]
    )
    plgpu.barrier_wait(memory.q_full.at[slot])

    def probabilities(s):
        plgpu.wgmma(s, memory.k_smem.at[zero, mine], q.transpose((1, 0)))
        s = s[...] * (p.scale * hopper.LOG2E) - row(memory.lse_smem)
        ahead = i * _QUERIES - p.block * _KEYS - me * _ROWS
        hidden = i < p.first + _KEYS // _QUERIES
        s = lax.cond(hidden, lambda s: hopper.hide_later(s, ahead), lambda s: s, s)
        return jnp.exp2(s).astype(dtype)

    def differences(probability, dp):
        plgpu.wgmma(dp, memory.v_smem.at[zero, mine], do.transpose((1, 0)))
        difference = dp[...] - row(memory.delta_smem)
        return (probability.astype(jnp.float32) * difference).astype(dtype)

    def add_dq(dq):
        plgpu.wgmma(dq, ds_smem.transpose((1, 0)), memory.k_smem.at[zero, :, columns])
        value = dq[...]
        plgpu.barrier_arrive(memory.ds_empty)
        plgpu.barrier_arrive(memory.empty.at[slot])
        rows = pl.ds(i * _QUERIES, _QUERIES)
        _add(
            memory.sums_smem[0].at[me + zero],
            value,
            p.dq.at[head, p.batch, rows, p.shared, columns],
        )

    def products(refs):
        dk, dv = refs
        probability = pl.run_scoped(probabilities, scores)
        plgpu.barrier_wait(memory.do_full.at[slot])
        ds = pl.run_scoped(functools.partial(differences, probability), scores)
        pl.when(n > 0)(lambda: plgpu.barrier_wait(memory.ds_empty))
        ds_smem.at[mine][...] = ds
        plgpu.commit_smem()
        plgpu.barrier_arrive(memory.ds_full)
        plgpu.wgmma(dv, probability, do)
        plgpu.wgmma(dk, ds_smem.at[mine], q)
        # So that the registers of the left side are free.
        plgpu.wgmma_wait(0)
        plgpu.barrier_wait(memory.ds_full)
        pl.run_scoped(add_dq, plgpu.ACC((_QUERIES, half), jnp.float32))

    return pl.run_state(products)(tuple(plgpu.ACC.init(x) for x in sums))
