"""Products of a few rows with large weights on Hopper GPUs, a chain of them in one launch.

In every CTA one warpgroup copies weights by TMA into a ring of shared-memory stages, one copies
rows, and one multiplies. The weights depend on nothing, so their copies run on into the next step
as far as the ring reaches, while the CTAs wait for each other (all of them between two steps) and
for the rows.

Each CTA has some output columns of a step and multiplies all of K, so nothing is joined and the
result does not depend on timing. A product is wgmma with the rows, padded to 64, on the left: what
memory beside the rows holds is multiplied with them, and the results are dropped.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from mlra_jax.kernels.decode_projections.steps import Heads, Problem

# Rows of one wgmma.
_ROWS = 64
# Elements of a swizzled line of shared memory, and the lines that make a tile.
_LINE = 64
_ALIGN = 8
_SMEM_BYTES = 227 * 1024
# Lines of a stage of the ring: one of 192 weight rows, or 2 of 96, 4 of 48, 8 of 24 each.
_STAGE_LINES = 192
_MOST_ROWS = 64
# Threads of a warpgroup.
_LANES = 128
_ROW_LAYOUT = plgpu.Layout.WGMMA.reduce(1)


def _padded(count: int) -> int:
    return pl.cdiv(count, _ALIGN) * _ALIGN


@dataclasses.dataclass(frozen=True)
class Config:
    """What can be tuned.

    Attributes:
      ctas: CTAs of the launch. All must run at once, one to a multiprocessor, as they wait for
        each other.
      stages: stages of the weights' ring, 24 KiB each.
      row_kib: size of the rows' ring, a multiple of 16.
      overlap: read weights while the launch before drains; they must be older than it.
    """

    ctas: int = 132
    stages: int = 7
    row_kib: int = 48
    overlap: bool = True


@dataclasses.dataclass(frozen=True)
class _Phase:
    """The static sizes of one step.

    A block is what a CTA does at a time: `columns` output columns, all of K.
    """

    source: str
    weight: str
    into: str
    add: str | None
    norm: float | None
    start: int
    heads: Heads | None
    gated: bool
    inner: int
    outputs: int
    columns: int
    passes: int
    lines: int
    # The step whose sums of squares give this one's norm; without it rows are multiplied with
    # themselves.
    squares: str | None = None
    sums_squares: bool = False

    @property
    def weight_rows(self) -> int:
        """Rows of the weight in a stage."""
        return self.columns * (2 if self.gated else 1)

    @property
    def parts(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Where each of the two copies of a stage begins among its weight rows, and how many."""
        first = self.columns if self.gated else _padded(-(-self.columns // 2))
        return (0, first), (first, self.weight_rows - first)

    @property
    def width(self) -> int:
        """Elements of K in a stage."""
        return self.lines * _LINE

    @property
    def stages(self) -> int:
        """Stages that a block takes."""
        return pl.cdiv(self.inner, self.width)

    def column(self, output, k):
        """The source's column that is factor k (a multiple of 64) of an output column."""
        if not self.heads:
            return self.start + k
        heads = self.heads
        head = lax.rem(lax.div(output, heads.width), heads.count)
        run, rest = lax.div(k, heads.run), lax.rem(k, heads.run)
        return self.start + head * heads.stride + run * heads.jump + rest

    @property
    def blocks(self) -> int:
        return pl.cdiv(self.outputs, self.columns)


def _lines(weight_rows: int, rows: int, heads: Heads | None) -> int:
    """How many lines of K a stage has for each weight row."""
    found = (n for n in (8, 4, 2) if weight_rows <= _STAGE_LINES // n)
    # Rows of a stage take at most 16 KiB, and a run of columns is copied whole.
    found = (n for n in found if n * rows <= 128 and (not heads or heads.run % (n * _LINE) == 0))
    return next(found, 1)


def _split(
    outputs: int, inner: int, gated: bool, heads: Heads | None, ctas: int
) -> tuple[int, int]:
    """Columns of a block and blocks of a CTA, so that the busiest CTA has least to do."""
    halves = 2 if gated else 1
    # A stage of weights is two copies of at least 8 rows each.
    fewest, most = 2 * _ALIGN // halves, _STAGE_LINES // halves
    if heads:
        found = [c for c in range(fewest, most + 1, _ALIGN) if heads.width % c == 0]
    else:
        found = []
        for passes in range(1, 9):
            found.append(max(_padded(pl.cdiv(outputs, ctas * passes)), fewest))
        found = [c for c in found if c <= most] or [most]
    passes = lambda columns: pl.cdiv(pl.cdiv(outputs, columns), ctas)
    # A block's beginning and end take as long as 32 KiB of weights.
    columns = min(found, key=lambda c: passes(c) * (c * halves + 16384 // inner))
    return columns, passes(columns)


def _phases(problem: Problem, ctas: int) -> list[_Phase]:
    weights = dict(problem.weights)
    found = []
    for step in problem.steps:
        *halves, outputs, inner = weights[step.weight]
        gated = bool(halves)
        columns, passes = _split(outputs, inner, gated, step.heads, ctas)
        lines = _lines(columns * (2 if gated else 1), _padded(problem.count), step.heads)
        found.append(
            _Phase(
                step.source,
                step.weight,
                step.into,
                step.add,
                step.norm,
                step.start,
                step.heads,
                gated,
                inner,
                outputs,
                columns,
                passes,
                lines,
            )
        )
    return _with_squares(found)


def _with_squares(phases: list[_Phase]) -> list[_Phase]:
    """Has earlier steps sum the squares that norms need, where they lie in whole blocks."""
    at = {phase.into: k for k, phase in enumerate(phases)}
    for k, phase in enumerate(phases):
        if phase.norm is None or phase.source not in at:
            continue
        earlier = phases[at[phase.source]]
        blocks = phase.inner // earlier.columns
        whole = (phase.start % earlier.columns, phase.inner % earlier.columns, blocks % _ALIGN)
        if not any(whole) and blocks <= 256:
            phases[k] = dataclasses.replace(phase, squares=earlier.into)
            phases[at[earlier.into]] = dataclasses.replace(earlier, sums_squares=True)
    return phases


def _row_stages(config: Config, rows: int, lines: int) -> int:
    """Stages of the rows' ring where each has `lines` lines of all rows."""
    return config.row_kib * 1024 // (rows * lines * _LINE * 2)


def _smem_bytes(problem: Problem, config: Config) -> int:
    phases = _phases(problem, config.ctas)
    staging = max(_ROWS * p.columns for p in phases) * 2
    ring = config.stages * _STAGE_LINES * _LINE * 2
    # Barriers come last, on KiBs of their own.
    return config.row_kib * 1024 + ring + -(-staging // 1024) * 1024 + 6 * 1024


def supports(problem: Problem) -> str | None:
    """None if the kernel can serve the problem, otherwise why not, in one phrase."""
    if problem.dtype not in ("bfloat16", "float16"):
        return f"dtype {problem.dtype} is neither bfloat16 nor float16"
    if len(problem.steps) > 1 and not problem.multiprocessors and "MIG" in problem.device_kind:
        return "how many multiprocessors this slice of a GPU has is not known"
    if problem.count > _MOST_ROWS:
        return f"{problem.count} rows are more than {_MOST_ROWS}"
    weights = dict(problem.weights)
    for name, columns in problem.rows:
        if columns % _LINE:
            return f"the rows {name!r} have {columns} columns, which is no multiple of {_LINE}"
    for step in problem.steps:
        *_, outputs, inner = weights[step.weight]
        for size in (outputs, inner, step.start):
            if size % _LINE:
                return f"{size} in the step into {step.into!r} is no multiple of {_LINE}"
        heads = step.heads
        if heads and any(
            size % _LINE for size in (heads.width, heads.stride, heads.run, heads.jump)
        ):
            return f"heads of the step into {step.into!r} are no multiple of {_LINE} wide and apart"
    return None


def _multiprocessors(problem: Problem) -> int:
    """How many CTAs run at once; more would wait for each other for ever."""
    if problem.multiprocessors:
        return problem.multiprocessors
    name = problem.device_kind.removeprefix("NVIDIA ")
    if name.split()[0] in ("H20", "H20-3e"):
        return 78
    return 114 if "PCIe" in name else 132


def heuristic(problem: Problem) -> Config:
    """The Config for a problem that nobody measured."""
    row_kib = 32 if problem.count <= _ALIGN else 48
    config = Config(ctas=_multiprocessors(problem), row_kib=row_kib)
    for stages in range(7, 1, -1):
        config = dataclasses.replace(config, stages=stages)
        if _smem_bytes(problem, config) <= _SMEM_BYTES:
            break
    return config


def _at(start, size: int, multiple: int = _ALIGN):
    """The slice [start, start + size), start being a multiple of `multiple`."""
    return pl.ds(start if isinstance(start, int) else pl.multiple_of(start, multiple), size)


def _swizzled(shape, dtype):
    """Shared memory in tiles of 8 lines, as wgmma and TMA want it."""
    return plgpu.SMEM(
        shape,
        dtype,
        transforms=(plgpu.TilingTransform((_ALIGN, _LINE)), plgpu.SwizzleTransform(128)),
    )


def _store(target, value) -> None:
    # Not in the fewest instructions, which JAX from 0.12 on wants to be told.
    if hasattr(plgpu, "store"):
        plgpu.store(target, value, optimized=False)
    else:
        target[...] = value


def _turnstiles(count: int, scratch: dict):
    """A counter, zero at the launch, for each place where all CTAs wait for each other."""
    del scratch  # Not in shared memory, but where every CTA has it.
    return pl.get_global(plgpu.SemaphoreType.REGULAR((count,)))


def _more_scratch(count: int) -> dict:
    return {}


def _signal(turnstile) -> None:
    """Says that what this warpgroup wrote to device memory, and waited for, may be read."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def signal(ctx, counter):
        mgpu.utils.warpgroup_barrier()
        i32 = ir.IntegerType.get_signless(32)
        thread = arith.remui(mgpu.thread_idx(), arith.constant(i32, _LANES))
        text = """{
            .reg .pred first;
            setp.eq.u32 first, $1, 0;
            @first red.release.gpu.global.add.u32 [$0], 1;
        }"""
        _assembly(text, "l,r", mgpu.utils.memref_ptr(counter), thread)

    signal(turnstile)


def _await(turnstile, ctas: int) -> None:
    """Waits until all CTAs have signalled."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def wait(ctx, counter):
        i32 = ir.IntegerType.get_signless(32)
        thread = arith.remui(mgpu.thread_idx(), arith.constant(i32, _LANES))
        # One thread asks, as more would keep the signals from arriving.
        text = """{
            .reg .pred missing;
            .reg .u32 seen;
            setp.ne.u32 missing, $2, 0;
            @missing bra there;
            again:
            ld.acquire.gpu.global.u32 seen, [$0];
            setp.lt.u32 missing, seen, $1;
            @missing bra again;
            there:
        }"""
        pointer, all_of_them = mgpu.utils.memref_ptr(counter), arith.constant(i32, ctas)
        _assembly(text, "l,r,r", pointer, all_of_them, thread)
        mgpu.utils.warpgroup_barrier()
        # Bulk copies read another way than the load that saw the signals; the fence orders them.
        _assembly("fence.proxy.async.global;", "")

    wait(turnstile)


def _assembly(text: str, constraints: str, *operands) -> None:
    void = ir.Type.parse("!llvm.void")
    constraints = ",".join(filter(None, [constraints, "~{memory}"]))
    llvm.inline_asm(void, operands, text, constraints, has_side_effects=True)


def _kernel(problem: Problem, config: Config):
    """Builds the launch: rows and weights in, the results of all steps out."""
    phases = _phases(problem, config.ctas)
    rows, dtype = _padded(problem.count), jnp.dtype(problem.dtype)
    row_names, weight_names = ([n for n, _ in x] for x in (problem.rows, problem.weights))
    stages = config.stages
    widths = sorted({p.lines for p in phases})
    columns = sorted({p.columns for p in phases})
    squared = [p for p in phases if p.sums_squares]

    def body(*refs, ring, staging, factors, full, empty, rows_full, rows_empty, **rest):
        names = row_names + weight_names
        names += [p.into for p in phases] + [("squares", p.into) for p in squared]
        refs = dict(zip(names, refs, strict=True))
        row_rings = dict(zip(widths, ring[: len(widths)], strict=True))
        rings = dict(zip(widths, [pair[1] for pair in ring[len(widths) :]], strict=True))
        rows_full, rows_empty = (dict(zip(widths, x, strict=True)) for x in (rows_full, rows_empty))
        stagings = dict(zip(columns, staging if len(columns) > 1 else [staging], strict=True))
        cta, wg = lax.axis_index("cta"), lax.axis_index("wg")
        turnstiles = _turnstiles(len(phases) - 1, rest) if len(phases) > 1 else None

        def for_each_phase(visit):
            """Calls visit(index, phase, blocks of this CTA, and where in either ring it begins)."""
            position, row_position = jnp.int32(0), {n: jnp.int32(0) for n in widths}
            for k, phase in enumerate(phases):
                left = phase.blocks - cta * phase.passes
                blocks = jnp.clip(left, 0, phase.passes)
                visit(k, phase, blocks, position, row_position[phase.lines])
                position = position + blocks * phase.stages
                row_position[phase.lines] = row_position[phase.lines] + blocks * phase.stages

        def first_column(phase, block):
            return (cta * phase.passes + block) * phase.columns

        def follow_last_launch():
            if config.overlap:
                plgpu.griddepcontrol_wait()
                plgpu.griddepcontrol_launch_dependents()

        def load_weights():
            def visit(k, phase, blocks, position, row_position):
                weight, target = refs[phase.weight], rings[phase.lines]

                def load(i, _):
                    stage = lax.rem(position + i, stages)
                    before = position + i >= stages
                    pl.when(before)(lambda: plgpu.barrier_wait(empty.at[stage]))
                    at = first_column(phase, lax.div(i, phase.stages))
                    inner = _at(lax.rem(i, phase.stages) * phase.width, phase.width, _LINE)
                    # Every stage is two copies, whichever step it is of.
                    for half, (first, some) in enumerate(phase.parts):
                        if phase.gated:
                            source = weight.at[half, _at(at, some), inner]
                        else:
                            source = weight.at[_at(at + first, some), inner]
                        place = target.at[stage, pl.ds(first, some)]
                        plgpu.copy_gmem_to_smem(source, place, full.at[stage])

                lax.fori_loop(0, blocks * phase.stages, load, None)

            for_each_phase(visit)

        def load_rows():
            follow_last_launch()

            def visit(k, phase, blocks, position, row_position):
                source, target = refs[phase.source], row_rings[phase.lines]
                row_stages = _row_stages(config, rows, phase.lines)
                if k > 0:
                    _await(turnstiles.at[k - 1], config.ctas)

                def load(i, _):
                    turn = row_position + i
                    stage = lax.rem(turn, row_stages)
                    wait = lambda: plgpu.barrier_wait(rows_empty[phase.lines].at[stage])
                    pl.when(turn >= row_stages)(wait)
                    output = first_column(phase, lax.div(i, phase.stages))
                    column = phase.column(output, lax.rem(i, phase.stages) * phase.width)
                    plgpu.copy_gmem_to_smem(
                        source.at[pl.ds(0, rows), _at(column, phase.width, _LINE)],
                        target.at[_at(stage * rows, rows)],
                        rows_full[phase.lines].at[stage],
                    )

                count = blocks * phase.stages
                first = jnp.minimum(count, row_stages) if phase.squares else count
                lax.fori_loop(0, first, load, None)
                if phase.squares:
                    # Meanwhile the first rows arrive.
                    pl.when(blocks > 0)(functools.partial(find_factors, phase))
                    lax.fori_loop(first, count, load, None)

            for_each_phase(visit)

        def find_factors(phase):
            """What the norm multiplies each row with, from the sums of all blocks."""
            width = next(p.columns for p in phases if p.into == phase.squares)
            at = pl.ds(phase.start // width, phase.inner // width)
            squares = plgpu.load(
                refs["squares", phase.squares].at[:, at],
                layout=plgpu.Layout.WGMMA,
                optimized=False,
            )
            factors[...] = lax.rsqrt(squares.sum(axis=1) / phase.inner + phase.norm)
            plgpu.barrier_arrive(rest["found"])

        def multiply():
            follow_last_launch()

            def visit(k, phase, blocks, position, row_position):
                weights, own_rows = rings[phase.lines], row_rings[phase.lines]
                row_stages = _row_stages(config, rows, phase.lines)
                staging = stagings[phase.columns]
                wide = lambda x, like: lax.broadcast_in_dim(x, like.shape, [0])

                def do_block(block, _):
                    at = first_column(phase, block)
                    begin = position + block * phase.stages
                    row_begin = row_position + block * phase.stages

                    def release(s):
                        plgpu.barrier_arrive(empty.at[lax.rem(begin + s, stages)])
                        row_stage = lax.rem(row_begin + s, row_stages)
                        plgpu.barrier_arrive(rows_empty[phase.lines].at[row_stage])

                    def load_added():
                        plgpu.copy_gmem_to_smem(
                            refs[phase.add].at[pl.ds(0, rows), _at(at, phase.columns)],
                            staging.at[pl.ds(0, rows)],
                            rest["added"],
                        )

                    def products(acc_ref, squares_ref=None):
                        def step(s, _):
                            stage = lax.rem(begin + s, stages)
                            row_stage = lax.rem(row_begin + s, row_stages)
                            plgpu.barrier_wait(rows_full[phase.lines].at[row_stage])
                            if phase.add:
                                # As its own rows are there, those of earlier steps are.
                                pl.when(s == 0)(load_added)
                            plgpu.barrier_wait(full.at[stage])
                            left = own_rows.at[_at(row_stage * rows, _ROWS)]
                            right = weights.at[stage, pl.ds(0, phase.weight_rows)]
                            plgpu.wgmma(acc_ref, left, right.transpose((1, 0)))
                            if squares_ref is not None:
                                same = own_rows.at[_at(row_stage * rows, rows)]
                                plgpu.wgmma(squares_ref, left, same.transpose((1, 0)))
                            plgpu.wgmma_wait(1 if squares_ref is None else 2)
                            # The products of the stage before are done.
                            pl.when(s > 0)(lambda: release(s - 1))

                        lax.fori_loop(0, phase.stages, step, None)
                        if squares_ref is None:
                            return acc_ref[...]
                        return acc_ref[...], squares_ref[...]

                    accs = [plgpu.ACC((_ROWS, phase.weight_rows), jnp.float32)]
                    if phase.norm is None or phase.squares:
                        acc = pl.run_scoped(products, *accs)
                    else:
                        accs.append(plgpu.ACC((_ROWS, rows), jnp.float32))
                        acc, squares = pl.run_scoped(products, *accs)
                        iota = functools.partial(
                            plgpu.broadcasted_iota,
                            jnp.int32,
                            squares.shape,
                            layout=plgpu.Layout.WGMMA,
                        )
                        own = jnp.where(iota(0) == iota(1), squares, 0.0).sum(axis=1)
                        acc = acc * wide(lax.rsqrt(own / phase.inner + phase.norm), acc)
                    release(phase.stages - 1)
                    if phase.squares:
                        pl.when(block == 0)(lambda: plgpu.barrier_wait(rest["found"]))
                        acc = acc * wide(plgpu.load(factors, layout=_ROW_LAYOUT), acc)
                    if phase.gated:
                        gate, up = acc[:, : phase.columns], acc[:, phase.columns :]
                        acc = gate * up / (1.0 + jnp.exp(-gate))
                    if phase.add:
                        plgpu.barrier_wait(rest["added"])
                        old = plgpu.load(staging, layout=plgpu.Layout.WGMMA, optimized=False)
                        acc = acc + old.astype(jnp.float32)
                    out = acc.astype(dtype)
                    _store(staging, out)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(
                        staging.at[pl.ds(0, rows)],
                        refs[phase.into].at[pl.ds(0, rows), _at(at, phase.columns)],
                    )
                    if phase.sums_squares:
                        out = out.astype(jnp.float32)
                        place = refs["squares", phase.into].at[:, cta * phase.passes + block]
                        _store(place, (out * out).sum(axis=1))
                    plgpu.wait_smem_to_gmem(0)

                lax.fori_loop(0, blocks, do_block, None)
                if k + 1 < len(phases):
                    _signal(turnstiles.at[k])

            for_each_phase(visit)

        pl.when(wg == 0)(multiply)
        pl.when(wg == 1)(load_weights)
        pl.when(wg == 2)(load_rows)

    def row_barriers():
        return [plgpu.Barrier(num_barriers=_row_stages(config, rows, n)) for n in widths]

    def union(shapes):
        return plgpu.RefUnion(*shapes) if len(shapes) > 1 else shapes[0]

    scratch = dict(
        # The weights' ring lies behind the rows': a product of the last rows reads on into it.
        ring=plgpu.RefUnion(
            *(
                _swizzled((_row_stages(config, rows, n) * rows + _ROWS - rows, n * _LINE), dtype)
                for n in widths
            ),
            *(
                (
                    plgpu.SMEM((config.row_kib * 1024,), jnp.int8),
                    _swizzled((stages, _STAGE_LINES // n, n * _LINE), dtype),
                )
                for n in widths
            ),
        ),
        staging=union([plgpu.SMEM((_ROWS, c), dtype) for c in columns]),
        factors=plgpu.SMEM((_ROWS,), jnp.float32),
        full=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        empty=plgpu.Barrier(num_barriers=stages),
        rows_full=row_barriers(),
        rows_empty=row_barriers(),
        added=plgpu.Barrier(),
        found=plgpu.Barrier(),
        **_more_scratch(len(phases) - 1),
    )
    return plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((rows, p.outputs), dtype) for p in phases]
        + [jax.ShapeDtypeStruct((_ROWS, _padded(p.blocks)), jnp.float32) for p in squared],
        scratch_types=scratch,
        grid=(config.ctas,),
        grid_names=("cta",),
        num_threads=3,
        thread_name="wg",
        kernel_name="decode_projections",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            reduction_scratch_bytes=0,
        ),
    )


@functools.partial(jax.jit, static_argnames=("problem", "config"))
def chain(
    rows: dict[str, jax.Array],
    weights: dict[str, jax.Array],
    *,
    problem: Problem,
    config: Config,
) -> dict[str, Any]:
    """The results of all steps, each [M, N]; arguments as `api.chain` checks them."""
    more = _padded(problem.count) - problem.count
    arrays = [jnp.pad(rows[name], ((0, more), (0, 0))) for name, _ in problem.rows]
    arrays += [weights[name] for name, _ in problem.weights]
    results = _kernel(problem, config)(*arrays)
    into = [step.into for step in problem.steps]
    return {name: x[: problem.count] for name, x in zip(into, results, strict=False)}
