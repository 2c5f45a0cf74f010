"""The backward pass of latent attention on Hopper GPUs.

A key is a latent and a rotary key, its value the latent itself. A CTA keeps a block of a latent's
keys and goes over the queries of several heads that share them, so that gradients of keys add up
in registers, those as keys and as values in one sum. A warpgroup copies; each of two others has
half of the keys:

    sᵀ = k qᵀ            pᵀ = exp(scale sᵀ - lse)         dc += pᵀ dz
    dpᵀ = c dzᵀ          dsᵀ = scale pᵀ (dpᵀ - delta)     dc, dk_rope += dsᵀ q

and, of what both found, dq += ds k for half of the columns, which the copy engine adds up in device
memory in float32 (FlashAttention-2, arXiv 2307.08691, algorithm 2). Tensor cores are given the next
block's scores before dq is sent.
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

# Queries and keys of a block, warpgroups that multiply, keys of each, and its columns of dq.
_QUERIES, _KEYS, _MULTIPLIERS, _ROWS, _HALF = 64, 128, 2, 64, 96
# Widths of latents and rotary keys.
_C, _R = 128, 64
# Query heads of a program: more spare starts, fewer stay together in the L2 cache.
_HEADS = 2
# Of so many programs' queries, keys and sums the L2 cache holds what they are at.
_SIDE_BY_SIDE = 8

SERVED = (
    f"bfloat16, lengths that {_KEYS} divides, latents of {_C} and rotary keys of {_R}, and an even "
    "number of query heads to a latent"
)


def serves(q_HBTbC: Any, q_rope_BTHR: Any, c_BTLC: Any) -> bool:
    """Whether `backward` takes these shapes; `SERVED` says which it takes."""
    (H, _, T, b, C), (L, R) = q_HBTbC.shape, (c_BTLC.shape[2], q_rope_BTHR.shape[-1])
    grouped = L % b == 0 and H % (L // b * _HEADS) == 0
    return grouped and T % _KEYS == 0 and (C, R) == (_C, _R) and q_HBTbC.dtype == jnp.bfloat16


# A function of its own in a program, so that all layers compile one.
@functools.partial(jax.jit, static_argnames="scale")
@target.int32_indices
def backward(
    q_HBTbC: jax.Array,
    q_rope_BTHR: jax.Array,
    c_BTLC: jax.Array,
    k_rope_BTR: jax.Array,
    dz_HBTbC: jax.Array,
    lse_BPT: jax.Array,
    delta_BPT: jax.Array,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Gradients of both kinds of queries, of latents and of rotary keys, float32.

    With H heads and b branches, branch head p = i * H + h is head h of branch i. Each branch has
    N = L / b latents, and latent i * N + n is that of heads n * H / N ... (n + 1) * H / N - 1.

    Args:
      q_HBTbC, q_rope_BTHR: bfloat16, queries of the latents and, shared by branches, rotary ones.
      c_BTLC, k_rope_BTR: bfloat16, latents and the rotary key that they share.
      dz_HBTbC: bfloat16, the gradient of the result.
      lse_BPT: float32, the binary logarithms of the sums of exp(scores).
      delta_BPT: float32, the products of the results and their gradients, summed over C.
      scale: of the scores.
    """
    (H, B, T, b, _), L = q_HBTbC.shape, c_BTLC.shape[2]
    shared_BTLR = jnp.broadcast_to(k_rope_BTR[:, :, None], (B, T, L, _R))
    k_BTLX = jnp.concatenate([c_BTLC, shared_BTLR], axis=-1)
    shapes = (x.shape for x in (q_HBTbC, q_rope_BTHR, c_BTLC, k_rope_BTR))
    # Otherwise the zeros of all layers would be there at once.
    dz_HBTbC, zero = lax.optimization_barrier((dz_HBTbC, jnp.float32(0)))
    sums = [jax.new_ref(jnp.full(shape, zero)) for shape in shapes]
    _launch(H, B, T, b, L, scale)(
        q_HBTbC, q_rope_BTHR, k_BTLX, dz_HBTbC, lse_BPT, scale * delta_BPT, *sums
    )
    dq_HBTbC, dq_rope_BTHR, dc_BTLC, dk_rope_BTR = map(jax.freeze, sums)
    return dq_HBTbC, dq_rope_BTHR, dc_BTLC, dk_rope_BTR


def _launch(H, B, T, b, L, scale):
    units, blocks = B * b * H // _HEADS, T // _KEYS
    side, latents = math.gcd(units, _SIDE_BY_SIDE), L // b
    names = "q", "q_rope", "k", "dz", "lse", "delta", "dq", "dq_rope", "dc", "dk_rope"

    def body(*refs, **memory):
        # What is side by side has the same keys and then the next ones, the longest programs first.
        at, wg = lax.axis_index("cta"), lax.axis_index("wg")
        divide = lambda x, by: (lax.div(x, jnp.int32(by)), lax.rem(x, jnp.int32(by)))
        at, unit = divide(at, side)
        at, block = divide(at, blocks)
        batch, unit = divide(at * side + unit, b * H // _HEADS)
        branch, pair = divide(unit, H // _HEADS)
        first_head = pair * _HEADS
        program = _Program(
            **dict(zip(names, refs, strict=True)),
            memory=types.SimpleNamespace(**memory),
            batch=batch,
            branch=branch,
            latent=branch * latents + lax.div(first_head, jnp.int32(H // latents)),
            block=block,
            first_head=first_head,
            heads=H,
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
        kernel_name="latent_attention_backward",
        scratch_types=_memory(),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            reduction_scratch_bytes=0,
        ),
    )


def _memory() -> dict[str, Any]:
    bf16, f32, barrier = jnp.bfloat16, jnp.float32, plgpu.Barrier
    # Operands of a product have lines of one width, and half of dq's columns are whole lines of 64.
    operand = lambda *shape: hopper.swizzled(shape, bf16, 64)
    sums = lambda *shape: hopper.swizzled(shape, f32, 128)
    return dict(
        q_smem=operand(2, _QUERIES, _C),
        q_rope_smem=operand(2, _QUERIES, _R),
        dz_smem=operand(2, _QUERIES, _C),
        lse_smem=plgpu.SMEM((2, _QUERIES), f32),
        delta_smem=plgpu.SMEM((2, _QUERIES), f32),
        k_smem=operand(1, _KEYS, _C + _R),
        ds_smem=operand(1, _KEYS, _QUERIES),
        # Sums on their way to device memory: the columns of dq that the first multiplier has, the
        # other's in both arrays; or 64 columns of each one's keys.
        sums_smem=plgpu.RefUnion(
            [sums(1, _QUERIES, x) for x in (_HALF, _C - _HALF, _R)],
            sums(2 * _MULTIPLIERS - 1, _ROWS, 64),
        ),
        k_full=barrier(),
        q_full=barrier(num_arrivals=3, num_barriers=2),
        dz_full=barrier(num_arrivals=2, num_barriers=2),
        empty=barrier(num_arrivals=_MULTIPLIERS, num_barriers=2),
        ds_full=barrier(num_arrivals=_MULTIPLIERS),
        ds_empty=barrier(num_arrivals=_MULTIPLIERS),
    )


@dataclasses.dataclass(frozen=True)
class _Program:
    """What the warpgroups of a CTA share.

    Attributes:
      q, q_rope, k, dz, lse, delta: what is read in device memory.
      dq, dq_rope, dc, dk_rope: what sums are added to there.
      memory: shared memory and barriers by name, of `_memory`.
      batch, branch, latent, block: row, branch, its latent among all and block of its keys.
      first_head, heads: the first of its heads of queries, and those of a branch in all.
      first, blocks: the first block of queries that sees the keys, and their number in all.
      scale: of the scores.
    """

    q: Any
    q_rope: Any
    k: Any
    dz: Any
    lse: Any
    delta: Any
    dq: Any
    dq_rope: Any
    dc: Any
    dk_rope: Any
    memory: types.SimpleNamespace
    batch: jax.Array
    branch: jax.Array
    latent: jax.Array
    block: jax.Array
    first_head: jax.Array
    heads: int
    first: jax.Array
    blocks: int
    scale: float

    @property
    def steps(self):
        return _HEADS * (self.blocks - self.first)

    def over_queries(self, step) -> None:
        """`step(n, i, head)` for block i of each head's queries."""

        def place_and_step(n, place):
            i, head = place
            step(n, i, head)
            last = i == self.blocks - 1
            return jnp.where(last, self.first, i + 1), head + last.astype(jnp.int32)

        lax.fori_loop(0, self.steps, place_and_step, (self.first, self.first_head))


def _load(program: _Program) -> None:
    plgpu.set_max_registers(24, action="decrease")
    p, memory = program, program.memory
    keys = pl.ds(p.block * _KEYS, _KEYS)
    plgpu.copy_gmem_to_smem(p.k.at[p.batch, keys, p.latent], memory.k_smem.at[0], memory.k_full)

    def load(n, i, head):
        slot, rows = lax.rem(n, jnp.int32(2)), pl.ds(i * _QUERIES, _QUERIES)
        branch_head = p.branch * p.heads + head
        pl.when(n > 1)(lambda: plgpu.barrier_wait(memory.empty.at[slot]))
        for source, to, full in (
            (p.q.at[head, p.batch, rows, p.branch], memory.q_smem, memory.q_full),
            (p.q_rope.at[p.batch, rows, head], memory.q_rope_smem, memory.q_full),
            (p.lse.at[p.batch, branch_head, rows], memory.lse_smem, memory.q_full),
            (p.dz.at[head, p.batch, rows, p.branch], memory.dz_smem, memory.dz_full),
            (p.delta.at[p.batch, branch_head, rows], memory.delta_smem, memory.dz_full),
        ):
            plgpu.copy_gmem_to_smem(source, to.at[slot], full.at[slot])

    p.over_queries(load)


def _multiply(program: _Program, me: int) -> None:
    plgpu.set_max_registers(240, action="increase")
    p, memory = program, program.memory
    plgpu.barrier_wait(memory.k_full)

    def steps(refs):
        _next_scores(program, me, jnp.int32(0), refs[-1])
        p.over_queries(functools.partial(_step, program, me, refs))

    zeros = [_zeros(width) for width in (_C, _R, _QUERIES)]
    dc, dk_rope, _ = pl.run_state(steps)(tuple(map(plgpu.ACC.init, zeros)))
    # Of three places of 64 columns the first and the last are each multiplier's own.
    smem = memory.sums_smem[1].at[me * _MULTIPLIERS]
    keys = pl.ds(p.block * _KEYS + me * _ROWS, _ROWS)
    for column in range(0, _C, 64):
        to = p.dc.at[p.batch, keys, p.latent, pl.ds(column, 64)]
        _add((smem, dc[:, column : column + 64], to))
    _add((smem, dk_rope, p.dk_rope.at[p.batch, keys]))
    plgpu.wait_smem_to_gmem(0)


def _zeros(width: int):
    return plgpu.layout_cast(jnp.zeros((_ROWS, width), jnp.float32), hopper.WGMMA)


def _add(*parts) -> None:
    """Adds to device memory by way of shared memory, as soon as that is free."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for smem, x, _ in parts:
        smem[...] = x
    plgpu.commit_smem()
    for smem, _, to in parts:
        plgpu.copy_smem_to_gmem(smem, to, reduction_op="add")


def _next_scores(program: _Program, me: int, n, scores) -> None:
    """Issues the products of step n's scores; behind the last step those of queries left there."""
    p, memory = program, program.memory
    slot, zero, mine = lax.rem(n, jnp.int32(2)), hopper.zero(n), pl.ds(me * _ROWS, _ROWS)
    pl.when(n < p.steps)(lambda: plgpu.barrier_wait(memory.q_full.at[slot]))
    scores[...] = _zeros(_QUERIES)
    for columns, q in (pl.ds(0, _C), memory.q_smem), (pl.ds(_C, _R), memory.q_rope_smem):
        plgpu.wgmma(scores, memory.k_smem.at[zero, mine, columns], q.at[slot].transpose((1, 0)))


def _step(program: _Program, me: int, refs, n, i, head) -> None:
    """Adds the gradients that a block of queries makes."""
    p, memory, (dc, dk_rope, scores) = program, program.memory, refs
    slot, zero, mine = lax.rem(n, jnp.int32(2)), hopper.zero(n), pl.ds(me * _ROWS, _ROWS)
    q, q_rope, dz = (x.at[slot] for x in (memory.q_smem, memory.q_rope_smem, memory.dz_smem))
    ds_smem = memory.ds_smem.at[zero]
    row = lambda ref: lax.broadcast_in_dim(
        plgpu.load(ref.at[slot], layout=hopper.COLUMN, optimized=False), scores.shape, [1]
    )

    def probabilities(s):
        s = s * (p.scale * hopper.LOG2E) - row(memory.lse_smem)
        ahead = i * _QUERIES - p.block * _KEYS - me * _ROWS
        hidden = i < p.first + _KEYS // _QUERIES
        s = lax.cond(hidden, lambda s: hopper.hide_later(s, ahead), lambda s: s, s)
        return jnp.exp2(s).astype(jnp.bfloat16)

    def slopes(dp):
        # Nothing else may be in flight when scores are read that a step before issued.
        s = scores[...]
        plgpu.barrier_wait(memory.dz_full.at[slot])
        plgpu.wgmma(dp, memory.k_smem.at[zero, mine, pl.ds(0, _C)], dz.transpose((1, 0)))
        probability = probabilities(s)
        plgpu.wgmma(dc, probability, dz)
        difference = plgpu.wgmma_accumulator_load(dp, wait_n=1) * p.scale - row(memory.delta_smem)
        return (probability.astype(jnp.float32) * difference).astype(jnp.bfloat16)

    def add_dq(dq):
        columns = pl.ds(me * _HALF, _HALF)
        plgpu.wgmma(dq, ds_smem.transpose((1, 0)), memory.k_smem.at[zero, :, columns])
        _next_scores(program, me, n + 1, scores)
        value = plgpu.wgmma_accumulator_load(dq, wait_n=2)
        plgpu.barrier_arrive(memory.ds_empty)
        plgpu.barrier_arrive(memory.empty.at[slot])
        rows, rest = pl.ds(i * _QUERIES, _QUERIES), _C - _HALF
        dq_at = lambda *columns: p.dq.at[head, p.batch, rows, p.branch, pl.ds(*columns)]
        most, some, rope = (x.at[zero] for x in memory.sums_smem[0])
        if me == 0:
            _add((most, value, dq_at(0, _HALF)))
        else:
            dq_rope_at = p.dq_rope.at[p.batch, rows, head]
            _add((some, value[:, :rest], dq_at(_HALF, rest)), (rope, value[:, rest:], dq_rope_at))

    ds = pl.run_scoped(slopes, plgpu.ACC(scores.shape, jnp.float32))
    pl.when(n > 0)(lambda: plgpu.barrier_wait(memory.ds_empty))
    ds_smem.at[mine][...] = ds
    plgpu.commit_smem()
    plgpu.barrier_arrive(memory.ds_full)
    plgpu.wgmma(dc, ds, q)
    plgpu.wgmma(dk_rope, ds, q_rope)
    plgpu.barrier_wait(memory.ds_full)
    pl.run_scoped(add_dq, plgpu.ACC((_QUERIES, _HALF), jnp.float32))
