"""What a chain of products is made of: steps over named rows, and weights as the kernel reads them.

A backend module (`mosaic_gpu`) provides

  Config                        frozen dataclass of plain numbers
  supports(problem)             None, or in one phrase why the kernel cannot serve the problem
  heuristic(problem)            the Config to use when nothing was measured
  chain(rows, weights, steps)   the kernel; arguments as `api.chain` checks them
"""

import dataclasses

import jax
import jax.numpy as jnp

# Elements of a line of the kernel's shared memory: sizes are multiples of it.
ALIGN = 64


@dataclasses.dataclass(frozen=True)
class Heads:
    """Which columns of its source each head of a step multiplies; weights differ from head to head.

    Output column n belongs to head `n // width`; its k-th factor is the source's column
    `start + (n // width % count) * stride + k // run * jump + k % run`.

    Attributes:
      width: output columns of a head.
      count: heads until the source's columns repeat.
      stride: columns from one head to the next.
      run: neighbouring columns that are multiplied.
      jump: columns from one run to the next.
    """

    width: int
    count: int
    stride: int
    run: int
    jump: int = 0


@dataclasses.dataclass(frozen=True)
class Step:
    """One product: `into = add + norm(source) @ weight`, or `silu(gate) * up` of it.

    Attributes:
      source: name of the rows that are multiplied, of the call or of an earlier step.
      weight: name of the prepared weight; with one that `prepare_gated` made, the step is a SwiGLU.
      into: name of the result, a new one.
      norm: the source is divided by its root mean square, and this is the epsilon under the root;
        None leaves it as it is. A norm's scale belongs into the weight (`prepare`).
      add: name of rows added to the product.
      start: first column of the source that is multiplied.
      heads: for products with a weight per head.
    """

    source: str
    weight: str
    into: str
    norm: float | None = None
    add: str | None = None
    start: int = 0
    heads: Heads | None = None


@dataclasses.dataclass(frozen=True)
class Problem:
    """Everything static about one call.

    Attributes:
      device_kind: as JAX names the device the call is compiled for ("NVIDIA H100 80GB HBM3").
      steps: the products in their order.
      rows: the name and number of columns of each array of rows that is given.
      weights: the name and shape of each prepared weight.
      count: M, how many rows there are.
      dtype: of rows and weights, "bfloat16", "float16" or "float32".
      multiprocessors: of the device, a slice of a GPU perhaps; None where only its kind is known.
    """

    device_kind: str
    steps: tuple[Step, ...]
    rows: tuple[tuple[str, int], ...]
    weights: tuple[tuple[str, tuple[int, ...]], ...]
    count: int
    dtype: str
    multiprocessors: int | None = None


def prepare(weight_KN: jax.Array, scale_K: jax.Array | None = None) -> jax.Array:
    """A weight as the kernel reads it, `[N, K]`: the factors of one output lie side by side.

    Both sizes are padded with zeros to multiples of 64, so the result of a step may have columns of
    zeros at its end. Where K is padded, the rows must have as many columns, finite ones.

    Args:
      weight_KN: maps rows of K to rows of N; any float dtype.
      scale_K: the scale of the RMSNorm in front of it, multiplied in float32 and rounded once.
    """
    if scale_K is not None:
        scaled = weight_KN.astype(jnp.float32) * scale_K.astype(jnp.float32)[:, None]
        weight_KN = scaled.astype(weight_KN.dtype)
    return jnp.pad(weight_KN.T, [(0, -size % ALIGN) for size in weight_KN.shape[::-1]])


def prepare_gated(
    gate_KN: jax.Array, up_KN: jax.Array, scale_K: jax.Array | None = None
) -> jax.Array:
    """The two weights of a SwiGLU as one, `[2, N, K]`; arguments as in `prepare`."""
    return jnp.stack([prepare(gate_KN, scale_K), prepare(up_KN, scale_K)])


def prepare_heads(weight_HKN: jax.Array) -> jax.Array:
    """A weight of each head, `[H * N, K]`; for a step with `heads`. K and N in multiples of 64."""
    heads, inner, outputs = weight_HKN.shape
    return weight_HKN.swapaxes(1, 2).reshape(heads * outputs, inner)
