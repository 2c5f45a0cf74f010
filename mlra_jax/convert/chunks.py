"""How leaves are cut into chunks on disk, so that each device of a mesh reads its own bytes."""

import math
from collections.abc import Mapping

from flax import nnx

from mlra_jax import sharding
from mlra_jax.config import ModelConfig
from mlra_jax.model import Model

DEFAULT_WAYS = 8
# Smaller chunks cost more files and waiting than reading them several times does.
MIN_CHUNK = 1 << 18


def chunk_shapes(
    config: ModelConfig, mesh: Mapping[str, int] | None = None
) -> dict[str, tuple[int, ...]]:
    """The chunk shape of every leaf, by its dotted path: one layer, and one device's part of it.

    Without a mesh, dimensions that `tensor` or `context` may split are cut into 8 parts, or as many
    as divide them: such chunks serve every smaller mesh of these axes as well. Layers of fewer than
    `MIN_CHUNK` numbers stay whole.

    Args:
      config: the model.
      mesh: axis name to size; axes that are not named are 1.

    Raises:
      ConfigError: no such axis, or the mesh does not divide a parameter.
    """
    mesh = None if mesh is None else sharding.all_axes(mesh)
    state = nnx.state(nnx.eval_shape(lambda: Model(config, rngs=nnx.Rngs(0))))
    shapes = {}
    for path, variable in nnx.to_flat_state(state):
        name = ".".join(map(str, path))
        axes = variable.get_metadata().get("out_sharding") or (None,) * len(variable.shape)
        if mesh is not None:
            sharding.check_divides(name, variable.shape, axes, mesh)
        chunk = []
        dimensions = list(zip(variable.shape, axes, sharding.mesh_axes(*axes), strict=True))
        small = math.prod(n for n, logical, _ in dimensions if logical != "layer") < MIN_CHUNK
        for length, logical, split in dimensions:
            if logical == "layer":
                chunk.append(1)
            elif mesh is None and small:
                chunk.append(length)
            elif mesh is None:
                ways = math.gcd(length, DEFAULT_WAYS) if split == sharding.MODEL else 1
                chunk.append(length // ways)
            else:
                chunk.append(length // math.prod(mesh[axis] for axis in split))
        shapes[name] = tuple(chunk)
    return shapes


def nested(flat: Mapping[str, object]) -> dict:
    """A tree of dicts from dotted paths."""
    tree: dict = {}
    for path, value in flat.items():
        *outer, last = path.split(".")
        node = tree
        for key in outer:
            node = node.setdefault(key, {})
        node[last] = value
    return tree
