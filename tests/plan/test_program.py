"""Exchanges are read off real programs: kinds, axes, bytes, and how often a loop runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mlra_jax.plan import program
from mlra_jax.plan.program import Collective
from mlra_jax.sharding import make_mesh

AXES = ("data", "fsdp", "tensor", "context")


def read(function, mesh, shape, spec):
    """The exchanges of a function of one device's part of a float32 array."""
    mapped = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    lowered = jax.jit(mapped).lower(jax.ShapeDtypeStruct(shape, jnp.float32))
    return program.collectives(lowered.compile().as_text(), mesh.devices, AXES)


def test_each_kind_along_its_axis_with_its_bytes():
    mesh = make_mesh(data=2, tensor=4)

    def exchange(x):  # [16, 128] on each device: 8192 bytes
        gathered = jax.lax.all_gather(x, "tensor")
        scattered = jax.lax.psum_scatter(gathered, "tensor")
        turned = jax.lax.ppermute(scattered, "data", [(0, 1), (1, 0)])
        return jax.lax.psum(turned, ("data", "tensor"))

    found = {c.kind: c for c in read(exchange, mesh, (32, 512), P("data", "tensor"))}
    assert found == {
        "all-gather": Collective("all-gather", ("tensor",), 1, 1, 3 * 8192),
        "reduce-scatter": Collective("reduce-scatter", ("tensor",), 1, 1, 3 * 8192),
        "collective-permute": Collective("collective-permute", ("data",), 1, 1, 8192),
        "all-reduce": Collective("all-reduce", ("data", "tensor"), 1, 1, 2 * 7 * 8192 // 8),
    }


@pytest.mark.parametrize("begin", [0, 2])
def test_a_loop_counts_as_often_as_it_runs(begin):
    mesh = make_mesh(fsdp=8)

    def looped(x):
        return jax.lax.fori_loop(begin, 7, lambda i, x: jax.lax.psum(jnp.sin(x), "fsdp"), x)

    [found] = read(looped, mesh, (8, 1024), P("fsdp"))
    times = 7 - begin
    assert found == Collective("all-reduce", ("fsdp",), 1, times, times * 2 * 7 * 4096 // 8)


# As the TPU compiler writes it: the trip count in a condition, one number for what is cut into
# three, a reduction of which only a part is kept, and one that goes over the network.
TPU = """HloModule step, num_partitions=4

%all-reduce-scatter.1 (p.0: f32[8,128]) -> f32[2,128] {
  %p.0 = f32[8,128]{1,0} parameter(0)
  ROOT %ar.0 = f32[8,128]{1,0} all-reduce(%p.0), channel_id=1, replica_groups={{0,1,2,3}}
}

%begin (p.1: bf16[4,8]) -> bf16[16,8] {
  %p.1 = bf16[4,8]{1,0} parameter(0)
  ROOT %ag.0 = bf16[16,8]{1,0} all-gather(%p.1), channel_id=2, replica_groups=[1,4]<=[4]
}

%end (p.2: bf16[4,8]) -> bf16[16,8] {
  %p.2 = bf16[4,8]{1,0} parameter(0)
  ROOT %ag.1 = bf16[16,8]{1,0} all-gather(%p.2), channel_id=2, replica_groups=[1,4]<=[4]
}

%condition (c: (s32[], f32[8,128])) -> pred[] {
  %limit = s32[]{:T(128)} constant(24)
  %c = (s32[], f32[8,128]) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%body (b: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %b = (s32[], f32[8,128]) parameter(0)
  %x = bf16[16,8]{1,0} fusion(%b), kind=kCustom, calls=%begin, backend_config={"a":"
}
"}
  %y = bf16[16,8]{1,0} fusion(%b), kind=kCustom, calls=%end
  ROOT %z = f32[2,128]{1,0} fusion(%b), kind=kCustom, calls=%all-reduce-scatter.1, metadata={}
}

ENTRY %main (a: f32[8,128]) -> f32[2,128] {
  %one = s32[] constant(1)
  %first = s32[] copy(%one)
  %a = f32[8,128]{1,0} parameter(0)
  %t = (s32[], /*index=1*/f32[8,128]) tuple(%first, %a)
  %w = (s32[], f32[8,128]) while(%t), condition=%condition, body=%body
  %s = (f32[2,128], u32[], token[]) send(%a), channel_id=8, is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %r = f32[2,128] get-tuple-element(%w), index=1
}
"""  # noqa: E501


class Chip:
    def __init__(self, place, slice_index):
        self.coords, self.slice_index = place, slice_index


def two_slices():
    chips = [Chip((i % 2, i // 2, 0), s) for s in range(2) for i in range(4)]
    devices = np.empty(8, object)
    devices[:] = chips
    return devices.reshape(2, 4, 1, 1)


def test_a_program_of_the_tpu_compiler():
    found = {c.kind: c for c in program.collectives(TPU, two_slices(), AXES)}
    assert found == {
        "all-gather": Collective("all-gather", ("fsdp",), 2, 23, 23 * 256 * 3 // 4),
        "reduce-scatter": Collective("reduce-scatter", ("fsdp",), 2, 23, 23 * 4096 * 3 // 4),
        "all-reduce": Collective("all-reduce", ("slices",), 0, 1, 1024),
    }


@pytest.mark.parametrize(
    "written, size",
    [
        ("bf16[4,8]{1,0} all-gather(%a)", 64),
        ("(f32[4], s8[16]) all-reduce(%a, %b)", 32),
        ("(f32[4], s8[16]) all-reduce-start(%a, %b)", 32),
        ("((f32[4], s4[8]), (f32[8], s4[16])) all-gather-start(%a, %b)", 40),
        ("(f32[2,8], f32[2,8], u32[], u32[]) collective-permute-start(%a)", 64),
        ("(f32[3,8,128]{2,1,0:T(8,128)}, u32[]{:S(2)}, token[]) send(%a, %t)", 12288),
    ],
)
def test_bytes_of_results(written, size):
    module, entry = program._parse(f"ENTRY %main () -> f32[] {{\n  %x = {written}\n}}\n")
    assert program._size(module[entry]["x"]) == size


@pytest.mark.parametrize(
    "written, group",
    [
        ("replica_groups={{0,2},{1,3}}", [0, 2]),
        ("replica_groups=[4,2]<=[8]", [0, 1]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [0, 4]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", [0, 1, 2, 3]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [0, 4]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}", [0, 1]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", [0, 2]),
        ("source_target_pairs={{0,2},{2,4},{4,6},{6,0},{1,3},{3,5},{5,7},{7,1}}", [0, 2, 4, 6]),
    ],
)
def test_who_exchanges_however_it_is_written(written, group):
    places = program._Places(two_slices().reshape(8, 1), ("x", "y"))
    assert places.group(f"%a), channel_id=1, {written}, metadata={{}}").tolist() == group


def test_links_of_a_torus():
    def links(shape, varies):
        grid = np.stack(np.meshgrid(*map(range, shape), indexing="ij"), -1).reshape(-1, 3)
        devices = np.empty(len(grid), object)
        devices[:] = [Chip(tuple(place), 0) for place in grid.tolist()]
        ids = np.arange(len(grid)).reshape(shape)
        index = tuple(slice(None) if i in varies else 0 for i in range(3))
        return program._Places(devices, ("x",)).links(ids[index].ravel())

    assert links((16, 16, 1), {0}) == 2 and links((16, 16, 1), {0, 1}) == 4
    assert links((4, 4, 1), {0}) == 1 and links((4, 4, 1), {0, 1}) == 2
    assert links((4, 4, 4), {0, 1, 2}) == 6 and links((2, 2, 4), {2}) == 2
