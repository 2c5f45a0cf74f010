"""The parts every block is made of: RMSNorm, projections, rotary positions, SwiGLU."""

import functools
import math
import re
import string
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from mlra_jax import sharding
from mlra_jax.config import ModelConfig
from mlra_jax.kernels import between_products, target
from mlra_jax.kernels.softmax import precision

INIT_STDDEV = 0.02


def param(
    rngs: nnx.Rngs, init, shape: Sequence[int], axes: Sequence[str | None], dtype: str
) -> nnx.Param:
    """A parameter with its logical axis names; `sharding.abstract` maps them to a mesh."""
    value = init(rngs.params(), tuple(shape), jnp.dtype(dtype))
    return nnx.Param(value, out_sharding=tuple(axes), eager_sharding=False)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def weigh(
    x: jax.Array,
    kernel: jax.Array,
    subscripts: str,
    out_dtype: str | None = None,
    place: tuple[Mesh, tuple[str | None, ...]] | None = None,
) -> jax.Array:
    """`einsum(subscripts, x, kernel)`, a product in the dtype of `x` whatever the kernel's is.

    The kernel's gradient is summed in float32, over tokens and, as it leaves the product so, over
    devices too; then it takes the kernel's dtype.

    Args:
      x: activations.
      kernel: a parameter.
      subscripts: `x,kernel->result`, each letter in two of the three.
      out_dtype: of the result, if it is not that of `x`.
      place: the mesh and the kernel's logical axes, for a gradient that GPUs exchange as they do it
        best. The batch is then the first dimension of `x` that the kernel does not have.
    """
    return einsum(subscripts, x, kernel.astype(x.dtype), out_dtype)


def einsum(subscripts: str, x: jax.Array, y: jax.Array, out_dtype=None) -> jax.Array:
    """`jnp.einsum` in the precision of the arrays' dtype; the result has it, or `out_dtype`."""
    return jnp.einsum(
        subscripts, x, y, precision=precision(x.dtype), preferred_element_type=out_dtype
    )


def _weigh_forward(x, kernel, subscripts, out_dtype, place):
    # Not by calling `weigh`: policies of `jax.checkpoint` do not look inside of it.
    return einsum(subscripts, x, kernel.astype(x.dtype), out_dtype), (x, kernel)


def _weigh_backward(subscripts, out_dtype, place, kept, slope):
    (x, kernel), (of_x, of_kernel, of_out) = kept, re.split(",|->", subscripts)
    slope = slope.astype(x.dtype)
    x_slope = einsum(f"{of_out},{of_kernel}->{of_x}", slope, kernel.astype(x.dtype))
    if place is not None and sharding.copies(*place):
        kernel_slope = _slope_in_turn(x, slope, (of_x, of_out, of_kernel), *place)
        return x_slope, kernel_slope.astype(kernel.dtype)
    if place is not None and (parts := gradient_parts(*place)) > 1:
        slope = slope.reshape(*slope.shape[:-1], parts, -1)
        of_out, of_kernel = of_out[:-1] + "yz", of_kernel[:-1] + "yz"
    kernel_slope = einsum(f"{of_x},{of_out}->{of_kernel}", x, slope, jnp.float32)
    return x_slope, kernel_slope.reshape(kernel.shape).astype(kernel.dtype)


weigh.defvjp(_weigh_forward, _weigh_backward)


def _slope_in_turn(x, slope, letters, mesh, axes):
    """The kernel's gradient, each device's part of it a product of its own.

    Where what would be cut for that is larger than the gradient, the gradient is cut.
    """
    of_x, of_out, of_kernel = letters
    split = dict(zip(of_kernel, sharding.kept(axes, sharding.BATCH), strict=True))
    split[next(letter for letter in of_x if letter not in of_kernel)] = sharding.BATCH
    ways, at = sharding.size(mesh, sharding.FSDP), sharding.split_dimension(axes, sharding.FSDP)
    cut = of_kernel[at]

    def narrow(y, of_y, i):
        if cut not in of_y:
            return y
        width = y.shape[of_y.index(cut)] // ways
        return jax.lax.dynamic_slice_in_dim(y, i * width, width, of_y.index(cut))

    def part(_, i, x, slope):
        multiply = lambda x, slope: einsum(f"{of_x},{of_out}->{of_kernel}", x, slope, jnp.float32)
        read = x if cut in of_x else slope
        made = jax.eval_shape(multiply, x, slope)
        if read.size * read.dtype.itemsize > made.size * made.dtype.itemsize:
            return narrow(multiply(x, slope), of_kernel, i)
        return multiply(narrow(x, of_x, i), narrow(slope, of_out, i))

    where = [PartitionSpec(*map(split.get, of)) for of in (of_x, of_out)]
    return sharding.summed_in_turn(part, mesh, axes, (x, slope), where)


def gradient_parts(mesh: Mesh, axes: Sequence[str | None]) -> int:
    """In how many parts GPUs that split the batch have the last dimension of a kernel.

    What they reduce and scatter must be part by part in memory. A gradient that is made so is one
    copy away from that; else it would be scattered, and read by the optimizer, transposed.
    """
    split = set(sharding.mesh_axes(*axes)[-1]).intersection(sharding.BATCH)
    return sharding.size(mesh, sorted(split)) if on_gpus(mesh) else 1


def on_gpus(mesh: Mesh) -> bool:
    return target.is_gpu(mesh.devices.flat[0])


class Projection(nnx.Module):
    """A bias-free linear map `[..., in dims] -> [..., out dims]`, kernel `[in dims, out dims]`.

    `shape` and `axes` are the kernel's; the first `num_in` dimensions are contracted. The product
    is computed in the input's dtype (`weigh`), the gradient as `mesh` wants it, if there is one.
    """

    def __init__(
        self,
        shape: Sequence[int],
        axes: Sequence[str | None],
        *,
        config: ModelConfig,
        rngs: nnx.Rngs,
        num_in: int = 1,
        init=None,
        mesh: Mesh | None = None,
    ):
        self.num_in, self.mesh = num_in, mesh
        init = init or nnx.initializers.normal(INIT_STDDEV)
        self.kernel = param(rngs, init, shape, axes, config.param_dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        letters = string.ascii_lowercase
        rows, features = letters[: x.ndim - self.num_in], letters[x.ndim - self.num_in :]
        of_kernel = features[: self.kernel.ndim]
        inner, outer = of_kernel[: self.num_in], of_kernel[self.num_in :]
        place, axes = None, self.kernel.get_metadata()["out_sharding"]
        if self.mesh is not None:
            place = self.mesh, tuple(axes[-self.kernel.ndim :])  # That of the layers is first.
        subscripts = f"{rows}{inner},{of_kernel}->{rows}{outer}"
        return weigh(x, self.kernel[...], subscripts, None, place)


class Spread(NamedTuple):
    """An activation for projections that devices split by columns.

    Attributes:
      whole: for those that they do not split; None where there are none.
      copies: `[ways, ...]`, each device's own (`overlap.SUMMANDS`).
    """

    whole: jax.Array | None
    copies: jax.Array


class Exchanges:
    """How devices that split heads exchange activations: as XLA does it by itself.

    `overlap.ByCopies` is how two GPUs do it in training.
    """

    copied = False

    def columns(self, projection: Projection, x: jax.Array) -> jax.Array:
        """The projection of an activation that every device has whole."""
        return projection(x)

    def rows(self, projection: Projection, x: jax.Array) -> jax.Array:
        """The projection, whole on every device, of an activation that devices split."""
        return projection(x)


def summands(x: jax.Array, kernel: jax.Array, num_in: int, out_dtype=None) -> jax.Array:
    """`[N, ..., out dims]`, which add up to a product of one device in a decoding step.

    Where kernels add them up (`between_products`) they are float32, each of a part of what is
    contracted; elsewhere there is one, the product, in `out_dtype` or that of `x`.
    """
    shape, outer = x.shape[: x.ndim - num_in], kernel.shape[num_in:]
    rows, contracted, columns = map(math.prod, (shape, kernel.shape[:num_in], outer))
    N = between_products.summands(target.device(), rows, contracted, columns)
    kernel = kernel.astype(x.dtype)
    if N == 1:
        how = dict(precision=precision(x.dtype), preferred_element_type=out_dtype)
        return jnp.tensordot(x, kernel, num_in, **how)[None]
    x_RND, kernel_NDE = x.reshape(rows, N, -1), kernel.reshape(N, -1, columns)
    return einsum("rnd,nde->nre", x_RND, kernel_NDE, "float32").reshape(N, *shape, *outer)


class SummedProjection(Projection):
    """`projection` in the decoding form, its contracted dimensions split over `mesh`."""

    apart = False
    """Whether what is to be added up stays in parts, `[N, rows, out dims]`, for `Additions`: the
    `summands` of each device."""
    later = False
    """Whether the product is another's (`kernels.after_attention`), and its input is returned."""

    def __init__(self, projection: Projection, mesh: Mesh):
        self.kernel, self.num_in, self.mesh = projection.kernel, projection.num_in, mesh
        self.axes = tuple(projection.kernel.get_metadata()["out_sharding"][: self.num_in])

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.later:
            return x
        if not self.apart:
            return super().__call__(x)
        # What several devices have is added up in float32.
        out_dtype = "float32" if self.mesh.size > 1 else None
        rows = ("batch", "length")
        return jax.shard_map(
            functools.partial(summands, num_in=self.num_in, out_dtype=out_dtype),
            mesh=self.mesh,
            in_specs=(sharding.spec(*rows, *self.axes), sharding.spec(*self.axes)),
            out_specs=sharding.spec("latent", *rows),
            check_vma=False,
        )(x, self.kernel[...].astype(x.dtype))


def output_init(config: ModelConfig):
    """Initialiser of a block's two output projections: zeros, or N(0, 0.02) in the ablation."""
    return nnx.initializers.zeros if config.zero_init else nnx.initializers.normal(INIT_STDDEV)


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x²) + eps) * scale`, statistics in float32, over blocks of `width`.

    With `blocks > 1` the last dimension is cut into that many contiguous parts, each normalised by
    itself. `factor` multiplies the result (the calibration factors of the latent family), which has
    the compute dtype.
    """

    def __init__(
        self,
        width: int,
        *,
        config: ModelConfig,
        rngs: nnx.Rngs,
        blocks: int = 1,
        factor: float = 1.0,
    ):
        self.blocks, self.width, self.factor, self.eps = blocks, width, factor, config.norm_eps
        self.dtype = config.execution.dtype
        self.scale = param(
            rngs, nnx.initializers.ones, (blocks * width,), ("norm",), config.param_dtype
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        blocked = x.astype(jnp.float32).reshape(*x.shape[:-1], self.blocks, self.width)
        normed = blocked * jax.lax.rsqrt(jnp.mean(blocked**2, axis=-1, keepdims=True) + self.eps)
        return (normed.reshape(x.shape) * (self.scale[...] * self.factor)).astype(self.dtype)

    def of_sum(self, x: jax.Array, summands: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(x and `summands` `[N, ..., width]` added up, in the dtype of `x`; that, normed)."""
        if not between_products.sums(self.width):
            x = (x + summands.sum(0)).astype(x.dtype)
            return x, self(x)
        rows = lambda y: y.reshape(*y.shape[: y.ndim - x.ndim], -1, self.width)
        how = dict(factor=self.factor, eps=self.eps, dtype=self.dtype)
        both = between_products.sum_and_norm(rows(summands), rows(x), self.scale[...], **how)
        return tuple(y.reshape(x.shape) for y in both)


def rotate(x_BTHR: jax.Array, positions_BT: jax.Array, base: float) -> jax.Array:
    """Rotary position embedding, half-split pairing, angles `position * base^(-2j/R)`."""
    return rotated(x_BTHR, *angles(positions_BT, x_BTHR.shape[-1], base))


def rotated(x_BTHR: jax.Array, cos_BTR: jax.Array, sin_BTR: jax.Array) -> jax.Array:
    """As `rotate`, by the cosines and sines of `angles`."""
    cos, sin = cos_BTR[:, :, None], sin_BTR[:, :, None]
    x1, x2 = jnp.split(x_BTHR.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([x1 * cos - x2 * sin, x1 * sin + x2 * cos], axis=-1)
    return turned.astype(x_BTHR.dtype)


def angles(positions_BT: jax.Array, width: int, base: float) -> tuple[jax.Array, jax.Array]:
    """(cosines, sines) of `rotate`, float32 `[B, T, width / 2]`.

    Positions are cut into two digits whose angles are reduced modulo 2π in float64 beforehand:
    float32 angles of positions in the millions would be wrong in the second decimal.
    """
    half, digit = width // 2, 1024
    frequency = base ** (-np.arange(half, dtype=np.float64) / half)
    high, low = jnp.divmod(positions_BT[..., None].astype(jnp.int32), digit)
    high = high * np.float32(np.mod(digit * frequency, 2 * np.pi))
    low = low * np.float32(frequency)
    cos = jnp.cos(high) * jnp.cos(low) - jnp.sin(high) * jnp.sin(low)
    sin = jnp.sin(high) * jnp.cos(low) + jnp.cos(high) * jnp.sin(low)
    return cos, sin


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def gated(gate: jax.Array, up: jax.Array, together: bool) -> jax.Array:
    """`silu(gate) * up`; its gradients are computed in float32 and have the arrays' dtype.

    Where they are wanted `together`, one needs the other: only then XLA's GPU compiler makes one
    kernel of both, which reads each array once. (TPUs would gather a weight once more for it.)
    """
    return nnx.silu(gate) * up


def _gated_backward(together, arrays, slope):
    gate, up, slope = (x.astype(jnp.float32) for x in (*arrays, slope))
    sigmoid = jax.nn.sigmoid(gate)
    up_slope = (slope * gate * sigmoid).astype(arrays[1].dtype)
    gate_slope = (slope * up * sigmoid * (1 + gate * (1 - sigmoid))).astype(arrays[0].dtype)
    if together:  # Where one is NaN the other is.
        gate_slope = jnp.where(jnp.isnan(up_slope), up_slope, gate_slope)
    return gate_slope, up_slope


gated.defvjp(lambda gate, up, together: (gated(gate, up, together), (gate, up)), _gated_backward)


class SwiGLU(nnx.Module):
    """`down(silu(gate x) * up x)`."""

    exchanges = Exchanges()

    def __init__(self, config: ModelConfig, *, mesh: Mesh, rngs: nnx.Rngs):
        self.mesh = mesh
        widen, narrow = (config.embed_dim, config.mlp_dim), (config.mlp_dim, config.embed_dim)
        how = dict(config=config, rngs=rngs, mesh=mesh)
        self.gate = Projection(widen, ("embed", "mlp"), **how)
        self.up = Projection(widen, ("embed", "mlp"), **how)
        self.down = Projection(narrow, ("mlp", "embed"), init=output_init(config), **how)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        gate_BTF, up_BTF = (self.exchanges.columns(p, x_BTD) for p in (self.gate, self.up))
        h_BTF = gated(gate_BTF, up_BTF, on_gpus(self.mesh))
        h_BTF = sharding.constrain(h_BTF, self.mesh, "batch", "length", "mlp")
        return self.exchanges.rows(self.down, h_BTF)
