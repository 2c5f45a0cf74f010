"""What the Hopper kernel serves, the sizes that follow from a problem, and the settings to take."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp

from mlra_jax.kernels.absorbed_decode.problem import Problem
from mlra_jax.kernels.tiles import REDUCTION

# Query rows of one wgmma; fewer are padded, which takes power unless it is by zeros.
ROWS = 64
# The smallest piece of a tiled shared-memory layout: starts and row counts are multiples of it.
ALIGN = 8
# Threads of a warpgroup, and the columns of a partial result that lie together, a line.
LANES = 128
SMEM_BYTES = 227 * 1024

_WIDTHS = (32, 64, 128, 256, 512)
_ROPES = (16, 32, 64, 128, 256)
# The code is unrolled over them: each more makes it longer to compile.
_MOST_QUERIES = 16
# Query rows that are columns of a product where `Config.swap`: more gain nothing over 64 rows.
_FEW_ROWS = 32
# Tiles for each CTA from which those of so many latents were faster with `Config.swap`.
_SWAPPED_FROM = {1: 4, 2: 15, 4: 15}
_FEWEST_AT_ONCE, _MOST_AT_ONCE = 3, 9
# All of two bytes, which `join.weigh` counts on.
_DTYPES = ("bfloat16", "float16")
# More in flight gains nothing, but memory then serves some CTAs long before others.
_MOST_STAGES = 4


@dataclasses.dataclass(frozen=True)
class Config:
    """What can be tuned; `heuristic` chooses it from the sizes.

    Attributes:
      block: cache positions per tile, a multiple of 64.
      stages: tiles in flight per CTA; an even number where two warpgroups take turns.
      ctas: how many CTAs share the work, so at most how many parts a query row's result has.
      shared: latents that a tile holds, 1 or 2, or 4 where `swap`.
      query_stages: 2 loads the next visit's queries while the present ones are in use.
      stripes: give CTAs every n-th tile instead of a run of neighbours; for a batch of one row,
        whose units then divide the CTAs among themselves.
      join_rows: query rows that a CTA of the second launch joins, where tiles are not in stripes.
      overlap: let each launch begin while the one before it drains.
      swap: make cache positions the rows of the products instead of query rows, of which a few
        then are not padded to 64.
    """

    block: int = 64
    stages: int = 4
    ctas: int = 132
    shared: int = 1
    query_stages: int = 1
    stripes: bool = False
    join_rows: int = 4
    overlap: bool = True
    swap: bool = False


@dataclasses.dataclass(frozen=True)
class Mode:
    """How the warpgroups of a CTA that multiply share its work; the package says what each is for.

    Attributes:
      warpgroups: of a CTA.
      takers: how many of them take turns at tiles; the number of stages is a multiple of it.
      row_tiles: blocks of 64 query rows that a CTA has at once.
    """

    name: str
    warpgroups: int = 2
    takers: int = 1
    row_tiles: int = 1


ALTERNATE = Mode("alternate", takers=2)
LATENTS = Mode("latents")
TOGETHER = Mode("together", row_tiles=2)
COLUMNS = Mode("columns", warpgroups=3)
SWAPPED = {
    1: Mode("swapped_1", takers=2),
    2: Mode("swapped_2"),
    4: Mode("swapped_4", warpgroups=4),
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """The static sizes that both launches are built from."""

    problem: Problem
    config: Config

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.problem.dtype)

    @property
    def rows(self) -> int:
        """Query rows of one latent, T * H rounded up to the alignment."""
        return _round_up(self.problem.queries * self.problem.heads, ALIGN)

    @property
    def mode(self) -> Mode:
        if self.problem.width == 512:
            return COLUMNS
        if self.config.swap:
            return SWAPPED[self.config.shared]
        if self.config.shared > 1:
            return LATENTS
        return ALTERNATE if self.rows <= ROWS else TOGETHER

    @property
    def slots(self) -> int:
        """Parts of a stage that come and go by themselves, each a warpgroup's."""
        return self.config.shared if self.config.swap else 1

    @property
    def slot_width(self) -> int:
        """Columns of latents in a slot."""
        return self.config.shared // self.slots * self.problem.width

    @property
    def block_rows(self) -> int:
        """Query rows that a CTA has at once."""
        return ROWS * self.mode.row_tiles

    @property
    def row_blocks(self) -> int:
        """Blocks of query rows per latent, each walking the cache."""
        return cdiv(self.rows, self.block_rows)

    @property
    def streams(self) -> int:
        """Streams of a CTA."""
        return self.mode.row_tiles * self.config.shared

    @property
    def stream_rows(self) -> int:
        return min(self.rows, ROWS)

    @property
    def rope_streams(self) -> int:
        """Streams with rotary queries of their own."""
        return self.mode.row_tiles * min(self.problem.groups, self.config.shared)

    @property
    def rope_width(self) -> int:
        """Columns of a tile's rotary keys."""
        return self.problem.rope * min(self.problem.rope_heads, self.config.shared)

    @property
    def lines(self) -> int:
        """Lines of a row of results; the last is not full where latents are narrower."""
        return cdiv(self.problem.width, LANES)

    @property
    def units(self) -> int:
        """Units per batch row: (latents of a tile, block of query rows) pairs."""
        return self.problem.latents // self.config.shared * self.row_blocks

    @property
    def team(self) -> int:
        """CTAs of a unit, where tiles are in stripes."""
        return self.config.ctas // self.units

    @property
    def parts(self) -> int:
        """Parts at most; every CTA and every unit begins at most one new."""
        if self.config.stripes:
            return self.config.ctas
        return self.config.ctas + self.problem.batch * self.units

    @property
    def parts_at_once(self) -> int:
        """Parts of a row that are joined at once, about half of them where tiles are no stripes."""
        of_unit = cdiv(self.config.ctas, self.problem.batch * self.units) + 1
        return min(max(cdiv(of_unit, 2), _FEWEST_AT_ONCE), _MOST_AT_ONCE)

    @property
    def piece(self) -> int:
        """Columns that a warpgroup passes through shared memory at a time when it has finished."""
        return {32: 16, 64: 32, 128: 64, 256: 32, 512: 128}[self.problem.width]

    @property
    def chunk(self) -> int:
        """Columns that one copy of queries brings."""
        return 64 if self.problem.width == 512 else min(self.problem.width, 128)

    def query_rows(self, streams: int) -> int:
        """Rows of queries in shared memory: a product of 64 rows may begin at any stream's."""
        beyond = 0 if self.config.swap else ROWS - self.stream_rows
        return streams * self.stream_rows + beyond


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["parts", "lses", "bounds"],
    meta_fields=["shape"],
)
@dataclasses.dataclass(frozen=True)
class Parts:
    """An answer that is not joined yet.

    Attributes:
      parts, lses: what the first launch returns.
      bounds: what it was told of the cache, `schedule.Bounds`.
    """

    parts: jax.Array
    lses: jax.Array
    bounds: tuple[jax.Array, ...]
    shape: Shape


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _round_up(x: int, multiple: int) -> int:
    return cdiv(x, multiple) * multiple


def smem_bytes(shape: Shape) -> int:
    """Shared memory of a CTA of the first launch, as `walk` asks for it."""
    config, rope, width = shape.config, shape.problem.rope, shape.problem.width
    query = shape.query_rows(shape.rope_streams) * rope
    if not shape.problem.values_only or shape.mode is COLUMNS:
        query += shape.query_rows(shape.streams) * width
    cache = config.stages * config.block * (config.shared * width + shape.rope_width)
    stored = (config.query_stages * query + cache) * shape.dtype.itemsize
    if shape.mode is COLUMNS:
        # Probabilities; results pass through the space of the queries.
        exchange = ROWS * config.block * shape.dtype.itemsize
    elif config.swap:
        # Probabilities and space for reductions of each warpgroup.
        warpgroups, rows = shape.mode.warpgroups, shape.stream_rows
        exchange = warpgroups * rows * config.block * shape.dtype.itemsize
        exchange += warpgroups * REDUCTION * 4
        if shape.mode.takers > 1:
            # What one of them hands over.
            exchange += width * rows * 4
    else:
        wide = 4 if shape.mode is ALTERNATE else shape.dtype.itemsize
        exchange = 2 * ROWS * shape.piece * wide
    # Row statistics and barriers come last, each on a KiB of its own.
    return stored + exchange + 3 * 1024


def supports(problem: Problem) -> str | None:
    """None if the kernel can serve the problem, otherwise why not, in one phrase."""
    if problem.dtype not in _DTYPES:
        return f"dtype {problem.dtype} is neither bfloat16 nor float16"
    if problem.width not in _WIDTHS:
        return f"latent width {problem.width} is none of {_WIDTHS}"
    if problem.rope not in _ROPES:
        return f"rotary width {problem.rope} is none of {', '.join(map(str, _ROPES))}"
    if problem.queries > _MOST_QUERIES:
        return f"{problem.queries} queries are more than {_MOST_QUERIES}"
    if problem.cache % ALIGN:
        return f"the cache has {problem.cache} positions, which is no multiple of {ALIGN}"
    if _with_most_stages(Config(), problem) is None:
        return f"latents of {problem.width} + {problem.rope} do not fit shared memory"
    return None


def leaves_parts(problem: Problem) -> bool:
    """Whether `kernels.after_attention` joins the parts of such an answer: one line a head."""
    return problem.queries == 1 and problem.width == LANES and problem.heads <= ROWS


def heuristic(problem: Problem) -> Config:
    """The Config for a problem that nobody measured."""
    # Two latents of a tile read the rotary key that they share once.
    pairs = problem.rope_heads == 1 and _pairs(problem)
    config = Config(ctas=_multiprocessors(problem.device_kind), shared=2 if pairs else 1)
    units = Shape(problem, config).units
    swaps = [n for n in _swaps(problem) if _tiles_each(problem, config, n) >= _SWAPPED_FROM[n]]
    if problem.batch == 1 and units <= 4 and config.ctas % units == 0:
        # As many CTAs as have equally much to do when the cache is full.
        tiles = cdiv(problem.cache, config.block)
        team = cdiv(tiles, cdiv(tiles, config.ctas // units))
        config = dataclasses.replace(config, stripes=True, ctas=team * units)
    elif problem.rope_heads == 1 and 4 in swaps:
        config = dataclasses.replace(config, shared=4, swap=True)
    elif pairs and problem.latents == 2 and 2 in swaps:
        config = dataclasses.replace(config, swap=True)
    elif config.shared == 1:
        query_stages = 2 if problem.width <= 128 else 1
        config = dataclasses.replace(config, swap=1 in swaps, query_stages=query_stages)
    config = _with_most_stages(config, problem)
    if config is not None and not config.stripes:
        config = _even(config, problem)
        shape = Shape(problem, config)
        rows = problem.batch * shape.units * shape.streams * shape.stream_rows * shape.lines
        # So few of a CTA that all multiprocessors have one.
        join_rows = next(n for n in (config.join_rows, 2, 1) if rows >= n * config.ctas or n == 1)
        config = dataclasses.replace(config, join_rows=join_rows)
    return config


def _even(config: Config, problem: Problem) -> Config:
    """With as many CTAs for each unit, where that leaves all but a few: none then visits two."""
    units = problem.batch * Shape(problem, config).units
    ctas = config.ctas // units * units
    return dataclasses.replace(config, ctas=ctas) if 32 * ctas >= 31 * config.ctas else config


def candidates(problem: Problem) -> list[Config]:
    """The settings worth measuring for a problem."""
    first = heuristic(problem)
    found = [first]
    # Tiles in stripes are joined by whole teams.
    join_rows = [first.join_rows] if first.stripes else [2, 4, 8]
    ways = [(64, shared, True) for shared in _swaps(problem)]
    ways += itertools.product((64, 128), (1, 2) if _pairs(problem) else (1,), (False,))
    for (block, shared, swap), query_stages, rows in itertools.product(ways, (1, 2), join_rows):
        stripes = first.stripes and (shared, swap) == (first.shared, first.swap)
        config = dataclasses.replace(
            first,
            block=block,
            ctas=first.ctas if stripes else _multiprocessors(problem.device_kind),
            shared=shared,
            query_stages=query_stages,
            join_rows=rows,
            stripes=stripes,
            swap=swap,
        )
        config = _with_most_stages(config, problem)
        if config is None:
            continue
        # Fewer tiles in flight wait less in memory's queues.
        takers = Shape(problem, config).mode.takers
        for stages in (config.stages, max(config.stages - takers, takers)):
            config = dataclasses.replace(config, stages=stages)
            if config not in found:
                found.append(config)
    return found


def _pairs(problem: Problem) -> bool:
    """Whether tiles may be of two latents."""
    return (
        problem.width == 128
        and problem.latents % 2 == 0
        and problem.queries * problem.heads <= ROWS
        and _keys_divide(problem)
    )


def _keys_divide(problem: Problem) -> bool:
    """Whether latents of a tile find their keys; swizzled ones are cut at multiples of 64."""
    return problem.rope_heads == 1 or problem.rope % 64 == 0


def _tiles_each(problem: Problem, config: Config, shared: int) -> int:
    """Tiles of so many latents that a full cache gives every CTA."""
    tiles = problem.batch * problem.latents // shared * cdiv(problem.cache, config.block)
    return tiles // config.ctas


def _swaps(problem: Problem) -> list[int]:
    """How many latents a tile may have where `Config.swap`."""
    if (
        problem.queries * problem.heads > _FEW_ROWS
        or problem.width not in (64, 128, 256)
        or not _keys_divide(problem)
    ):
        return []
    # One tile in use and one on its way.
    taken = lambda shared: smem_bytes(Shape(problem, Config(stages=2, shared=shared, swap=True)))
    return [n for n in SWAPPED if problem.latents % n == 0 and taken(n) <= SMEM_BYTES]


def _with_most_stages(config: Config, problem: Problem) -> Config | None:
    for stages in range(_MOST_STAGES, 0, -Shape(problem, config).mode.takers):
        config = dataclasses.replace(config, stages=stages)
        if smem_bytes(Shape(problem, config)) <= SMEM_BYTES:
            return config
    return None


def _multiprocessors(device_kind: str) -> int:
    return {"H20": 78, "H800 PCIe": 114, "H100 PCIe": 114}.get(
        device_kind.removeprefix("NVIDIA "), 132
    )
