"""GQLA's second way to decode (arXiv 2605.15250): keys and values of few heads, made of one latent.

The same weights as those of a `LatentAttention` with as many `num_kv_heads`, which caches the
latent. This one caches the keys and values, as GQA does: more on one device, but split over
several, as a latent is not.
"""

from mlra_jax import sharding
from mlra_jax.attention.from_latents import FromLatents, keys_and_values
from mlra_jax.attention.grouped import GroupedAttention


class GroupedLatentAttention(FromLatents, GroupedAttention):
    """Its methods on latents are `FromLatents`'s, those on what is cached `GroupedAttention`'s."""

    def _add_parameters(self, config, project, rngs):
        super()._add_parameters(config, project, rngs)
        self.held = self._held(config.attention, sharding.size(self.mesh, sharding.TENSOR))

    @classmethod
    def cache_shapes(cls, a, batch, capacity, tensor):
        heads = tensor * cls._held(a, tensor).each
        return {
            "k": (batch, capacity, heads, a.query_dim),
            "v": (batch, capacity, heads, a.value_dim),
        }

    def _entries(self, kept):
        made = keys_and_values(kept["latents"], kept["k_rope"], self.k_up, self.v_up)
        return super()._entries(made)
