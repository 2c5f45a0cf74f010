"""Absorbed decode for Hopper GPUs: one pass over the latent cache at the speed of memory.

Two launches. The first (`walk`) walks the cache. Its work is a list of tiles that is divided
equally among the CTAs (`schedule`), so that rows of unequal length cost what they read and no CTA
waits for another. A latent tile is loaded once, by TMA into a ring of shared-memory stages, and
serves as key and as value. The warpgroups that multiply ask for the copies themselves: beside one
that only copies they would need `setmaxnreg`, which libnvJitLink ignores. The second launch
(`join`) joins the partial results of each query row by their log-sum-exp. `plan` says what is
served and chooses the settings.

The ring, with 4 stages; a tile's turn decides its stage:

    tiles in the order of their turns    ... 4   5   6   7   8   9 ...
                                               ┌───┬───┬───┬───┐
    copies, 4 turns ahead              ──────► │ 8 │ 5 │ 6 │ 7 │ ──────► products
                                               └───┴───┴───┴───┘
    stage = turn % 4                             0   1   2   3

    full[stage]:  the copies of latents and of rotary keys arrive, who multiplies waits
    empty[stage]: who multiplies arrives, and the last of them waits and asks for the tile 4 turns
                  later; those who take turns ask for their own

Words:

    tile     `block` positions of one batch row's cache, with one latent, two or four
    stream   up to 64 query rows of one latent, with a softmax of their own
    unit     what walks the cache as one: the streams of a CTA; a batch row has a unit for each of
             its (latents of a tile, block of query rows)
    visit    a CTA's run of tiles of one unit
    part     what a stream has after a visit: its normalised sum and the LSE, a partial result
    turn     a tile's number among those that a CTA loads, counted over all visits
    stripe   every n-th tile of a unit: what a CTA visits where `Config.stripes`; otherwise it
             visits neighbours, an equal share of all tiles
    team     the n CTAs that have a stripe each of one unit

How the warpgroups share the work depends on the problem:

    alternate  one latent, up to 64 query rows: two take turns at tiles and join their states at
               the end, so that the softmax of one runs while the other multiplies;
    latents    tiles of two latents, which share a rotary key: each of two has one of them;
    together   more than 64 query rows: each of two has 64 of them, both use every tile;
    swapped    few query rows: cache positions are the rows of the products, query rows their
               columns, of which 64 are not needed. Scores and sums lie transposed in the
               registers. Two or four latents of a tile have a warpgroup each, and slots of their
               own in a stage, with barriers of their own; of one latent two warpgroups take turns
               at tiles;
    columns    latents of width 512, whose accumulator does not fit the registers of one warpgroup:
               the first turns tiles into probabilities, the second and third have one half of the
               value columns each.

To change something:

    the number of stages   `plan.heuristic` takes as many as fit (`_MOST_STAGES`, `smem_bytes`);
                           everything else reads `Config.stages`
    a storage type         `plan._DTYPES`. Copies, layouts and sizes follow from the item size; of
                           two bytes only are the loads of `join.weigh_parts`, the lines that it
                           drops, and the operands of the products (`walk._scores`, `_accumulate`):
                           wgmma multiplies 16-bit floats, others must be converted on the way
    a mode                 `plan.Mode` and `Shape.mode`, its roles in `walk._WAYS`, what they take
                           of shared memory in `plan.smem_bytes`
"""

import functools

import jax
import jax.numpy as jnp

from mlra_jax.kernels import target
from mlra_jax.kernels.absorbed_decode.mosaic_gpu import join, schedule, walk
from mlra_jax.kernels.absorbed_decode.mosaic_gpu.plan import (
    Config,
    Parts,
    Shape,
    candidates,
    heuristic,
    leaves_parts,
    supports,
)
from mlra_jax.kernels.absorbed_decode.problem import Problem

__all__ = [
    "Config",
    "Parts",
    "absorbed_decode",
    "candidates",
    "heuristic",
    "leaves_parts",
    "supports",
]


# A function of its own in a program, so that all layers compile one.
@functools.partial(jax.jit, static_argnames=("scale", "config", "in_parts"))
@target.int32_indices
def absorbed_decode(
    q_BTLHC: jax.Array | None,
    q_rope_BTGHR: jax.Array,
    latents_BSLC: jax.Array,
    k_rope: jax.Array,
    lengths_BT: jax.Array,
    starts_B: jax.Array,
    *,
    scale: float,
    config: Config,
    in_parts: bool = False,
) -> tuple[jax.Array, jax.Array] | Parts:
    """Softmax attention over the latents; arguments as `api.absorbed_decode` normalises them.

    The cache must be finite wherever a tile may reach (up to `Config.block` positions beyond the
    length): hidden scores are replaced, but hidden values are multiplied by a weight of zero.

    Returns:
      out_BTLHC in the dtype of the queries, and lse_BTLH in float32 (natural logarithm), or what
      the second launch would make them of.
    """
    B, T, _, H, _ = q_rope_BTGHR.shape
    S, L, C = latents_BSLC.shape[1:]
    shape = Shape(Problem.of(q_BTLHC, q_rope_BTGHR, latents_BSLC, k_rope), config)

    def as_rows(x_BTNHX):
        # For one query or one latent this only renames dimensions.
        N, X = x_BTNHX.shape[2], x_BTNHX.shape[4]
        x_BNRX = jnp.swapaxes(x_BTNHX, 1, 2).reshape(B, N, T * H, X)
        return jnp.pad(x_BNRX, ((0, 0), (0, 0), (0, shape.rows - T * H), (0, 0)))

    bounds = (lengths_BT, starts_B)
    if B > 1:
        bounds += (schedule.table(shape, lengths_BT, starts_B),)
    queries = [as_rows(q) for q in (q_BTLHC, q_rope_BTGHR) if q is not None]
    cache = latents_BSLC.reshape(B, S, L * C), k_rope.reshape(B, S, -1)
    parts, lses = walk.launch(shape, float(scale))(*queries, *cache, *bounds)
    if in_parts:
        return Parts(parts, lses, bounds, shape)
    out_BLRC, lse_BLR = join.launch(shape)(parts, lses, *bounds)
    out_BTLHC = jnp.swapaxes(out_BLRC[..., :C].reshape(B, L, T, H, C), 1, 2)
    lse_BTLH = jnp.swapaxes(lse_BLR.reshape(B, L, T, H), 1, 2)
    return out_BTLHC, lse_BTLH
