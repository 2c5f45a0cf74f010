"""Sizes of a model, and the presets of the paper. The only place that validates sizes."""

import dataclasses
from typing import Any, ClassVar

from mlra_jax.execution import Execution, normalise_dtype, takes_execution, with_execution
from mlra_jax.scaling import SIZES, scale_attention, scale_mlp, split_size
from mlra_jax.settings_tree import ConfigError, at_least, build, check_kinds, closest, within
from mlra_jax.settings_tree import require as _require


def _check_fields(config) -> None:
    """Sizes are whole numbers in [1, 2**31): devices count in int32. Switches are True or False."""
    check_kinds(config, "")
    for field in (f for f in dataclasses.fields(config) if f.type is int):
        # What is 0 if nothing is said may be 0.
        name, least = field.name, 0 if field.default == 0 else 1
        at_least(least, config, "", name)
        size = getattr(config, name)
        _require(size < 2**31, f"{name}={size} must lie in [{least}, 2**31)")


@dataclasses.dataclass(frozen=True)
class LatentConfig:
    """MLA, GLA-2, GLA-4, MLRA-2, MLRA-4 and neighbours: `groups` of heads, `branches` per group.

    There are `groups * branches` latent heads; latent `r * groups + g` serves query heads
    `g * heads / groups ... (g + 1) * heads / groups - 1` in branch `r` (paper, section 3).
    """

    kind: ClassVar[str] = "latent"
    num_heads: int
    """In [1, 2**31); query heads, a multiple of `groups`."""
    groups: int
    """In [1, 2**31); of query heads, each with latents of its own."""
    branches: int
    """In [1, 2**31); latents of a group; a head attends in each, the outputs are summed."""
    latent_dim: int
    """In [1, 2**31); width of all latents together, d_c (the released configs' `kv_lora_rank`), a
    multiple of their number."""
    q_latent_dim: int
    """In [1, 2**31); width of the query latent, d_q (`q_lora_rank`)."""
    nope_dim: int
    """In [1, 2**31); width of a head's values, and of its queries and keys before rotation."""
    rope_dim: int
    """In [2, 2**31), even; width of the rotary part, which all heads' keys share."""
    gated: bool = False
    """A sigmoid of the block's input scales each head's output."""
    scaled: bool = True
    """Calibration factors on the query latent, the latents and the branch sum."""
    head_gated: bool = False
    """As `gated`, but one sigmoid for the whole of a head's output."""
    branch_gated: bool = False
    """A softmax of the block's input over each head's branches weighs them in the branch sum."""
    base_dim: int = 0
    """In [0, 2**31); width of a latent that every device holds and all heads attend in, as one more
    branch; 0: none."""
    num_kv_heads: int = 0
    """In [0, 2**31); heads for which a branch makes keys and values of its latents, each for
    neighbouring query heads (GQLA), a multiple of `groups`; 0: one for each query head."""
    expanded: bool = False
    """Decoding keeps the keys and values of these heads, not latents (GQLA's second way)."""

    def __post_init__(self):
        _check_fields(self)
        _require(
            self.num_heads % self.groups == 0,
            f"num_heads={self.num_heads} does not divide into groups={self.groups}",
        )
        _require(
            self.latent_dim % self.num_latents == 0,
            f"latent_dim={self.latent_dim} does not divide into {self.num_latents} latent heads "
            f"(groups={self.groups} x branches={self.branches})",
        )
        _require(self.rope_dim % 2 == 0, f"rope_dim={self.rope_dim} must be even")
        self._check_neighbours()

    def _check_neighbours(self) -> None:
        _require(
            not (self.gated and self.head_gated), "gated and head_gated exclude each other: set one"
        )
        _require(
            not self.branch_gated or self.num_branches > 1,
            "branch_gated needs branches to choose from: branches=2 or more, or base_dim",
        )
        _require(
            self.num_heads % self.kv_heads == 0 and self.kv_heads % self.groups == 0,
            f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads} and be a "
            f"multiple of groups={self.groups}",
        )
        _require(
            not self.expanded or (self.num_kv_heads > 0 and self.num_branches * self.groups == 1),
            "expanded needs num_kv_heads, groups=1, branches=1 and base_dim=0",
        )

    @property
    def num_latents(self) -> int:
        """The base is not among them."""
        return self.groups * self.branches

    @property
    def num_branches(self) -> int:
        """Softmaxes of a head, that of the base among them."""
        return self.branches + (self.base_dim > 0)

    @property
    def kv_heads(self) -> int:
        """Heads for which a branch makes keys and values."""
        return self.num_kv_heads or self.num_heads

    @property
    def latent_head_dim(self) -> int:
        return self.latent_dim // self.num_latents

    @property
    def query_dim(self) -> int:
        return self.nope_dim + self.rope_dim

    @property
    def value_dim(self) -> int:
        return self.nope_dim


class _WholeHeads:
    """Queries, keys and values as wide as a head."""

    head_dim: int
    gated: bool = False

    @property
    def query_dim(self) -> int:
        return self.head_dim

    @property
    def value_dim(self) -> int:
        return self.head_dim

    @property
    def rope_dim(self) -> int:
        """Dimensions of a query and a key that are rotated, the last ones; here all."""
        return self.head_dim


@dataclasses.dataclass(frozen=True)
class GroupedConfig(_WholeHeads):
    """MHA (`num_kv_heads == num_heads`), GQA, and MQA (`num_kv_heads == 1`)."""

    kind: ClassVar[str] = "grouped"
    num_heads: int
    """In [1, 2**31); query heads, a multiple of `num_kv_heads`."""
    num_kv_heads: int
    """In [1, 2**31); key/value heads."""
    head_dim: int
    """In [2, 2**31), even; width of a head."""
    gated: bool = False

    def __post_init__(self):
        _check_fields(self)
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads={self.num_heads} does not divide into num_kv_heads={self.num_kv_heads}",
        )
        _require(self.head_dim % 2 == 0, f"head_dim={self.head_dim} must be even")


@dataclasses.dataclass(frozen=True)
class TiedConfig(_WholeHeads):
    """GTA: a key and its value share one vector; half of each key is a shared rotary key."""

    kind: ClassVar[str] = "tied"
    num_heads: int
    """In [1, 2**31); query heads, a multiple of `num_kv_heads`."""
    num_kv_heads: int
    """In [1, 2**31); heads that are key and value in one."""
    head_dim: int
    """In [4, 2**31), a multiple of 4; width of a head."""

    def __post_init__(self):
        _check_fields(self)
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads={self.num_heads} does not divide into num_kv_heads={self.num_kv_heads}",
        )
        _require(self.head_dim % 4 == 0, f"head_dim={self.head_dim} must be a multiple of 4")

    @property
    def rope_dim(self) -> int:
        return self.head_dim // 2


@dataclasses.dataclass(frozen=True)
class MultiMatrixConfig(_WholeHeads):
    """MFA: queries through a narrow latent, one key head and one value head."""

    kind: ClassVar[str] = "multi_matrix"
    num_heads: int
    """In [1, 2**31); query heads."""
    head_dim: int
    """In [2, 2**31), even; width of a head."""
    q_latent_dim: int
    """In [1, 2**31); width of the query latent, d_q."""

    def __post_init__(self):
        _check_fields(self)
        _require(self.head_dim % 2 == 0, f"head_dim={self.head_dim} must be even")


@dataclasses.dataclass(frozen=True)
class TensorProductConfig(_WholeHeads):
    """TPA: queries, keys and values are sums of `rank` outer products of two factors."""

    kind: ClassVar[str] = "tensor_product"
    num_heads: int
    """In [1, 2**31); query heads."""
    head_dim: int
    """In [2, 2**31), even; width of a head."""
    rank: int
    """In [1, 2**31); outer products that keys and values are sums of."""
    q_rank: int
    """In [1, 2**31); outer products that queries are sums of."""

    def __post_init__(self):
        _check_fields(self)
        _require(self.head_dim % 2 == 0, f"head_dim={self.head_dim} must be even")


AttentionConfig = (
    LatentConfig | GroupedConfig | TiedConfig | MultiMatrixConfig | TensorProductConfig
)
KINDS = {
    c.kind: c
    for c in (LatentConfig, GroupedConfig, TiedConfig, MultiMatrixConfig, TensorProductConfig)
}
"""Config of each attention by its `kind`; `attention.register` adds to it."""


@takes_execution
@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder: embedding, `num_layers` blocks of attention and SwiGLU, tied output head.

    All but `execution` says what the model is: a checkpoint is of one such model. As a dictionary,
    on a command line and in files, the fields of `execution` stand among the others, and
    `ModelConfig(..., dtype="float32")` is as good as `execution=Execution(dtype="float32")`.
    """

    attention: AttentionConfig
    vocab_size: int
    """In [1, 2**31); at least the tokenizer's, and more so that it divides over a mesh."""
    num_layers: int
    """In [1, 2**31); blocks."""
    embed_dim: int
    """In [1, 2**31); width of the model."""
    mlp_dim: int
    """In [1, 2**31); width of the MLP."""
    context_length: int = 2048
    """In [1, 2**31); tokens in a training sequence. Decoding is limited by its cache only."""
    norm_eps: float = 1e-6
    """In (0, inf), as float32 has it; added to the mean square in the norms."""
    rope_base: float = 10000.0
    """In [1, inf); rotary pair i of n turns by `position / rope_base**(i / n)`."""
    zero_init: bool = True
    """Attention output and MLP down projections begin at zero (the paper's choice)."""
    param_dtype: str = "float32"
    """Of the parameters."""
    execution: Execution = Execution()

    def __post_init__(self):
        _require(
            type(self.attention) in KINDS.values(),
            f"attention={self.attention!r} is none of {', '.join(KINDS)}",
        )
        normalise_dtype(self, "param_dtype")
        _check_fields(self)
        within(self, "", norm_eps="(0, inf)", rope_base="[1, inf)")

    def identity(self) -> dict[str, Any]:
        """What the model is, JSON-ready: `to_dict` without how it is computed."""
        values = dataclasses.asdict(self)
        del values["execution"]
        attention = {"kind": self.attention.kind} | dataclasses.asdict(self.attention)
        return values | {"attention": attention}

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict that `from_dict` takes back."""
        return self.identity() | dataclasses.asdict(self.execution)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """Raises ConfigError (one line) for a missing, unknown or impossible value."""
        values = dict(values)
        attention = dict(values.pop("attention", {}))
        kind = attention.pop("kind", None)
        if kind not in KINDS:
            raise ConfigError(f"attention.kind={kind!r} is none of {', '.join(KINDS)}")
        attention = build(KINDS[kind], attention, "attention.", "model setting")
        values = {"attention": attention} | with_execution(values)
        return build(cls, values, what="model setting")


GPT2_VOCABULARY = 50304
"""The published models' vocabulary: GPT-2's 50257 ids, padded so that it divides over meshes."""


_WIDTH = 3072


# The published models (24 layers, width 3072): MLP width and attention of each.
def _latent(groups, branches, q_latent_dim=1024, **kwargs):
    return LatentConfig(
        **{"num_heads": 24, "latent_dim": 512} | kwargs,
        groups=groups,
        branches=branches,
        q_latent_dim=q_latent_dim,
        nope_dim=128,
        rope_dim=64,
    )


_PAPER: dict[str, tuple[int, AttentionConfig]] = {
    "mha": (8192, GroupedConfig(24, 24, 128)),
    "mqa": (10152, GroupedConfig(24, 1, 128)),
    "gqa": (9728, GroupedConfig(24, 6, 128)),
    "gta": (9960, TiedConfig(24, 6, 128)),
    "mfa": (8024, MultiMatrixConfig(24, 256, 2048)),
    "tpa": (10760, TensorProductConfig(24, 128, 2, 6)),
    "mla": (9448, _latent(1, 1, 1536)),
    "gla_2": (10048, _latent(2, 1)),
    "gla_4": (10136, _latent(4, 1)),
    "mlra_2": (10048, _latent(2, 2)),
    "mlra_4": (9880, _latent(1, 4)),
    "gqa_gated": (8704, GroupedConfig(24, 6, 128, gated=True)),
    "mla_gated": (8424, _latent(1, 1, 1536, gated=True)),
    "gla_2_gated": (9024, _latent(2, 1, gated=True)),
    "mlra_2_gated": (9024, _latent(2, 2, gated=True)),
    "mlra_4_gated": (8856, _latent(1, 4, gated=True)),
    "gqa_double_heads": (7680, GroupedConfig(48, 6, 128)),
    "mla_double_heads": (7320, _latent(1, 1, 1536, num_heads=48)),
    "gla_2_double_heads": (8344, _latent(2, 1, num_heads=48)),
    "gla_2_no_scale": (10048, _latent(2, 1, scaled=False)),
    "mla_no_scale": (9448, _latent(1, 1, 1536, scaled=False)),
    "mlra_2_no_scale": (10048, _latent(2, 2, scaled=False)),
}
VARIANTS = tuple(_PAPER)[:11]
"""The attention variants that the paper compares; the other presets vary these."""
_NORMAL = "_normal_initialization"
PRESETS = (*_PAPER, *(n + _NORMAL for n in _PAPER if "_" not in n or n[-1].isdigit()))
# Not published: as large as MLRA-4, by their MLP.
_NEIGHBOURS: dict[str, tuple[int, AttentionConfig]] = {
    "mlra_4_base": (9880, _latent(1, 4, latent_dim=256, base_dim=256)),
    "mlra_4_head_gated": (9872, _latent(1, 4, head_gated=True)),
    "mlra_4_branch_gated": (9848, _latent(1, 4, branch_gated=True)),
    "gqla": (9736, _latent(1, 1, 1536, num_kv_heads=4, expanded=True)),
}
NEIGHBOURS = tuple(_NEIGHBOURS)
"""Presets of mechanisms near those of the paper, which has no such models (docs/neighbours.md)."""


def preset(name: str, **changes: Any) -> ModelConfig:
    """The 2.9B model that the paper publishes as `name`, or one of its kind in another size.

    `NEIGHBOURS` are presets, too.

    `NAME_small` and `NAME_medium` are for one GPU. `changes` are to fields of ModelConfig, of its
    `execution` and of its attention, by their own names. With another `embed_dim`, heads, latents
    and MLP follow (`mlra_jax/scaling.py`), unless they are given.

    Raises ConfigError naming the nearest preset for an unknown name, and sizes that contradict.
    """
    known = (*PRESETS, *NEIGHBOURS)
    base, size = split_size(name, known)
    if base not in known:
        sized = (f"{variant}_{size}" for variant in VARIANTS for size in SIZES)
        raise ConfigError(f"unknown preset {name!r}; {closest(name, (*known, *sized))}")
    mlp_dim, attention = (_PAPER | _NEIGHBOURS)[base.removesuffix(_NORMAL)]
    changes = size | changes
    attention = changes.get("attention", attention)
    own = {f.name: changes.pop(f.name) for f in dataclasses.fields(attention) if f.name in changes}
    embed_dim = changes.get("embed_dim", _WIDTH)
    if embed_dim != _WIDTH:
        mlp_dim = scale_mlp(mlp_dim, _WIDTH, embed_dim)
        if "attention" not in changes:
            attention = scale_attention(attention, _WIDTH, embed_dim, own.get("num_heads"))
    sizes = dict(
        vocab_size=GPT2_VOCABULARY,
        num_layers=24,
        embed_dim=_WIDTH,
        mlp_dim=mlp_dim,
        zero_init=not base.endswith(_NORMAL),
    )
    return ModelConfig(**sizes | changes | {"attention": dataclasses.replace(attention, **own)})
