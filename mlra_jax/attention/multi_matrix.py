"""MFA: wide query heads made from a narrow latent, one key head and one value head."""

import functools
import math

from flax import nnx
from jax.sharding import Mesh

from mlra_jax import sharding
from mlra_jax.attention import heads
from mlra_jax.attention.grouped import GroupedAttention
from mlra_jax.config import ModelConfig, MultiMatrixConfig
from mlra_jax.layers import Projection, RMSNorm, output_init, rotate


class MultiMatrixAttention(GroupedAttention):
    """An MQA whose queries are `RMSNorm(x W_DQ) W_UQ`."""

    def __init__(self, config: ModelConfig, *, mesh: Mesh, rngs: nnx.Rngs):
        a: MultiMatrixConfig = config.attention
        self.mesh, self.rope_base = mesh, config.rope_base
        heads.check_heads(a.num_heads, mesh)
        self.held = self._held(a, sharding.size(mesh, sharding.TENSOR))
        D, H, K, Q = config.embed_dim, a.num_heads, a.head_dim, a.q_latent_dim
        self.scale = 1 / math.sqrt(K)
        project = functools.partial(Projection, config=config, rngs=rngs)
        self.q_down = project((D, Q), ("embed", "q_latent"))
        self.q_norm = RMSNorm(Q, config=config, rngs=rngs)
        self.q_up = project((Q, H, K), ("q_latent", "heads", "head_dim"))
        self.kv_axes = heads.kv_axes(mesh, 1, K)
        self.k = project((D, K), ("embed", self.kv_axes[1]))
        self.v = project((D, K), ("embed", self.kv_axes[1]))
        self.gate = None
        self.out = project(
            (H, K, D), ("heads", "head_dim", "embed"), num_in=2, init=output_init(config)
        )

    @staticmethod
    def _held(a: MultiMatrixConfig, tensor: int) -> heads.HeldHeads:
        return heads.HeldHeads(a.num_heads, 1, tensor)

    def _queries(self, x_BTD, positions_BT):
        # Gathered before the norm, whose statistics would cost another exchange; named as the
        # kernel is split first, else XLA would gather the kernel instead.
        down_BTQ = sharding.constrain(self.q_down(x_BTD), self.mesh, "batch", "length", "q_latent")
        down_BTQ = sharding.constrain(down_BTQ, self.mesh, "batch", "length", None)
        q_BTHK = self.q_up(self.q_norm(down_BTQ))
        q_BTHK = sharding.constrain(q_BTHK, self.mesh, "batch", "length", "heads", "head_dim")
        return rotate(q_BTHK, positions_BT, self.rope_base)

    def _keys_values(self, x_BTD, positions_BT):
        k_BT1K = heads.whole_heads(self.k(x_BTD)[:, :, None], self.kv_axes, self.mesh)
        v_BT1K = heads.whole_heads(self.v(x_BTD)[:, :, None], self.kv_axes, self.mesh)
        return rotate(k_BT1K, positions_BT, self.rope_base), v_BT1K
