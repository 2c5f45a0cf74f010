"""Words of device memory that others wait for, as vectors of a thread in Mosaic GPU kernels."""

import functools

from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf, vector

EMPTY = -(2**31)
"""A word that is not written yet. As float32 it is -0.0; a part's are sent as 0.0."""


def word(value: int):
    return arith.constant(ir.IntegerType.get_signless(32), value)


def kind(count: int) -> ir.Type:
    """Of so many words."""
    return ir.VectorType.get((count,), ir.IntegerType.get_signless(32))


def filled(kind: ir.Type, value: int):
    return vector.broadcast(kind, word(value))


def pointers(ref, offsets):
    """To what lies so many words (of type index) behind the begin of `ref`."""
    base = mgpu.utils.memref_ptr(ref)
    for offset in offsets:
        offset = arith.index_cast(ir.IntegerType.get_signless(64), offset)
        yield mgpu.utils.getelementptr(base, [offset], ir.IntegerType.get_signless(32))


def joint(halves):
    """64 bits of two numbers of 32, low and high, that all threads have."""
    i64 = ir.IntegerType.get_signless(64)
    low, high = (x.registers.flat[0] for x in halves)
    high = arith.shli(arith.extui(i64, high), arith.constant(i64, 32))
    return arith.ori(high, arith.extui(i64, low))


def beyond(pointer, halves):
    """So many bytes behind a pointer."""
    return mgpu.utils.getelementptr(pointer, [joint(halves)], ir.IntegerType.get_signless(8))


def send(pointer, numbers) -> None:
    """Writes a vector of float32 for whom waits for it."""
    held = vector.bitcast(kind(ir.VectorType(numbers.type).shape[0]), numbers)
    empty = arith.cmpi(arith.CmpIPredicate.eq, held, filled(held.type, EMPTY))
    write(pointer, arith.select(empty, filled(held.type, 0), held))


def receive(pointers, count: int, wanted=None) -> list:
    """Vectors of `count` float32 when all have been written.

    Where `wanted` says no, a vector is 0 and not waited for.
    """
    loop = scf.WhileOp([kind(count)] * len(pointers), [filled(kind(count), EMPTY)] * len(pointers))
    with ir.InsertionPoint(loop.before.blocks.append(*[kind(count)] * len(pointers))):
        held = [read(pointer, count) for pointer in pointers]
        if wanted is not None:
            nothing = filled(kind(count), 0)
            held = [arith.select(w, x, nothing) for w, x in zip(wanted, held, strict=True)]
        missing = [
            arith.cmpi(arith.CmpIPredicate.eq, vector.extract(x, [], [i]), word(EMPTY))
            for x in held
            for i in range(count)
        ]
        scf.condition(functools.reduce(arith.ori, missing), held)
    block = loop.after.blocks.append(*[kind(count)] * len(pointers))
    with ir.InsertionPoint(block):
        scf.yield_(list(block.arguments))
    real = ir.VectorType.get((count,), ir.F32Type.get())
    return [vector.bitcast(real, x) for x in loop.results]


# At once and in the order of the program: not to be moved to the other side of the wait.
def write(pointer, held) -> None:
    n = ir.VectorType(held.type).shape[0]
    values = [vector.extract(held, [], [i]) for i in range(n)]
    text = f"st.relaxed.sys.global{_listed(1, n)[0]}.b32 [$0], {_listed(1, n)[1]};"
    constraints = ",".join(["l", *["r"] * n, "~{memory}"])
    void = ir.Type.parse("!llvm.void")
    llvm.inline_asm(void, [pointer, *values], text, constraints, has_side_effects=True)


def read(pointer, n: int):
    i32 = ir.IntegerType.get_signless(32)
    text = f"ld.relaxed.sys.global{_listed(0, n)[0]}.b32 {_listed(0, n)[1]}, [${n}];"
    constraints = ",".join([*["=r"] * n, "l", "~{memory}"])
    struct = llvm.StructType.get_literal([i32] * n) if n > 1 else i32
    found = llvm.inline_asm(struct, [pointer], text, constraints, has_side_effects=True)
    held = filled(kind(n), 0)
    for i in range(n):
        one = llvm.extractvalue(i32, found, [i]) if n > 1 else found
        held = vector.insert(one, held, [], [i])
    return held


def _listed(first: int, n: int) -> tuple[str, str]:
    """(suffix of an instruction on n words, its operands from `first` on)."""
    operands = ", ".join(f"${first + i}" for i in range(n))
    return (f".v{n}", f"{{{operands}}}") if n > 1 else ("", operands)
