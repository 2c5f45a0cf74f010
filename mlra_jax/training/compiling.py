"""The options with which XLA compiles a training step."""

from typing import Any

import jax
from jax.sharding import Mesh

from mlra_jax import sharding
from mlra_jax.settings_tree import ConfigError
from mlra_jax.training.settings import Experiment

_OF_SEVERAL = {
    "gpu": {
        "xla_gpu_experimental_collective_start_as_early_as_possible": "True",
        "xla_gpu_experimental_parallel_collective_overlap_limit": "4",
    }
}
"""By platform, what steps on devices that split the batch are compiled with: more than one exchange
begun and not waited for. Latency hiding itself is on by default (`benchmarks/NOTES_TRAIN.md`)."""
_COPIED = {
    "xla_gpu_collective_permute_mode": "COLLECTIVES_PEER_MEMORY",
    "xla_gpu_use_memcpy_local_p2p": "True",
    "xla_gpu_experimental_parallel_collective_overlap_limit": "16",
    "xla_gpu_triton_gemm_any": "False",
}
"""With which engines copy what devices send each other, where `sharding.has_copies`: as many under
way as two blocks have, since a small one that is waited for must else wait for large ones; and
products by cuBLAS, which adds what was received to what it makes, unless they read by the way."""


def options(experiment: Experiment, mesh: Mesh) -> dict[str, str]:
    """What this program sets, as far as this JAX knows it, and `xla_options` over it."""
    several = sharding.size(mesh, sharding.BATCH) > 1
    own = _OF_SEVERAL.get(sharding.platform(mesh), {}) if several else {}
    own = own | (_COPIED if sharding.has_copies(mesh) else {})
    known = {name: value for name, value in own.items() if _refusal({name: value}) is None}
    asked = (item.split("=", 1) for item in experiment.xla_options.split())
    return known | {name: _as_python(value) for name, value in asked}


def _as_python(value: str) -> str:
    """`true` and `false`, as XLA's own flags have them; JAX's options know `True` and `False`."""
    return value.capitalize() if value in ("true", "false") else value


def compile_with(
    step: Any, arguments: tuple[Any, ...], chosen: dict[str, str]
) -> jax.stages.Compiled:
    """The compiled step.

    Raises:
      ConfigError: this JAX does not know an option, or not its value.
    """
    try:
        return step.lower(*arguments).compile(compiler_options=chosen or None)
    except jax.errors.JaxRuntimeError:
        if refusal := _refusal(chosen):
            told = f"xla_options: JAX {jax.__version__} refuses: {refusal}; leave it out"
            raise ConfigError(told) from None
        raise


def _refusal(chosen: dict[str, str]) -> str | None:
    """What the compiler says against options, asked about next to nothing."""
    try:
        jax.jit(lambda: 0).lower().compile(compiler_options=chosen)
    except jax.errors.JaxRuntimeError as error:
        return str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ")
    return None
