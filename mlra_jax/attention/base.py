"""The shape that all mechanisms share.

A mechanism says which projections read a token (`reads`), how queries and what is kept come of
them, and how one device attends to what is cached. Training, prefill and decoding follow.
"""

import abc
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from mlra_jax import sharding
from mlra_jax.attention import heads, sharded
from mlra_jax.attention.blocks import in_blocks, of_keys, of_scores
from mlra_jax.config import AttentionConfig, ModelConfig
from mlra_jax.kernels.chunk_attention import WIDEST, chunk_attention
from mlra_jax.kernels.grouped_decode import grouped_decode
from mlra_jax.layers import Exchanges, Projection, on_gpus, output_init, rotate

Entries = dict[str, jax.Array]
OVER = ("blocks", "cudnn")
"""How many tokens attend to a cache: plain JAX, a block of positions at a time; or cuDNN's fused
attention, of GPUs, to the cache and to themselves."""
Operands = tuple[jax.Array, jax.Array, jax.Array]


class Asked(NamedTuple):
    """An attention's input in a decoding step as what is made of it: the queries `[B, T, H, K]`,
    rotated, and the cache with the new tokens."""

    queries: jax.Array
    cache: Entries

    @property
    def shape(self) -> tuple[int, ...]:
        """The first two dimensions of the input."""
        return self.queries.shape[:2]


class Attention(nnx.Module):
    """`[B, T, D]` in and out. Subclasses add their parameters and what is abstract here."""

    reads: ClassVar[tuple[str, ...]]
    """The projections whose input is the block's; the gate is one more, where there is one."""
    cache_axes: ClassVar[dict[str, tuple[str | None, ...]]]
    """Logical axes of what is cached, by name, beginning with "batch" and "cache_length"."""
    exchanges = Exchanges()
    """Of activations between devices; a block in training sets others for a call."""
    in_parts = False
    """Whether `decode` leaves its answer in each device's parts, for `kernels.after_attention`."""
    rotated: ClassVar[str] = "k_rope"
    """What is cached that turns with the position, in its last `config.rope_dim` values."""

    def __init__(self, config: ModelConfig, *, mesh: Mesh, rngs: nnx.Rngs):
        a = config.attention
        self.config, self.mesh, self.rope_base = a, mesh, config.rope_base
        self.scale, self.kernel = 1 / math.sqrt(a.query_dim), config.execution.attention_kernel
        self.dtype = config.execution.dtype
        heads.check_heads(a.num_heads, mesh)
        project = functools.partial(Projection, config=config, rngs=rngs, mesh=mesh)
        self._add_parameters(config, project, rngs)
        self._add_outputs(config, project)

    def _add_outputs(self, config: ModelConfig, project: Callable[..., Projection]) -> None:
        a = config.attention
        D, H, V = config.embed_dim, a.num_heads, a.value_dim
        if width := gate_width(a):
            self.gate = project((D, H, width), ("embed", "heads", "head_dim"))
        how = dict(num_in=2, init=output_init(config))
        self.out = project((H, V, D), ("heads", "head_dim", "embed"), **how)

    def __call__(self, x_BTD: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """The whole sequence attends to itself."""
        return self.prefill(x_BTD, positions_BT)[0]

    def prefill(self, x_BTD: jax.Array, positions_BT: jax.Array) -> tuple[jax.Array, Entries]:
        """As `__call__`, and what decoding needs to keep: `[B, T, ...]` arrays by name."""
        y = self.inputs(x_BTD)
        kept = self._kept(y, positions_BT)
        o_BTHV = self._whole(y, self._queries(y, positions_BT), kept)
        return self._output(y, o_BTHV), self._entries(kept)

    def decode(
        self,
        x_BTD: jax.Array | Asked,
        positions_BT: jax.Array,
        cache: Entries,
        lengths_B: jax.Array,
    ) -> tuple[jax.Array, Entries]:
        """T new tokens in each row's slots from `lengths[b]` on, over what is cached.

        Rows of `x` beyond those of the cache are computed and mean nothing.

        Returns:
          what `out` makes of the heads' results (`SummedProjection`), or their parts where they
          stay `in_parts`, and the cache.
        """
        rows = lengths_B.shape[0]
        of_cache = lambda tree: jax.tree.map(lambda x: x[:rows], tree)
        if isinstance(x_BTD, Asked):
            y, (q_BTHK, cache), new = {}, x_BTD, {}
        else:
            y, q_BTHK, new, cache = self._enter(x_BTD, positions_BT, cache, lengths_B)
        o_BTHV, cache = sharded.decode_step(
            self._attend,
            self._ask(of_cache(q_BTHK)),
            of_cache(new),
            cache,
            lengths_B,
            cache_axes=self.cache_axes,
            mesh=self.mesh,
            in_parts=self.in_parts,
        )
        if self.in_parts:
            return o_BTHV, cache
        o_BTHV = self._answer(of_cache(y), o_BTHV)
        if rows == 1:
            # Read by the product as often as it needs it, where a pad would be an array.
            o_BTHV = jnp.broadcast_to(o_BTHV, (x_BTD.shape[0], *o_BTHV.shape[1:]))
        else:
            beyond = [(0, x_BTD.shape[0] - rows)] + [(0, 0)] * (o_BTHV.ndim - 1)
            o_BTHV = jnp.pad(o_BTHV, beyond)
        return self._output(y, o_BTHV), cache

    def _enter(self, x_BTD, positions_BT, cache, lengths_B):
        """(`inputs`, queries, entries by name that are not in the cache yet, the cache)."""
        y = self.inputs(x_BTD)
        new = self._entries(self._kept(y, positions_BT))
        return y, self._queries(y, positions_BT), new, cache

    def extend(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        cache: Entries,
        lengths_B: jax.Array,
        over: str | None = None,
    ) -> tuple[jax.Array, Entries]:
        """As `decode`, for many tokens: no `[T, S]` matrix is in memory.

        `over` is one of `OVER`, by default what `extends_over` says.
        """
        y, over = self.inputs(x_BTD), over or self.extends_over()
        if over not in OVER:
            raise ValueError(f"attention over {over!r}, expected one of {', '.join(OVER)}")
        if over == "blocks":
            attend, within = in_blocks(self._in_plain, of_scores), None
        else:
            attend, within = in_blocks(self._to_earlier, of_keys), self._to_themselves
        queries, weights = self._ask_chunk(self._queries(y, positions_BT))
        o_BTHV, cache = sharded.decode_step(
            attend,
            queries,
            self._entries(self._kept(y, positions_BT)),
            cache,
            lengths_B,
            cache_axes=self.cache_axes,
            mesh=self.mesh,
            within=within,
            weights=weights,
        )
        return self._output(y, self._answer_chunk(y, o_BTHV)), cache

    def extends_over(self) -> str:
        """The way of `OVER` that serves the mesh's devices."""
        serves = self.dtype != "float32" and self._key_width() <= WIDEST
        return "cudnn" if serves and on_gpus(self.mesh) else "blocks"

    def _in_plain(self, queries, cache, lengths_BT, *weights):
        def attend(*grouped):
            how = dict(implementation="reference", scale=self.scale)
            return grouped_decode(*grouped, lengths_BT, **how)

        return self._attend_grouped(attend, queries, cache, *weights)

    def _to_earlier(self, queries, cache, ends_BT, *weights):
        attend = lambda *grouped: chunk_attention(*grouped, ends_BT[:, 0], scale=self.scale)
        return self._attend_grouped(attend, queries, cache, *weights)

    def _to_themselves(self, queries, new, *weights):
        attend = functools.partial(chunk_attention, scale=self.scale)
        return self._attend_grouped(attend, queries, new, *weights)

    def _attend_grouped(self, attend, queries, entries, *weights):
        """(o_BThV, lse_BTh) of one device by `attend(q_BTJGK, k_BSJK, v_BSJV)`."""
        return tuple(map(self._ungrouped, attend(*self._grouped(queries, entries, *weights))))

    def operands(
        self, y: dict[str, jax.Array], positions_BT: jax.Array, key_positions_BT: jax.Array
    ) -> Operands:
        """What the softmaxes of a whole sequence are made of, for who wants to look at them.

        Args:
          y: from `inputs`.
          positions_BT, key_positions_BT: int32, of the queries and of the keys.

        Returns:
          queries `[B, T, P, K]`, keys `[B, T, J, K]` and values `[B, T, J, V]`. P counts heads, in
          the latent family branch heads `r * H + h`; key head `j` serves P/J neighbours. The last
          `config.rope_dim` of K are rotated, the others (NoPE) are not.
        """
        return self._operands(self._queries(y, positions_BT), self._kept(y, key_positions_BT))

    def result(self, y: dict[str, jax.Array], o_BTPV: jax.Array) -> jax.Array:
        """`[B, T, D]` from what the softmaxes of `operands` gave."""
        return self._output(y, self._sum(y, o_BTPV))

    def inputs(self, x_BTD: jax.Array) -> dict[str, jax.Array]:
        """Every projection of the block's input, by name."""
        # Gradients of `x` are added in the opposite order. That of the rotary key, which no device
        # has a part of, comes last: those before it are then exchanged as one.
        names = sorted(self.input_names(self.config), key=lambda name: name != "k_rope")
        return {name: self.exchanges.columns(getattr(self, name), x_BTD) for name in names}

    def input_summands(self, x_BTD: jax.Array) -> jax.Array | None:
        """`[N, B, T, E]`, which add up to what `reads` names, side by side, where that is all."""
        return None

    def entry_widths(self) -> dict[str, int] | None:
        """What `kernels.after_attention.Shape` says of an attention on a device, where `decode`
        takes what it has been `Asked`."""
        return None

    def leaves_parts(self, cache: Entries) -> bool:
        """Whether the answer to one token of each row may stay `in_parts`."""
        return False

    @classmethod
    def input_names(cls, a: AttentionConfig) -> tuple[str, ...]:
        """The projections that read the block's input."""
        return (*cls.reads, "gate") if gate_width(a) else cls.reads

    @classmethod
    def moved(cls, config: ModelConfig, cache: Entries, slots_BS: jax.Array) -> Entries:
        """A layer's cache with what was in slot `slots[b, s]` of row `b` in slot `s`.

        Rotary keys are turned by so much: a token's position is its slot.
        """
        taken = {n: jax.vmap(lambda x, slots: x[slots])(x, slots_BS) for n, x in cache.items()}
        keys, S = taken[cls.rotated], slots_BS.shape[1]
        by_head_BSJK = keys.reshape(*keys.shape[:2], -1, keys.shape[-1])
        fixed, turning = jnp.split(by_head_BSJK, [-config.attention.rope_dim], axis=-1)
        turned = rotate(turning, jnp.arange(S, dtype=jnp.int32) - slots_BS, config.rope_base)
        taken[cls.rotated] = jnp.concatenate([fixed, turned], axis=-1).reshape(keys.shape)
        return taken

    @classmethod
    @abc.abstractmethod
    def cache_shapes(cls, a, batch: int, capacity: int, tensor: int) -> dict[str, tuple[int, ...]]:
        """Shapes of what is kept; what several devices of `tensor` hold is repeated.

        Raises ConfigError when the heads do not divide.
        """

    @abc.abstractmethod
    def _add_parameters(
        self, config: ModelConfig, project: Callable[..., Projection], rngs: nnx.Rngs
    ) -> None:
        """Sets the mechanism's own parameters as attributes."""

    @abc.abstractmethod
    def _queries(self, y: dict[str, jax.Array], positions_BT: jax.Array) -> jax.Array:
        """`[B, T, H, K]`, rotated, split by head."""

    @abc.abstractmethod
    def _kept(self, y: dict[str, jax.Array], positions_BT: jax.Array) -> Any:
        """What attention needs of each token, however the mesh repeats it."""

    def _whole(self, y: dict[str, jax.Array], q_BTHK: jax.Array, kept: Any) -> jax.Array:
        """`[B, T, H, V]`: causal attention of the sequence to itself."""
        return self._sum(y, self._to_itself(*self._operands(q_BTHK, kept)))

    @abc.abstractmethod
    def _operands(self, q_BTHK: jax.Array, kept: Any) -> Operands:
        """What `operands` gives."""

    def _sum(self, y: dict[str, jax.Array], o_BTPV: jax.Array) -> jax.Array:
        """`[B, T, H, V]`: each head's output, the sum of its branches where it has several."""
        return o_BTPV

    @abc.abstractmethod
    def _entries(self, kept: Any) -> Entries:
        """`kept` as it is cached."""

    @abc.abstractmethod
    def _attend(self, queries: Any, cache: Entries, lengths_BT: jax.Array):
        """(o_BThV, lse_BTh) of one device's heads over its share of the cache.

        Where heads attend in latents of several widths, each of the two is a tuple.
        """

    def _to_itself(self, q_BTHK: jax.Array, k_BTJK: jax.Array, v_BTJV: jax.Array) -> jax.Array:
        """Causal attention, `[B, T, H, V]`; key/value heads that divide over the mesh."""
        return sharded.whole_sequence(
            q_BTHK, k_BTJK, v_BTJV, scale=self.scale, mesh=self.mesh, implementation=self.kernel
        )

    @abc.abstractmethod
    def _grouped(
        self, queries: Any, entries: Entries, *weights: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(q_BTJGK, k_BSJK, v_BSJV) of one device: the cached entries as keys and values.

        `queries` and `weights` are of `_ask_chunk`.
        """

    def _ungrouped(self, x_BTJG: jax.Array) -> jax.Array:
        """`[B, T, h, ...]` from what came out for each of `_grouped`'s queries."""
        return x_BTJG.reshape(*x_BTJG.shape[:2], -1, *x_BTJG.shape[4:])

    def _key_width(self) -> int:
        """Of the keys of `_grouped`."""
        return self.config.query_dim

    def _ask(self, q_BTHK: jax.Array) -> Any:
        """The queries as the cache is asked them."""
        return q_BTHK

    def _answer(self, y: dict[str, jax.Array], o_BTHV: Any) -> jax.Array:
        """`[B, T, H, V]` from what `_attend` found."""
        return o_BTHV

    def _ask_chunk(self, q_BTHK: jax.Array) -> tuple[Any, tuple[jax.Array, ...]]:
        """(the queries as `_grouped` takes them, the weights that it needs)."""
        return self._ask(q_BTHK), ()

    def _answer_chunk(self, y: dict[str, jax.Array], o_BTHV: Any) -> jax.Array:
        """`[B, T, H, V]` from what was found for the queries of `_ask_chunk`."""
        return self._answer(y, o_BTHV)

    def _output(self, y: dict[str, jax.Array], o_BTHV: jax.Array) -> jax.Array:
        o_BTHV = self._by_head(o_BTHV)
        if "gate" in y:
            o_BTHV = o_BTHV * jax.nn.sigmoid(y["gate"])
        return self.exchanges.rows(self.out, o_BTHV)

    def _by_head(self, x_BTHK: jax.Array) -> jax.Array:
        return sharding.constrain(x_BTHK, self.mesh, "batch", "length", "heads", "head_dim")


def gate_width(a: AttentionConfig) -> int:
    """Sigmoids for each head's output: one for each of its values, one for all, or none."""
    return a.value_dim if a.gated else int(getattr(a, "head_gated", False))
