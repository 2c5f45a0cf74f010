"""What runs at a point: the kernel, libraries beside it, and the exact result."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.absorbed_decode.points import K, Point, caches_of, scale_of, shapes
from mlra_jax.kernels.absorbed_decode import reference

_BURST = 8e-3  # Seconds.


def looped(op, steps: int):
    """op's result for the first cache, and what a loop over all caches makes of its queries."""
    op = jax.jit(op)

    def run(q, q_rope, caches, lengths, starts):
        first = op(q, q_rope, *caches[0], lengths, starts)

        def step(_, q):
            for cache in caches:
                q = op(q, q_rope, *cache, lengths, starts)[0]
            return q

        return first, lax.fori_loop(0, steps, step, first[0])

    return run


def exact(q, q_rope, latents, k_rope, lengths, starts, *, scale):
    """Float32 attention, one block of the cache at a time: nothing in common with the kernels."""
    B, T, L, H, _ = q.shape
    G, S = q_rope.shape[2], latents.shape[1]
    block = next(size for size in (2048, 1024, 1000) if S % size == 0)
    wide = lambda x: x.astype(jnp.float32)
    einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)

    def step(carry, first):
        top, total, acc = carry
        c = wide(lax.dynamic_slice_in_dim(latents, first, block, axis=1))
        r = wide(lax.dynamic_slice_in_dim(k_rope, first, block, axis=1))
        s = einsum("btlhc,bslc->btlhs", wide(q), c).reshape(B, T, L // G, G, H, block)
        rope = "btghr,bsr->btghs" if r.ndim == 3 else "btghr,bsgr->btghs"
        s = s + einsum(rope, wide(q_rope), r)[:, :, None]
        position = first + jnp.arange(block)
        seen = (position >= starts[:, None, None]) & (position < lengths[..., None])
        s = s.reshape(B, T, L, H, block) * scale
        s = jnp.where(seen[:, :, None, None], s, -jnp.inf)
        new_top = jnp.maximum(top, s.max(-1))
        finite = jnp.where(jnp.isfinite(new_top), new_top, 0)
        p = jnp.exp(s - finite[..., None])
        fade = jnp.exp(top - finite)
        acc = acc * fade[..., None] + einsum("btlhs,bslc->btlhc", p, c)
        return (new_top, total * fade + p.sum(-1), acc), None

    top = jnp.full(q.shape[:-1], -jnp.inf, jnp.float32)
    carry = (top, jnp.zeros_like(top), jnp.zeros(q.shape, jnp.float32))
    (top, total, acc), _ = lax.scan(step, carry, jnp.arange(0, S, block))
    return acc / jnp.where(total == 0, 1, total)[..., None], top + jnp.log(total)


def error_of(result, truth) -> float:
    """Relative Frobenius error of the outputs; infinite where finiteness of the LSE differs."""
    (out, lse), (true_out, true_lse) = result, truth
    true_out = true_out.astype(jnp.float32)
    error = jnp.linalg.norm((out.astype(jnp.float32) - true_out).ravel())
    seen = jnp.isfinite(true_lse)
    lse_error = jnp.where(seen, jnp.abs(lse - true_lse), 0).max()
    agree = (jnp.isfinite(lse) == seen).all() & (lse_error < 1e-2)
    return float(jnp.where(agree, error / jnp.linalg.norm(true_out.ravel()), jnp.inf))


def attention_by_library(point: Point, library: str):
    """Keys and values by head: "cudnn" and "xla" of jax.nn, or tokamax's own choice."""
    if library == "tokamax":
        import tokamax

        attention = tokamax.dot_product_attention
    else:
        attention = functools.partial(jax.nn.dot_product_attention, implementation=library)

    def op(q, q_rope, latents, k_rope, lengths, starts):
        del q, lengths, starts  # The whole cache is visible at these points.
        B, T, J, G, K = q_rope.shape
        keys = k_rope if k_rope.ndim == 4 else k_rope[:, :, None]
        out = attention(q_rope.reshape(B, T, J * G, K), keys, latents)  # These are the values.
        # The loop feeds the first result on; the second keeps the op's signature.
        return out.reshape(B, T, J, G, -1), jnp.zeros([B, T, J, G], jnp.float32)

    def chained(q, q_rope, *rest):
        # The next step's queries must depend on this step's output, or the loop is empty.
        return op(q, q_rope + q * q_rope.dtype.type(1e-9), *rest)

    return chained


def kernel_op(point: Point, device_kind: str):
    from mlra_jax.kernels.absorbed_decode import mosaic_gpu

    problem = point.problem(device_kind)
    reason = mosaic_gpu.supports(problem)
    if reason:
        raise ValueError(f"{point}: {reason}")
    config = mosaic_gpu.heuristic(problem)
    op = functools.partial(mosaic_gpu.absorbed_decode, scale=scale_of(point), config=config)
    if not point.values_only:
        return op

    def grouped(q, q_rope, latents, k_rope, lengths, starts):
        return op(None, q_rope + q * q.dtype.type(1e-9), latents, k_rope, lengths, starts)

    return grouped


def compilations(point: Point, functions: dict) -> dict:
    """{(point, name): a call that compiles the function for the point's shapes}."""

    def build(name, function):
        q_shapes, c_shapes = shapes(point)
        struct = lambda shape: jax.ShapeDtypeStruct(shape, point.dtype)
        caches = [tuple(map(struct, c_shapes))] * caches_of(point)
        lengths = jax.ShapeDtypeStruct((point.batch, point.queries), jnp.int32)
        starts = jax.ShapeDtypeStruct((point.batch,), jnp.int32)
        if name == "exact":  # Only its numbers matter, so no time goes into choosing products.
            args = (*map(struct, q_shapes), *caches[0], lengths, starts)
            return jax.jit(function).lower(*args).compile({"xla_gpu_autotune_level": 0})
        args = (*map(struct, q_shapes), caches, lengths, starts)
        return jax.jit(function).lower(*args).compile()

    return {
        (point, name): functools.partial(build, name, function)
        for name, (function, _) in functions.items()
    }


def steps_for(point: Point, limit: dict, slower: float) -> int:
    """Loop steps that take about one burst, if an op is `slower` times slower than it could be."""
    expected = slower * (point.bytes() / limit["read"] + 8e-6)
    return max(1, round(_BURST / (expected * caches_of(point))))


def programs(point: Point, limit: dict, kind: str, quick: bool) -> dict:
    """{name: (function, loop steps)} of what is compiled for a point."""
    scale = scale_of(point)
    found = dict(kernel=(kernel_op(point, kind), 0 if quick else steps_for(point, limit, 1)))
    if not quick and point.values_only:
        libraries = ["cudnn", "xla"]
        if importlib.util.find_spec("tokamax"):
            libraries.append("tokamax")
        for name in libraries:
            found[name] = attention_by_library(point, name), steps_for(point, limit, 4)
    elif not quick and point.group == "paper" and point.cache in (128 * K, 1024 * K):
        op = functools.partial(reference.absorbed_decode, scale=scale)
        found["xla"] = op, steps_for(point, limit, 8)
    found = {name: (looped(op, steps), steps) for name, (op, steps) in found.items()}
    return found | dict(exact=(functools.partial(exact, scale=scale), 0))
