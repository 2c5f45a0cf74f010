"""The decoding form of a model: each layer's weights as a step reads them; prefill and step.

A step is bound by reading weights and cache, so weights lie as they are read: layers apart, in the
dtype of the products, the MLP's two widening matrices as one, its width a multiple of what hardware
tiles are, and on one device every projection of an attention's input as one.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from jax.sharding import Mesh

from mlra_jax import cache as kv
from mlra_jax import sharding
from mlra_jax.attention import absorbed, joined, mechanism
from mlra_jax.attention.parted import part_columns
from mlra_jax.config import ModelConfig
from mlra_jax.layers import Projection, RMSNorm, SummedProjection
from mlra_jax.model import Block, Embedding, Model, positions
from mlra_jax.rest_of_layer import Additions, rest_of_layers

_LEAST_ROWS = 8
"""Of a product on a GPU. Measured at batch 1: 9.6 us instead of 23.8 for 3072 x 3072."""
_TILE = 128
"""Columns of the MLP on one device are a multiple of this; what is added is zero."""


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What a checkpoint knows of its tokens."""

    num_tokens: int
    """Ids from here on are padding: never drawn, and no prompt has them."""
    tokenizer: str | None = None
    """The name of the one it was trained with, if known."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["weights"],
    meta_fields=["config", "mesh", "vocabulary"],
)
@dataclasses.dataclass(frozen=True)
class Decoder:
    """A model that decodes. A tree of arrays: jitted functions take it as it is."""

    config: ModelConfig
    mesh: Mesh
    vocabulary: Vocabulary
    weights: dict
    """Nested dict of arrays; `layers` by number."""

    @classmethod
    def from_model(cls, model: Model, vocabulary: Vocabulary | None = None) -> "Decoder":
        """The decoding form of `model`, which stays as it is; all its ids mean something if no
        vocabulary is given."""
        params = nnx.to_pure_dict(nnx.state(model))
        return cls.from_params(model.config, model.mesh, params, vocabulary)

    @classmethod
    def from_params(
        cls,
        config: ModelConfig,
        mesh: Mesh,
        params: dict,
        vocabulary: Vocabulary | None = None,
        *,
        donate: bool = False,
    ) -> "Decoder":
        """From the parameters of the training form, a nested dict of arrays.

        With `donate` they are gone afterwards, and no more than one kind of them is held twice.
        """
        vocabulary = vocabulary or Vocabulary(config.vocab_size)
        return cls(config, mesh, vocabulary, _convert(config, mesh, params, donate))

    def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array | None = None) -> jax.Array:
        """int32 tokens `[B, T]` -> float32 logits `[B, T, V]`; positions count from 0."""
        return _logits(self, tokens_BT, positions_BT)

    def hidden(self, tokens_BT: jax.Array, positions_BT: jax.Array | None = None) -> jax.Array:
        """The last block's output after the final norm, `[B, T, D]` in the compute dtype."""
        form = self._form()
        x_BTD = form.embed(tokens_BT)
        positions_BT = positions(tokens_BT) if positions_BT is None else positions_BT
        for block in form.layers:
            x_BTD = block(x_BTD, positions_BT)
        return form.final_norm(x_BTD)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """float32 `[B, T, V]` from `hidden`'s output, split over the vocabulary."""
        return self._form().embed.logits(x_BTD)

    def prefill(
        self, tokens_BT: jax.Array, lengths_B: jax.Array, capacity: int
    ) -> tuple[jax.Array, kv.Cache]:
        """(logits `[B, V]` after each row's last token, the cache), from right-padded prompts.

        `capacity` is the number of slots, from `cache.round_capacity`.
        """
        form, entries = self._form(), []
        x_BTD, positions_BT = form.embed(tokens_BT), positions(tokens_BT)
        for block in form.layers:
            x_BTD, entry = block.prefill(x_BTD, positions_BT)
            entries.append(self._stored(entry, block.attention.cache_axes, capacity))
        cache = kv.Cache(tuple(entries), lengths_B.astype(jnp.int32))
        return self._after(x_BTD, lengths_B), cache

    def extend(
        self,
        tokens_BT: jax.Array,
        counts_B: jax.Array,
        cache: kv.Cache,
        over: str | None = None,
    ) -> tuple[jax.Array, kv.Cache]:
        """The next `counts[b]` tokens of row `b`, right-padded to T, after those in the cache.

        For a chunk of a long prompt: there is no `[T, S]` matrix, and the same program serves every
        chunk. What is written of the padding is hidden by the lengths and written over later.

        Args:
          tokens_BT: int32.
          counts_B: int32, 0 to T; a row of 0 stays as it is.
          cache: with room for the tokens; donated, it is changed in place.
          over: how the tokens attend to the cache, one of `attention.base.OVER`; by default what
            serves the devices.

        Returns:
          (logits `[B, V]` after each row's last new token, which mean nothing where there is none;
          the cache).
        """
        x_BTD, cache = self._read(tokens_BT, counts_B, cache, over)
        return self._after(x_BTD, counts_B), cache

    def read(self, tokens_BT: jax.Array, cache: kv.Cache) -> tuple[jax.Array, kv.Cache]:
        """As `extend` by T tokens of each row, but `hidden` of all of them, `[B, T, D]`."""
        x_BTD, cache = self._read(tokens_BT, jnp.int32(tokens_BT.shape[1]), cache, None)
        return self._form().final_norm(x_BTD), cache

    def _read(self, tokens_BT, counts_B, cache, over):
        form, layers = self._form(), []
        x_BTD = form.embed(tokens_BT)
        positions_BT = cache.lengths[:, None] + positions(tokens_BT)
        for block, layer in zip(form.layers, cache.layers, strict=True):
            x_BTD, layer = block.extend(x_BTD, positions_BT, layer, cache.lengths, over)
            layers.append(layer)
        return x_BTD, kv.Cache(tuple(layers), cache.lengths + counts_B.astype(jnp.int32))

    def _after(self, x_BTD, counts_B):
        """The logits `[B, V]` after the last of the first `counts[b]` tokens."""
        last_B = jnp.maximum(counts_B - 1, 0)
        last_B1D = jnp.take_along_axis(x_BTD, last_B[:, None, None], axis=1)
        form = self._form()
        return form.embed.logits(form.final_norm(last_B1D))[:, 0]

    def step(self, tokens_BT: jax.Array, cache: kv.Cache) -> tuple[jax.Array, kv.Cache]:
        """T more tokens after those in the cache -> (logits `[B, T, V]`, the cache with them).

        Meant for `jax.jit` with the cache donated, so that it is changed in place. There lengths
        are not known and nothing can be refused: what is beyond a row's last slot is dropped (see
        `Cache`), and the logits of such tokens mean nothing. Outside, ValueError if a row has too
        few free slots.
        """
        if not isinstance(cache.lengths, jax.core.Tracer):
            _check_room(cache, tokens_BT.shape[1])
        form, (B, T), layers = self._form(), tokens_BT.shape, []
        positions_BT = cache.lengths[:, None] + jnp.arange(T, dtype=jnp.int32)
        beyond = ((0, self._rows(B, T) - B), (0, 0))
        positions_BT, tokens_BT = (jnp.pad(x, beyond) for x in (positions_BT, tokens_BT))
        stream = jax.eval_shape(form.embed, tokens_BT)
        summed = [p for block in form.layers for p in (block.attention.out, block.mlp.down)]
        add = Additions(self.mesh, stream, [form.embed, *summed], self.config.vocab_size)
        x, normed = add(None, form.embed(tokens_BT), form.layers[0].attention_norm)
        rest = rest_of_layers(add, form.layers, cache.layers, cache.lengths, positions_BT)
        x = rest.stream(x)
        next_norms = (*(block.attention_norm for block in form.layers[1:]), form.final_norm)
        for i, (layer, next_norm) in enumerate(zip(cache.layers, next_norms, strict=True)):
            attention = form.layers[i].attention
            y, layer = attention.decode(normed, positions_BT, layer, cache.lengths)
            x, normed = rest(i, x, y, next_norm)
            layers.append(layer)
        cache = kv.Cache(tuple(layers), cache.lengths + T)
        return add.whole(form.embed.logits(normed))[:B], cache

    def _rows(self, batch: int, queries: int) -> int:
        """Rows that a step computes: of fewer, XLA makes reductions on GPUs, not products."""
        if sharding.platform(self.mesh) != "gpu" or sharding.size(self.mesh, sharding.BATCH) > 1:
            return batch
        return max(batch, -(-_LEAST_ROWS // queries))

    def _stored(self, entry, cache_axes, capacity):
        shares, layer = sharding.size(self.mesh, sharding.CONTEXT), {}
        for name, axes in cache_axes.items():
            # Whole along the positions first: each device then picks its share by itself.
            whole = sharding.constrain(entry[name], self.mesh, axes[0], "length", *axes[2:])
            stored = kv.from_prompt(whole, capacity, shares)
            layer[name] = sharding.constrain(stored, self.mesh, *axes)
        return layer

    def _form(self) -> "_Form":
        return nnx.merge(_abstract(self.config, self.mesh)[0], self.weights)


def _check_room(cache: kv.Cache, new: int) -> None:
    # The maximum is known to every process, the lengths may not be.
    longest = int(jnp.max(cache.lengths))
    if longest + new > cache.capacity:
        raise ValueError(
            f"the cache has {cache.capacity} slots and a row fills {longest}: no room for {new} "
            "more token(s); prefill with a larger capacity"
        )


@jax.jit
def _logits(decoder, tokens_BT, positions_BT):
    return decoder.logits(decoder.hidden(tokens_BT, positions_BT))


def abstract_decoder(
    config: ModelConfig, mesh: Mesh, vocabulary: Vocabulary | None = None
) -> Decoder:
    """A decoder of sharded shapes, to compile for; costs nothing."""
    vocabulary = vocabulary or Vocabulary(config.vocab_size)
    return Decoder(config, mesh, vocabulary, _abstract(config, mesh)[1])


def abstract_cache(config: ModelConfig, mesh: Mesh, batch: int, capacity: int) -> kv.Cache:
    """A cache of sharded shapes, to compile for; `capacity` is from `cache.round_capacity`."""
    module, tensor = mechanism(config.attention), sharding.size(mesh, sharding.TENSOR)
    layer = {
        name: jax.ShapeDtypeStruct(
            shape, config.execution.dtype, sharding=sharding.named(mesh, *module.cache_axes[name])
        )
        for name, shape in module.cache_shapes(config.attention, batch, capacity, tensor).items()
    }
    lengths = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=sharding.named(mesh))
    return kv.Cache((layer,) * config.num_layers, lengths)


class _Form(nnx.Module):
    """The structure of the weights."""

    def __init__(self, config: ModelConfig, *, mesh: Mesh, rngs: nnx.Rngs):
        attention = joined.mechanism_of(config, mesh)
        block = functools.partial(Block, config, mesh=mesh, rngs=rngs)
        self.embed = Embedding(config, mesh=mesh, rngs=rngs)
        self.layers = nnx.List(
            [block(attention=attention, mlp=_JoinedSwiGLU) for _ in range(config.num_layers)]
        )
        self.final_norm = RMSNorm(config.embed_dim, config=config, rngs=rngs)


class _JoinedSwiGLU(nnx.Module):
    """`SwiGLU` with gate and up as one kernel `[D, 2, F]`; F padded, which changes nothing."""

    def __init__(self, config: ModelConfig, *, mesh: Mesh, rngs: nnx.Rngs):
        self.mesh, D, F = mesh, config.embed_dim, padded_width(config, mesh)
        project = functools.partial(Projection, config=config, rngs=rngs)
        self.gate_up = project((D, 2, F), ("embed", None, "mlp"))
        self.down = SummedProjection(project((F, D), ("mlp", "embed")), mesh)

    def __call__(self, x_BTD):
        y_BT2F = sharding.constrain(self.gate_up(x_BTD), self.mesh, "batch", "length", None, "mlp")
        return self.down(nnx.silu(y_BT2F[:, :, 0]) * y_BT2F[:, :, 1])


def padded_width(config: ModelConfig, mesh: Mesh) -> int:
    """The MLP's width in the decoding form."""
    step = _TILE * sharding.size(mesh, sharding.MODEL)
    return -(-config.mlp_dim // step) * step


@functools.lru_cache(maxsize=64)
def _abstract(config, mesh):
    """(definition, weights as sharded shapes) of a decoder."""
    make = lambda: _Form(config, mesh=mesh, rngs=nnx.Rngs(0))
    definition, shapes = sharding.abstract(make, mesh)

    def as_read(path, x):
        # Norms are computed in float32 and stay as they are stored.
        dtype = x.dtype if path[-1].key == "scale" else jnp.dtype(config.execution.dtype)
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)

    return definition, jax.tree.map_with_path(as_read, shapes)


def _convert(config, mesh, params, donate):
    """The weights, from the training form's parameters with their layers stacked."""
    shapes = _abstract(config, mesh)[1]
    stacked = traverse_util.flatten_dict(params["layers"])
    layers = [{} for _ in range(config.num_layers)]
    for path, like in traverse_util.flatten_dict(shapes["layers"][0]).items():
        sources, join = recipe(path, config, like)
        made = _make([stacked[source] for source in sources], join, [like] * len(layers), donate)
        for layer, weight in zip(layers, made, strict=True):
            layer[path] = weight
    weights = {"layers": {i: traverse_util.unflatten_dict(x) for i, x in enumerate(layers)}}
    for module in ("embed", "final_norm"):
        [(name, like)] = shapes[module].items()
        weights[module] = {name: _make([params[module][name]], lambda x: x, like, donate)}
    return weights


def recipe(path: tuple[str, ...], config: ModelConfig, like: jax.ShapeDtypeStruct):
    """(the training form's parameters, the function that makes the weight `path` of them)."""

    def pad(x, axis):
        missing = [(0, 0)] * x.ndim
        missing[axis] = (0, like.shape[axis] - x.shape[axis])
        return jnp.pad(x, missing)

    mesh = like.sharding.mesh
    ways = sharding.size(mesh, sharding.MODEL)
    match path:
        case ("attention", "q_up", "kernel") if joined.is_absorbed(config, mesh):
            sources = [path, ("attention", "k_up", "kernel")]
            return sources, functools.partial(absorbed.query_recipe, config.attention)
        case ("attention", "out", "kernel") if joined.is_absorbed(config, mesh):
            sources = [path, ("attention", "v_up", "kernel")]
            return sources, functools.partial(absorbed.output_recipe, config.attention, ways)
        case ("attention", "out", "kernel") if joined.is_parted(config, mesh):
            return [path], lambda x: part_columns(x, config.attention, ways, axis=0)
        case ("mlp", "gate_up", "kernel"):
            sources = [("mlp", "gate", "kernel"), ("mlp", "up", "kernel")]
            return sources, lambda gate, up: pad(jnp.stack([gate, up], axis=1), 2)
        case ("mlp", "down", "kernel"):
            return [path], lambda down: pad(down, 0)
        case ("attention", "joined", "kernel"):
            names, join = joined.recipe(config, mesh)
            return [("attention", name, "kernel") for name in names], join
    return [path], lambda x: x


def _make(sources, join, like, donate):
    """`join` of the sources in the dtype and place of `like`; of each layer if that is a list."""
    where = jax.tree.map(lambda x: x.sharding, like)

    def make(sources):
        if not isinstance(like, list):
            return join(*sources).astype(like.dtype)
        return [join(*(x[i] for x in sources)).astype(to.dtype) for i, to in enumerate(like)]

    made = jax.jit(make, out_shardings=where)(sources)
    if donate:
        for x in sources:
            x.delete()
    return made
