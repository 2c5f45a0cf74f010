"""The sizes that are measured, and their inputs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mlra_jax.kernels.absorbed_decode.problem import Problem

K = 1024
_BEYOND_L2 = 400e6  # Bytes of cache that a loop goes through before it comes to the first again.


@dataclasses.dataclass(frozen=True)
class Point:
    """One row of the table: `heads` per latent, `cache` positions per row of the batch."""

    group: str
    name: str
    cache: int
    batch: int = 1
    queries: int = 1
    latents: int = 1
    heads: int = 64
    groups: int = 1
    width: int = 128
    rope: int = 64
    ragged: bool = False
    dtype: str = "bfloat16"
    rope_heads: int = 1
    values_only: bool = False

    @classmethod
    def by_head(
        cls, group: str, name: str, cache: int, kv_heads: int, heads: int, width: int = 128, **sizes
    ) -> "Point":
        """Grouped-query attention on the same kernel: queries meet only the rotary keys."""
        return cls(
            group,
            name,
            cache,
            latents=kv_heads,
            groups=kv_heads,
            rope_heads=kv_heads,
            heads=heads,
            width=width,
            rope=width,
            values_only=True,
            **sizes,
        )

    @property
    def values(self) -> int:
        """Cached at a position."""
        return self.latents * self.width + self.rope_heads * self.rope

    def ends(self) -> np.ndarray:
        """The cache length of every row."""
        if not self.ragged:
            return np.full([self.batch], self.cache)
        # From nothing to full, in an order that puts short beside long.
        ends = np.linspace(0, self.cache, self.batch).astype(int)
        return ends[np.random.default_rng(0).permutation(self.batch)]

    def bytes(self) -> int:
        """Bytes of cache that the queries see, read once."""
        return int(self.ends().sum()) * self.values * 2

    def problem(self, device_kind: str) -> Problem:
        fields = {f.name for f in dataclasses.fields(Problem)}
        own = {k: v for k, v in dataclasses.asdict(self).items() if k in fields}
        return Problem(device_kind=device_kind, **own)


def paper_points() -> list[Point]:
    shares = {
        "MLRA-4 4-way": dict(width=128),
        "MLA": dict(width=512),
        "GLA-2 2-way": dict(width=256, heads=32),
    }
    caches = [128 * K, 256 * K, 512 * K, 1024 * K, 2048 * K]
    points = [Point("paper", name, c, **size) for name, size in shares.items() for c in caches]
    return points + [Point.by_head("paper", "GQA 8-way", c, 1, 8) for c in caches]


def model_points() -> list[Point]:
    points = []
    for batch, caches in (
        (1, (2 * K, 16 * K, 128 * K)),
        (8, (2 * K, 16 * K, 128 * K)),
        (64, (2 * K, 4 * K, 16 * K)),
        (128, (K, 2 * K, 4 * K)),
    ):
        for cache in caches:
            for latents in (1, 2, 4):
                points.append(
                    Point("24 heads", f"L={latents}", cache, batch, latents=latents, heads=24)
                )
    return points


def other_points() -> list[Point]:
    sizes = dict(batch=64, cache=4 * K)
    return [
        Point("queries", "64 heads T=1", 2 * K),
        Point("queries", "24 heads T=2", 128 * K, queries=2, heads=24),
        Point("queries", "24 heads T=4", 128 * K, queries=4, heads=24),
        Point("queries", "64 heads T=2", 128 * K, queries=2),
        Point("queries", "64 heads T=4", 128 * K, queries=4),
        Point("ragged", "24 heads L=1", **sizes, heads=24, ragged=True),
        Point("ragged", "24 heads L=4", **sizes, heads=24, latents=4, ragged=True),
        Point("ragged", "MLA 24 heads", **sizes, heads=24, width=512, ragged=True),
        Point("ragged", "12 heads G=2 T=2", 5000, 37, 2, 4, 12, 2, ragged=True),
    ]


def head_points() -> list[Point]:
    """The published models with keys and values by head, whole on one device, and narrow ones."""
    points = []
    for batch, cache in ((1, 16 * K), (1, 128 * K), (8, 16 * K), (64, 4 * K)):
        sizes = dict(cache=cache, batch=batch)
        points += [
            Point.by_head("heads", "GQA 6 x 4", kv_heads=6, heads=4, **sizes),
            Point.by_head("heads", "MQA", kv_heads=1, heads=24, **sizes),
            Point.by_head("heads", "MFA", kv_heads=1, heads=24, width=256, **sizes),
            Point("heads", "GTA 6 x 4", latents=6, groups=6, heads=4, **sizes),
            Point("narrow", "C=32 R=16", latents=4, heads=4, width=32, rope=16, **sizes),
            Point("narrow", "C=64 R=32", latents=4, heads=8, width=64, rope=32, **sizes),
            Point.by_head("narrow", "GQA 4 x 2", kv_heads=4, heads=2, width=64, **sizes),
        ]
    for batch, cache in ((1, 16 * K), (1, 128 * K), (8, 16 * K), (64, 2 * K)):
        points.append(Point.by_head("heads", "MHA 24", cache, 24, 1, batch=batch))
    return points


def quick_points() -> list[Point]:
    narrow = dict(latents=4, heads=4, batch=3, ragged=True)
    wide = dict(latents=4, heads=12, groups=2, width=256, ragged=True)
    return [
        Point("quick", "MLRA-4 4-way", 5000),
        Point("quick", "MLA", 5000, width=512),
        Point("quick", "GLA-2 2-way", 5000, heads=32, width=256),
        Point.by_head("quick", "GQA 8-way", 5000, 1, 8),
        Point.by_head("quick", "GQA 6 x 4", 5000, 6, 4),
        Point.by_head("quick", "GQA 6 x 4 T=2", 1000, 6, 4, batch=3, queries=2, ragged=True),
        Point.by_head("quick", "GQA 4 x 6", 5000, 4, 6),
        Point.by_head("quick", "GQA 2 x 40 T=2", 1000, 2, 40, batch=2, queries=2, ragged=True),
        Point.by_head("quick", "MHA 24", 1000, 24, 1, batch=2, ragged=True),
        Point.by_head("quick", "MFA", 5000, 1, 24, 256),
        Point("quick", "GTA 6 x 4", 1000, 3, 2, 6, 4, 6, ragged=True),
        Point("quick", "C=32 R=16", 1000, width=32, rope=16, **narrow),
        Point("quick", "C=64 R=32", 1000, width=64, rope=32, **narrow),
        Point("quick", "C=32 R=32 row", 5000, heads=4, width=32, rope=32),
        Point("quick", "C=64 T=4", 1000, 2, 4, heads=40, width=64, ragged=True),
        Point.by_head("quick", "GQA 4 x 2 of 32", 1000, 4, 2, 32, batch=3, ragged=True),
        Point.by_head("quick", "GQA 4 x 2 of 64", 1000, 4, 2, 64, batch=3, ragged=True),
        Point("quick", "24 heads L=4", 1000, 8, latents=4, heads=24, ragged=True),
        Point("quick", "12 heads G=2 T=4", 1000, 5, 4, 4, 12, 2, ragged=True),
        # Tiles enough for cache positions as the rows of products, of one latent.
        Point("quick", "24 heads, 40 rows", 1000, 40, heads=24, ragged=True),
        Point("quick", "8 heads T=4, 40 rows", 1000, 40, 4, heads=8, ragged=True),
        Point("quick", "12 heads of 256, float16", 1000, 30, 2, **wide, dtype="float16"),
        Point.by_head("quick", "GQA 6 x 4, 10 rows", 1000, 6, 4, batch=10, ragged=True),
        Point.by_head("quick", "MFA, 40 rows", 1000, 1, 24, 256, batch=40, ragged=True),
        Point("quick", "128 heads", 1000, 2, heads=128, ragged=True),
        Point("quick", "1 head, float16", 1000, 3, heads=1, ragged=True, dtype="float16"),
        Point("quick", "MLA T=2", 1000, 3, 2, heads=24, width=512, ragged=True),
    ]


def bounds(point: Point) -> tuple[jax.Array, jax.Array]:
    """Ends per query (the last sees the whole row) and starts; ragged rows are left-padded."""
    ends = point.ends()
    lengths = np.clip(ends[:, None] - np.arange(point.queries)[::-1], 0, None)
    starts = np.minimum(np.arange(point.batch) % 7, ends) if point.ragged else 0 * ends
    return jnp.asarray(lengths, jnp.int32), jnp.asarray(starts, jnp.int32)


def caches_of(point: Point) -> int:
    stored = point.batch * point.cache * point.values * 2
    return int(np.clip(np.ceil(_BEYOND_L2 / stored), 1, 16))


def shapes(point: Point):
    B, T, L, H, S = point.batch, point.queries, point.latents, point.heads, point.cache
    q = [(B, T, L, H, point.width), (B, T, point.groups, H, point.rope)]
    own = () if point.rope_heads == 1 else (point.rope_heads,)
    return q, [(B, S, L, point.width), (B, S, *own, point.rope)]


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _cut(pool, first, shape, dtype):
    flat = lax.dynamic_slice_in_dim(pool, first, int(np.prod(shape)))
    return flat.reshape(shape).astype(dtype)


def draw(point: Point, pool: jax.Array):
    """Queries and caches from a pool of random numbers, every array from another place of it."""
    places = np.random.default_rng()

    def take(shape):
        most = pool.size - int(np.prod(shape))
        return _cut(pool, int(places.integers(0, most, endpoint=True)), shape, point.dtype)

    q_shapes, c_shapes = shapes(point)
    q, q_rope = map(take, q_shapes)
    if point.values_only:  # It only carries what a loop's step hands to the next.
        q = jnp.zeros_like(q)
    return q, q_rope, [tuple(map(take, c_shapes)) for _ in range(caches_of(point))]


def scale_of(point: Point) -> float:
    return (point.rope if point.values_only else point.width + point.rope) ** -0.5
