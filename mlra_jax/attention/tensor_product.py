"""TPA: queries, keys and values are means over `rank` outer products of two factors.

`k = A_k B_k / r` with `A_k [H, r]` and `B_k [r, K]`, both projections of the token; likewise values
and, with its own rank, queries. The factors are cached, `2 r (H + K)` values a token, and a step
contracts them one after the other, so that no key or value is ever made.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from mlra_jax import sharding
from mlra_jax.attention import heads, sharded
from mlra_jax.config import ConfigError, ModelConfig, TensorProductConfig
from mlra_jax.kernels.softmax import visible_softmax
from mlra_jax.layers import Projection, output_init, precision, rotate


class TensorProductAttention(nnx.Module):
    def __init__(self, config: ModelConfig, *, mesh: Mesh, rngs: nnx.Rngs):
        a: TensorProductConfig = config.attention
        self.config, self.mesh, self.rope_base = a, mesh, config.rope_base
        heads.check_heads(a.num_heads, mesh)
        D, H, K = config.embed_dim, a.num_heads, a.head_dim
        self.scale = 1 / math.sqrt(K)
        project = functools.partial(Projection, config=config, rngs=rngs)

        self.shared_axes = (None, heads.feature_axis(mesh, K))

        def factors(rank):
            """Projections to A `[H, rank]` and B `[rank, K]`, Xavier-uniform."""
            by_head = project(
                (D, H, rank),
                ("embed", "heads", None),
                init=_uniform(math.sqrt(6 / ((H + D) * rank))),
            )
            shared = project(
                (D, rank, K),
                ("embed", *self.shared_axes),
                init=_uniform(math.sqrt(6 / ((rank + D) * K))),
            )
            return by_head, shared

        self.q_a, self.q_b = factors(a.q_rank)
        self.k_a, self.k_b = factors(a.rank)
        self.v_a, self.v_b = factors(a.rank)
        self.out = project(
            (H, K, D), ("heads", "head_dim", "embed"), num_in=2, init=output_init(config)
        )

    def __call__(self, x_BTD: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """The whole sequence attends to itself; `[B, T, D]` in and out."""
        return self.prefill(x_BTD, positions_BT)[0]

    def prefill(
        self, x_BTD: jax.Array, positions_BT: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """As `__call__`, and what decoding needs to keep: `[B, T, ...]` arrays by name."""
        q_BTHK = self._queries(x_BTD, positions_BT)
        entries = self._entries(x_BTD, positions_BT)
        k_BTHK = self._product(entries["k_a"], entries["k_b"])
        v_BTHK = self._product(entries["v_a"], entries["v_b"])
        o_BTHK = sharded.causal(q_BTHK, k_BTHK, v_BTHK, scale=self.scale, mesh=self.mesh)
        return self._output(o_BTHK), entries

    def decode(
        self, x_BTD: jax.Array, positions_BT: jax.Array, cache: dict, length, starts_B
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """`T` new tokens in slots `length ...`; keys and values are never materialised."""
        o_BTHK, cache = heads.decode_step(
            self._attend,
            self._queries(x_BTD, positions_BT),
            self._entries(x_BTD, positions_BT),
            cache,
            length,
            starts_B,
            cache_axes=self.cache_axes,
            mesh=self.mesh,
        )
        return self._output(o_BTHK), cache

    def _attend(self, q_BThK, cache, lengths_BT, starts_B):
        """q · (A B) = A · (B q): the B factors first, which all heads share."""
        dtype = q_BThK.dtype
        product = dict(preferred_element_type=jnp.float32, precision=precision(dtype))
        scores_BThrS = jnp.einsum("BThK,BSrK->BThrS", q_BThK, cache["k_b"], **product)
        k_a_BhrS = jnp.moveaxis(cache["k_a"], 1, -1)
        scores_BThS = (scores_BThrS * k_a_BhrS[:, None]).sum(axis=3) * self.scale
        weights_BThS, total_BTh, lse_BTh = visible_softmax(scores_BThS, lengths_BT, starts_B)
        v_a_BhrS = jnp.moveaxis(cache["v_a"], 1, -1)
        weights_BThrS = (weights_BThS[:, :, :, None] * v_a_BhrS[:, None]).astype(dtype)
        o_BThK = jnp.einsum("BThrS,BSrK->BThK", weights_BThrS, cache["v_b"], **product)
        return (o_BThK / total_BTh[..., None]).astype(dtype), lse_BTh

    cache_axes = {
        "k_a": ("batch", "cache_length", "cache_latent", None),
        "k_b": ("batch", "cache_length", None, None),
        "v_a": ("batch", "cache_length", "cache_latent", None),
        "v_b": ("batch", "cache_length", None, None),
    }

    @staticmethod
    def cache_shapes(
        a: TensorProductConfig, batch: int, capacity: int, tensor: int
    ) -> dict[str, tuple[int, ...]]:
        """Shapes of what is kept: the factors; B belongs to all heads and so to every device."""
        if a.num_heads % tensor:
            raise ConfigError(
                f"{a.num_heads} heads do not divide over tensor={tensor} devices; use "
                f"tensor={math.gcd(a.num_heads, tensor)} and put the rest on the context axis"
            )
        by_head, shared = (
            (batch, capacity, a.num_heads, a.rank),
            (batch, capacity, a.rank, a.head_dim),
        )
        return {"k_a": by_head, "k_b": shared, "v_a": by_head, "v_b": shared}

    def _entries(self, x_BTD, positions_BT):
        """The factors as cached: keys' B after the rotation, both B already divided by the rank."""
        rank = self.config.rank
        k_b_BTrK = rotate(self._shared(self.k_b, x_BTD), positions_BT, self.rope_base)
        return {
            "k_a": self._by_head(self.k_a(x_BTD)),
            "k_b": k_b_BTrK / rank,
            "v_a": self._by_head(self.v_a(x_BTD)),
            "v_b": self._shared(self.v_b, x_BTD) / rank,
        }

    def _queries(self, x_BTD, positions_BT):
        b_BTrK = rotate(self._shared(self.q_b, x_BTD), positions_BT, self.rope_base)
        return self._product(self._by_head(self.q_a(x_BTD)), b_BTrK / self.config.q_rank)

    def _product(self, a_BTHr, b_BTrK):
        x_BTHK = jnp.einsum("bthr,btrk->bthk", a_BTHr, b_BTrK, precision=precision(a_BTHr.dtype))
        return self._by_head(x_BTHK)

    def _by_head(self, x_BTHK):
        return sharding.constrain(x_BTHK, self.mesh, "batch", "length", "heads", None)

    def _shared(self, projection, x_BTD):
        return heads.whole_heads(projection(x_BTD), self.shared_axes, self.mesh)

    def _output(self, o_BTHK):
        return self.out(self._by_head(o_BTHK))


def _uniform(bound: float):
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
