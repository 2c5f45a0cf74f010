"""One launch from a product of a few rows to the next one, on Hopper GPUs.

XLA cuts a product of a few rows into summands, so that there is work for all multiprocessors. It
then has kernels of 1 to 4 us after each other: one that adds them up and adds the residual, one
for the norm; at the entry of attention one for each norm, each rotation and each array of the
cache. Here the product is cut by us, and one kernel does all of it. A warpgroup has a row, or one
of the vectors that a row is made of.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mlra_jax.kernels import target, tiles
from mlra_jax.kernels.rows import THREADS, layout, normed

# Tiles of a product, of 64 rows and 64 columns, that keep the multiprocessors busy. Of fewer XLA
# would cut the summands once more; below the second number, pieces that are not whole tiles of what
# is contracted are better.
_TILES, _FEWEST, _TILE = 384, 192, 64
_PIECES = (THREADS, 64, 16)
_MOST = 8
# Each number of a short vector is held by four threads.
_SHORT = plgpu.Layout.WGMMA.reduce(1)
_SHORT_WIDTHS = 64


def summands(device: Any, rows: int, contracted: int, columns: int) -> int:
    """In how many summands a device is to make a product; 1 where no kernel adds them up.

    Args:
      device: with its kind.
      rows, contracted, columns: the product's sizes, on this device.
    """
    if not target.is_hopper(device):
        return 1
    tiles = -(-rows // _TILE) * -(-columns // _TILE)
    fits = [
        [n for n in range(1, _MOST + 1) if contracted % (n * piece) == 0] or [1]
        for piece in _PIECES
    ]
    fit = next((fit for fit in fits if fit[-1] * tiles >= _FEWEST), fits[0])
    return next((n for n in fit if n * tiles >= _TILES), fit[-1])


def sums(width: int) -> bool:
    """Whether `sum_and_norm` serves rows of this width."""
    return width % THREADS == 0


def _added_up(N: int, summands_ref, token, start, width: int, lying) -> jax.Array:
    at = pl.ds(start, width)
    parts = [tiles.load(summands_ref.at[n, token, at], lying) for n in range(N)]
    return functools.reduce(jnp.add, parts)


def turning(angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """`[2, B * T, R]`: what a vector is multiplied by, and what it is with its halves exchanged."""
    cos, sin = (x.reshape(-1, x.shape[-1]) for x in angles)
    return jnp.stack([jnp.tile(cos, 2), jnp.concatenate([-sin, sin], axis=-1)])


def _rotated(x, turns_ref, token, twice) -> jax.Array:
    """A rotary vector of `_SHORT`, turned; `twice` is memory for it, two times."""
    (R,) = x.shape
    cos, sin = (tiles.load(turns_ref.at[k, token], _SHORT) for k in (0, 1))
    # Beside itself, each half has the other one behind it.
    twice[pl.ds(0, R)], twice[pl.ds(R, R)] = x, x
    plgpu.commit_smem()
    return x * cos + tiles.load(twice.at[pl.ds(R // 2, R)], _SHORT) * sin


def _launch(body, name: str, **how):
    return plgpu.kernel(
        body,
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        **how,
    )


# Functions of their own in a program, so that all layers compile one.
@functools.partial(jax.jit, static_argnames=("factor", "eps", "dtype"))
@target.int32_indices
def sum_and_norm(
    summands_NRD: jax.Array,
    x_RD: jax.Array,
    scale_D: jax.Array,
    *,
    factor: float,
    eps: float,
    dtype: str,
) -> tuple[jax.Array, jax.Array]:
    """(x and the summands added up, in the dtype of `x`; that, normed, in `dtype`).

    Args:
      summands_NRD: float32.
      x_RD: any float dtype.
      scale_D: any float dtype; the norm multiplies by it and by `factor`.
      eps: of the norm.
      dtype: of what is normed.
    """
    (N, R, D), lying = summands_NRD.shape, layout(x_RD.shape[1])

    def body(summands_ref, x_ref, scale_ref, sum_ref, normed_ref):
        row = lax.axis_index("row")
        # All is asked for before anything is waited for.
        scale = tiles.load(scale_ref, lying) * factor
        x = tiles.load(x_ref.at[row], lying)
        for n in range(N):
            x = x + tiles.load(summands_ref.at[n, row], lying)
        x = x.astype(sum_ref.dtype)
        tiles.store(sum_ref.at[row], x)
        tiles.store(normed_ref.at[row], normed(x.astype(jnp.float32), scale, eps))

    return _launch(
        body,
        "sum_and_norm",
        out_type=[jax.ShapeDtypeStruct((R, D), to) for to in (x_RD.dtype, jnp.dtype(dtype))],
        grid=(R,),
        grid_names=("row",),
    )(summands_NRD, x_RD, scale_D)


def enters(
    summands: int, width: int, query: int, latents_BSLC: Sequence[int], k_rope_BSR: Sequence[int]
) -> bool:
    """Whether `enter` serves so many summands of this width on a device.

    Args:
      query: the width of the query's latent.
      latents_BSLC, k_rope_BSR: shapes of the cache.
    """
    (*_, L, C), R = latents_BSLC, k_rope_BSR[-1]
    latents, rest = divmod(width - query - R, C)
    serves = not (rest or query % THREADS or C % THREADS or R % _SHORT_WIDTHS)
    return summands > 1 and latents >= L and serves


@functools.partial(jax.jit, static_argnames=("factors", "eps"))
@target.int32_indices
def enter(
    summands_NBTE: jax.Array,
    angles: tuple[jax.Array, jax.Array],
    scales: Sequence[jax.Array],
    slots_BT: jax.Array,
    first: jax.Array,
    latents_BSLC: jax.Array,
    k_rope_BSR: jax.Array,
    *,
    factors: tuple[float, float],
    eps: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The entry of latent attention on a device, from one product to the next and to the cache.

    Args:
      summands_NBTE: float32; in E lie the query's latent, the latents and the rotary key. Rows
        beyond those of the cache enter nothing.
      angles: cosines and sines of the tokens' positions, float32 `[B, T, R / 2]`.
      scales: of the norms of the query's latent, `[Q]`, and of all the model's latents, which
        multiply by them and by their `factors`.
      slots_BT: int32, where each token lies in this cache; what is beyond the last is dropped.
      first: int32 `[1]`, the cache's first latent among all. E has either all or the cache's.
      latents_BSLC, k_rope_BSR: the cache, changed in place where it is donated.
      eps: of the norms.

    Returns:
      (the query's latent normed, `[B, T, Q]` in the cache's dtype; the latents; the rotary keys).
    """
    (N, rows, T, E), (B, S, L, C), R = summands_NBTE.shape, latents_BSLC.shape, k_rope_BSR.shape[-1]
    (Q,), (all_latents,) = (scale.shape for scale in scales)
    own = Q + all_latents + R > E
    arrays = summands_NBTE.reshape(N, rows * T, E), turning(angles), *scales
    added_up = functools.partial(_added_up, N)

    def body(
        summands_ref,
        turns_ref,
        q_scale,
        kv_scale,
        slots_ref,
        first_ref,
        latents,
        k_rope,
        q_ref,
        twice,
    ):
        token, vector = lax.axis_index("token"), lax.axis_index("vector")
        row, t = lax.div(token, jnp.int32(T)), lax.rem(token, jnp.int32(T))

        slot = slots_ref[jnp.minimum(row, B - 1), t]
        kept = (row < B) & (slot < S)

        def scaled(start, scale_ref, factor):
            (width,) = scale_ref.shape
            scale = tiles.load(scale_ref, layout(width)) * factor
            x = added_up(summands_ref, token, start, width, layout(width))
            return normed(x, scale, eps)

        @pl.when(vector == 0)
        def _query():
            tiles.store(q_ref.at[token], scaled(0, q_scale, factors[0]))

        @pl.when((vector > 0) & (vector <= L))
        def _latent():
            latent = vector - 1
            among_all = first_ref[0] + latent
            start = pl.multiple_of((latent if own else among_all) * C, THREADS)
            scale = kv_scale.at[pl.ds(pl.multiple_of(among_all * C, THREADS), C)]
            x = scaled(Q + start, scale, factors[1])
            pl.when(kept)(lambda: tiles.store(latents.at[row, slot, latent], x))

        @pl.when(vector > L)
        def _rotary():
            x = added_up(summands_ref, token, E - R, R, _SHORT)
            x = _rotated(x, turns_ref, token, twice)
            pl.when(kept)(lambda: tiles.store(k_rope.at[row, slot], x))

    latents, k_rope = jax.new_ref(latents_BSLC), jax.new_ref(k_rope_BSR)
    q_XQ = _launch(
        body,
        "enter",
        out_type=jax.ShapeDtypeStruct((rows * T, Q), latents_BSLC.dtype),
        grid=(rows * T, 2 + L),
        grid_names=("token", "vector"),
        scratch_types=[plgpu.SMEM((2 * R,), jnp.float32)],
    )(*arrays, slots_BT, first, latents, k_rope)
    return q_XQ.reshape(rows, T, Q), jax.freeze(latents), jax.freeze(k_rope)


def turns(summands: int, nope: int, rope: int) -> bool:
    """Whether `turn` serves so many summands of queries of these widths."""
    return summands > 1 and not (nope % THREADS or rope % _SHORT_WIDTHS)


@functools.partial(jax.jit, static_argnames=("rope", "dtype"))
@target.int32_indices
def turn(
    summands_NBTHK: jax.Array, angles: tuple[jax.Array, jax.Array], *, rope: int, dtype: str
) -> tuple[jax.Array, jax.Array]:
    """Queries from one product to the next: added up, and the last `rope` of K turned.

    Args:
      summands_NBTHK: float32.
      angles: as of `enter`.

    Returns:
      (`[B, T, H, K - rope]`, `[B, T, H, rope]`), in `dtype`.
    """
    N, *rows, H, K = summands_NBTHK.shape
    tokens, nope = math.prod(rows), K - rope

    def body(summands_ref, turns_ref, nope_ref, rope_ref, twice):
        token, head = lax.axis_index("token"), lax.axis_index("head")
        start = pl.multiple_of(head * K, _SHORT_WIDTHS)
        x = _added_up(N, summands_ref, token, start, nope, layout(nope))
        turning = _added_up(N, summands_ref, token, start + nope, rope, _SHORT)
        tiles.store(nope_ref.at[token, head], x)
        tiles.store(rope_ref.at[token, head], _rotated(turning, turns_ref, token, twice))

    made = _launch(
        body,
        "turn",
        out_type=[jax.ShapeDtypeStruct((tokens, H, x), jnp.dtype(dtype)) for x in (nope, rope)],
        grid=(tokens, H),
        grid_names=("token", "head"),
        scratch_types=[plgpu.SMEM((2 * rope,), jnp.float32)],
    )(summands_NBTHK.reshape(N, tokens, H * K), turning(angles))
    return tuple(x.reshape(*rows, H, -1) for x in made)
