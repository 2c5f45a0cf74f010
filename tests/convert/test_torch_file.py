"""What torch.save writes comes out bit for bit; anything else is refused in one line."""

import os
import pickle
import struct
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest

from mlra_jax.convert.errors import CheckpointFileError
from mlra_jax.convert.torch_format.reader import TorchFile
from mlra_jax.convert.torch_format.unpickle import MAX_BYTES, MAX_OPCODES, Storage, Tensor
from mlra_jax.convert.torch_format.writer import contiguous, pickle_tensors, write_torch_file

from .files import FOLDERS, RELEASED, archive, small_arrays, torch_bytes, write_arrays

FLOAT = Storage("0", np.dtype(np.float32), 12)
SAMPLE = next((RELEASED / "mla").glob("*00002.bin"))


def refused(path, match):
    with pytest.raises(CheckpointFileError, match=match) as caught:
        TorchFile(path).verify()
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.fixture
def write(tmp_path):
    def to_file(data):
        path = tmp_path / "m.bin"
        path.write_bytes(data)
        return path

    return to_file


def test_arrays_of_all_types_come_back(tmp_path):
    arrays = small_arrays()
    write_arrays(tmp_path / "x.bin", arrays)
    file = TorchFile(tmp_path / "x.bin")
    file.verify()
    assert list(file.specs) == list(arrays)
    for name, array in arrays.items():
        read = file.read(name)
        assert read.dtype == array.dtype and read.shape == array.shape
        assert read.tobytes() == array.tobytes()
        assert not read.flags.writeable and not read.flags.owndata
    file.release()
    assert file.read("c").tobytes() == arrays["c"].tobytes()


@pytest.mark.parametrize("name", FOLDERS)
def test_released_files_hold_what_an_unpickler_sees(name):
    """Against Python's own unpickler and zip reader, with the tensor functions given by hand."""

    class Trusting(pickle.Unpickler):
        def find_class(self, module, name):
            if name == "_rebuild_tensor_v2":
                return lambda storage, offset, shape, strides, *_: np.lib.stride_tricks.as_strided(
                    storage[offset:], shape, [4 * s for s in strides]
                ).copy()
            return dict if name == "OrderedDict" else name

        def persistent_load(self, identifier):
            return np.frombuffer(archive.read(f"{root}/data/{identifier[2]}"), np.float32)

    for path in sorted((RELEASED / name).glob("*.bin")):
        root = path.stem
        with zipfile.ZipFile(path) as archive, archive.open(f"{root}/data.pkl") as file:
            wanted = Trusting(file).load()
        found = TorchFile(path)
        assert list(found.specs) == list(wanted)
        for tensor, values in wanted.items():
            np.testing.assert_array_equal(found.read(tensor), values)


def test_views_strides_and_tied_storages(write):
    whole = np.arange(12, dtype=np.float32).reshape(3, 4)
    tensors = {
        "whole": contiguous(FLOAT, (3, 4)),
        "tied": contiguous(FLOAT, (3, 4)),
        "transposed": Tensor(FLOAT, 0, (4, 3), (1, 4)),
        "columns": Tensor(FLOAT, 1, (3, 2), (4, 2)),
        "last": Tensor(FLOAT, 11, (), ()),
        "empty": Tensor(FLOAT, 0, (0, 4), (4, 1)),
    }
    file = TorchFile(write(torch_bytes(tensors=tensors)))
    np.testing.assert_array_equal(file.read("whole"), whole)
    np.testing.assert_array_equal(file.read("transposed"), whole.T)
    np.testing.assert_array_equal(file.read("columns"), whole[:, 1::2])
    assert file.read("last") == 11 and file.read("empty").shape == (0, 4)
    assert file.same_bytes("whole", "tied") and not file.same_bytes("whole", "transposed")


def test_state_dict_with_version_table_and_parameters(write):
    """`torch.save(model.state_dict())`: an OrderedDict with `_metadata`, tensors in parameters."""
    tensor = pickle_tensors({"w": contiguous(FLOAT, (12,))})
    name, rebuilt = tensor[4:10], tensor[10:-2]
    parameter = (
        b"ctorch._utils\n_rebuild_parameter\n(" + rebuilt + b"\x88ccollections\nOrderedDict\n)RtR"
    )
    state = b"}X\x09\x00\x00\x00_metadataccollections\nOrderedDict\n)R(X\x00\x00\x00\x00}X\x07\x00"
    state += b"\x00\x00versionK\x01suAs"[:-2] + b"s"
    data = b"\x80\x02ccollections\nOrderedDict\n)R(" + name + parameter + b"u" + state + b"b."
    file = TorchFile(write(torch_bytes(pickle=data)))
    np.testing.assert_array_equal(file.read("w"), np.arange(12))


class Attack:
    def __reduce__(self):
        return os.system, ("touch attacked",)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (pickle.dumps(Attack(), 2), r"'(posix|nt)\.system'"),
        (pickle.dumps({"w": Attack()}, 2), r"'(posix|nt)\.system'"),
        (b"\x80\x02cbuiltins\neval\nX\x01\x00\x00\x001\x85R.", "'builtins.eval'"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor\n)R.", "'torch._utils._rebuild_tensor'"),
        (b"\x80\x02ctorch.os\nsystem\n.", "'torch.os.system'"),
        (b"\x80\x02}Q.", "persistent id"),
        (b"\x80\x02(ios\nsystem\n.", "INST"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "protocol 4"),
        (b"\x8c\x02os\x8c\x06system\x93.", "SHORT_BINUNICODE"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"\x80\x02]q\x00.", "no dictionary"),
        (b"\x80\x02}X\x01\x00\x00\x00wK\x01s.", "'w' is not a tensor"),
        (b"\x80\x02K\x01.", "no dictionary"),
        (b"\x80\x02K\x01}b.", "sets the state"),
        (b"\x80\x02.", "damaged"),
        (b"\x80\x02}", "damaged"),
        (b"\x80\x02X\xff\xff\xff\xffabc.", "damaged"),
        (b"\x80\x02h\x07.", "damaged"),
        (b"\x80\x02L" + b"9" * 5000 + b"L\n.", "damaged"),
        (b"", "damaged"),
    ],
)
def test_pickles_that_are_no_tensors_are_refused_by_name(data, match, write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(write(torch_bytes(pickle=data)), match)
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize(
    ("tensor", "match"),
    [
        (Tensor(FLOAT, 0, (13,), (1,)), "does not fit"),
        (Tensor(FLOAT, 1, (12,), (1,)), "does not fit"),
        (Tensor(FLOAT, 0, (2, 6), (12, 1)), "does not fit"),
        (Tensor(FLOAT, 0, (2**40, 2**40), (0, 0)), "does not fit"),
        (Tensor(FLOAT, 0, (2**61, 2**61, 2**61), (1, 1, 1)), "does not fit"),
        (Tensor(FLOAT, 0, (3, 5), (0, 1)), "does not fit"),
        (Tensor(FLOAT, 2**70, (1,), (1,)), "absurd"),
        (Tensor(FLOAT, 0, (-1,), (1,)), "absurd"),
        (Tensor(FLOAT, 0, (2,), (-1,)), "absurd"),
        (Tensor(FLOAT, -1, (2,), (1,)), "absurd"),
        (Tensor(FLOAT, 0, (1,) * 60, (1,) * 60), "too many dimensions"),
        (Tensor(FLOAT, 0, (1, 1), (1,)), "disagree"),
        (Tensor(Storage("0", np.dtype(np.float32), 2**65), 0, (1,), (1,)), "absurd"),
        (Tensor(Storage("0", np.dtype(np.float32), 2**40), 0, (2**40,), (1,)), "length"),
        (Tensor(Storage("0", np.dtype(np.float16), 12), 0, (12,), (1,)), "length"),
        (Tensor(Storage("1", np.dtype(np.float32), 12), 0, (12,), (1,)), "missing"),
        (Tensor(Storage("../0", np.dtype(np.float32), 12), 0, (12,), (1,)), "storage"),
    ],
)
def test_absurd_sizes_and_keys(tensor, match, write):
    refused(write(torch_bytes(tensors={"w": tensor})), match)


def test_the_same_name_twice(write, tmp_path):
    one = pickle_tensors({"w": contiguous(FLOAT, (12,))})
    refused(write(torch_bytes(pickle=one[:-2] + one[4:-2] + b"u.")), "'w' twice")
    path = tmp_path / "twice.bin"
    with zipfile.ZipFile(path, "w") as file, pytest.warns(UserWarning):
        file.writestr("m/data.pkl", one)
        file.writestr("m/data.pkl", one)
    refused(path, "two entries")


def test_deflated_entries_are_no_zip_bombs(write):
    bomb = archive({"m/data.pkl": b"}" * (1 << 24), "m/data/0": b""}, zipfile.ZIP_DEFLATED)
    assert len(bomb) < 100_000
    refused(write(bomb), "compressed")


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02" + b"}" * (MAX_BYTES - 3) + b".",
        b"\x80\x02" + b"(" * (MAX_BYTES - 3) + b".",
        b"\x80\x02)" + b"\x85" * (MAX_OPCODES // 3) + b".",
        b"\x80\x02)q\x00" + b"h\x00h\x00\x86q\x00" * (MAX_OPCODES // 5) + b".",
        b"\x80\x02}" + b")q\x00" + b"h\x00h\x00\x86q\x00" * 100 + b"}s.",
        b"\x80\x02" + b"0" * (MAX_BYTES + 1),
    ],
    ids=["dicts", "marks", "nested", "shared", "shared key", "long"],
)
def test_opcode_bombs_end_soon_and_small(data, write):
    path = write(torch_bytes(pickle=data))
    tracemalloc.start()
    try:
        refused(path, "pickle|damaged|opcodes|dictionary")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 128 << 20


def test_lying_zip_directories(write):
    good = bytearray(torch_bytes(tensors={"w": contiguous(FLOAT, (12,))}))
    end = len(good) - 22
    directory = struct.unpack_from("<L", good, end + 16)[0]

    def changed(position, layout, value):
        data = bytearray(good)
        struct.pack_into(layout, data, position, value)
        return write(bytes(data))

    TorchFile(write(bytes(good))).verify()
    refused(changed(end + 16, "<L", directory + 1), "directory")
    refused(changed(end + 10, "<H", 60000), "outside")
    refused(changed(end + 12, "<L", 2**31), "directory")
    refused(changed(end + 20, "<H", 5), "comment")
    refused(changed(directory + 42, "<L", 7), "zip|name")
    refused(changed(directory + 42, "<L", 2**31), "outside")
    refused(changed(directory + 8, "<H", 1), "encrypted")
    refused(changed(directory + 20, "<L", 2**30), "compressed|past")
    refused(changed(directory + 16, "<L", 1), "damaged")
    data = bytearray(good)
    struct.pack_into("<2L", data, directory + 20, 2**30, 2**30)
    refused(write(bytes(data)), "past")
    refused(write(bytes(good) + b"x"), "torch.save")
    refused(write(b"PK\x03\x04"), "outside|torch.save")
    refused(write(b""), "cannot be read")


def test_entries_that_share_bytes_cannot_multiply_work(write):
    good = torch_bytes(tensors={"w": contiguous(FLOAT, (12,))}, data=bytes(48))
    end = len(good) - 22
    count, size, directory = struct.unpack_from("<HLL", good, end + 10)
    rows = good[directory:end]
    # The same local entry listed many times under the name of the first.
    many = rows + rows[:56] * 500
    data = good[:directory] + many + good[end : end + 8]
    data += struct.pack("<HHLLH", count + 500, count + 500, len(many), directory, 0)
    refused(write(data), "two entries|zip")


def test_what_is_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "regular")
    refused(tmp_path / "absent", "no such")
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", "regular")


def test_big_endian_is_refused(write):
    data = torch_bytes(tensors={"w": contiguous(FLOAT, (12,))}, **{"m/byteorder": b"big"})
    refused(write(data), "little-endian")


def test_zip64_entries(tmp_path):
    """The writer's streamed entries carry zip64 fields, as files beyond 4 GiB have them."""
    path = tmp_path / "x.bin"
    storage = Storage("0", np.dtype(ml_dtypes.bfloat16), 5)
    values = np.arange(5).astype(ml_dtypes.bfloat16)
    write_torch_file(path, {"w": contiguous(storage, (5,))}, {"0": [values.tobytes()]})
    np.testing.assert_array_equal(TorchFile(path).read("w"), values)


def attempt(path):
    """Reads all of a file that may be anything; only CheckpointFileError may come out."""
    try:
        file = TorchFile(path)
        file.verify()
        for name in file.specs:
            file.read(name).tobytes()
    except CheckpointFileError as error:
        assert "\n" not in str(error)
        return False
    return True


def test_fuzz_truncations(write):
    data = SAMPLE.read_bytes()
    rng = np.random.default_rng(0)
    for size in [*range(0, 60), *rng.integers(0, len(data), 100), len(data) - 1]:
        assert not attempt(write(data[:size]))


def test_fuzz_bit_flips(write):
    """Every flip of a bit is found, wherever it is: structure by the parser, numbers by the CRC."""
    arrays = small_arrays()
    path = write(b"")
    write_arrays(path, arrays)
    data = path.read_bytes()
    rng = np.random.default_rng(1)
    survived = 0
    for bit in rng.choice(8 * len(data), 600, replace=False):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        if attempt(path):
            # Dates, attributes and versions in zip headers mean nothing here.
            survived += 1
            file = TorchFile(path)
            for name, array in arrays.items():
                assert file.read(name).tobytes() == array.tobytes()
    assert survived < 240


def test_fuzz_pickles(write):
    """Random changes to the pickle alone, with a valid CRC around it, as an attacker would."""
    rng = np.random.default_rng(2)
    good = pickle_tensors({"w": contiguous(FLOAT, (3, 4)), "v": Tensor(FLOAT, 2, (5,), (2,))})
    opcodes = np.frombuffer(
        b"(.0tQR}us\x85\x86\x87\x88\x89Nh\x00q\x01K\xffM\xff\xffJXc)b]", np.uint8
    )
    path = write(b"")
    for _ in range(700):
        data = np.frombuffer(good, np.uint8).copy()
        where = rng.integers(0, len(data), rng.integers(1, 6))
        data[where] = rng.choice(opcodes, len(where))
        if rng.random() < 0.3:
            data = np.delete(data, slice(where[0], where[0] + rng.integers(1, 20)))
        path.write_bytes(torch_bytes(pickle=data.tobytes()))
        attempt(path)
