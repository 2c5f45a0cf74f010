"""The decoder: embedding, blocks of attention and SwiGLU, tied output head."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from mlra_jax import sharding
from mlra_jax.attention import MODULES
from mlra_jax.cache import Cache
from mlra_jax.config import ModelConfig
from mlra_jax.layers import INIT_STDDEV, RMSNorm, SwiGLU, param, precision


class Block(nnx.Module):
    """`x += attention(norm(x))`, then `x += mlp(norm(x))`."""

    def __init__(self, config: ModelConfig, *, mesh: Mesh, rngs: nnx.Rngs):
        self.mesh = mesh
        self.attention_norm = RMSNorm(config.embed_dim, config=config, rngs=rngs)
        self.attention = MODULES[type(config.attention)](config, mesh=mesh, rngs=rngs)
        self.mlp_norm = RMSNorm(config.embed_dim, config=config, rngs=rngs)
        self.mlp = SwiGLU(config, mesh=mesh, rngs=rngs)

    def __call__(self, x_BTD, positions_BT):
        return self._rest(x_BTD, self.attention(self.attention_norm(x_BTD), positions_BT))

    def prefill(self, x_BTD, positions_BT):
        y_BTD, entries = self.attention.prefill(self.attention_norm(x_BTD), positions_BT)
        return self._rest(x_BTD, y_BTD), entries

    def decode(self, x_BTD, positions_BT, cache, length, starts_B):
        y_BTD, cache = self.attention.decode(
            self.attention_norm(x_BTD), positions_BT, cache, length, starts_B
        )
        return self._rest(x_BTD, y_BTD), cache

    def _rest(self, x_BTD, y_BTD):
        x_BTD = self._stream(x_BTD + y_BTD)
        return self._stream(x_BTD + self.mlp(self.mlp_norm(x_BTD)))

    def _stream(self, x_BTD):
        return sharding.constrain(x_BTD, self.mesh, "batch", "length", None)


class Embedding(nnx.Module):
    """Token vectors, and the output head that is the same tensor."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.embedding = param(
            rngs,
            nnx.initializers.normal(INIT_STDDEV),
            (config.vocab_size, config.embed_dim),
            ("vocab", "embed"),
            config.param_dtype,
        )


class Model(nnx.Module):
    """A decoder over `mesh` (by default one device).

    `rngs` seeds the weights. Built under `jax.eval_shape` or `jax.jit` it costs nothing or is made
    in place: see `create`. For training the blocks are one stack, scanned over; for decoding
    `unstacked` takes them apart, so that no step has to slice a stack.

    `tokenizer` is the name of the one it was trained with, if known; ids from `num_tokens` on are
    padding of the vocabulary and never sampled.

    Raises ConfigError when the sizes do not divide over the mesh.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, mesh: Mesh | None = None):
        self.config = config
        self.mesh = mesh = sharding.make_mesh() if mesh is None else mesh
        self.tokenizer: str | None = None
        self.num_tokens = config.vocab_size
        self.embed = Embedding(config, rngs=rngs)
        self.final_norm = RMSNorm(config.embed_dim, config=config, rngs=rngs)

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layer"})
        def make_blocks(rngs):
            return Block(config, mesh=mesh, rngs=rngs)

        self.layers = make_blocks(rngs)

    def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array | None = None) -> jax.Array:
        """int32 tokens `[B, T]` -> float32 logits `[B, T, V]`; positions count from 0."""
        return _logits(self, tokens_BT, positions_BT)

    def hidden(self, tokens_BT: jax.Array, positions_BT: jax.Array | None = None) -> jax.Array:
        """The last block's output after the final norm, `[B, T, D]` in the compute dtype."""
        x_BTD = self._embed(tokens_BT)
        positions_BT = _positions(tokens_BT) if positions_BT is None else positions_BT
        if isinstance(self.layers, Block):
            graphdef, stacked = nnx.split(self.layers)

            def body(x, layer):
                return nnx.merge(graphdef, layer)(x, positions_BT), None

            body = jax.checkpoint(body) if self.config.remat else body
            x_BTD, _ = jax.lax.scan(body, x_BTD, stacked)
        else:
            for block in self.layers:
                x_BTD = block(x_BTD, positions_BT)
        return self.final_norm(x_BTD)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """float32 `[B, T, V]` from `hidden`'s output, split over the vocabulary."""
        logits_BTV = jnp.einsum(
            "btd,vd->btv",
            x_BTD,
            self.embed.embedding[...].astype(x_BTD.dtype),
            precision=precision(x_BTD.dtype),
            preferred_element_type=jnp.float32,
        )
        return sharding.constrain(logits_BTV, self.mesh, "batch", "length", "vocab")

    def unstack(self) -> None:
        """Takes the stack of blocks apart, in place, parameter by parameter, for decoding.

        Holds no more than one parameter twice; arrays of the stack are gone afterwards.
        """
        if not isinstance(self.layers, Block):
            return
        graphdef, stacked = nnx.split(self.layers)
        layers = [[] for _ in range(self.config.num_layers)]
        for path, stack in nnx.to_flat_state(stacked):
            axes = stack.get_metadata()["out_sharding"][1:]
            for layer, value in zip(layers, _take_apart(stack[...], self.mesh, axes), strict=True):
                variable = stack.replace(value)
                variable.set_metadata(out_sharding=axes)
                layer.append((path, variable))
        self.layers = nnx.List(
            [nnx.merge(graphdef, nnx.from_flat_state(layer)) for layer in layers]
        )

    def prefill(self, tokens_BT: jax.Array) -> tuple[jax.Array, Sequence[dict[str, jax.Array]]]:
        """Like `hidden`, and each layer's cache entries. Needs unstacked layers."""
        x_BTD, positions_BT = self._embed(tokens_BT), _positions(tokens_BT)
        entries = []
        for block in self.layers:
            x_BTD, entry = block.prefill(x_BTD, positions_BT)
            entries.append(entry)
        return self.final_norm(x_BTD), entries

    def decode(self, tokens_BT: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """`T` more tokens after those in the cache -> (logits `[B, T, V]`, the cache with them).

        The cache must have room for them. Needs unstacked layers; meant for `jax.jit` with the
        cache donated, so that it is changed in place.
        """
        x_BTD = self._embed(tokens_BT)
        slots_T = cache.length + jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)
        positions_BT = slots_T - cache.starts[:, None]
        layers = []
        for block, layer in zip(self.layers, cache.layers, strict=True):
            x_BTD, layer = block.decode(x_BTD, positions_BT, layer, cache.length, cache.starts)
            layers.append(layer)
        cache = Cache(tuple(layers), cache.length + tokens_BT.shape[1], cache.starts)
        return self.logits(self.final_norm(x_BTD)), cache

    def _embed(self, tokens_BT):
        # Gathered over the devices that split the batch: their tokens' vectors would be far more.
        table_VD = self.embed.embedding[...].astype(self.config.dtype)
        table_VD = sharding.constrain(table_VD, self.mesh, "vocab", None)
        x_BTD = jnp.take(table_VD, tokens_BT, axis=0)
        return sharding.constrain(x_BTD, self.mesh, "batch", "length", None)


@nnx.jit
def _logits(model, tokens_BT, positions_BT):
    return model.logits(model.hidden(tokens_BT, positions_BT))


def _positions(tokens_BT: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)


def _take_apart(stack, mesh, axes):
    if isinstance(stack, jax.core.Tracer):
        return list(stack)
    parts = jax.jit(lambda x: list(x), out_shardings=sharding.named(mesh, *axes))(stack)
    stack.delete()
    return parts


def abstract_state(config: ModelConfig, mesh: Mesh, *, unstacked: bool = False) -> tuple:
    """(graphdef, state): the model's structure and its parameters as sharded shapes; costs nothing.

    Raises ConfigError when the sizes do not divide over the mesh.
    """
    model = nnx.eval_shape(lambda: _make(config, mesh, jax.random.key(0), unstacked))
    graphdef, state = nnx.split(model)
    shardings = sharding.state_shardings(state, mesh)
    shapes = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
    )
    return graphdef, shapes


def create(config: ModelConfig, mesh: Mesh, *, seed: int = 0) -> Model:
    """A model with fresh weights made where they belong: no device ever holds a whole one."""
    _, shapes = abstract_state(config, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, shapes)
    make = jax.jit(lambda key: nnx.state(_make(config, mesh, key, False)), out_shardings=shardings)
    return from_state(config, mesh, make(jax.random.key(seed)))


def from_state(config: ModelConfig, mesh: Mesh, state: nnx.State) -> Model:
    """A model around given parameters (stacked layers)."""
    graphdef, _ = abstract_state(config, mesh)
    return nnx.merge(graphdef, state)


def _make(config, mesh, key, unstacked):
    model = Model(config, rngs=nnx.Rngs(key), mesh=mesh)
    if unstacked:
        model.unstack()
    return model
