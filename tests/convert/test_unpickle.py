"""The pickle interpreter: every opcode, every name and every limit, exactly."""

import math
import pickle
import pickletools

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlra_jax.convert.errors import CheckpointFileError
from mlra_jax.convert.torch_format import reader, unpickle
from mlra_jax.convert.torch_format.reader import TorchFile
from mlra_jax.convert.torch_format.unpickle import STORAGES, Storage, Tensor, read_tensors
from mlra_jax.convert.torch_format.writer import contiguous, pickle_tensors, write_torch_file

from .files import torch_bytes, training_pickle

FLOAT = Storage("0", np.dtype(np.float32), 12)
PERSISTENT = (
    b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x0ct"
)
TENSOR = (
    b"ctorch._utils\n_rebuild_tensor_v2\n(" + PERSISTENT + b"QK\x00K\x0c\x85K\x01\x85\x89"
    b"ccollections\nOrderedDict\n)RtR"
)

# What each allowed opcode does, as the value of a pickle in which it occurs.
ALLOWED = {
    "PROTO": (b"\x80\x02N.", None),
    "STOP": (b"N.", None),
    "MARK": (b"(NNt.", (None, None)),
    "NONE": (b"N.", None),
    "NEWTRUE": (b"\x88.", True),
    "NEWFALSE": (b"\x89.", False),
    "BINUNICODE": (b"X\x03\x00\x00\x00\xc3\xa4b.", "äb"),
    "BININT": (b"J\xfe\xff\xff\xff.", -2),
    "BININT1": (b"K\xff.", 255),
    "BININT2": (b"M\x01\x02.", 513),
    "LONG1": (b"\x8a\x05\x01\x00\x00\x00\x01.", 2**32 + 1),
    "EMPTY_TUPLE": (b").", ()),
    "TUPLE": (b"(K\x01K\x02K\x03K\x04t.", (1, 2, 3, 4)),
    "TUPLE1": (b"K\x01\x85.", (1,)),
    "TUPLE2": (b"K\x01K\x02\x86.", (1, 2)),
    "TUPLE3": (b"K\x01K\x02K\x03\x87.", (1, 2, 3)),
    "EMPTY_DICT": (b"}.", {}),
    "BINFLOAT": (b"G\x3f\xf8\x00\x00\x00\x00\x00\x00.", 1.5),
    "EMPTY_LIST": (b"].", []),
    "APPEND": (b"]K\x01a.", [1]),
    "APPENDS": (b"](K\x01K\x02e.", [1, 2]),
    "SETITEM": (b"}X\x01\x00\x00\x00aK\x01s.", {"a": 1}),
    "SETITEMS": (b"}(X\x01\x00\x00\x00aK\x01X\x01\x00\x00\x00bK\x02u.", {"a": 1, "b": 2}),
    "BINPUT": (b"K\x07q\x03K\x08q\x04h\x03\x87.", (7, 8, 7)),
    "LONG_BINPUT": (b"K\x07r\x00\x01\x00\x00j\x00\x01\x00\x00\x86.", (7, 7)),
    "BINGET": (b"K\x07q\x00K\x08h\x00\x87.", (7, 8, 7)),
    "LONG_BINGET": (b"K\x07q\x05j\x05\x00\x00\x00\x86.", (7, 7)),
    "GLOBAL": (b"ccollections\nOrderedDict\n)R.", {}),
    "BINPERSID": (PERSISTENT + b"Q.", FLOAT),
    "REDUCE": (b"ccollections\nOrderedDict\n)R.", {}),
    "BUILD": (b"}X\x01\x00\x00\x00aK\x01s}b.", {"a": 1}),
}


def interpret(data):
    return unpickle._Interpreter().run(data)


def refused(data, match):
    with pytest.raises(CheckpointFileError, match=match) as caught:
        read_tensors(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ALLOWED)
def test_allowed_opcodes(name):
    data, wanted = ALLOWED[name]
    assert name in [opcode.name for opcode, _, _ in pickletools.genops(data)]
    found = interpret(data)
    if isinstance(wanted, Storage):
        assert (found.key, found.dtype, found.count) == (wanted.key, wanted.dtype, wanted.count)
    else:
        assert found == wanted and type(found) is type(wanted)
        # Python's own sets the state of an OrderedDict, which has one; here it is dropped.
        if name != "BUILD":
            assert pickle.loads(data) == wanted


OTHERS = [opcode for opcode in pickletools.opcodes if opcode.name not in ALLOWED]


def argument_bytes(opcode):
    kind = opcode.arg
    if kind is None:
        return b""
    if kind.n >= 0:
        return bytes(kind.n)
    if kind.n == pickletools.UP_TO_NEWLINE:
        return {"stringnl": b"'a'\n", "stringnl_noescape_pair": b"os\nsystem\n"}.get(
            kind.name, b"0\n"
        )
    lengths = {
        pickletools.TAKEN_FROM_ARGUMENT1: 1,
        pickletools.TAKEN_FROM_ARGUMENT4: 4,
        pickletools.TAKEN_FROM_ARGUMENT4U: 4,
        pickletools.TAKEN_FROM_ARGUMENT8U: 8,
    }
    return bytes(lengths[kind.n])


@pytest.mark.parametrize("opcode", OTHERS, ids=lambda opcode: opcode.name)
def test_every_other_opcode_is_refused_by_name(opcode):
    """Wherever it stands: alone, after a mark, or on top of things it could work with."""
    code = opcode.code.encode("latin1") + argument_bytes(opcode)
    for before in (b"", b"(", b"}", b"((X\x01\x00\x00\x00a)", b"ccollections\nOrderedDict\n)"):
        refused(b"\x80\x02" + before + code + b".", f"uses {opcode.name}, which is no part")


def test_the_two_lists_are_all_there_are():
    assert len(OTHERS) + len(ALLOWED) == len(pickletools.opcodes)
    assert {opcode.name for opcode in pickletools.opcodes} >= ALLOWED.keys()


@pytest.mark.parametrize("protocol", [0, 1, 3, 4, 5])
def test_other_protocols_are_refused(protocol):
    refused(b"\x80" + bytes([protocol]) + b"}.", f"protocol {protocol}; torch.save writes 2")


def test_names_are_the_known_ones():
    types = {
        "Float": np.float32, "BFloat16": ml_dtypes.bfloat16, "Half": np.float16,
        "Double": np.float64, "Long": np.int64, "Int": np.int32, "Short": np.int16,
        "Char": np.int8, "Byte": np.uint8, "Bool": np.bool_,
    }  # fmt: skip
    wanted = {f"torch {name}Storage": np.dtype(dtype) for name, dtype in types.items()}
    assert wanted == STORAGES
    for name, dtype in wanted.items():
        data = PERSISTENT.replace(b"torch\nFloatStorage", name.replace(" ", "\n").encode())
        assert interpret(data + b"Q.").dtype == dtype
    for name in (b"torch\nUntypedStorage", b"torch\nComplexFloatStorage", b"torch\nFloatStorage "):
        refused(PERSISTENT.replace(b"torch\nFloatStorage", name) + b"Q.", "no part of a tensor")
    for name in (
        "_rebuild_tensor",
        "_rebuild_tensor_v3",
        "_rebuild_qtensor",
        "_rebuild_parameter2",
    ):
        refused(b"ctorch._utils\n" + name.encode() + b"\n.", f"'torch._utils.{name}', which is")
    refused(b"ccollections\ndefaultdict\n.", "'collections.defaultdict'")
    # A name is no value by itself, and a known one is not called with something else.
    refused(b"}X\x01\x00\x00\x00wccollections\nOrderedDict\ns.", "'w' is not a tensor")
    refused(b"ccollections\nOrderedDict\nK\x01\x85R.", "calls collections.OrderedDict in an unk")
    refused(b"ctorch\nFloatStorage\n)R.", "calls torch.FloatStorage in an unknown way")
    refused(b"K\x01)R.", "calls something that is no tensor")
    refused(b"ccollections\nOrderedDict\nNR.", "calls something that is no tensor")


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        (b"storage", b"Storage", "persistent id"),
        (b"K\x0ct", b"\x88t", "persistent id"),
        (b"K\x0ct", b"Nt", "persistent id"),
        (b"K\x0ct", b"K\x0cNt", "persistent id"),
        (b"\x000X\x03", b"\x00aX\x03", "names a storage 'a'"),
        (b"X\x01\x00\x00\x000", b"X\x00\x00\x00\x00", "names a storage ''"),
        (b"X\x01\x00\x00\x000", "X\x02\x00\x00\x00²".encode(), "names a storage '²'"),
        (b"X\x01\x00\x00\x000", "X\x02\x00\x00\x00٣".encode(), "names a storage '٣'"),
        (b"X\x01\x00\x00\x000", b"X\x15\x00\x00\x00" + b"1" * 21, "names a storage '1{21}'"),
        (b"K\x0ct", b"J\xff\xff\xff\xfft", "storage 0 has an absurd length"),
        (b"K\x0ct", b"\x8a\x08" + (2**62).to_bytes(8, "little") + b"t", "absurd length"),
    ],
)
def test_storages_that_are_none(old, new, match):
    assert PERSISTENT.count(old) == 1
    refused(PERSISTENT.replace(old, new) + b"Q.", match)


def test_storages_at_their_limits():
    longest = PERSISTENT.replace(b"X\x01\x00\x00\x000", b"X\x14\x00\x00\x00" + b"1" * 20)
    assert interpret(longest + b"Q.").key == "1" * 20
    largest = (2**62 - 1).to_bytes(8, "little")
    assert interpret(PERSISTENT.replace(b"K\x0ct", b"\x8a\x08" + largest + b"t") + b"Q.").count == (
        2**62 - 1
    )
    assert interpret(PERSISTENT.replace(b"K\x0ct", b"K\x00t") + b"Q.").count == 0


@pytest.mark.parametrize(
    ("tensor", "fits"),
    [
        (Tensor(FLOAT, 0, (12,), (1,)), True),
        (Tensor(FLOAT, 11, (1,), (1,)), True),
        (Tensor(FLOAT, 11, (1,), (2**61,)), True),
        (Tensor(FLOAT, 11, (), ()), True),
        (Tensor(FLOAT, 12, (), ()), False),
        (Tensor(FLOAT, 1, (11,), (1,)), True),
        (Tensor(FLOAT, 1, (12,), (1,)), False),
        (Tensor(FLOAT, 0, (13,), (1,)), False),
        (Tensor(FLOAT, 0, (3, 4), (1, 3)), True),
        (Tensor(FLOAT, 0, (4, 2), (3, 2)), True),
        (Tensor(FLOAT, 1, (4, 2), (3, 2)), False),
        (Tensor(FLOAT, 0, (2, 2), (10, 1)), True),
        (Tensor(FLOAT, 0, (2, 2), (11, 1)), False),
        (Tensor(FLOAT, 0, (12,), (0,)), True),
        (Tensor(FLOAT, 0, (13,), (0,)), False),
        (Tensor(FLOAT, 0, (4, 4), (1, 0)), False),
        (Tensor(FLOAT, 0, (0,), (1,)), True),
        (Tensor(FLOAT, 12, (0,), (1,)), True),
        (Tensor(FLOAT, 0, (1,) * 8, (1,) * 8), True),
        (Tensor(FLOAT, 0, (1,) * 9, (1,) * 9), None),
    ],
)
def test_tensors_at_the_ends_of_their_storage(tensor, fits):
    data = pickle_tensors({"w": tensor})
    if not fits:
        refused(data, "does not fit its storage of 12" if fits is False else "too many dimensions")
        return
    found = read_tensors(data)[0]["w"]
    assert (found.offset, found.shape, found.strides) == (
        tensor.offset,
        tensor.shape,
        tensor.strides,
    )


@pytest.mark.parametrize(
    "number", [b"\x88", b"N", b"J\xff\xff\xff\xff", b"\x8a\x09" + b"\0" * 7 + b"\x40\0"]
)
@pytest.mark.parametrize("field", [b"QK\x00", b"K\x0c\x85K", b"K\x01\x85\x89"])
def test_offsets_shapes_and_strides_are_whole_numbers(number, field):
    """Not truth values, nothing, negative, or from 2**62 on."""
    value = next(v for v in (b"K\x00", b"K\x0c", b"K\x01") if v in field)
    assert TENSOR.count(field) == 1
    data = b"}X\x01\x00\x00\x00w" + TENSOR.replace(field, field.replace(value, number, 1)) + b"s."
    refused(data, "absurd shape, stride or offset|in an unknown way")


def test_arguments_of_a_tensor():
    """Six, or torch's seventh; hooks are a dictionary, `requires_grad` is true or false."""
    good = b"}X\x01\x00\x00\x00w" + TENSOR + b"s."
    assert read_tensors(good)[0]["w"].shape == (12,)
    assert read_tensors(good.replace(b"\x85\x89", b"\x85\x88"))[0]["w"].shape == (12,)
    assert read_tensors(good.replace(b")RtR", b")R}tR"))[0]["w"].shape == (12,)
    for old, new in (
        (b")RtR", b")RNNtR"),
        (b"ccollections\nOrderedDict\n)RtR", b"tR"),
        (b"ccollections\nOrderedDict\n)RtR", b"NtR"),
        (b"\x85\x89", b"\x85N"),
        (PERSISTENT + b"Q", b"N"),
    ):
        refused(good.replace(old, new), "calls torch._utils._rebuild_tensor_v2 in an unknown way")


def test_limits_are_kept_exactly(monkeypatch, tmp_path):
    data = pickle_tensors({"w": contiguous(FLOAT, (3, 4)), "v": contiguous(FLOAT, (12,))})
    opcodes = sum(1 for _ in pickletools.genops(data))
    path = tmp_path / "m.bin"
    path.write_bytes(torch_bytes(pickle=data))
    monkeypatch.setattr(unpickle, "MAX_BYTES", len(data))
    monkeypatch.setattr(reader, "MAX_BYTES", len(data))
    monkeypatch.setattr(unpickle, "MAX_OPCODES", opcodes)
    assert list(read_tensors(data)[0]) == ["w", "v"] == list(TorchFile(path).specs)
    monkeypatch.setattr(unpickle, "MAX_OPCODES", opcodes - 1)
    refused(data, f"more than {opcodes - 1} opcodes")
    monkeypatch.setattr(unpickle, "MAX_OPCODES", opcodes)
    monkeypatch.setattr(unpickle, "MAX_BYTES", len(data) - 1)
    refused(data, f"of {len(data)} bytes is too large")
    monkeypatch.setattr(unpickle, "MAX_BYTES", len(data))
    monkeypatch.setattr(reader, "MAX_BYTES", len(data) - 1)
    with pytest.raises(CheckpointFileError, match=f"larger than {len(data) - 1} bytes"):
        TorchFile(path)


def test_published_limits():
    """Of a released model the pickle has some 400 tensors; these are what the docs promise."""
    assert (unpickle.MAX_BYTES, unpickle.MAX_OPCODES, unpickle.MAX_DIMENSIONS) == (
        4 << 20,
        250_000,
        8,
    )


def test_what_is_left_on_the_stack_is_refused():
    for data in (b"\x80\x02}N.", b"\x80\x02(}.", b"\x80\x02}(."):
        refused(data, "damaged")
    refused(b"\x80\x02}(X\x01\x00\x00\x00a.", "damaged")
    refused(b"\x80\x02}(X\x01\x00\x00\x00au.", "items of no dictionary")
    refused(b"\x80\x02)(X\x01\x00\x00\x00aNu.", "items of no dictionary")
    for key in (b"\x88", b")", b"N", b"]"):
        refused(b"\x80\x02}" + key + b"Ns.", "a dictionary key that is no name")
    refused(b"\x80\x02}K\x01Ns.", "1 is not a tensor")
    refused(b"\x80\x02}(K\x01NK\x01Nu.", "'1' twice")
    for append in (b"Na", b"(Ne"):
        refused(b"\x80\x02}" + append + b".", "items of no list")
    refused(b"\x80\x02}(\x85.", "stray mark")
    refused(b"\x80\x02)}b.", "sets the state of something else")
    refused(b"\x80\x02}b.", "sets the state of something else|damaged")


@pytest.mark.parametrize(
    "value", [0, 1, -1, 255, 256, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**40, 2**62, -(2**62)]
)
def test_the_writers_numbers_are_what_pickle_reads(value):
    from mlra_jax.convert.torch_format import writer

    data = writer._number(value) + b"."
    assert pickle.loads(data) == value == interpret(data)


STATE = {
    "state": {0: {"step": 3.0}, 1: {}},
    "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.95), "params": [0, 1]}],
}


@pytest.mark.parametrize("key", unpickle.MODELS)
def test_a_model_inside_a_training_dictionary(key):
    tensors = {"w": contiguous(FLOAT, (3, 4)), "v": contiguous(FLOAT, (12,))}
    found, inside = read_tensors(training_pickle(tensors, key, optimizer=STATE, iter_num=7))
    assert (list(found), inside, found["w"].shape) == (["w", "v"], key, (3, 4))
    two = training_pickle(tensors, key, **{other: {} for other in unpickle.MODELS if other != key})
    refused(two, "several models: model, state_dict, model_state_dict")
    refused(training_pickle(tensors, "net", iter_num=7), "'net' is not a tensor")


SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.dictionaries(st.text(max_size=20), SHAPES, max_size=4), st.sampled_from(sorted(STORAGES)))
def test_written_pickles_come_back(shapes, storage):
    tensors = {
        name: contiguous(Storage(str(i), STORAGES[storage], math.prod(shape)), shape)
        for i, (name, shape) in enumerate(shapes.items())
    }
    found, inside = read_tensors(pickle_tensors(tensors))
    assert inside is None
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        array = np.empty(tensor.shape, np.int8)
        assert found[name].shape == array.shape and found[name].offset == 0
        if array.size:
            assert found[name].strides == array.strides
        assert (found[name].storage.key, found[name].storage.dtype) == (
            tensor.storage.key,
            tensor.storage.dtype,
        )


@pytest.mark.parametrize("name", sorted(STORAGES))
def test_every_storage_type_is_read(name, tmp_path):
    dtype = STORAGES[name]
    values = np.arange(6).astype(dtype)
    storage = Storage("3", dtype, 6)
    tensors = {"rows": contiguous(storage, (2, 3)), "turned": Tensor(storage, 1, (2, 2), (1, 3))}
    write_torch_file(
        tmp_path / "x.bin", tensors, {"3": [values[:2].tobytes(), values[2:].tobytes()]}
    )
    file = TorchFile(tmp_path / "x.bin")
    assert file.specs["rows"] == ((2, 3), dtype)
    np.testing.assert_array_equal(file.read("rows"), values.reshape(2, 3))
    np.testing.assert_array_equal(file.read("turned"), values.reshape(2, 3).T[1:])


def test_one_tensor_is_one_in_every_respect(tmp_path):
    """Equal storage, type, offset, shape and strides; a change in any one of them is another."""
    other = Storage("1", FLOAT.dtype, 12)
    tensors = {
        "w": Tensor(FLOAT, 0, (2, 2), (2, 1)),
        "same": Tensor(FLOAT, 0, (2, 2), (2, 1)),
        "key": Tensor(other, 0, (2, 2), (2, 1)),
        "offset": Tensor(FLOAT, 1, (2, 2), (2, 1)),
        "shape": Tensor(FLOAT, 0, (2, 1), (2, 1)),
        "strides": Tensor(FLOAT, 0, (2, 2), (4, 1)),
        "dtype": Tensor(Storage("0", np.dtype(np.int32), 12), 0, (2, 2), (2, 1)),
    }
    path = tmp_path / "m.bin"
    path.write_bytes(torch_bytes(tensors=tensors, **{"m/data/1": bytes(48)}))
    file = TorchFile(path)
    assert [name for name in tensors if file.same_bytes("w", name)] == ["w", "same"]
    assert file.size == sum(entry.size for entry in file._archive.entries.values())


def test_one_folder_in_the_archive(tmp_path):
    good = pickle_tensors({"w": contiguous(FLOAT, (12,))})
    path = tmp_path / "m.bin"
    for extra, ok in (({}, True), ({"n/data.pkl": good}, False), ({"m/n/data.pkl": good}, True)):
        path.write_bytes(torch_bytes(pickle=good, **extra))
        if ok:
            assert TorchFile(path).read("w")[11] == 11
        else:
            with pytest.raises(CheckpointFileError, match="without one data.pkl"):
                TorchFile(path)
    path.write_bytes(torch_bytes(pickle=good, data=bytes(47)))
    with pytest.raises(CheckpointFileError, match="storage of 'w' has not the length"):
        TorchFile(path)
    path.write_bytes(torch_bytes(pickle=good, data=bytes(49)))
    with pytest.raises(CheckpointFileError, match="storage of 'w' has not the length"):
        TorchFile(path)
