"""The mesh, the logical axis names, and the one table from logical axis to mesh axes.

Mesh axes: `data` splits the batch; `fsdp` splits parameters and optimizer state, and also the
batch; `tensor` splits latent heads, query heads, the MLP width and the vocabulary; `context` splits
the positions of the cache. What `tensor` splits of the weights is split over `tensor` and `context`
together, so that no device of a decoding mesh stores what another one stores.

Nothing outside this file names a mesh axis.
"""

import collections
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mlra_jax.config import ConfigError

MESH_AXES = ("data", "fsdp", "tensor", "context")
BATCH = ("data", "fsdp")
FSDP = ("fsdp",)
TENSOR = ("tensor",)
CONTEXT = ("context",)
MODEL = ("tensor", "context")

# Earlier rows win when two logical axes of one array want the same mesh axis. A logical axis in
# two rows takes the first whose mesh axes are free; one whose rows are all taken is not split.
RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("batch", BATCH),
    ("cache_length", CONTEXT),
    ("cache_latent", TENSOR),
    ("latent", MODEL),
    ("latent_heads", MODEL),
    ("heads", MODEL),
    ("kv_heads", MODEL),
    ("mlp", MODEL),
    ("vocab", MODEL),
    ("embed", ("fsdp",)),
    ("q_latent", MODEL),
    ("q_latent", ("fsdp",)),
    ("latent_dim", ("fsdp",)),
)
# Never split: length, layer, head_dim, rope, norm.


def make_mesh(
    data: int = 1,
    fsdp: int = 1,
    tensor: int = 1,
    context: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh over the first `data * fsdp * tensor * context` devices.

    Where they are of several TPU slices (or hosts of GPUs), `data` crosses from one to the next, or
    `fsdp` if `data` does not divide by their number; all other axes stay inside.

    Raises ConfigError when a size is not positive, there are too few devices, or TPU slices are
    used in part or crossed by neither axis.
    """
    sizes = (data, fsdp, tensor, context)
    for name, size in zip(MESH_AXES, sizes, strict=True):
        if size < 1:
            raise ConfigError(f"mesh axis {name}={size} must be at least 1")
    devices = list(jax.devices() if devices is None else devices)
    wanted = math.prod(sizes)
    if wanted > len(devices):
        described = " x ".join(f"{n}={s}" for n, s in zip(MESH_AXES, sizes, strict=True) if s > 1)
        raise ConfigError(
            f"the mesh {described} needs {wanted} devices and there are {len(devices)}; "
            "make it smaller (on a CPU, XLA_FLAGS=--xla_force_host_platform_device_count=N "
            "gives N virtual devices)"
        )
    if (across := _across_slices(sizes, devices[:wanted])) != (1, 1):
        inside = tuple(n // across[i] if i < len(across) else n for i, n in enumerate(sizes))
        grid = _laid_out(
            mesh_utils.create_hybrid_device_mesh, inside, (*across, 1, 1), devices[:wanted]
        )
    elif wanted == len(devices):
        grid = _laid_out(mesh_utils.create_device_mesh, sizes, devices)
    else:
        grid = np.asarray(devices[:wanted]).reshape(sizes)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _across_slices(sizes: Sequence[int], devices: Sequence[jax.Device]) -> tuple[int, int]:
    """How many slices `data` and `fsdp` cross; ones where there is one slice, or it cannot be."""
    counts = collections.Counter(getattr(device, "slice_index", 0) for device in devices)
    slices, even = len(counts), len(set(counts.values())) == 1
    for across in ((slices, 1), (1, slices)):
        if even and not (sizes[0] % across[0] or sizes[1] % across[1]):
            return across
    if devices[0].platform != "tpu":  # Slow, but possible.
        return 1, 1
    if not even:
        raise ConfigError(
            f"the mesh's {len(devices)} devices are not the same number of each of {slices} "
            f"slices: {dict(counts)}; use whole slices"
        )
    raise ConfigError(
        f"the mesh data={sizes[0]} x fsdp={sizes[1]} cannot cross {slices} slices; make data "
        f"(or else fsdp) a multiple of {slices}"
    )


def _laid_out(make: Callable[..., np.ndarray], *arguments: Any) -> np.ndarray:
    """Axes along directions of the torus where that can be, else along parts of them."""
    try:
        return make(*arguments)
    except NotImplementedError:  # JAX's answer where no whole directions make up an axis.
        return make(*arguments, allow_split_physical_axes=True)


def mesh_sizes(text: str) -> dict[str, int]:
    """The size of each axis from a command line's `tensor=4,context=2`; axes not named are 1.

    Raises ConfigError for an unknown axis, one named twice, and a size that is no positive number.
    """
    sizes = {}
    text = text.replace(" ", "")
    for part in text.split(",") if text else ():
        name, _, value = part.partition("=")
        if name not in MESH_AXES or not (value.isdecimal() and int(value)):
            raise ConfigError(
                f"--mesh={text}: {part!r} is not one of {', '.join(MESH_AXES)} with a size, "
                "as in tensor=4,context=2"
            )
        if name in sizes:
            raise ConfigError(f"--mesh={text} names {name} twice; give each axis once")
        sizes[name] = int(value)
    return all_axes(sizes)


def all_axes(sizes: Mapping[str, int]) -> dict[str, int]:
    """The size of every axis, 1 of those not named; ConfigError for an unknown axis or no size."""
    for name, value in sizes.items():
        if name not in MESH_AXES or type(value) is not int or value < 1:
            raise ConfigError(
                f"mesh {name}={value!r} is not one of {', '.join(MESH_AXES)} with a size from 1 on"
            )
    return dict.fromkeys(MESH_AXES, 1) | dict(sizes)


def parse_mesh(text: str, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `mesh_sizes(text)`; raises ConfigError also where there are too few devices."""
    return make_mesh(**mesh_sizes(text), devices=devices)


def platform(mesh: Mesh) -> str:
    """'cpu', 'gpu' or 'tpu': what the mesh's devices are, also when they are only described."""
    return mesh.devices.flat[0].platform


def size(mesh: Mesh, axes: Sequence[str]) -> int:
    """The number of devices along these mesh axes together."""
    return math.prod(mesh.shape[a] for a in axes)


def mesh_axes(*axes: str | None) -> tuple[tuple[str, ...], ...]:
    """For each dimension of an array with these logical names, the mesh axes that split it."""
    assigned: dict[int, tuple[str, ...]] = {}
    for logical, wanted in RULES:
        taken = {a for used in assigned.values() for a in used}
        for i, axis in enumerate(axes):
            if axis == logical and i not in assigned and not taken.intersection(wanted):
                assigned[i] = wanted
                break
    return tuple(assigned.get(i, ()) for i in range(len(axes)))


def spec(*axes: str | None) -> PartitionSpec:
    """The PartitionSpec of an array whose dimensions have these logical names."""
    return PartitionSpec(*(over or None for over in mesh_axes(*axes)))


def named(mesh: Mesh, *axes: str | None) -> NamedSharding:
    return NamedSharding(mesh, spec(*axes))


def constrain(x: jax.Array, mesh: Mesh, *axes: str | None) -> jax.Array:
    """Tells XLA how to split an activation whose dimensions have these logical names."""
    if mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, named(mesh, *axes))


def splits(mesh: Mesh, axes: Sequence[str | None], over: Sequence[str]) -> bool:
    """Whether devices along the mesh axes `over` have parts of an array with these names."""
    split = {a for names in mesh_axes(*axes) for a in names}
    return any(mesh.shape[a] > 1 for a in split.intersection(over))


def whole(
    x: jax.Array, mesh: Mesh, axes: Sequence[str | None], over: Sequence[str], dtype: str = ""
) -> jax.Array:
    """An array with these logical names, whole on the devices along the mesh axes `over`.

    It is rounded to `dtype`, if one is given and narrower.
    """
    where = NamedSharding(mesh, PartitionSpec(*kept(axes, over)))
    return jax.lax.with_sharding_constraint(_rounded(x, mesh, axes, dtype), where)


def _rounded(x, mesh, axes, dtype):
    narrow = min(x.dtype, jnp.dtype(dtype or x.dtype), key=lambda d: d.itemsize)
    # Named as it is split first: else XLA would round it, or project it, behind the exchange.
    return constrain(x.astype(narrow), mesh, *axes)


def kept(axes: Sequence[str | None], over: Sequence[str]) -> tuple[tuple[str, ...] | None, ...]:
    """As `mesh_axes` without those in `over`; for a PartitionSpec."""
    return tuple(tuple(a for a in names if a not in over) or None for names in mesh_axes(*axes))


def has_copies(mesh: Mesh) -> bool:
    """Whether engines of GPUs copy from one to the other what `fsdp` or `tensor` splits.

    XLA has them do what devices of one process send each other (`training/compiling.py` asks for
    it); its gathers and sums over devices are kernels, which slow the products beside them. On four
    GPUs what is waited for costs more than that (`benchmarks/NOTES_TRAIN.md`).
    """
    processes = {device.process_index for device in mesh.devices.flat}
    pair = mesh.size == 2 and 2 in (mesh.shape["fsdp"], mesh.shape["tensor"])
    return platform(mesh) == "gpu" and len(processes) == 1 and pair


def copies(mesh: Mesh, axes: Sequence[str | None]) -> bool:
    """Whether they do so with an array with these logical names."""
    return has_copies(mesh) and splits(mesh, axes, FSDP)


def copies_heads(mesh: Mesh) -> bool:
    """Whether they do so with activations, of devices that split heads."""
    return has_copies(mesh) and size(mesh, MODEL) > 1


def split_dimension(axes: Sequence[str | None], over: Sequence[str]) -> int | None:
    """Which dimension of an array with these names the mesh axes `over` split, the first if any."""
    split = (i for i, names in enumerate(mesh_axes(*axes)) if set(over).intersection(names))
    return next(split, None)


def _copied(x, mesh, axes, over, dtype):
    """As `whole`, where `copies`."""
    at, ways = split_dimension(axes, FSDP), size(mesh, FSDP)

    def local(part):
        first = jnp.moveaxis(part, at, 0)
        # Not a broadcast, for which XLA's GPU compiler reads the part `ways` times.
        sent = jnp.concatenate([first] * ways).reshape(ways, *first.shape)
        received = jax.lax.all_to_all(sent, FSDP, 0, 0)
        return jnp.moveaxis(received.reshape(-1, *first.shape[1:]), 0, at)

    split_map = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
    move = split_map(local, in_specs=spec(*axes), out_specs=PartitionSpec(*kept(axes, over)))
    return move(_rounded(x, mesh, axes, dtype))


def summed_in_turn(
    part: Callable[..., jax.Array],
    mesh: Mesh,
    axes: Sequence[str | None],
    arrays: Sequence[jax.Array],
    split: Sequence[PartitionSpec],
) -> jax.Array:
    """The sum over devices that split the batch, an array with these names, which `fsdp` splits.

    `part(turn, i, *arrays)` is what a device adds to the part of device i along `fsdp`, made of its
    own shares of `arrays`, split as `split` says; its turns count from 0. A part is sent on from
    device to device, the one that has it last keeps it, and meanwhile each makes what it adds to
    another part.
    """
    ways = size(mesh, FSDP)
    next_one = [(i, (i + 1) % ways) for i in range(ways)]

    def local(*arrays):
        first, *others = enumerate(_turns(ways))
        total = part(*first, *arrays)
        for turn in others:
            received = jax.lax.ppermute(total, FSDP, next_one)
            total = received + part(*turn, *arrays)
        return jax.lax.psum(total, "data") if mesh.shape["data"] > 1 else total

    split_map = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
    return split_map(local, in_specs=tuple(split), out_specs=spec(*axes))(*arrays)


def _turns(ways):
    """Whose part a device adds to, first to last: its own is the last one."""
    here = jax.lax.axis_index(FSDP)
    return [(here - back) % ways for back in range(1, ways + 1)]


def parts_in_turn(x: jax.Array, mesh: Mesh, *axes: str | None) -> list[jax.Array]:
    """The last dimension's parts, one for each device along `fsdp`, as `summed_in_turn` has turns.

    Its devices have them in different orders, each of its own share of `x`.
    """
    ways = size(mesh, FSDP)

    def local(x):
        parts = x.reshape(*x.shape[:-1], ways, -1)
        return [jax.lax.dynamic_index_in_dim(parts, i, -2, keepdims=False) for i in _turns(ways)]

    where = spec(*axes)
    return jax.shard_map(local, mesh=mesh, in_specs=where, out_specs=where, check_vma=False)(x)


def gathered(
    x: jax.Array,
    mesh: Mesh,
    axes: Sequence[str | None],
    over: Sequence[str],
    dtype: str = "",
    given: jax.Array | None = None,
) -> jax.Array:
    """As `whole`, in the dtype of `x`; it is `given`, if that is here already.

    Devices exchange it once for all that is computed of it, where XLA would for each product. The
    gradient is summed over them in the dtype of `x` on its way to where each part belongs, and
    never whole anywhere.
    """
    if not splits(mesh, axes, over):
        return x
    return _gathered(x, given, mesh, tuple(axes), tuple(over), dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _gathered(x, given, *how):
    return (whole(x, *how) if given is None else given).astype(x.dtype)


def _gathered_in_a_step(x, given, mesh, axes, over, dtype):
    """What has a gradient is part of a training step, whose options make copies of engines."""
    if given is None and over == BATCH and copies(mesh, axes):
        given = _copied(x, mesh, axes, over, dtype)
    return _gathered(x, given, mesh, axes, over, dtype), None


_gathered.defvjp(
    _gathered_in_a_step,
    lambda mesh, axes, over, dtype, _, slope: (constrain(slope, mesh, *axes), None),
)


def padded(x: jax.Array, mesh: Mesh, axes: Sequence[str | None], axis: str, step: int) -> jax.Array:
    """An array with these logical names, each device's part of `axis` with zeros behind it, up to
    a multiple of `step`. No device exchanges anything for it."""
    if axis not in axes:
        return x
    at = axes.index(axis)
    ways = size(mesh, mesh_axes(*axes)[at])
    part = x.shape[at] // ways
    more = -part % step
    if not more:
        return x
    shape = lambda *widths: (*x.shape[:at], *widths, *x.shape[at + 1 :])
    names = (*axes[:at], axis, None, *axes[at + 1 :])
    parts = constrain(x.reshape(shape(ways, part)), mesh, *names)
    behind = [(0, more if i == at + 1 else 0) for i in range(parts.ndim)]
    parts = constrain(jnp.pad(parts, behind), mesh, *names)
    return constrain(parts.reshape(shape(ways * (part + more))), mesh, *axes)


def abstract(make: Callable[[], nnx.Module], mesh: Mesh) -> tuple[nnx.GraphDef, dict]:
    """(definition, parameters) of the module that `make` would make; nothing is computed.

    The parameters are a nested dict of shapes, each split as its logical axis names say. Raises
    ConfigError naming the parameter, the dimension and the mesh axes that do not divide it.
    """
    definition, state = nnx.split(nnx.eval_shape(make))

    def placed(path, variable):
        axes = variable.get_metadata().get("out_sharding") or (None,) * variable.ndim
        check_divides(".".join(map(str, path)), variable.shape, axes, mesh.shape)
        return variable.replace(
            jax.ShapeDtypeStruct(variable.shape, variable.dtype, sharding=named(mesh, *axes))
        )

    return definition, nnx.to_pure_dict(nnx.map_state(placed, state))


def check_divides(
    name: str, shape: Sequence[int], axes: Sequence[str | None], mesh_shape: Mapping[str, int]
) -> None:
    """Raises ConfigError where a dimension cannot be split evenly over its mesh axes."""
    for length, axis, over in zip(shape, axes, mesh_axes(*axes), strict=True):
        if length % math.prod(mesh_shape[a] for a in over):
            sizes = " x ".join(f"{a}={mesh_shape[a]}" for a in over)
            raise ConfigError(
                f"{axis}={length} ({name}) does not divide over {sizes}; choose a mesh whose "
                f"{'*'.join(over)} divides {length}"
            )
