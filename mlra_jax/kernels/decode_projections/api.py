"""The entries to products of a few rows: check the arguments and pick the kernel."""

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from mlra_jax.kernels.decode_projections import reference
from mlra_jax.kernels.decode_projections.steps import Problem, Step

IMPLEMENTATIONS = ("reference", "mosaic_gpu")
_PACKAGE = "mlra_jax.kernels.decode_projections"


def chain(
    rows: dict[str, jax.Array],
    weights: dict[str, jax.Array],
    steps: Sequence[Step],
    *,
    implementation: str | None = None,
    config: Any = None,
) -> dict[str, jax.Array]:
    """Products of a few rows that follow from each other, where a kernel serves them as one launch.

    In the kernel all CTAs wait for each other between steps, so it must have the GPU for itself:
    two such launches at the same time, on two streams, can wait for each other for ever. Its
    weights must not be a result of the launch just before, as it reads them without waiting.

    Args:
      rows: `[M, K]` by name; M from 1 to 64 for the kernel, which is fastest if M is a multiple of
        8 (fewer are padded in front of it). Columns in multiples of 64.
      weights: what `prepare`, `prepare_gated` and `prepare_heads` made, by name; dtype of the rows.
      steps: see `Step`.
      implementation: "reference", which is XLA's own products, or "mosaic_gpu"; default: the kernel
        on Hopper GPUs for two steps and more where it can serve them, elsewhere the reference.
        Alone, XLA's products are as fast there (benchmarks/NOTES_DECODE.md).
      config: the kernel's Config, or a function that changes the one it would choose.

    Returns:
      The result of every step by its name, `[M, N]` in the dtype of the rows, rounded once.

    Raises:
      ValueError: names, shapes or dtypes that do not fit together, an unknown implementation, or
        one asked for by name that cannot serve the call.
    """
    steps = tuple(steps)
    problem = _problem(_target_device(), rows, weights, steps)
    name = _choose(implementation, problem)
    if name == "reference":
        return _by_xla(rows, weights, problem)
    module = _backend()
    chosen = module.heuristic(problem)
    if config is not None:
        chosen = config(chosen) if callable(config) else config
    return module.chain(rows, weights, problem=problem, config=chosen)


def product(
    x_MK: jax.Array,
    weight: jax.Array,
    *,
    norm: float | None = None,
    add_MN: jax.Array | None = None,
    implementation: str | None = None,
    config: Any = None,
) -> jax.Array:
    """`add + norm(x) @ weight` for a few rows; a SwiGLU where `prepare_gated` made the weight.

    Arguments as in `chain` and `Step`. Returns `[M, N]` in the dtype of `x_MK`.
    """
    rows = {"x": x_MK} if add_MN is None else {"x": x_MK, "add": add_MN}
    step = Step("x", "weight", "out", norm=norm, add=None if add_MN is None else "add")
    options = dict(implementation=implementation, config=config)
    return chain(rows, {"weight": weight}, [step], **options)["out"]


def has_kernel(rows: dict[str, Any], weights: dict[str, Any], steps: Sequence[Step]) -> bool:
    """Whether `chain` runs a kernel, not plain JAX, for arrays of these shapes.

    Args:
      rows, weights: arrays or `jax.ShapeDtypeStruct`s.
      steps: as in `chain`.
    """
    problem = _problem(_target_device(), rows, weights, tuple(steps))
    return _choose(None, problem) != "reference"


def _by_xla(rows, weights, problem: Problem) -> dict[str, jax.Array]:
    """The reference; on GPUs with at least 8 rows, as XLA makes slow reductions of fewer."""
    more = 8 - problem.count if _target_device().platform in ("gpu", "cuda") else 0
    if more > 0:
        rows = {name: jnp.pad(x_MK, ((0, more), (0, 0))) for name, x_MK in rows.items()}
    results = reference.chain(rows, weights, problem=problem)
    return {name: x_MN[: problem.count] for name, x_MN in results.items()}


def _problem(device, rows, weights, steps) -> Problem:
    if not steps or not rows:
        raise ValueError("a chain needs rows and at least one step")
    first = next(iter(rows.values()))
    if first.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ValueError(f"rows are {first.dtype}, expected bfloat16, float16 or float32")
    for name, array in [*rows.items(), *weights.items()]:
        if array.dtype != first.dtype:
            raise ValueError(f"{name!r} is {array.dtype} beside {first.dtype}: cast one of them")
    for name, array in rows.items():
        if array.ndim != 2 or array.shape[0] != first.shape[0]:
            raise ValueError(
                f"rows {name!r} have shape {array.shape}, expected [{first.shape[0]}, N]"
            )
    columns = {name: array.shape[1] for name, array in rows.items()}
    for step in steps:
        columns[step.into] = _check_step(step, columns, weights)
    return Problem(
        device_kind=device.device_kind,
        steps=steps,
        rows=tuple((name, array.shape[1]) for name, array in rows.items()),
        weights=tuple((name, array.shape) for name, array in weights.items()),
        count=first.shape[0],
        dtype=first.dtype.name,
        multiprocessors=getattr(device, "core_count", None),
    )


def _check_step(step: Step, columns: dict[str, int], weights: dict[str, Any]) -> int:
    """The number of columns of the step's result."""
    where = f"the step into {step.into!r}"
    if step.into in columns:
        raise ValueError(f"{where}: that name is taken, a result needs a new one")
    for name in (step.source, step.add):
        if name is not None and name not in columns:
            raise ValueError(f"{where}: there are no rows {name!r}, only {', '.join(columns)}")
    if step.weight not in weights:
        raise ValueError(f"{where}: no weight {step.weight!r}, only {', '.join(weights)}")
    shape = weights[step.weight].shape
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[0] != 2):
        raise ValueError(
            f"{where}: weight of shape {shape}, expected what a prepare function makes"
        )
    outputs, inner = shape[-2:]
    heads, last = step.heads, step.start + inner
    if heads:
        if len(shape) == 3 or step.norm is not None:
            raise ValueError(f"{where}: a product by heads has neither norm nor gate")
        if outputs % (heads.width * heads.count):
            raise ValueError(
                f"{where}: {outputs} outputs are no multiple of {heads.count} heads of "
                f"{heads.width}"
            )
        if inner % heads.run:
            raise ValueError(f"{where}: K = {inner} is no multiple of runs of {heads.run}")
        jumps = inner // heads.run - 1
        last = step.start + (heads.count - 1) * heads.stride + jumps * heads.jump + heads.run
    if last > columns[step.source]:
        raise ValueError(
            f"{where}: reads up to column {last} of {step.source!r}, which has "
            f"{columns[step.source]}: pad it with zeros as the weight is"
        )
    if step.add is not None and columns[step.add] != outputs:
        raise ValueError(f"{where}: adds {columns[step.add]} columns to {outputs}")
    return outputs


def _target_device() -> Any:
    """The kind of device being compiled for; has `platform` and `device_kind`."""
    # Inside shard_map the mesh may be of other devices than the host's.
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device if device is not None else jax.devices()[0]


def _choose(implementation: str | None, problem: Problem) -> str:
    if implementation is not None:
        if implementation not in IMPLEMENTATIONS:
            known = ", ".join(IMPLEMENTATIONS)
            raise ValueError(f"implementation is {implementation!r}, expected one of {known}")
        reason = None if implementation == "reference" else _why_not(problem)
        if reason:
            raise ValueError(f"implementation={implementation} cannot serve this call: {reason}")
        return implementation
    if len(problem.steps) == 1:
        return "reference"
    hopper = any(chip in problem.device_kind for chip in ("H100", "H200", "H800", "H20", "GH200"))
    reason = _why_not(problem) if hopper else f"there is no kernel for {problem.device_kind}"
    if reason:
        _log_once(reason, logging.WARNING if hopper else logging.INFO)
        return "reference"
    return "mosaic_gpu"


def _why_not(problem: Problem) -> str | None:
    try:
        return _backend().supports(problem)
    except ImportError as error:
        return f"the kernel cannot be imported ({error})"


def _backend() -> Any:
    # Late, because its Pallas dialect is not importable with every jaxlib.
    return importlib.import_module(f"{_PACKAGE}.mosaic_gpu")


@functools.cache
def _log_once(reason: str, level: int) -> None:
    logging.log(level, "decode projections run in plain JAX: %s", reason)
