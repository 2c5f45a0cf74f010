"""The forward pass of causal attention to latents on Hopper GPUs.

A latent is the first part of a key, before the rotary part that all latents share, and the value as
well: one copy of it in shared memory serves both products. Each of two warpgroups has half of a
block of queries of a head and goes over the keys from the diagonal back:

    s = q cᵀ + q_rope k_ropeᵀ        p = exp(scale s - highest)        z += p c

The scores of a block of keys are multiplied while the one before is weighed, and a warpgroup weighs
while the other one multiplies (FlashAttention-3, arXiv 2407.08608, sections 3.1 and 3.2). They
copy as well: beside a third warpgroup they would need `setmaxnreg`, which libnvJitLink ignores.
"""

import dataclasses
import functools
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mlra_jax.kernels import target, tiles
from mlra_jax.kernels.causal_attention import hopper

# Keys of a block, warpgroups, queries of each, blocks of keys in shared memory.
_KEYS, _WARPGROUPS, _ROWS, _STAGES = 128, 2, 64, 3
_QUERIES = _WARPGROUPS * _ROWS
_WIDTHS = 128, 64
# One program a multiprocessor of an H100 or H200; it takes one block of queries after the other.
_PROGRAMS = 132


def serves(q_HBTbC: Any, q_rope_BTHR: Any, c_BTLC: Any) -> bool:
    """Whether `forward` takes these shapes."""
    (H, _, T, b, C), R, L = q_HBTbC.shape, q_rope_BTHR.shape[-1], c_BTLC.shape[2]
    whole = T % _QUERIES == 0 and L % b == 0 and H % (L // b) == 0
    return whole and (C, R) == _WIDTHS and q_HBTbC.dtype == jnp.bfloat16


# A function of its own in a program, so that all layers compile one.
@functools.partial(jax.jit, static_argnames="scale")
@target.int32_indices
def forward(
    q_HBTbC: jax.Array,
    q_rope_BTHR: jax.Array,
    c_BTLC: jax.Array,
    k_rope_BTR: jax.Array,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """What is attended of each branch head's latent, and how much was weighed.

    Args:
      q_HBTbC: bfloat16, queries of the latents by head and branch.
      q_rope_BTHR: bfloat16, rotary queries, which the branches of a head share.
      c_BTLC: bfloat16, latents; latent i * N + n of b * N is branch i's for the n-th part of the
        heads.
      k_rope_BTR: bfloat16, the rotary key of a position.
      scale: of the scores.

    Returns:
      z_HBTbC, bfloat16, and lse_BPT, float32, the binary logarithms of the sums of exp(scores),
      branch head i * H + h of head h and branch i.
    """
    (H, B, T, b, _), L = q_HBTbC.shape, c_BTLC.shape[2]
    blocks, units = T // _QUERIES, B * L * (H * b // L)
    programs = min(_PROGRAMS, units * blocks)
    names = "q", "q_rope", "c", "k_rope", "z", "lse"

    def body(*refs, **memory):
        program = _Program(
            **dict(zip(names, refs, strict=True)),
            memory=types.SimpleNamespace(**memory),
            index=lax.axis_index("cta"),
            programs=programs,
            blocks=blocks,
            units=units,
            scale=scale,
        )
        wg = lax.axis_index("wg")
        for me in range(_WARPGROUPS):
            pl.when(wg == me)(functools.partial(_multiply, program, me))

    lse_BPT = jax.ShapeDtypeStruct((B, b * H, T), jnp.float32)
    kernel = plgpu.kernel(
        body,
        out_type=(jax.ShapeDtypeStruct(q_HBTbC.shape, q_HBTbC.dtype), lse_BPT),
        grid=(programs,),
        grid_names=("cta",),
        num_threads=_WARPGROUPS,
        thread_name="wg",
        kernel_name="latent_attention_forward",
        scratch_types=_memory(q_HBTbC.dtype),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            reduction_scratch_bytes=0,
        ),
    )
    return kernel(q_HBTbC, q_rope_BTHR, c_BTLC, k_rope_BTR)


def _memory(dtype) -> dict[str, Any]:
    (C, R), barrier = _WIDTHS, plgpu.Barrier
    swizzled = lambda *shape: tiles.swizzled(shape, dtype, 128)
    return dict(
        q_smem=swizzled(_WARPGROUPS, _ROWS, C),
        q_rope_smem=swizzled(_WARPGROUPS, _ROWS, R),
        c_smem=swizzled(_STAGES, _KEYS, C),
        k_rope_smem=swizzled(_STAGES, _KEYS, R),
        z_smem=swizzled(_WARPGROUPS, _ROWS, C),
        lse_smem=plgpu.SMEM((_WARPGROUPS, _ROWS), jnp.float32),
        q_full=barrier(num_arrivals=2, num_barriers=_WARPGROUPS),
        keys_full=barrier(num_arrivals=2, num_barriers=_STAGES),
        turn=barrier(num_arrivals=1, num_barriers=_WARPGROUPS),
    )


@dataclasses.dataclass(frozen=True)
class _Program:
    """What the warpgroups of a CTA share.

    Attributes:
      q, q_rope, c, k_rope: the arguments, in device memory.
      z, lse: the results there.
      memory: shared memory and barriers by name, of `_memory`.
      index, programs: which of how many it is.
      blocks, units: blocks of queries of a branch head, branch heads of all rows.
      scale: of the scores.
    """

    q: Any
    q_rope: Any
    c: Any
    k_rope: Any
    z: Any
    lse: Any
    memory: types.SimpleNamespace
    index: jax.Array
    programs: int
    blocks: int
    units: int
    scale: float

    def over_blocks(self, step) -> None:
        """`step(place, following, more, used)` for each of its blocks of queries.

        `following` is the next one's place if there is `more`; used blocks of keys came before.
        The longest first, and forth and back, so that all programs have as much to do. What runs
        at the same time has the same keys or those of other rows and latents up to the same one.
        """
        whole, rest = divmod(self.units * self.blocks, self.programs)
        turned = self.programs - 1 - self.index
        at = lambda n: jnp.where(lax.rem(n, jnp.int32(2)) == 0, self.index, turned)
        rounds = whole + (at(jnp.int32(whole)) < rest).astype(jnp.int32)

        def place_and_step(n, used):
            place = self.place(n * self.programs + at(n))
            following = self.place((n + 1) * self.programs + at(n + 1))
            step(place, following, n + 1 < rounds, used)
            return used + place.block + 1

        lax.fori_loop(0, rounds, place_and_step, jnp.int32(0))

    def place(self, at):
        (H, _, _, b, _), L = self.q.shape, self.c.shape[2]
        block, unit = hopper.divide(at, self.units)
        unit, head = hopper.divide(unit, H * b // L)
        batch, latent = hopper.divide(unit, L)
        branch, part = hopper.divide(latent, L // b)
        head = part * (H * b // L) + head
        return _Place(batch, latent, branch, head, self.blocks - 1 - block)


class _Place(NamedTuple):
    """Where a block of queries and its keys are."""

    batch: jax.Array
    latent: jax.Array
    branch: jax.Array
    head: jax.Array
    block: jax.Array

    def rows(self, me):
        return pl.ds(self.block * _QUERIES + me * _ROWS, _ROWS)


def _slot(used):
    return lax.rem(used, jnp.int32(_STAGES))


def _load_queries(program: _Program, me: int, place: _Place) -> None:
    p, memory, rows = program, program.memory, place.rows(me)
    full = memory.q_full.at[me]
    q = p.q.at[place.head, place.batch, rows, place.branch]
    q_rope = p.q_rope.at[place.batch, rows, place.head]
    plgpu.copy_gmem_to_smem(q, memory.q_smem.at[me], full)
    plgpu.copy_gmem_to_smem(q_rope, memory.q_rope_smem.at[me], full)


def _load_keys(program: _Program, place: _Place, n) -> None:
    """Of the place's block, which become the n-th in shared memory."""
    p, memory, keys = program, program.memory, pl.ds(place.block * _KEYS, _KEYS)
    slot, c = _slot(n), p.c.at[place.batch, keys, place.latent]
    full = memory.keys_full.at[slot]
    plgpu.copy_gmem_to_smem(c, memory.c_smem.at[slot], full)
    plgpu.copy_gmem_to_smem(p.k_rope.at[place.batch, keys], memory.k_rope_smem.at[slot], full)


def _multiply(program: _Program, me: int) -> None:
    first = program.place(program.index)
    if me == 0:
        plgpu.barrier_arrive(program.memory.turn.at[0])
    else:
        _load_keys(program, first, jnp.int32(0))
    _load_queries(program, me, first)
    program.over_blocks(functools.partial(_attend, program, me))
    plgpu.wait_smem_to_gmem(0)


def _attend(program: _Program, me: int, place, following, more, used) -> None:
    """A block of queries."""
    p, memory = program, program.memory
    scores = plgpu.ACC((_ROWS, _KEYS), jnp.float32)
    sums = plgpu.ACC((_ROWS, _WIDTHS[0]), jnp.float32)
    dtype, scale = p.z.dtype, p.scale * hopper.LOG2E
    wide = lambda x_Q, n: lax.broadcast_in_dim(x_Q, (_ROWS, n), [0])
    take_turn = lambda: plgpu.barrier_wait(memory.turn.at[me])
    give_turn = lambda: plgpu.barrier_arrive(memory.turn.at[(me + 1) % _WARPGROUPS])

    end = used + place.block

    def load_next(n):
        """The last one's, at its turn: all have left the place of block n - 2 by then."""
        if me == _WARPGROUPS - 1:
            source = place._replace(block=end - n - 1)
            source = jax.tree.map(functools.partial(jnp.where, n < end), source, following)
            pl.when((n < end) | more)(lambda: _load_keys(p, source, n + 1))

    def ask(s, slot):
        plgpu.wgmma(s, memory.q_smem.at[me], memory.c_smem.at[slot].transpose((1, 0)))
        plgpu.wgmma(s, memory.q_rope_smem.at[me], memory.k_rope_smem.at[slot].transpose((1, 0)))

    def weigh(s, highest_Q):
        weights = jnp.exp2(s * scale - wide(highest_Q, _KEYS))
        return weights, weights.sum(axis=1)

    def diagonal(s):
        take_turn()
        load_next(used)
        ask(s, _slot(used))
        give_turn()
        s = hopper.hide_later(s[...], jnp.int32(me * _ROWS), keys=1)
        highest_Q = s.max(axis=1) * scale
        weights, total_Q = weigh(s, highest_Q)
        return weights.astype(dtype), highest_Q, total_Q

    def step(n, carry):
        z, weights, highest_Q, total_Q = carry
        slot, before = _slot(n), _slot(n - 1)
        plgpu.barrier_wait(memory.keys_full.at[slot])

        def products(sums, s):
            sums[...] = z
            take_turn()
            ask(s, slot)
            load_next(n)
            plgpu.wgmma(sums, weights, memory.c_smem.at[before])
            give_turn()
            s = plgpu.wgmma_accumulator_load(s, wait_n=1)
            higher_Q = jnp.maximum(highest_Q, s.max(axis=1) * scale)
            new, new_total_Q = weigh(s, higher_Q)
            fade_Q = jnp.exp2(highest_Q - higher_Q)
            # The registers of the old weights are free only behind their product.
            new, fade_Q, new_total_Q = lax.optimization_barrier((new, fade_Q, new_total_Q))
            faded = sums[...] * wide(fade_Q, sums.shape[1])
            return faded, new.astype(dtype), higher_Q, total_Q * fade_Q + new_total_Q

        return pl.run_scoped(products, sums, scores)

    def last(weights, z, slot):
        def product(sums):
            sums[...] = z
            take_turn()
            plgpu.wgmma(sums, weights, memory.c_smem.at[slot])
            give_turn()
            pl.when(more)(lambda: _load_queries(p, me, following))
            return sums[...]

        return pl.run_scoped(product, sums)

    plgpu.barrier_wait(memory.q_full.at[me])
    plgpu.barrier_wait(memory.keys_full.at[_slot(used)])
    z = plgpu.layout_cast(jnp.zeros(sums.shape, jnp.float32), hopper.WGMMA)
    carry = z, *pl.run_scoped(diagonal, scores)
    z, weights, highest_Q, total_Q = lax.fori_loop(used + 1, end + 1, step, carry)
    z = last(weights, z, _slot(end))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    memory.z_smem.at[me][...] = (z * wide(1 / total_Q, sums.shape[1])).astype(dtype)
    memory.lse_smem.at[me][...] = highest_Q + jnp.log(total_Q) * hopper.LOG2E
    plgpu.commit_smem()
    rows, branch_head = place.rows(me), place.branch * p.z.shape[0] + place.head
    to = p.z.at[place.head, place.batch, rows, place.branch]
    plgpu.copy_smem_to_gmem(memory.z_smem.at[me], to)
    plgpu.copy_smem_to_gmem(memory.lse_smem.at[me], p.lse.at[place.batch, branch_head, rows])
