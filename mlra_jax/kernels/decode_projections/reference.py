"""Chains of products in plain JAX: the truth the kernel is held to, and the fallback."""

import jax
import jax.numpy as jnp

from mlra_jax.kernels.decode_projections.steps import Problem, Step


def chain(
    rows: dict[str, jax.Array],
    weights: dict[str, jax.Array],
    *,
    problem: Problem,
    config: None = None,
) -> dict[str, jax.Array]:
    """The results of all steps, each [M, N]; arguments as `api.chain` checks them.

    Products accumulate in float32, a step's results are rounded once to the dtype of the rows.
    """
    del config
    known = dict(rows)
    for step in problem.steps:
        known[step.into] = _product(step, known, weights[step.weight])
    return {step.into: known[step.into] for step in problem.steps}


def _product(step: Step, known: dict[str, jax.Array], weight: jax.Array) -> jax.Array:
    source_MX = known[step.source]
    inner = weight.shape[-1]
    product = dict(
        preferred_element_type=jnp.float32,
        precision=jax.lax.Precision.HIGHEST if source_MX.dtype == jnp.float32 else None,
    )
    if step.heads:
        heads = step.heads
        head, k = jnp.arange(heads.count)[:, None], jnp.arange(inner)
        column_HK = step.start + head * heads.stride + k // heads.run * heads.jump + k % heads.run
        x_MHK = source_MX[:, column_HK]
        # Heads of the weight beyond `count` begin again with the first head's columns.
        weight_RHNK = weight.reshape(-1, heads.count, heads.width, inner)
        out_MN = jnp.einsum("mhk,rhnk->mrhn", x_MHK, weight_RHNK, **product)
        out_MN = out_MN.reshape(source_MX.shape[0], -1)
    else:
        x_MK = source_MX[:, step.start : step.start + inner]
        if weight.ndim == 3:
            gate_MN, up_MN = jnp.einsum("mk,gnk->gmn", x_MK, weight, **product)
        else:
            out_MN = jnp.einsum("mk,nk->mn", x_MK, weight, **product)
        if step.norm is not None:
            square_M1 = jnp.mean(x_MK.astype(jnp.float32) ** 2, axis=1, keepdims=True)
            factor_M1 = jax.lax.rsqrt(square_M1 + step.norm)
            if weight.ndim == 3:
                gate_MN, up_MN = gate_MN * factor_M1, up_MN * factor_M1
            else:
                out_MN = out_MN * factor_M1
        if weight.ndim == 3:
            out_MN = jax.nn.silu(gate_MN) * up_MN
    if step.add is not None:
        out_MN = out_MN + known[step.add].astype(jnp.float32)
    return out_MN.astype(source_MX.dtype)
