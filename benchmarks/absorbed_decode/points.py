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

    @property
    def grouped(self) -> bool:
        """Grouped-query attention on the same kernel: queries meet only the rotary keys."""
        return self.name.startswith("GQA")

    def ends(self) -> np.ndarray:
        """The cache length of every row."""
        if not self.ragged:
            return np.full([self.batch], self.cache)
        # From nothing to full, in an order that puts short beside long.
        ends = np.linspace(0, self.cache, self.batch).astype(int)
        return ends[np.random.default_rng(0).permutation(self.batch)]

    def bytes(self) -> int:
        """Bytes of cache that the queries see, read once."""
        return int(self.ends().sum()) * (self.latents * self.width + self.rope) * 2

    def problem(self, device_kind: str) -> Problem:
        fields = {f.name for f in dataclasses.fields(Problem)}
        own = {k: v for k, v in dataclasses.asdict(self).items() if k in fields}
        return Problem(device_kind=device_kind, **own)


def paper_points() -> list[Point]:
    shares = {
        "MLRA-4 4-way": dict(width=128),
        "MLA": dict(width=512),
        "GLA-2 2-way": dict(width=256, heads=32),
        "GQA 8-way": dict(width=128, rope=128, heads=8),
    }
    caches = [128 * K, 256 * K, 512 * K, 1024 * K, 2048 * K]
    return [Point("paper", name, c, **size) for name, size in shares.items() for c in caches]


def model_points() -> list[Point]:
    points = []
    for batch, caches in (
        (1, (2 * K, 16 * K, 128 * K)),
        (8, (2 * K, 16 * K, 128 * K)),
        (64, (2 * K, 4 * K, 16 * K)),
        (128, (2 * K, 4 * K)),
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


def quick_points() -> list[Point]:
    return [
        Point("quick", "MLRA-4 4-way", 5000),
        Point("quick", "MLA", 5000, width=512),
        Point("quick", "GLA-2 2-way", 5000, heads=32, width=256),
        Point("quick", "GQA 8-way", 5000, heads=8, rope=128),
        Point("quick", "24 heads L=4", 1000, 8, latents=4, heads=24, ragged=True),
        Point("quick", "12 heads G=2 T=4", 1000, 5, 4, 4, 12, 2, ragged=True),
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
    stored = point.batch * point.cache * (point.latents * point.width + point.rope) * 2
    return int(np.clip(np.ceil(_BEYOND_L2 / stored), 1, 16))


def shapes(point: Point):
    B, T, L, H, S = point.batch, point.queries, point.latents, point.heads, point.cache
    q = [(B, T, L, H, point.width), (B, T, point.groups, H, point.rope)]
    return q, [(B, S, L, point.width), (B, S, point.rope)]


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
    if point.grouped:
        q = jnp.zeros_like(q)
    return q, q_rope, [tuple(map(take, c_shapes)) for _ in range(caches_of(point))]


def scale_of(point: Point) -> float:
    return (point.rope if point.grouped else point.width + point.rope) ** -0.5
