"""The backward pass of latent attention on Hopper GPUs.

A key is a latent and a rotary key, its value the latent itself. A CTA keeps a block of a latent's
keys and goes over the queries of several heads that share them, so that gradients of keys add up
in registers, those as keys and as values in one sum. Each of two warpgroups has half of the keys:

    sᵀ = k qᵀ            pᵀ = exp(scale sᵀ - lse)         dc += pᵀ dz
    dpᵀ = c dzᵀ          dsᵀ = scale pᵀ (dpᵀ - delta)     dc, dk_rope += dsᵀ q

and, of what both found, dq += ds k for half of the columns, which the copy engine adds up in device
memory in float32 (FlashAttention-2, arXiv 2307.08691, algorithm 2). That is done a block of queries
later, so that neither waits for the other. Latents stay in registers; c qᵀ and c dzᵀ are one
product. One warpgroup also copies the next queries while it multiplies: a third one for that would
have to give its registers to the others (setmaxnreg), which the compiler of nvJitLink ignores.
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

from mlra_jax.kernels import target, tiles
from mlra_jax.kernels.causal_attention import hopper
from mlra_jax.kernels.causal_attention.shared import with_shared

# Queries and keys of a block, warpgroups, keys of each, and its columns of dq.
_QUERIES, _KEYS, _WARPGROUPS, _ROWS, _HALF = 64, 128, 2, 64, 96
# The warpgroup that copies as well.
_COPIER = 1
# Widths of latents and rotary keys.
_C, _R = 128, 64
# Query heads of a program: more spare starts, fewer stay together in the L2 cache.
_HEADS = 2
# Of so many programs' queries, keys and sums the L2 cache holds what they are at.
_SIDE_BY_SIDE = 8


def serves(q_HBTbC: Any, q_rope_BTHR: Any, c_BTLC: Any) -> bool:
    """Whether `backward` takes these shapes; of heads pairs must share a latent."""
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
    k_BTLX = with_shared(c_BTLC, k_rope_BTR)
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
        at, unit = hopper.divide(at, side)
        at, block = hopper.divide(at, blocks)
        batch, unit = hopper.divide(at * side + unit, b * H // _HEADS)
        branch, pair = hopper.divide(unit, H // _HEADS)
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
        for me in range(_WARPGROUPS):
            pl.when(wg == me)(functools.partial(_multiply, program, me))

    return plgpu.kernel(
        body,
        out_type=(),
        grid=(units * blocks,),
        grid_names=("cta",),
        num_threads=_WARPGROUPS,
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
    sums = lambda *shape: tiles.swizzled(shape, f32, 128)
    return dict(
        # Of two blocks, the queries and below them dz.
        q_dz_smem=tiles.swizzled((2, 2 * _QUERIES, _C), bf16, 128),
        q_rope_smem=tiles.swizzled((2, _QUERIES, _R), bf16, 64),
        lse_smem=plgpu.SMEM((2, _QUERIES), f32),
        delta_smem=plgpu.SMEM((2, _QUERIES), f32),
        # Half of the columns are whole lines of 32.
        k_smem=tiles.swizzled((1, _KEYS, _C + _R), bf16, 64),
        ds_smem=tiles.swizzled((2, _KEYS, _QUERIES), bf16, 64),
        # Sums on their way to device memory: the columns of dq that the first multiplier has, the
        # other's in both arrays; or 64 columns of each one's keys.
        sums_smem=plgpu.RefUnion(
            [sums(1, _QUERIES, x) for x in (_HALF, _C - _HALF, _R)],
            sums(2 * _WARPGROUPS - 1, _ROWS, 64),
        ),
        k_full=barrier(),
        full=barrier(num_arrivals=5, num_barriers=2),
        left=barrier(num_arrivals=_WARPGROUPS, num_barriers=2),
        ds_full=barrier(num_arrivals=_WARPGROUPS, num_barriers=2),
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

    def place(self, n):
        """Block of queries and head of step n: all blocks of the first head, then the second's."""
        second = self.first + n >= self.blocks
        i = jnp.where(second, 2 * self.first - self.blocks, self.first) + n
        return i, self.first_head + second.astype(jnp.int32)


def _queries_and_dz(memory, slot):
    return (memory.q_dz_smem.at[slot, pl.ds(x, _QUERIES)] for x in (0, _QUERIES))


def _copy(program: _Program, n) -> None:
    """What step n has of queries."""
    p, memory, (i, head) = program, program.memory, program.place(n)
    slot, rows = lax.rem(n, jnp.int32(2)), pl.ds(i * _QUERIES, _QUERIES)
    branch_head, (q, dz) = p.branch * p.heads + head, _queries_and_dz(memory, slot)
    for source, to in (
        (p.q.at[head, p.batch, rows, p.branch], q),
        (p.q_rope.at[p.batch, rows, head], memory.q_rope_smem.at[slot]),
        (p.lse.at[p.batch, branch_head, rows], memory.lse_smem.at[slot]),
        (p.dz.at[head, p.batch, rows, p.branch], dz),
        (p.delta.at[p.batch, branch_head, rows], memory.delta_smem.at[slot]),
    ):
        plgpu.copy_gmem_to_smem(source, to, memory.full.at[slot])


def _multiply(program: _Program, me: int) -> None:
    p, memory = program, program.memory
    if me == _COPIER:
        keys = pl.ds(p.block * _KEYS, _KEYS)
        plgpu.copy_gmem_to_smem(p.k.at[p.batch, keys, p.latent], memory.k_smem.at[0], memory.k_full)
        for n in range(2):
            _copy(program, jnp.int32(n))
    plgpu.barrier_wait(memory.k_full)
    c = plgpu.load(memory.k_smem.at[0, pl.ds(me * _ROWS, _ROWS), pl.ds(0, _C)], layout=hopper.WGMMA)
    zeros = [jnp.zeros((_ROWS, width), jnp.float32) for width in (_C, _R)]
    sums = tuple(plgpu.layout_cast(x, hopper.WGMMA) for x in zeros)
    dc, dk_rope = lax.fori_loop(0, p.steps, functools.partial(_step, program, me, c), sums)
    _add_dq(program, me, 0, p.steps - 1)
    # Of three places of 64 columns the first and the last are each multiplier's own.
    smem = memory.sums_smem[1].at[me * _WARPGROUPS]
    keys = pl.ds(p.block * _KEYS + me * _ROWS, _ROWS)
    for column in range(0, _C, 64):
        to = p.dc.at[p.batch, keys, p.latent, pl.ds(column, 64)]
        _add((smem, dc[:, column : column + 64], to))
    _add((smem, dk_rope, p.dk_rope.at[p.batch, keys]))
    plgpu.wait_smem_to_gmem(0)


def _add(*parts) -> None:
    """Adds to device memory by way of shared memory, as soon as that is free."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for smem, x, _ in parts:
        smem[...] = x
    plgpu.commit_smem()
    for smem, _, to in parts:
        plgpu.copy_smem_to_gmem(smem, to, reduction_op="add")


def _add_dq(program: _Program, me: int, zero, n) -> None:
    """Adds half of the columns of dq of step n."""
    p, memory, slot, (i, head) = program, program.memory, lax.rem(n, jnp.int32(2)), program.place(n)
    plgpu.barrier_wait(memory.ds_full.at[slot])

    def add(dq):
        ds, columns = memory.ds_smem.at[slot], pl.ds(me * _HALF, _HALF)
        plgpu.wgmma(dq, ds.transpose((1, 0)), memory.k_smem.at[zero, :, columns])
        value = dq[...]
        plgpu.barrier_arrive(memory.left.at[1 - slot])
        rows, rest = pl.ds(i * _QUERIES, _QUERIES), _C - _HALF
        dq_at = lambda *columns: p.dq.at[head, p.batch, rows, p.branch, pl.ds(*columns)]
        most, some, rope = (x.at[zero] for x in memory.sums_smem[0])
        if me == 0:
            _add((most, value, dq_at(0, _HALF)))
        else:
            dq_rope_at = p.dq_rope.at[p.batch, rows, head]
            _add((some, value[:, :rest], dq_at(_HALF, rest)), (rope, value[:, rest:], dq_rope_at))

    pl.run_scoped(add, plgpu.ACC((_QUERIES, _HALF), jnp.float32))


def _step(program: _Program, me: int, c, n, sums):
    """The gradients of keys with those of a block of queries."""
    p, memory, bf16 = program, program.memory, jnp.bfloat16
    slot, zero, mine = lax.rem(n, jnp.int32(2)), hopper.zero(n), pl.ds(me * _ROWS, _ROWS)
    i, _ = p.place(n)
    (q, dz), q_rope = _queries_and_dz(memory, slot), memory.q_rope_smem.at[slot]
    row = lambda ref: lax.broadcast_in_dim(
        plgpu.load(ref.at[slot], layout=tiles.COLUMN, optimized=False), (_ROWS, _QUERIES), [1]
    )

    def go_on():
        """Waits until the other has left the step before, whose queries give way."""
        plgpu.barrier_wait(memory.left.at[1 - slot])
        if me == _COPIER:
            pl.when(n + 1 < p.steps)(lambda: _copy(program, n + 1))

    def probabilities(s):
        s = s * (p.scale * hopper.LOG2E) - row(memory.lse_smem)
        ahead = i * _QUERIES - p.block * _KEYS - me * _ROWS
        hidden = i < p.first + _KEYS // _QUERIES
        s = lax.cond(hidden, lambda s: hopper.hide_later(s, ahead), lambda s: s, s)
        return jnp.exp2(s)

    def products(refs):
        dc, dk_rope = refs

        def slopes(s_and_dp):
            k_rope = memory.k_smem.at[zero, mine, pl.ds(_C, _R)]
            plgpu.wgmma(s_and_dp, c, memory.q_dz_smem.at[slot].transpose((1, 0)))
            plgpu.wgmma(s_and_dp.at[:, :_QUERIES], k_rope, q_rope.transpose((1, 0)))
            if me == _COPIER:
                pl.when(n > 0)(go_on)
            s_and_dp = s_and_dp[...]
            probability = probabilities(s_and_dp[:, :_QUERIES])
            plgpu.wgmma(dc, probability.astype(bf16), dz)
            difference = s_and_dp[:, _QUERIES:] * p.scale - row(memory.delta_smem)
            return (probability * difference).astype(bf16)

        ds = pl.run_scoped(slopes, plgpu.ACC((_ROWS, 2 * _QUERIES), jnp.float32))
        if me != _COPIER:
            pl.when(n > 0)(go_on)
        memory.ds_smem.at[slot, mine][...] = ds
        plgpu.commit_smem()
        plgpu.barrier_arrive(memory.ds_full.at[slot])
        plgpu.wgmma(dc, ds, q)
        plgpu.wgmma(dk_rope, ds, q_rope)

    plgpu.barrier_wait(memory.full.at[slot])
    sums = pl.run_state(products)(tuple(map(plgpu.ACC.init, sums)))
    pl.when(n == 0)(lambda: plgpu.barrier_arrive(memory.left.at[slot]))
    pl.when(n > 0)(lambda: _add_dq(program, me, zero, n - 1))
    return sums
