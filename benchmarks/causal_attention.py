"""Attention of whole sequences to latents, forward and backward: errors beside float32, and times.

    python -m benchmarks.causal_attention [--over=mosaic_gpu,cudnn] [--batch=4] [--length=2048]
        [--heads=24] [--branches=4] [--latents=4] [--repeats=6]

Errors are relative, of the gradients of queries, rotary queries, latents and rotary keys, the worst
of several runs on the same fresh inputs; they are taken at `--length` of one row and at small
sizes. The times are those of the card warm and at work: many passes after each other, with what an
implementation needs between arrays in the order of the products beside it and its own. Widths are
those of MLRA-4, MLRA-2 and GLA-4. The FLOP/s count the products of the causal half: 3 of the key's
width, 2 of the latent's. `tokamax` in `--over` is that library's own choice, `tokamax:mosaic`,
`tokamax:triton`, ... what it calls so.
"""

import argparse
import functools
import importlib.util
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from mlra_jax.kernels.causal_attention import latent_attention, latents_for, with_shared

_LATENT, _ROPE = 128, 64
_SCALE = (_LATENT + _ROPE) ** -0.5
_BOUND = 4e-3


def inputs(batch: int, length: int, heads: int, branches: int, latents: int) -> list[jax.Array]:
    """Fresh queries, rotary queries, latents, rotary keys and gradient of the result, bfloat16."""
    by_head = heads, batch, length, branches, _LATENT
    shapes = by_head, (heads, _ROPE), (latents, _LATENT), (_ROPE,), by_head
    keys = jax.random.split(jax.random.key(np.random.SeedSequence().entropy % 2**63), len(shapes))
    whole = lambda shape: shape if len(shape) == 5 else (batch, length, *shape)
    draw = lambda key, shape: jax.random.normal(key, whole(shape), jnp.bfloat16)
    return [draw(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def by_branch_head(q_HBTbC, q_rope_BTHR):
    (H, B, T, b, _), of_heads = q_HBTbC.shape, lambda x: x.reshape(*x.shape[:2], -1, x.shape[-1])
    rope_BTbHR = jnp.broadcast_to(q_rope_BTHR[:, :, None], (B, T, b, H, _ROPE))
    return of_heads(jnp.moveaxis(q_HBTbC, 0, 3)), of_heads(rope_BTbHR)


def attend(over: str, q_HBTbC, q_rope_BTHR, c_BTLC, k_rope_BTR):
    (H, B, T, b, C), queries = q_HBTbC.shape, by_branch_head(q_HBTbC, q_rope_BTHR)
    library, _, implementation = over.partition(":")
    if library == "tokamax":
        import tokamax

        how = dict(scale=_SCALE, is_causal=True, implementation=implementation or None)
        q_BTPX, k_BTLX = jnp.concatenate(queries, axis=-1), with_shared(c_BTLC, k_rope_BTR)
        z_BTPC = tokamax.dot_product_attention(q_BTPX, k_BTLX, c_BTLC, **how)
    else:
        how = dict(heads=H, scale=_SCALE, implementation=over)
        z_BTPC = latent_attention(*queries, c_BTLC, k_rope_BTR, **how)
    return jnp.moveaxis(z_BTPC.reshape(B, T, b, H, C), 3, 0)


def gradients(over: str, *arrays):
    *given, dz = arrays
    return jax.vjp(functools.partial(attend, over), *given)[1](dz)


def errors(over: str, repeats: int, *sizes: int) -> list[float]:
    """The worst relative errors of the four gradients."""
    arrays = inputs(*sizes)
    wide = [x.astype(jnp.float32) for x in arrays]
    wanted = jax.jit(functools.partial(gradients, "reference"))(*wide)
    back = jax.jit(functools.partial(gradients, over))
    norm = lambda x: float(jnp.linalg.norm(x.astype(jnp.float32).ravel()))
    runs = [back(*arrays) for _ in range(repeats)]
    return [
        max(norm(run[i].astype(jnp.float32) - want) for run in runs) / norm(want)
        for i, want in enumerate(wanted)
    ]


def milliseconds(call, *arguments, passes: int) -> float:
    """Of one call, many after each other."""
    jax.block_until_ready(call(*arguments))
    began = time.perf_counter()
    results = [call(*arguments) for _ in range(passes)][-1]
    jax.block_until_ready(results)
    return 1e3 * (time.perf_counter() - began) / passes


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.causal_attention",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--over", help="implementations, commas between; default: auto's, and cuDNN's own"
    )
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048, help="tokens")
    parser.add_argument("--heads", type=int, default=24, help="of a branch")
    parser.add_argument("--branches", type=int, default=4)
    parser.add_argument("--latents", type=int, default=4, help="of all branches")
    parser.add_argument("--repeats", type=int, default=6, help="runs on the same inputs")
    parser.add_argument("--tiny", action="store_true", help="a few short rows: does it run?")
    flags = parser.parse_args(argv)
    if "tokamax" in (flags.over or "") and not importlib.util.find_spec("tokamax"):
        parser.exit(2, f"{parser.prog}: --over={flags.over} needs tokamax: pip install tokamax\n")
    small = [(3, 128, 24, 4, 4), (1, 384, 12, 2, 4), (5, 256, 6, 1, 3), (1, 256, 4, 1, 1)]
    if flags.tiny:
        flags.batch, flags.length, flags.heads, flags.branches, flags.latents = 1, 128, 2, 2, 2
        flags.repeats, small = 2, [(2, 128, 2, 1, 1)]
    sizes = flags.batch, flags.length, flags.heads, flags.branches, flags.latents
    arrays = inputs(*sizes)
    queries = jax.eval_shape(by_branch_head, *arrays[:2])
    auto = latents_for(jax.devices()[0], *queries, *arrays[2:4], heads=flags.heads)
    ways = (flags.over or (f"{auto},cudnn" if auto == "mosaic_gpu" else auto)).split(",")
    right = True
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}", flush=True)
    for over in ways:
        for checked in [*small, (1, flags.length, flags.heads, 1, 1)]:
            found = errors(over, flags.repeats, *checked)
            right &= max(found) < _BOUND
            said = ", ".join(f"{x:.2e}" for x in found)
            print(f"{over}, {checked}: errors of dq, dq_rope, dc, dk_rope {said}", flush=True)
    branch_heads = flags.branches * flags.heads
    work = flags.batch * branch_heads * flags.length**2 * (3 * (_LATENT + _ROPE) + 2 * _LATENT)
    for over in ways:
        passes = 2 if flags.tiny else 60
        alone = jax.jit(functools.partial(attend, over))
        forward = milliseconds(alone, *arrays[:4], passes=passes)
        both = milliseconds(jax.jit(functools.partial(gradients, over)), *arrays, passes=passes)
        backward = both - forward
        said = f"forward {forward:.3f} ms, backward {backward:.3f} ms"
        print(f"{over}, {sizes}: {said}, {work / backward / 1e9:.0f} TFLOP/s", flush=True)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
