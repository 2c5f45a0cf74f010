"""How a model is computed: dtypes, and what of a config does not say what the model is."""

import contextlib
import dataclasses
import functools
from typing import Any

import numpy as np

from mlra_jax.settings_tree import among, at_least, check_kinds, require

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
    require(name in DTYPES, f"{what}={shown} is none of {', '.join(DTYPES)}")
    return name


def normalise_dtype(config: Any, name: str) -> None:
    """Puts the name of a dtype into this field of a dataclass; see `dtype_name`."""
    object.__setattr__(config, name, dtype_name(getattr(config, name), name))


REMAT = ("auto", "none", "block", "attention", "products", "offload")
ATTENTION_KERNELS = ("auto", "cudnn", "cudnn_padded", "mosaic_gpu", "splash", "reference")


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
    """From 0 on; blocks in the body of the loop over blocks. 0 is all of them on GPUs, which takes
    longer to compile, and one elsewhere."""
    float32_stream: bool = False
    """Keep the sum that blocks add to in float32, also where activations are narrower."""
    attention_kernel: str = "auto"
    """Of whole sequences, one of `ATTENTION_KERNELS`; "auto" takes the device's fastest."""

    def __post_init__(self):
        normalise_dtype(self, "dtype")
        at_least(0, self, "", "unroll")
        names = {"true": "block", "false": "none"}
        object.__setattr__(self, "remat", names.get(str(self.remat).lower(), self.remat))
        check_kinds(self, "")
        among(REMAT, self, "remat")
        among(ATTENTION_KERNELS, self, "attention_kernel")


def with_execution(values: dict[str, Any]) -> dict[str, Any]:
    """The same settings of a model with those of `Execution` gathered in one."""
    how = {f.name for f in dataclasses.fields(Execution)} & values.keys()
    if not how:
        return values
    execution = values.get("execution", Execution())
    execution = dataclasses.replace(execution, **{name: values[name] for name in how})
    return {n: x for n, x in values.items() if n not in how} | {"execution": execution}


def takes_execution(cls: Any) -> Any:
    """Lets a config be made, or replaced, with fields of its `execution` by their own names."""
    made = cls.__init__

    @functools.wraps(made)
    def init(self, *args, **values):
        made(self, *args, **with_execution(values))

    cls.__init__ = init
    return cls
