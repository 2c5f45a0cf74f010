"""The decoding form of an attention's input: every projection of it in one matrix.

Each device has its own columns side by side, and with them those that all devices have whole: one
product a device.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from mlra_jax import sharding
from mlra_jax.attention import absorbed, mechanism
from mlra_jax.attention.base import Attention
from mlra_jax.attention.latent import LatentAttention
from mlra_jax.attention.parted import part_columns, parted
from mlra_jax.config import ModelConfig
from mlra_jax.layers import Projection, SummedProjection, summands, weigh


def is_parted(config: ModelConfig, mesh: Mesh) -> bool:
    """Whether the decoding form is that of `parted`."""
    latent = issubclass(mechanism(config.attention), LatentAttention)
    return latent and sharding.size(mesh, sharding.MODEL) > 1


def is_absorbed(config: ModelConfig, mesh: Mesh) -> bool:
    """Whether the decoding form is that of `absorbed`."""
    return is_parted(config, mesh) and absorbed.is_absorbed(config.attention, mesh)


def _apart(config: ModelConfig, mesh: Mesh) -> type[Attention]:
    of_model = mechanism(config.attention)
    if is_absorbed(config, mesh):
        return absorbed.absorbed(of_model)
    return parted(of_model) if is_parted(config, mesh) else of_model


@functools.lru_cache(maxsize=64)
def _kernels(config: ModelConfig, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """`[D, ...]` of the projections that are one matrix, by name, as they would be apart.

    None of them where other mechanisms' weights are split, which want them apart.
    """
    if mesh.size > mesh.shape["data"] and not is_parted(config, mesh):
        return {}
    make = lambda: _apart(config, mesh)(config, mesh=mesh, rngs=nnx.Rngs(0))
    shapes = sharding.abstract(make, mesh)[1]
    names = mechanism(config.attention).input_names(config.attention)
    return {name: shapes[name]["kernel"] for name in names}


def recipe(config: ModelConfig, mesh: Mesh) -> tuple[list[str], Callable[..., jax.Array]]:
    """(names of the projections, what makes the one matrix `[D, N]` of the training form's)."""
    kernels, before, columns = _kernels(config, mesh), 0, []
    for kernel in kernels.values():
        D, *shape = kernel.shape
        numbers = before + np.arange(math.prod(shape)).reshape(shape)
        where = kernel.sharding.devices_indices_map(kernel.shape)
        columns.append([numbers[where[d][1:]].ravel() for d in mesh.devices[0, 0].ravel()])
        before += numbers.size
    columns = np.concatenate(columns, axis=1).ravel()

    def join(*trained):
        by_name = dict(zip(kernels, trained, strict=True))
        if "gate" in kernels and is_parted(config, mesh):
            ways = sharding.size(mesh, sharding.MODEL)
            by_name["gate"] = part_columns(by_name["gate"], config.attention, ways, axis=1)
        flat = [x.reshape(x.shape[0], -1) for x in by_name.values()]
        return jnp.take(jnp.concatenate(flat, axis=1), columns, axis=1)

    return list(kernels), join


@functools.lru_cache(maxsize=64)
def mechanism_of(config: ModelConfig, mesh: Mesh) -> type[Attention]:
    """The mechanism of a decoding step."""
    kernels = _kernels(config, mesh)
    shapes = {name: x.sharding.shard_shape(x.shape)[1:] for name, x in kernels.items()}
    widths, rows = [math.prod(x) for x in shapes.values()], sharding.spec("batch", "length")

    class Joined(_apart(config, mesh)):
        def __init__(self, config, *, mesh, rngs):
            super().__init__(config, mesh=mesh, rngs=rngs)
            self.out = SummedProjection(self.out, mesh)
            for name in kernels:
                delattr(self, name)
            if kernels:
                columns = sharding.size(mesh, sharding.MODEL) * sum(widths)
                self.joined = Projection(
                    (config.embed_dim, columns), ("embed", "latent"), config=config, rngs=rngs
                )

        def inputs(self, x_BTD):
            if not kernels:
                return super().inputs(x_BTD)

            def local(x_BTD, kernel_DN):
                y_BTN = weigh(x_BTD, kernel_DN, "btd,dn->btn")
                parts = jnp.split(y_BTN, np.cumsum(widths)[:-1], axis=-1)
                return {
                    name: part.reshape(*part.shape[:2], *shape)
                    for (name, shape), part in zip(shapes.items(), parts, strict=True)
                }

            specs = {n: PartitionSpec(*rows, *x.sharding.spec[1:]) for n, x in kernels.items()}
            return self._by_device(local, x_BTD, specs)

        def input_summands(self, x_BTD):
            if tuple(kernels) != self.reads:
                return None
            local = functools.partial(summands, num_in=1)
            return self._by_device(local, x_BTD, sharding.spec("latent", "batch", "length"))

        def entry_widths(self):
            return self.asked_widths(sum(widths)) if tuple(kernels) == self.reads else None

        def _by_device(self, product, x_BTD, specs):
            return jax.shard_map(
                product,
                mesh=mesh,
                in_specs=(rows, sharding.spec(None, "latent")),
                out_specs=specs,
                check_vma=False,
            )(x_BTD, self.joined.kernel[...])

    return Joined
