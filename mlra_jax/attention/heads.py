"""How heads, and the features that heads share, are dealt to the devices."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mlra_jax import sharding
from mlra_jax.config import ConfigError


def check_heads(num_heads: int, mesh: Mesh) -> None:
    """Raises ConfigError when the query heads do not divide over the mesh."""
    sharding.check_divides("query heads", (num_heads,), ("heads",), mesh.shape)


def feature_axis(mesh: Mesh, width: int) -> str:
    """Logical axis of a kernel's features that all heads share.

    They are split over the devices that split the heads, where they divide, so that no device
    stores what another one stores.
    """
    return "kv_heads" if width % sharding.size(mesh, sharding.MODEL) == 0 else "head_dim"


def kv_axes(mesh: Mesh, num_kv_heads: int, width: int) -> tuple[str | None, str]:
    """Logical axes of a kernel's key/value heads: split by head, else within each head."""
    if num_kv_heads % sharding.size(mesh, sharding.MODEL) == 0:
        return "kv_heads", "head_dim"
    return None, feature_axis(mesh, width)


def whole_heads(x_BTJK: jax.Array, axes: tuple[str | None, str], mesh: Mesh) -> jax.Array:
    """Key/value heads as a kernel with these `axes` made them, features gathered.

    Named as the kernel is split first: else XLA would gather the kernel instead.
    """
    x_BTJK = sharding.constrain(x_BTJK, mesh, "batch", "length", *axes)
    return sharding.constrain(x_BTJK, mesh, "batch", "length", axes[0], "head_dim")


def gathered(x_BTQ: jax.Array, axis: str, mesh: Mesh) -> jax.Array:
    """A narrow projection whole on every device, its kernel's columns split along `axis`.

    Gathered before its norm, whose statistics would cost another exchange. Named as the kernel is
    split first: else XLA would gather the kernel instead.
    """
    x_BTQ = sharding.constrain(x_BTQ, mesh, "batch", "length", axis)
    return sharding.constrain(x_BTQ, mesh, "batch", "length", None)


def repeat_for_mesh(x_BTJK: jax.Array, mesh: Mesh) -> jax.Array:
    """Key/value heads repeated until they divide over the mesh, for `sharded.whole_sequence`.

    Query heads that divide over the mesh and among the J heads divide among the repeated ones too.
    """
    J, ways = x_BTJK.shape[2], sharding.size(mesh, sharding.MODEL)
    x_BTJK = jnp.repeat(x_BTJK, math.lcm(J, ways) // J, axis=2)
    return sharding.constrain(x_BTJK, mesh, "batch", "length", "kv_heads", "head_dim")


@dataclasses.dataclass(frozen=True)
class HeldHeads:
    """Which key/value heads each of `tensor` devices keeps: those that its query heads read.

    Device `t` has the query heads `t*H/tensor ... (t+1)*H/tensor - 1` and keeps `each` key/value
    heads from `t*J // tensor` on. Where neither of J and `tensor` divides the other, neighbours
    keep a head in common (J=6 over 4 devices: heads 0 1 | 1 2 | 3 4 | 4 5). Raises ConfigError when
    the query heads do not divide.
    """

    num_heads: int
    num_kv_heads: int
    tensor: int

    def __post_init__(self):
        if self.num_heads % self.tensor:
            raise ConfigError(
                f"{self.num_heads} query heads do not divide over tensor={self.tensor} devices; "
                f"use tensor={math.gcd(self.num_heads, self.tensor)} and put the rest on the "
                "context axis"
            )

    @property
    def _even(self) -> bool:
        """Each key/value head that a device keeps serves as many of its query heads."""
        return self.num_kv_heads % self.tensor == 0 or self.tensor % self.num_kv_heads == 0

    @functools.cached_property
    def _read(self) -> np.ndarray:
        """`[tensor, H / tensor]`: the key/value head that each of a device's query heads reads."""
        group = self.num_heads // self.num_kv_heads
        return np.arange(self.num_heads).reshape(self.tensor, -1) // group

    @property
    def each(self) -> int:
        """Key/value heads on one device."""
        return int((self._read[:, -1] - self._read[:, 0]).max()) + 1

    def spread(self, x_BTJK: jax.Array) -> jax.Array:
        """`[B, T, tensor * each, K]`: the heads of device 0, of device 1 and so on."""
        if self.num_kv_heads % self.tensor == 0:
            return x_BTJK
        kept = self._read[:, :1] + np.arange(self.each)
        return jnp.take(x_BTJK, np.minimum(kept, self.num_kv_heads - 1).ravel(), axis=2)

    def by_held_head(self, q_BThK: jax.Array) -> jax.Array:
        """A device's queries `[B, T, H/tensor, K]` as `[B, T, each, G, K]`.

        Where the heads it keeps serve unequal numbers of queries, each is asked all of them:
        reading the cache takes longer than the products.
        """
        B, T, h, K = q_BThK.shape
        if self._even:
            return q_BThK.reshape(B, T, self.each, h // self.each, K)
        return jnp.broadcast_to(q_BThK[:, :, None], (B, T, self.each, h, K))

    def by_query_head(self, x_BTJG: jax.Array, device: jax.Array) -> jax.Array:
        """The reverse, for what came out for each: `[B, T, each, G, ...]` as `[B, T, h, ...]`."""
        B, T, J, G = x_BTJG.shape[:4]
        if self._even:
            return x_BTJG.reshape(B, T, J * G, *x_BTJG.shape[4:])
        kept_h = jnp.asarray(self._read - self._read[:, :1])[device]
        return x_BTJG[:, :, kept_h, jnp.arange(G)]


def held_copies(heads: int, tensor: int) -> int:
    """Cached latent heads stored when `heads` of them are split over `tensor` devices.

    Where there are fewer heads than devices several hold each head, and the array repeats it.
    Raises ConfigError when neither number divides the other.
    """
    if heads % tensor and tensor % heads:
        raise ConfigError(
            f"{heads} latent heads and tensor={tensor} devices: one must divide the other; "
            f"use tensor={math.gcd(heads, tensor)} and put the rest on the context axis"
        )
    return max(heads, tensor)
