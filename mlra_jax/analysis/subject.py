"""What is looked into: a checkpoint or a fresh model, one block at a time, and its softmaxes."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mlra_jax import checkpoints, sharding
from mlra_jax import model as models
from mlra_jax.attention.base import Attention
from mlra_jax.command import Parser
from mlra_jax.config import Execution, ModelConfig, preset
from mlra_jax.kernels.softmax import precision
from mlra_jax.layers import RMSNorm
from mlra_jax.model import Block, Embedding
from mlra_jax.settings_tree import ConfigError
from mlra_jax.storage import paths
from mlra_jax.storage.paths import AnyPath


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model of which one block exists at a time."""

    name: str
    config: ModelConfig
    embed: Embedding
    final_norm: RMSNorm
    block: Callable[[int], Block]
    """The block of a layer, numbered from 0."""
    in_dtype: Callable[[str], "Subject"]
    """The same weights with products in another dtype."""
    tokenizer: str | None = None

    def tokens(self, rows: int, length: int, seed: int = 0) -> np.ndarray:
        """Random ids, int32 `[rows, length]`, none twice in a row where there are enough."""
        rng, size = np.random.default_rng(seed), self.config.vocab_size
        row = lambda: rng.choice(size, length, replace=length > size)
        return np.stack([row() for _ in range(rows)]).astype(np.int32)


def fresh(
    name: str,
    config: ModelConfig,
    *,
    dtype: str = "float32",
    seed: int = 0,
    attention: type[Attention] | None = None,
) -> Subject:
    """A model as it begins, every block made when it is asked for.

    Args:
      name: for tables and figures.
      config: its sizes; how it is computed is not asked.
      dtype: of the products.
      seed: of the weights.
      attention: another class than the mechanism's own.
    """
    config, mesh = _computed_in(dtype, config), sharding.make_mesh()
    at = lambda place: nnx.Rngs(jax.random.fold_in(jax.random.key(seed), place))

    def block(layer: int) -> Block:
        return Block(config, mesh=mesh, rngs=at(layer), attention=attention)

    return Subject(
        name=name,
        config=config,
        embed=Embedding(config, mesh=mesh, rngs=at(config.num_layers)),
        final_norm=RMSNorm(config.embed_dim, config=config, rngs=at(config.num_layers)),
        block=block,
        in_dtype=lambda other: fresh(name, config, dtype=other, seed=seed, attention=attention),
    )


def opened(checkpoint: str | Path, step: int | None = None) -> Subject:
    """The model of a training run's or a converted checkpoint, on one device, in float32.

    Raises CheckpointError where it is missing or damaged.
    """
    found = checkpoints.open_checkpoint(checkpoint, step)
    _, shapes = models.structure(found.model, sharding.make_mesh())
    params = found.restore("params", shapes)
    return of_params(Path(checkpoint).absolute().name, found.model, params, found.tokenizer)


def of_params(
    name: str,
    config: ModelConfig,
    params: dict,
    tokenizer: str | None = None,
    dtype: str = "float32",
) -> Subject:
    """A model whose parameters are there, as a nested dict with its layers stacked."""
    config = _computed_in(dtype, config)
    definition, _ = models.structure(config, sharding.make_mesh())
    model = nnx.merge(definition, params)
    of_block, stacked = nnx.split(model.layers)

    def block(layer: int) -> Block:
        return nnx.merge(of_block, jax.tree.map(lambda x: x[layer], stacked))

    return Subject(
        name=name,
        config=config,
        embed=model.embed,
        final_norm=model.final_norm,
        block=block,
        in_dtype=lambda other: of_params(name, config, params, tokenizer, other),
        tokenizer=tokenizer,
    )


def _computed_in(dtype: str, config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(config, execution=Execution(dtype=dtype, remat=False))


def presets(names: str, **changes) -> dict[str, ModelConfig]:
    """The models of `NAME,NAME,...`; output projections are random, or a block would do nothing.

    Raises ConfigError for an unknown name.
    """
    wanted = [name for name in names.split(",") if name]
    if not wanted:
        raise ConfigError("--preset is empty; name a preset, as in --preset=mlra_4")
    return {name: preset(name, **changes) for name in wanted}


def add_flags(parser: Parser) -> None:
    """`--checkpoint` with `--step`, or `--preset`; `--layers` and `--output`."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", help="training run or converted checkpoint")
    what.add_argument("--preset", help="fresh models of these names, joined by commas")
    add_common_flags(parser)


def add_common_flags(parser: Parser) -> None:
    """`--step`, `--layers` and `--output`."""
    parser.add_argument("--step", type=int, help="of the checkpoint (default: the latest)")
    parser.add_argument("--layers", type=positive, help="only the first so many")
    parser.add_argument("--output", help="folder for the numbers (JSON) and figures")


def parse(parser: Parser, argv: list[str] | None):
    """The flags of `add_flags` and others, refused where one would not be heeded."""
    flags = parser.parse_args(argv)
    if flags.preset is not None and flags.step is not None:
        parser.error("--step is of a checkpoint; a fresh model has none")
    return flags


def output_folder(path: str | None) -> AnyPath | None:
    """The folder of `--output`, made before anything is measured.

    Raises ConfigError where a file is in the way.
    """
    if path is None:
        return None
    try:
        folder = paths.path(path)
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(f"--output={path} is a file or lies in one; name a folder") from None
    return folder


def positive(text: str) -> int:
    """A flag's whole number from 1 on."""
    if (number := int(text)) < 1:
        raise ValueError(text)
    return number


class Scores(NamedTuple):
    """Scaled scores in their two parts, float32 `[B, P, T, S]`; their sum goes to the softmax."""

    nope: jax.Array
    rope: jax.Array

    @property
    def whole(self) -> jax.Array:
        return self.nope + self.rope


def scores(attention: Attention, q_BTPK: jax.Array, k_BTJK: jax.Array) -> Scores:
    """The scores of all queries and keys of `attention.operands`."""
    P, J, R = q_BTPK.shape[2], k_BTJK.shape[2], attention.config.rope_dim
    k_BTPK = jnp.repeat(k_BTJK, P // J, axis=2)

    def product(part):
        return attention.scale * jnp.einsum(
            "btpk,bspk->bpts",
            q_BTPK[..., part],
            k_BTPK[..., part],
            precision=precision(q_BTPK.dtype),
            preferred_element_type=jnp.float32,
        )

    return Scores(product(slice(None, -R)), product(slice(-R, None)))


def softmax(scores_BPTS: jax.Array, first_B: jax.Array | int = 0) -> jax.Array:
    """Weights of the slots from each row's first on, up to the query's own; float32."""
    slot = jnp.arange(scores_BPTS.shape[-1])
    visible = (slot <= slot[:, None]) & (slot >= jnp.reshape(first_B, (-1, 1, 1)))
    # A slot before the first sees itself: what it gives is not looked at, and must be finite.
    visible |= slot == slot[:, None]
    return jax.nn.softmax(jnp.where(visible[:, None], scores_BPTS, -jnp.inf), axis=-1)


def weighted(weights_BPTS: jax.Array, v_BTJV: jax.Array) -> jax.Array:
    """`[B, T, P, V]`: what the weights take of the values."""
    v_BTPV = jnp.repeat(v_BTJV, weights_BPTS.shape[1] // v_BTJV.shape[2], axis=2)
    weights_BPTS = weights_BPTS.astype(v_BTJV.dtype)
    return jnp.einsum("bpts,bspv->btpv", weights_BPTS, v_BTPV, precision=precision(v_BTJV.dtype))
