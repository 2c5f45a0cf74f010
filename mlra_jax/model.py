"""The training form of a decoder: embedding, stacked blocks of attention and SwiGLU, tied head."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mlra_jax import remat, sharding
from mlra_jax.attention import mechanism
from mlra_jax.config import ModelConfig
from mlra_jax.layers import INIT_STDDEV, RMSNorm, SwiGLU, on_gpus, param, weigh
from mlra_jax.overlap import ByCopies


class Block(nnx.Module):
    """`x += attention(norm(x))`, then `x += mlp(norm(x))`.

    `attention` and `mlp` are classes; by default those of the training form.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        mesh: Mesh,
        rngs: nnx.Rngs,
        attention: type[nnx.Module] | None = None,
        mlp: type[nnx.Module] = SwiGLU,
    ):
        self.mesh = mesh
        attention = attention or mechanism(config.attention)
        self.attention_norm = RMSNorm(config.embed_dim, config=config, rngs=rngs)
        self.attention = attention(config, mesh=mesh, rngs=rngs)
        self.mlp_norm = RMSNorm(config.embed_dim, config=config, rngs=rngs)
        self.mlp = mlp(config, mesh=mesh, rngs=rngs)

    def __call__(self, x_BTD, positions_BT):
        if sharding.copies_heads(self.mesh):
            return self._by_copies(x_BTD, positions_BT)
        return self._rest(x_BTD, self.attention(self.attention_norm(x_BTD), positions_BT))

    def _by_copies(self, x_BTD, positions_BT):
        own, of_mlp = (ByCopies(self.mesh, module) for module in (self.attention, self.mlp))
        y = own.spread(self.attention_norm(x_BTD))
        # The MLP's gradients are made before attention's: two of them hide its exchanges.
        self.attention.exchanges = self.mlp.exchanges = of_mlp
        x_BTD = self._stream(x_BTD + self.attention(y, positions_BT))
        x_BTD = self._stream(x_BTD + self.mlp(of_mlp.spread(self.mlp_norm(x_BTD))))
        del self.attention.exchanges, self.mlp.exchanges  # Those of this call.
        return x_BTD

    def prefill(self, x_BTD, positions_BT):
        y_BTD, entries = self.attention.prefill(self.attention_norm(x_BTD), positions_BT)
        return self._rest(x_BTD, y_BTD), entries

    def extend(self, x_BTD, positions_BT, cache, lengths_B, over=None):
        y_BTD, cache = self.attention.extend(
            self.attention_norm(x_BTD), positions_BT, cache, lengths_B, over
        )
        return self._rest(x_BTD, y_BTD), cache

    def _rest(self, x_BTD, y_BTD):
        x_BTD = self._stream(x_BTD + y_BTD)
        return self._stream(x_BTD + self.mlp(self.mlp_norm(x_BTD)))

    def _stream(self, x_BTD):
        return sharding.constrain(x_BTD, self.mesh, "batch", "length", None)


TABLE = ("vocab", "embed")
"""Logical axes of the token vectors."""


def logits(x_BTD: jax.Array, table_VD: jax.Array, mesh: Mesh) -> jax.Array:
    """float32 `[B, T, V]`, split over the vocabulary."""
    logits_BTV = weigh(x_BTD, table_VD, "btd,vd->btv", "float32")
    return sharding.constrain(logits_BTV, mesh, "batch", "length", "vocab")


class Embedding(nnx.Module):
    """Token vectors, and the output head that is the same tensor."""

    apart = False
    """As of `layers.SummedProjection`: whether each device gives the vectors of its own tokens."""

    def __init__(self, config: ModelConfig, *, mesh: Mesh, rngs: nnx.Rngs):
        how = config.execution
        self.mesh, self.dtype = mesh, "float32" if how.float32_stream else how.dtype
        self.embedding = param(
            rngs,
            nnx.initializers.normal(INIT_STDDEV),
            (config.vocab_size, config.embed_dim),
            TABLE,
            config.param_dtype,
        )

    def __call__(self, tokens_BT: jax.Array, given: jax.Array | None = None) -> jax.Array:
        """`[B, T, D]` in the dtype of the stream that blocks add to; `given` of `Model.whole`."""
        if self.apart:
            return self._parts(tokens_BT)
        in_parts = sharding.splits(self.mesh, TABLE, sharding.FSDP)
        if given is None and in_parts and on_gpus(self.mesh):
            return self._exchanged(tokens_BT)
        # Not the tokens' vectors: those would be far more.
        table_VD = sharding.gathered(
            self.embedding[...], self.mesh, TABLE, sharding.BATCH, self.dtype, given
        )
        # Cast after the look-up: else gradients of a token seen often are summed in that dtype.
        x_BTD = jnp.take(table_VD, tokens_BT, axis=0).astype(self.dtype)
        return sharding.constrain(x_BTD, self.mesh, "batch", "length", None)

    def _exchanged(self, tokens_BT):
        """Devices look up all tokens in their parts of the table, and send each device its own.

        The whole table would be waited for before the first block; the head, which needs it, is
        the last to read it.
        """
        rows = sharding.kept(("batch", "length"), sharding.FSDP)
        where = lambda *axes: NamedSharding(self.mesh, PartitionSpec(*rows, *axes))
        tokens_BT = jax.lax.with_sharding_constraint(tokens_BT, where())
        x_BTD = jnp.take(self.embedding[...], tokens_BT, axis=0).astype(self.dtype)
        x_BTD = jax.lax.with_sharding_constraint(x_BTD, where(sharding.FSDP))
        return sharding.constrain(x_BTD, self.mesh, "batch", "length", None)

    def _parts(self, tokens_BT):
        def local(tokens_BT, table_vD):
            own_BT = tokens_BT - jax.lax.axis_index(sharding.MODEL) * len(table_vD)
            mine_BT = (own_BT >= 0) & (own_BT < len(table_vD))
            part_BTD = jnp.take(table_vD, own_BT, axis=0, mode="clip").astype(jnp.float32)
            return jnp.where(mine_BT[..., None], part_BTD, 0)[None]

        rows = ("batch", "length")
        return jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(sharding.spec(*rows), sharding.spec("vocab", None)),
            out_specs=sharding.spec("latent", *rows),
            check_vma=False,
        )(tokens_BT, self.embedding[...])

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """float32 `[B, T, V]`, split over the vocabulary."""
        return logits(x_BTD, self.embedding[...], self.mesh)


class Model(nnx.Module):
    """A decoder over `mesh` (by default one device), its blocks one stack that is scanned over.

    `rngs` seeds the weights. Built under `jax.eval_shape` or `jax.jit` it costs nothing or is made
    in place: see `create`. To decode from it, `Decoder.from_model(model)`.

    Raises ConfigError when the sizes do not divide over the mesh.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, mesh: Mesh | None = None):
        self.config = config
        self.mesh = mesh = sharding.make_mesh() if mesh is None else mesh
        self.embed = Embedding(config, mesh=mesh, rngs=rngs)
        self.final_norm = RMSNorm(config.embed_dim, config=config, rngs=rngs)

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layer"})
        def make_blocks(rngs):
            return Block(config, mesh=mesh, rngs=rngs)

        self.layers = make_blocks(rngs)

    def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array | None = None) -> jax.Array:
        """int32 tokens `[B, T]` -> float32 logits `[B, T, V]`; positions count from 0."""
        return _logits(self, tokens_BT, positions_BT)

    def hidden(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        whole: dict[Any, jax.Array] | None = None,
    ) -> jax.Array:
        """The last block's output after the final norm, `[B, T, D]` in the compute dtype.

        `whole` is what the method of that name gave, for several passes with the same weights.
        """
        given = dict(whole or {})
        x_BTD = self.embed(tokens_BT, given.pop(TABLE, None))
        positions_BT = positions(tokens_BT) if positions_BT is None else positions_BT
        graphdef, stacked = nnx.split(self.layers)

        together, how = unrolled(self.config, self.mesh), self.config.execution
        in_loop = together < self.config.num_layers

        def body(x_BTD, layer):
            layer, given = layer
            layer = nnx.map_state(functools.partial(self._as_read, given), layer)
            block = nnx.merge(graphdef, layer)
            return block(remat.name_stream(x_BTD), positions_BT), None

        body = remat.checkpointed(body, how.remat, in_loop=in_loop)
        splits_batch = sharding.size(self.mesh, sharding.BATCH) > 1
        scan = functools.partial(jax.lax.scan, unroll=together)
        # What is not held keeps activations until the end, where they are kept anyway: gradients of
        # vectors, then exchanged all at once, and where engines copy all but those of heads: what
        # a device adds to those when it has received them goes on beside the last copies.
        held = 1
        if self._keeps_all:
            held = 3 if sharding.has_copies(self.mesh) else 2
        in_turn = functools.partial(_in_turn, ready=self._ready, held=held)
        loop = in_turn if splits_batch and not in_loop else scan
        x_BTD, _ = loop(body, x_BTD, (stacked, given))
        return self.final_norm(x_BTD)

    def _as_read(self, given, path, weight: nnx.Variable) -> nnx.Variable:
        """Of one layer, as its products read it."""
        axes = weight.get_metadata()["out_sharding"][1:]  # That of the layers is first.
        kernel = self._padded(weight, axes)
        if self._keeps_all:
            dtype = self.config.execution.dtype
            how = (self.mesh, axes, sharding.BATCH, dtype, given.get(path))
            kernel = sharding.gathered(kernel, *how)
        return weight.replace(kernel)

    def _ready(self, layer):
        """A layer, padded where that is kept: its gradients are then cut where they are used."""
        if not self._keeps_all:
            return layer
        weights, given = layer
        axes = lambda weight: weight.get_metadata()["out_sharding"][1:]
        pad = lambda _, weight: weight.replace(self._padded(weight, axes(weight)))
        return nnx.map_state(pad, weights), given

    def _padded(self, weight, axes):
        return sharding.padded(weight[...], self.mesh, axes, "mlp", product_step(self.mesh))

    @property
    def _keeps_all(self) -> bool:
        """Whether all is kept for the backward pass, and gathered weights too."""
        how, layers = self.config.execution, self.config.num_layers
        return how.remat == "none" and unrolled(self.config, self.mesh) == layers

    def whole(self) -> dict[Any, jax.Array]:
        """Weights of which devices that split the batch have parts, rounded and gathered, by path.

        Nothing where no gathered weight is kept for the backward pass either.
        """
        if not self._keeps_all:
            return {}
        found = {}

        def add(path, array, axes, dtype):
            if sharding.splits(self.mesh, axes, sharding.BATCH):
                found[path] = sharding.whole(array, self.mesh, axes, sharding.BATCH, dtype)

        for path, weight in nnx.to_flat_state(nnx.state(self.layers)):
            axes = weight.get_metadata()["out_sharding"]
            add(path, self._padded(weight, axes), axes, self.config.execution.dtype)
        add(TABLE, self.embed.embedding[...], TABLE, self.embed.dtype)
        return found

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """float32 `[B, T, V]` from `hidden`'s output, split over the vocabulary."""
        return self.embed.logits(x_BTD)


def _in_turn(body, x_BTD, stacked, ready, held):
    """As `jax.lax.scan`, without a loop; each layer is made `ready` beforehand.

    The backward pass goes no further than one block before a block's gradients of `held` or more
    dimensions are where they belong: XLA would put off all of them to its end, and their exchanges
    with nothing to hide them.
    """
    leaves, structure = jax.tree.flatten(stacked)
    rows = [jax.lax.split(leaf, [1] * len(leaf)) for leaf in leaves]
    layers = [structure.unflatten([y[0] for y in row]) for row in zip(*rows, strict=True)]
    layers = [ready(layer) for layer in layers]
    for i, layer in enumerate(layers):
        if i + 1 < len(layers):
            x_BTD, layers[i + 1] = _in_order(held, (x_BTD, layers[i + 1]))
        x_BTD, _ = body(x_BTD, layer)
    return x_BTD, None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_order(held, both):
    """The same; gradients of `held` or more dimensions come before what needs one of them."""
    return both


def _held_first(held, _, slopes):
    leaves, structure = jax.tree.flatten(slopes)
    at = [i for i, leaf in enumerate(leaves) if leaf.ndim >= held]
    first = jax.lax.optimization_barrier([leaves[i] for i in at])
    for i, leaf in zip(at, first, strict=True):
        leaves[i] = leaf
    return (structure.unflatten(leaves),)


_in_order.defvjp(lambda held, both: (both, None), _held_first)


@nnx.jit
def _logits(model, tokens_BT, positions_BT):
    return model.logits(model.hidden(tokens_BT, positions_BT))


def positions(tokens_BT: jax.Array) -> jax.Array:
    """int32 `[B, T]`, counting from 0 in each row."""
    return jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)


def product_step(mesh: Mesh) -> int:
    """What the MLP's width on each device is padded to a multiple of: products of rows that are no
    multiple of 16 bytes take twice the time on GPUs."""
    return 128 if on_gpus(mesh) else 1


def unrolled(config: ModelConfig, mesh: Mesh) -> int:
    """How many blocks the body of the loop over blocks has on the mesh's devices; at most all."""
    asked = config.execution.unroll or (config.num_layers if on_gpus(mesh) else 1)
    return min(asked, config.num_layers)


@functools.lru_cache(maxsize=64)
def structure(config: ModelConfig, mesh: Mesh) -> tuple[nnx.GraphDef, dict]:
    """(definition, parameters) of a model; costs nothing, and the devices need not exist here.

    The parameters are a nested dict, as in a checkpoint, of shapes with dtypes and shardings.
    `nnx.merge(definition, params)` makes the model of such a dict of arrays.

    Raises ConfigError when the sizes do not divide over the mesh.
    """
    return sharding.abstract(lambda: Model(config, mesh=mesh, rngs=nnx.Rngs(0)), mesh)


def fresh_params(config: ModelConfig, mesh: Mesh, seed: int | jax.Array) -> dict:
    """Fresh parameters, a nested dict; under `jax.jit` with shardings, made in their places.

    `seed` is a whole number or a random key.
    """
    return nnx.to_pure_dict(nnx.state(Model(config, mesh=mesh, rngs=nnx.Rngs(seed))))


def create(config: ModelConfig, mesh: Mesh, *, seed: int = 0) -> Model:
    """A model with fresh weights made where they belong: no device ever holds a whole one."""
    definition, shapes = structure(config, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, shapes)
    make = jax.jit(lambda key: fresh_params(config, mesh, key), out_shardings=shardings)
    return nnx.merge(definition, make(jax.random.key(seed)))
