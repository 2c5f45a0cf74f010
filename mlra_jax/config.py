"""Sizes of a model, and the presets of the paper. The only place that validates sizes."""

import contextlib
import dataclasses
import functools
from typing import Any, ClassVar

import numpy as np

from mlra_jax.settings_tree import ConfigError, among, at_least, build, check_kinds, closest, within
from mlra_jax.settings_tree import require as _require


def _check_fields(config) -> None:
    """Sizes are whole numbers in [1, 2**31): devices count in int32. Switches are True or False."""
    check_kinds(config, "")
    for name in (f.name for f in dataclasses.fields(config) if f.type is int):
        at_least(1, config, "", name)
        size = getattr(config, name)
        _require(size < 2**31, f"{name}={size} must lie in [1, 2**31)")


@dataclasses.dataclass(frozen=True)
class LatentConfig:
    """MLA, GLA-2, GLA-4, MLRA-2, MLRA-4: `groups` of query heads, `branches` per group.

    There are `groups * branches` latent heads; latent `r * groups + g` serves query heads
    `g * heads / groups ... (g + 1) * heads / groups - 1` in branch `r` (paper, section 3).
    """

    kind: ClassVar[str] = "latent"
    num_heads: int
    """In [1, 2**31), a multiple of `groups`."""
    groups: int
    """In [1, 2**31)."""
    branches: int
    """In [1, 2**31)."""
    latent_dim: int
    """d_c, the width of all latents together (the released configs' `kv_lora_rank`); in [1, 2**31),
    a multiple of the number of latents."""
    q_latent_dim: int
    """d_q, the width of the query latent (`q_lora_rank`); in [1, 2**31)."""
    nope_dim: int
    """Width of a head's key without rotation, and of its value; in [1, 2**31)."""
    rope_dim: int
    """Width of the shared rotary key; even, in [2, 2**31)."""
    gated: bool = False
    scaled: bool = True
    """Calibration factors on the query latent, the latents and the branch sum."""

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

    @property
    def num_latents(self) -> int:
        return self.groups * self.branches

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
    """In [1, 2**31), a multiple of `num_kv_heads`."""
    num_kv_heads: int
    """In [1, 2**31)."""
    head_dim: int
    """Even, in [2, 2**31)."""
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
    """In [1, 2**31), a multiple of `num_kv_heads`."""
    num_kv_heads: int
    """In [1, 2**31)."""
    head_dim: int
    """A multiple of 4, in [4, 2**31)."""

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
    """In [1, 2**31)."""
    head_dim: int
    """Even, in [2, 2**31)."""
    q_latent_dim: int
    """In [1, 2**31)."""

    def __post_init__(self):
        _check_fields(self)
        _require(self.head_dim % 2 == 0, f"head_dim={self.head_dim} must be even")


@dataclasses.dataclass(frozen=True)
class TensorProductConfig(_WholeHeads):
    """TPA: queries, keys and values are sums of `rank` outer products of two factors."""

    kind: ClassVar[str] = "tensor_product"
    num_heads: int
    """In [1, 2**31)."""
    head_dim: int
    """Even, in [2, 2**31)."""
    rank: int
    """Of keys and of values; in [1, 2**31)."""
    q_rank: int
    """Of queries; in [1, 2**31)."""

    def __post_init__(self):
        _check_fields(self)
        _require(self.head_dim % 2 == 0, f"head_dim={self.head_dim} must be even")


AttentionConfig = (
    LatentConfig | GroupedConfig | TiedConfig | MultiMatrixConfig | TensorProductConfig
)
_KINDS = {
    c.kind: c
    for c in (LatentConfig, GroupedConfig, TiedConfig, MultiMatrixConfig, TensorProductConfig)
}
DTYPES = ("float32", "bfloat16", "float16")


DTypeLike = str | type | np.dtype
"""A dtype as people pass it: "float32", np.float32, jnp.float32, np.dtype(...), x.dtype."""


def dtype_name(value: DTypeLike, what: str = "dtype") -> str:
    """The name, one of `DTYPES`, of a dtype however NumPy or JAX write it.

    Raises ConfigError, which calls the setting `what`, for all others.
    """
    if isinstance(value, str) and value in DTYPES:
        return value  # also bfloat16, which NumPy knows by this name only beside ml_dtypes
    name = ""
    with contextlib.suppress(TypeError, ValueError, SyntaxError):
        name = np.dtype(value).name
    shown = " ".join(repr(value).split())[:100]
    _require(name in DTYPES, f"{what}={shown} is none of {', '.join(DTYPES)}")
    return name


def _normalise_dtype(config, name: str) -> None:
    object.__setattr__(config, name, dtype_name(getattr(config, name), name))


REMAT = ("auto", "none", "block", "attention", "products", "offload")
ATTENTION_KERNELS = ("auto", "cudnn", "cudnn_padded", "splash", "reference")


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a model is computed. Another one computes the same model."""

    dtype: str = "bfloat16"
    """Of activations and products; norms' statistics, softmax and logits are float32. It may be
    given as NumPy or JAX write it (`jnp.bfloat16`), and is kept by name."""
    remat: str | bool = "auto"
    """What the backward pass finds kept of a block, one of `REMAT` (`mlra_jax.remat`); True is
    "block" and False "none". "auto" is the fastest that fits, chosen when a training step is
    compiled (`mlra_jax.training.fitting`), and "block" elsewhere."""
    unroll: int = 0
    """Blocks in the body of the loop over blocks, from 0 on; 0 is all of them on GPUs, which takes
    longer to compile, and one elsewhere."""
    float32_stream: bool = False
    """Keep the sum that blocks add to in float32, also where activations are narrower."""
    attention_kernel: str = "auto"
    """Of whole sequences, one of `ATTENTION_KERNELS`; "auto" takes the device's fastest."""

    def __post_init__(self):
        _normalise_dtype(self, "dtype")
        at_least(0, self, "", "unroll")
        names = {"true": "block", "false": "none"}
        object.__setattr__(self, "remat", names.get(str(self.remat).lower(), self.remat))
        check_kinds(self, "")
        among(REMAT, self, "remat")
        among(ATTENTION_KERNELS, self, "attention_kernel")


def _with_execution(values: dict[str, Any]) -> dict[str, Any]:
    """The same settings of a model with those of `Execution` gathered in one."""
    how = {f.name for f in dataclasses.fields(Execution)} & values.keys()
    if not how:
        return values
    execution = values.get("execution", Execution())
    execution = dataclasses.replace(execution, **{name: values[name] for name in how})
    return {n: x for n, x in values.items() if n not in how} | {"execution": execution}


def _takes_execution(cls: Any) -> Any:
    """Lets a config be made, or replaced, with fields of its `execution` by their own names."""
    made = cls.__init__

    @functools.wraps(made)
    def init(self, *args, **values):
        made(self, *args, **_with_execution(values))

    cls.__init__ = init
    return cls


@_takes_execution
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
    """In [1, 2**31)."""
    embed_dim: int
    """In [1, 2**31)."""
    mlp_dim: int
    """In [1, 2**31)."""
    context_length: int = 2048
    """Tokens in a training sequence, in [1, 2**31); decoding is limited by its cache only."""
    norm_eps: float = 1e-6
    """Added to the mean square in the norms; in (0, inf), as float32 has it."""
    rope_base: float = 10000.0
    """Rotary pair i of n turns by `position / rope_base**(i / n)`; in [1, inf)."""
    zero_init: bool = True
    """Attention output and MLP down projections begin at zero (the paper's choice)."""
    param_dtype: str = "float32"
    execution: Execution = Execution()

    def __post_init__(self):
        _require(
            type(self.attention) in _KINDS.values(),
            f"attention={self.attention!r} is none of {', '.join(_KINDS)}",
        )
        _normalise_dtype(self, "param_dtype")
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
        if kind not in _KINDS:
            raise ConfigError(f"attention.kind={kind!r} is none of {', '.join(_KINDS)}")
        attention = build(_KINDS[kind], attention, "attention.", "model setting")
        values = {"attention": attention} | _with_execution(values)
        return build(cls, values, what="model setting")


GPT2_VOCABULARY = 50304
"""The published models' vocabulary: GPT-2's 50257 ids, padded so that it divides over meshes."""


# The published models (24 layers, width 3072): MLP width and attention of each.
def _latent(groups, branches, q_latent_dim=1024, **kwargs):
    return LatentConfig(
        **{"num_heads": 24} | kwargs,
        groups=groups,
        branches=branches,
        latent_dim=512,
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


def preset(name: str, **changes: Any) -> ModelConfig:
    """The 2.9B model that the paper publishes as `name`.

    `changes` are to ModelConfig's fields, or to those of its `execution` by their own names.

    Raises ConfigError naming the nearest preset for an unknown name.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; {closest(name, PRESETS)}")
    mlp_dim, attention = _PAPER[name.removesuffix(_NORMAL)]
    sizes = dict(
        attention=attention,
        vocab_size=GPT2_VOCABULARY,
        num_layers=24,
        embed_dim=3072,
        mlp_dim=mlp_dim,
        zero_init=not name.endswith(_NORMAL),
    )
    return ModelConfig(**sizes | changes)
