"""The one entry to absorbed decode: checks the arguments and picks the kernel."""

import dataclasses
import functools
import importlib
import os
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from mlra_jax.kernels import target, tuning
from mlra_jax.kernels.absorbed_decode import reference
from mlra_jax.kernels.absorbed_decode.problem import Problem

OP = "absorbed_decode"
IMPLEMENTATIONS = ("reference", "mosaic_gpu", "mosaic_tpu")
OVERRIDE = "MLRA_JAX_DECODE_KERNEL"
_PACKAGE = "mlra_jax.kernels.absorbed_decode"


def absorbed_decode(
    q_BTLHC: jax.Array | None,
    q_rope: jax.Array,
    latents_BSLC: jax.Array,
    k_rope: jax.Array,
    lengths: jax.Array,
    starts_B: jax.Array | None = None,
    *,
    scale: float,
    implementation: str | None = None,
    config: Any = None,
    in_parts: bool = False,
) -> Any:
    """Attends from absorbed queries to a cache of latents, which are keys and values at once.

    Score = scale * (q . c + q_rope . k_rope), value = c, one softmax per query, latent and head
    (the "absorbed" decoding of the paper). Query t of row b sees the cache positions
    `starts[b] <= s < lengths[b, t]`.

    The kernels read the cache where it lies, once. Give them whole arrays: a slice of a cache
    stacked over layers would be copied in front of the kernel, so keep one array per layer.

    Args:
      q_BTLHC: queries already multiplied by the key up-projection, H heads per latent; bfloat16,
        float16 or float32. None if the latents are values only: the score is that of the rotary
        keys.
      q_rope: rotary queries, `[B, T, H, R]` shared by all latents, or `[B, T, G, H, R]` where
        latent l uses group l % G. Same dtype.
      latents_BSLC: the cache. Same dtype. Finite everywhere, also where nothing was written yet.
      k_rope: the rotary keys, `[B, S, R]` shared by all latents, or `[B, S, L, R]`, one of each
        latent. Same dtype, finite everywhere.
      lengths: int32 `[B]`, the cache length including all T queries (query t sees
        `lengths - T + 1 + t` positions), or `[B, T]`, the end of what each query sees. Any value is
        legal; those outside 0..S are clipped.
      starts_B: int32, first position that is not left padding; default 0. Clipped likewise.
      scale: what scores are multiplied by before the softmax, a Python number.
      implementation: "reference", "mosaic_gpu" or "mosaic_tpu"; default: the environment variable
        MLRA_JAX_DECODE_KERNEL, else the kernel for the platform that is compiled for (that of the
        mesh inside shard_map, otherwise JAX's default backend), else, with one logged line, the
        reference.
      config: the implementation's Config; default: the measured one, else its heuristic.
      in_parts: leave the answer in parts, where `leaves_parts` says that it can be.

    Returns:
      out_BTLHC in the dtype of the queries, and lse_BTLH float32, the natural logarithm of the
      softmax denominator. A query that sees nothing gets 0 and -inf. Or `mosaic_gpu.Parts`.

    Raises:
      ValueError: shapes or dtypes that do not fit together, an unknown implementation, or one asked
        for by name that cannot serve the call.
    """
    _check(q_BTLHC, q_rope, latents_BSLC, k_rope, lengths, starts_B, scale)
    (B, T), S = q_rope.shape[:2], latents_BSLC.shape[1]
    q_rope_BTGHR, k_rope = _normalised(q_rope, k_rope)
    lengths_BT = lengths.astype(jnp.int32)
    if lengths.ndim == 1:
        # Clipped first so that the subtraction cannot wrap around; beyond S + T - 1 all is visible.
        ends_B = jnp.clip(lengths_BT, 0, S + T)
        lengths_BT = ends_B[:, None] - (T - 1) + jnp.arange(T, dtype=jnp.int32)
    lengths_BT = jnp.clip(lengths_BT, 0, S)
    starts_B = jnp.zeros([B], jnp.int32) if starts_B is None else starts_B.astype(jnp.int32)
    starts_B = jnp.clip(starts_B, 0, S)

    device = target.device()
    problem = Problem.of(q_BTLHC, q_rope_BTGHR, latents_BSLC, k_rope, device.device_kind)
    name = _choose(implementation, device, problem)
    if name == "reference":
        kernel = reference.absorbed_decode
    else:
        kernel = _backend(name).absorbed_decode
        config = _config(name, problem) if config is None else config
    if in_parts:
        kernel = functools.partial(kernel, in_parts=True)
    return kernel(
        q_BTLHC,
        q_rope_BTGHR,
        latents_BSLC,
        k_rope,
        lengths_BT,
        starts_B,
        scale=float(scale),
        config=config,
    )


def leaves_parts(device: Any, problem: Problem) -> bool:
    """Whether the answer may stay in parts, which `kernels.after_attention` joins."""
    if _choose(None, device, problem) != "mosaic_gpu":
        return False
    return _backend("mosaic_gpu").leaves_parts(problem)


def has_kernel(q_BTLHC: Any, q_rope_BTGHR: Any, latents_BSLC: Any) -> bool:
    """Whether `absorbed_decode` runs a kernel, not plain JAX, over latents that share rotary keys.

    Args:
      q_BTLHC, q_rope_BTGHR, latents_BSLC: arrays or `jax.ShapeDtypeStruct`s.

    Raises:
      ValueError: MLRA_JAX_DECODE_KERNEL names no implementation.
    """
    device, rope = target.device(), q_rope_BTGHR.shape[4]
    k_rope_BSR = jax.ShapeDtypeStruct((*latents_BSLC.shape[:2], rope), latents_BSLC.dtype)
    arrays = q_BTLHC, q_rope_BTGHR, latents_BSLC, k_rope_BSR
    problem = Problem.of(*arrays, device.device_kind)
    name = _asked_for(None)[0] or _kernel_for(device)
    return name not in (None, "reference") and _why_not(name, problem) is None


def autotune(
    q_BTLHC: jax.Array | None,
    q_rope: jax.Array,
    latents_BSLC: jax.Array,
    k_rope: jax.Array,
    lengths: jax.Array,
    starts_B: jax.Array | None = None,
    *,
    scale: float,
    implementation: str | None = None,
) -> Any:
    """Measures the candidate settings on these very arrays; later calls of this shape use the best.

    Arguments as in `absorbed_decode`. `save_tuned(path)` keeps the result, `load_tuned(path)`
    brings it back in another process.

    Returns:
      The fastest Config, or None where the reference serves the call and nothing can be set.
    """
    arrays = (q_BTLHC, q_rope, latents_BSLC, k_rope, lengths, starts_B)
    _check(*arrays, scale)
    q_rope_BTGHR, k_rope = _normalised(q_rope, k_rope)
    device = target.device()
    problem = Problem.of(q_BTLHC, q_rope_BTGHR, latents_BSLC, k_rope, device.device_kind)
    name = _choose(implementation, device, problem)
    if name == "reference":
        return None

    def run(config):
        step = jax.jit(
            functools.partial(absorbed_decode, scale=scale, implementation=name, config=config)
        )
        return lambda: step(*arrays)

    best, _ = tuning.fastest(_backend(name).candidates(problem), run)
    tuning.remember_tuned(OP, name, problem, best)
    return best


def _normalised(q_rope: jax.Array, k_rope: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rotary queries with their groups, rotary keys without heads where there is one."""
    if q_rope.ndim == 4:
        q_rope = q_rope[:, :, None]
    if k_rope.ndim == 4 and k_rope.shape[2] == 1:
        k_rope = k_rope[:, :, 0]
    return q_rope, k_rope


def _check(q_BTLHC, q_rope, latents_BSLC, k_rope, lengths, starts_B, scale) -> None:
    for name, array, ranks in (
        ("q", q_BTLHC, (5,)),
        ("q_rope", q_rope, (4, 5)),
        ("latents", latents_BSLC, (4,)),
        ("k_rope", k_rope, (3, 4)),
        ("lengths", lengths, (1, 2)),
        ("starts", starts_B, (1,)),
    ):
        if array is not None and array.ndim not in ranks:
            expected = " or ".join(map(str, ranks))
            raise ValueError(f"{name} needs {expected} dimensions, got shape {array.shape}")
    # What the others are to fit: the queries, where the latents are asked any.
    name, q = ("q", q_BTLHC) if q_BTLHC is not None else ("q_rope", q_rope)
    L, C = latents_BSLC.shape[2:] if q_BTLHC is None else (q.shape[2], q.shape[4])
    B, T, H = *q.shape[:2], q.shape[-2]
    S, R = k_rope.shape[1], k_rope.shape[-1]
    G = q_rope.shape[2] if q_rope.ndim == 5 else 1
    if 0 in (*q.shape, L, C, S, R, G):
        shapes = f"{name} {q.shape}, latents {latents_BSLC.shape}, k_rope {k_rope.shape}"
        raise ValueError(f"no dimension may be 0: {shapes}")
    if L % G:
        raise ValueError(f"the {L} latents do not divide among the {G} groups of q_rope")
    beside = f"{name} {q.shape}"
    for name, array, shape in (
        ("q_rope", q_rope, (B, T, G, H, R) if q_rope.ndim == 5 else (B, T, H, R)),
        ("latents", latents_BSLC, (B, S, L, C)),
        ("k_rope", k_rope, (B, S, L, R) if k_rope.ndim == 4 else (B, S, R)),
        ("lengths", lengths, (B, T)[: lengths.ndim]),
        ("starts", starts_B, (B,)),
    ):
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}, expected {shape} beside {beside}")
    _check_dtypes(q_BTLHC, q_rope, latents_BSLC, k_rope, lengths, starts_B)
    if isinstance(scale, jax.core.Tracer):
        raise ValueError("scale must be a Python number, not a traced array")


def _check_dtypes(q_BTLHC, q_rope, latents_BSLC, k_rope, lengths, starts_B) -> None:
    name, q = ("q", q_BTLHC) if q_BTLHC is not None else ("q_rope", q_rope)
    if q.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ValueError(f"{name} is {q.dtype}, expected bfloat16, float16 or float32")
    for other, array in (("q_rope", q_rope), ("latents", latents_BSLC), ("k_rope", k_rope)):
        if array.dtype != q.dtype:
            raise ValueError(f"{other} is {array.dtype} but {name} is {q.dtype}: cast one of them")
    for name, array in (("lengths", lengths), ("starts", starts_B)):
        if array is not None and not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(f"{name} is {array.dtype}, expected int32")


def _choose(implementation: str | None, device: Any, problem: Problem) -> str:
    name, source = _asked_for(implementation)
    if name is not None:
        reason = None if name == "reference" else _why_not(name, problem)
        if reason:
            raise ValueError(f"{source}={name} cannot serve this call: {reason}")
        return name
    name = _kernel_for(device)
    if name is None:
        _log_once(f"runs in plain JAX: there is no kernel for {device.device_kind}", logging.INFO)
        return "reference"
    reason = _why_not(name, problem)
    if reason:
        _log_once(f"runs in plain JAX: {name}: {reason}", _level(name, problem))
        return "reference"
    return name


def _asked_for(implementation: str | None) -> tuple[str | None, str]:
    """The implementation asked for by name, if any, and by what."""
    name, source = implementation, "implementation"
    if name is None and os.environ.get(OVERRIDE):
        name, source = os.environ[OVERRIDE], OVERRIDE
    if name is not None and name not in IMPLEMENTATIONS:
        raise ValueError(f"{source} is {name!r}, expected one of {', '.join(IMPLEMENTATIONS)}")
    return name, source


def _kernel_for(device: Any) -> str | None:
    if device.platform == "tpu":
        return "mosaic_tpu"
    return "mosaic_gpu" if target.is_hopper(device) else None


def _why_not(name: str, problem: Problem) -> str | None:
    try:
        module = _backend(name)
    except ImportError as error:
        return f"it cannot be imported ({error})"
    return module.supports(problem)


def _level(name: str, problem: Problem) -> int:
    """A warning where users can act, which is not on the widths of a model."""
    try:
        supports = _backend(name).supports
    except ImportError:
        return logging.WARNING
    cache = -(-problem.cache // 8) * 8
    changed = dataclasses.replace(problem, dtype="bfloat16", cache=cache)
    return logging.INFO if supports(changed) else logging.WARNING


def _config(name: str, problem: Problem) -> Any:
    module = _backend(name)
    tuned = tuning.find_tuned(OP, name, problem)
    if tuned is not None:
        try:
            return module.Config(**tuned)
        except (TypeError, ValueError) as error:  # Saved by a version with other settings.
            _log_once(f"leaves tuned settings of {name} aside: {error}", logging.WARNING)
    return module.heuristic(problem)


def _backend(name: str) -> Any:
    # Late, because a backend's Pallas dialect is not importable with every jaxlib.
    return importlib.import_module(f"{_PACKAGE}.{name}")


@functools.cache
def _log_once(text: str, level: int) -> None:
    logging.log(level, "absorbed decode %s", text)
