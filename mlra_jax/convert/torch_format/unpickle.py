"""Reads the pickle inside a torch.save archive without running anything.

Not an unpickler with some functions forbidden, but an interpreter of the two dozen opcodes that
describe a dictionary of tensors, and the numbers and lists that training programs put beside it.
It never imports a module and never calls a function named by the file: the only names it knows
stand for the records below, every other name and every other opcode is refused. Work and memory
are bounded by `MAX_BYTES` and `MAX_OPCODES`.
"""

import pickletools
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from mlra_jax.convert.errors import CheckpointFileError

# A released model has 400 tensors of about 30 opcodes and 110 bytes each.
MAX_BYTES = 4 << 20
MAX_OPCODES = 250_000
MAX_DIMENSIONS = 8
# What training programs call the model's tensors beside the optimizer's and their settings.
MODELS = ("model", "state_dict", "model_state_dict")

STORAGES = {
    "torch FloatStorage": np.dtype(np.float32),
    "torch BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch HalfStorage": np.dtype(np.float16),
    # Known, so that a tensor of a wrong type can be refused by its own name.
    "torch DoubleStorage": np.dtype(np.float64),
    "torch LongStorage": np.dtype(np.int64),
    "torch IntStorage": np.dtype(np.int32),
    "torch ShortStorage": np.dtype(np.int16),
    "torch CharStorage": np.dtype(np.int8),
    "torch ByteStorage": np.dtype(np.uint8),
    "torch BoolStorage": np.dtype(np.bool_),
}
_TENSOR = "torch._utils _rebuild_tensor_v2"
_PARAMETER = "torch._utils _rebuild_parameter"
_ORDERED_DICT = "collections OrderedDict"


@dataclass(frozen=True, eq=False)
class Storage:
    """A run of ``count`` numbers in the archive's entry ``data/<key>``."""

    key: str
    dtype: np.dtype
    count: int


@dataclass(frozen=True, eq=False)
class Tensor:
    """A view of a storage; offset and strides in elements, as torch has them."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class _Global:
    name: str


_MARK = object()


class _Refused(Exception):
    """Why a pickle is not a dictionary of tensors."""


def read_tensors(data: bytes) -> tuple[dict[str, Tensor], str | None]:
    """Interprets a pickle as a flat dictionary from names to tensors.

    Such a dictionary may also be inside another one, that of a training run, under one of `MODELS`.

    Args:
      data: the bytes of ``data.pkl``.

    Returns:
      The tensors in the order of the file, and which of `MODELS` they are under, or None. They are
      checked against their storages' declared lengths, not yet against the archive.

    Raises:
      CheckpointFileError: anything but a dictionary of tensors, with the offending name.
    """
    if len(data) > MAX_BYTES:
        raise CheckpointFileError(
            f"its pickle of {len(data)} bytes is too large (limit {MAX_BYTES})"
        )
    try:
        result = _Interpreter().run(data)
    except _Refused as refused:
        raise CheckpointFileError(str(refused)) from None
    except (ValueError, IndexError, KeyError, UnicodeError, OverflowError) as error:
        raise CheckpointFileError(f"its pickle is damaged ({type(error).__name__})") from None
    if type(result) is not dict:
        raise CheckpointFileError("its pickle holds no dictionary of tensors")
    inside = [name for name in MODELS if type(result.get(name)) is dict]
    if len(inside) > 1:
        raise CheckpointFileError(f"its pickle holds several models: {', '.join(inside)}")
    for name, value in result[inside[0]].items() if inside else result.items():
        if type(value) is not Tensor:
            raise CheckpointFileError(f"{name!r} is not a tensor")
    return (result[inside[0]], inside[0]) if inside else (result, None)


class _Interpreter:
    """A stack machine of the opcodes that `torch.save` writes with pickle protocol 2.

    Values are never hashed, compared or printed unless they are strings or whole numbers: shared
    nested tuples make any of these take exponential time.
    """

    def __init__(self):
        self.stack: list = []
        self.memo: dict[int, object] = {}

    def run(self, data: bytes) -> object:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if count >= MAX_OPCODES:
                raise _Refused(f"its pickle has more than {MAX_OPCODES} opcodes")
            if opcode.name == "STOP":
                if len(self.stack) != 1:
                    break
                return self.stack[0]
            self.step(opcode.name, argument)
        raise _Refused("its pickle is damaged (no single result)")

    def step(self, opcode: str, argument) -> None:
        stack = self.stack
        match opcode:
            case "PROTO":
                if argument != 2:
                    raise _Refused(f"its pickle has protocol {argument}; torch.save writes 2")
            case "MARK":
                stack.append(_MARK)
            case "NONE":
                stack.append(None)
            case "NEWTRUE":
                stack.append(True)
            case "NEWFALSE":
                stack.append(False)
            case "BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(argument)
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE":
                stack.append(tuple(self.pop_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [self.pop() for _ in range(int(opcode[-1]))]
                stack.append(tuple(reversed(items)))
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "APPEND":
                self.append_items([self.pop()])
            case "APPENDS":
                self.append_items(self.pop_to_mark())
            case "SETITEM":
                value, key = self.pop(), self.pop()
                self.set_items([key, value])
            case "SETITEMS":
                self.set_items(self.pop_to_mark())
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "GLOBAL":
                if argument not in (_TENSOR, _PARAMETER, _ORDERED_DICT, *STORAGES):
                    name = argument.replace(" ", ".", 1)[:100]
                    raise _Refused(f"its pickle asks for {name!r}, which is no part of a tensor")
                stack.append(_Global(argument))
            case "BINPERSID":
                stack.append(_storage(self.pop()))
            case "REDUCE":
                arguments, function = self.pop(), self.pop()
                stack.append(_rebuild(function, arguments))
            case "BUILD":
                # The version table that torch hangs on a state dict; nothing of it is a weight.
                self.pop()
                if not stack or type(stack[-1]) is not dict:
                    raise _Refused("its pickle sets the state of something else than a dictionary")
            case _:
                raise _Refused(f"its pickle uses {opcode}, which is no part of a tensor")

    def pop(self) -> object:
        value = self.stack.pop()
        if value is _MARK:
            raise _Refused("its pickle is damaged (stray mark)")
        return value

    def pop_to_mark(self) -> list:
        items = []
        while (value := self.stack.pop()) is not _MARK:
            items.append(value)
        items.reverse()
        return items

    def append_items(self, items: list) -> None:
        if type(self.stack[-1]) is not list:
            raise _Refused("its pickle is damaged (items of no list)")
        self.stack[-1].extend(items)

    def set_items(self, items: list) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise _Refused("its pickle is damaged (items of no dictionary)")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Optimizers number their parameters.
            if type(key) not in (str, int):
                raise _Refused("its pickle has a dictionary key that is no name")
            if key in target:
                raise _Refused(f"its pickle has {str(key)[:200]!r} twice")
            target[key] = value


def _storage(identifier) -> Storage:
    match identifier:
        case ("storage", _Global(name=name), str(key), str(), int(count)) if (
            name in STORAGES and type(count) is int
        ):
            # Keys are numbers in every file; anything else could only be a trick with paths.
            if not (key.isascii() and key.isdigit() and len(key) <= 20):
                raise _Refused(f"its pickle names a storage {key[:40]!r}")
            if not 0 <= count < 2**62:
                raise _Refused(f"storage {key} has an absurd length")
            return Storage(key, STORAGES[name], count)
    raise _Refused("its pickle has a persistent id that is no storage")


def _rebuild(function, arguments) -> object:
    if type(function) is not _Global or type(arguments) is not tuple:
        raise _Refused("its pickle calls something that is no tensor")
    match function.name, arguments:
        case "collections OrderedDict", ():
            return {}
        case "torch._utils _rebuild_parameter", (Tensor() as tensor, bool(), dict()):
            return tensor
        case (
            "torch._utils _rebuild_tensor_v2",
            (Storage() as storage, int(offset), tuple(shape), tuple(strides), bool(), dict(), *_),
        ) if len(arguments) <= 7:
            return _tensor(storage, offset, shape, strides)
    raise _Refused(f"its pickle calls {function.name.replace(' ', '.')} in an unknown way")


def _tensor(storage: Storage, offset: int, shape: tuple, strides: tuple) -> Tensor:
    if len(shape) != len(strides) or len(shape) > MAX_DIMENSIONS:
        raise _Refused("a tensor's shape and strides disagree or have too many dimensions")
    for number in (offset, *shape, *strides):
        if type(number) is not int or not 0 <= number < 2**62:
            raise _Refused("a tensor has an absurd shape, stride or offset")
    count = 1
    for size in shape:
        count *= size
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    # A view that repeats its storage (stride 0) would let a small file ask for any memory.
    if count > storage.count or (count and last >= storage.count):
        raise _Refused(f"a tensor of shape {shape} does not fit its storage of {storage.count}")
    return Tensor(storage, offset, shape, strides)
