"""The zip reader by itself: ranges, checksums from block to block, limits, any byte string."""

import io
import struct
import zipfile
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlra_jax.convert.errors import CheckpointFileError
from mlra_jax.convert.torch_format import archive
from mlra_jax.convert.torch_format.archive import StoredArchive
from mlra_jax.convert.torch_format.reader import TorchFile
from mlra_jax.convert.torch_format.unpickle import Storage, Tensor
from mlra_jax.convert.torch_format.writer import contiguous

from .files import small_arrays, torch_bytes, write_arrays

WIDE = 0xFFFFFFFF
FLOAT = Storage("0", np.dtype(np.float32), 12)


class Record:
    """One entry of an archive that is put together by hand, so that any field may lie."""

    def __init__(self, name, data, **fields):
        self.name, self.data = name, data
        self.fields = dict(
            size=len(data), packed=len(data), crc=zlib.crc32(data), local=None, extra=b"",
            local_extra=b"", local_name=name, flags=0, method=0, disk=0, comment=b"",
        )  # fmt: skip
        self.fields |= fields


def build(*records, end64=False, **end_fields):
    """The bytes of an archive of these records; `end_fields` replace what the end record says."""
    body, directory = b"", b""
    for record in records:
        f = record.fields
        at = len(body) if f["local"] is None else f["local"]
        name, local_name = record.name.encode(), f["local_name"].encode()
        body += struct.pack(
            "<4s5H3L2H", b"PK\x03\x04", 20, f["flags"], f["method"], 0, 0, f["crc"],
            f["packed"], f["size"], len(local_name), len(f["local_extra"]),
        )  # fmt: skip
        body += local_name + f["local_extra"] + record.data
        directory += struct.pack(
            "<4s6H3L5H2L", b"PK\x01\x02", 20, 20, f["flags"], f["method"], 0, 0, f["crc"],
            f["packed"], f["size"], len(name), len(f["extra"]), len(f["comment"]), f["disk"], 0,
            0, at,
        )  # fmt: skip
        directory += name + f["extra"] + f["comment"]
    end = dict(
        disk=0, first_disk=0, count=len(records), size=len(directory), offset=len(body), comment=0
    )
    end |= end_fields
    tail = b""
    if end64:
        tail += struct.pack(
            "<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, end["disk"], end["first_disk"],
            end["count"], end["count"], end["size"], end["offset"],
        )  # fmt: skip
        tail += struct.pack("<4sLQL", b"PK\x06\x07", 0, len(body + directory), 1)
        end |= dict(count=0xFFFF, size=WIDE, offset=WIDE, disk=0, first_disk=0)
    tail += struct.pack(
        "<4s4H2LH", b"PK\x05\x06", end["disk"], end["first_disk"], end["count"] & 0xFFFF,
        end["count"] & 0xFFFF, end["size"], end["offset"], end["comment"],
    )  # fmt: skip
    return body + directory + tail


@pytest.fixture
def opened(tmp_path):
    def open_bytes(data):
        (tmp_path / "m.zip").write_bytes(data)
        return StoredArchive(tmp_path / "m.zip")

    return open_bytes


def refused(opened, data, match):
    with pytest.raises(CheckpointFileError, match=match) as caught:
        opened(data).verify()
    assert "\n" not in str(caught.value) and "m.zip: " in str(caught.value)


def test_entries_are_what_zipfile_finds(opened):
    rng = np.random.default_rng(0)
    contents = {f"m/{i}": rng.bytes(size) for i, size in enumerate((0, 1, 63, 64, 65, 1000))}
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as writer:
        for name, data in contents.items():
            writer.writestr(name, data)
    read = opened(file.getvalue())
    assert list(read.entries) == list(contents)
    for info in zipfile.ZipFile(file).infolist():
        entry = read.entries[info.filename]
        assert (entry.size, entry.crc) == (info.file_size, info.CRC)
        # A local header has 30 bytes before its name.
        assert entry.start == info.header_offset + 30 + len(info.filename)
        assert bytes(read.data(info.filename)) == contents[info.filename]


def test_headers_of_any_length_are_stepped_over(opened):
    """Extra fields may differ between the two headers; comments stand in the directory alone."""
    read = opened(
        build(
            Record("a", b"first", extra=b"\x99\x00\x02\x00xy", comment=b"said of a"),
            Record("b", b"second", local_extra=b"\x99\x00\x05\x00vwxyz"),
            Record("c", b"third"),
        )
    )
    read.verify()
    assert [bytes(read.data(name)) for name in "abc"] == [b"first", b"second", b"third"]


@pytest.mark.parametrize("size", [15, 16, 17, 31, 32, 33, 48])
def test_checksums_are_carried_from_block_to_block(opened, monkeypatch, size):
    """Entries of one to several blocks, the last one full or not; a change anywhere is found."""
    monkeypatch.setattr(archive, "_BYTES_AT_ONCE", 16)
    data = bytes(range(100, 100 + size))
    good = build(Record("m/data/0", data), Record("m/after", b"abc"))
    seen = []
    opened(good).verify(seen.append)
    assert seen == [16] * (size // 16) + ([size % 16] if size % 16 else []) + [3]
    first = good.index(data)
    for at in (0, 14, 15, 16, size - 1):
        if at < size:
            changed = bytearray(good)
            changed[first + at] ^= 1
            refused(opened, bytes(changed), "'m/data/0' is damaged")
    changed = bytearray(good)
    changed[good.index(b"abc") + 2] ^= 1
    refused(opened, bytes(changed), "'m/after' is damaged")


def test_an_entry_ends_where_the_directory_begins(opened):
    """To the last byte before it, and not one further."""
    for size, ok in ((4, True), (5, True), (6, False), (5 + 46, False)):
        reads = b"12345PK\x01\x02"[:size]
        data = build(Record("a", b"x"), Record("b", b"12345", size=size, packed=size))
        if ok:
            assert bytes(opened(data).data("b")) == reads
        else:
            refused(opened, data, "'b' runs past the data of the archive")
    # A local header that pretends a longer extra field pushes its data there, too.
    data = bytearray(build(Record("a", b"12345")))
    data[28] = 1
    refused(opened, bytes(data), "'a' runs past")


def test_directory_and_end_record_agree(opened):
    records = Record("a", b"1"), Record("b", b"22")
    good = build(*records)
    opened(good).verify()
    size, offset = struct.unpack_from("<2L", good, len(good) - 10)
    for fields, match in (
        (dict(offset=offset - 1), "directory is not where"),
        (dict(offset=offset + 1), "directory is not where"),
        (dict(size=size - 1), "directory is not where"),
        (dict(size=size + 1), "directory is not where"),
        (dict(size=size - 1, offset=offset + 1), "no whole zip archive"),
        (dict(size=size + 1, offset=offset - 1), "no whole zip archive"),
        (dict(count=1), "entry count disagree"),
        (dict(count=3), "outside the file|no whole zip"),
        (dict(count=0), "entry count disagree"),
        (dict(disk=1), "in parts"),
        (dict(first_disk=1), "in parts"),
        (dict(comment=1), "with a comment"),
    ):
        refused(opened, build(*records, **fields), match)
    # The comment of the last entry reaches over the end of the directory.
    data = bytearray(good)
    struct.pack_into("<H", data, offset + 47 + 32, 1)
    refused(opened, bytes(data), "runs past the directory")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        (dict(method=8), "'b' is compressed"),
        (dict(packed=4), "'b' is compressed"),
        (dict(flags=1), "'b' is encrypted"),
        (dict(disk=1), "'b' is encrypted or in another part"),
        (dict(local_name="c"), "'b' has another name"),
        (dict(local_name="bb"), "'b' has another name|runs past"),
        (dict(local=1), "no whole zip archive"),
        (dict(local=2**31), "outside the file"),
        (dict(crc=1), "'b' is damaged"),
        (dict(size=WIDE, packed=WIDE), "lacks its 64-bit sizes"),
        (dict(local=WIDE), "lacks its 64-bit sizes"),
    ],
)
def test_entries_that_lie(opened, fields, match):
    refused(opened, build(Record("a", b"1"), Record("b", b"22222", **fields)), match)


def test_flags_without_a_meaning_here_are_let_through(opened):
    """Sizes after the data (bit 3), names in UTF-8 (bit 11)."""
    assert bytes(opened(build(Record("ä", b"1", flags=0x808))).data("ä")) == b"1"


def test_unreadable_names_are_refused(opened):
    data = build(Record("ab", b"1")).replace(b"ab", b"\xff\xfe")
    refused(opened, data, "unreadable name")


def test_entries_within_entries_are_refused_when_they_add_up_to_more_than_the_file(opened):
    inner = build(Record("inner", bytes(3000)))
    local = inner[: inner.index(b"PK\x01\x02")]
    outer = Record("outer", local)
    # 5 bytes of name and 30 of header before the data of the outer entry.
    data = build(outer, Record("inner", b"", size=3000, packed=3000, local=35))
    # The record of the directory is right; its own local header, which nothing points to, stays.
    refused(opened, data, "overlap")


@pytest.mark.parametrize("wide", range(1, 8))
def test_64_bit_fields_replace_just_the_fields_that_are_full(opened, wide):
    """The extra field holds, in order, those of size, packed size and place that are 0xFFFFFFFF."""
    values = [5, 5, 32]
    names = ["size", "packed", "local"]
    picked = [i for i in range(3) if wide >> i & 1]
    body = struct.pack(f"<{len(picked)}Q", *(values[i] for i in picked))
    # Another field before it, and rest behind it.
    extra = b"\x99\x00\x01\x00z" + struct.pack("<2H", 1, len(body)) + body + b"\x98\x00\x00\x00"
    fields = dict(zip(names, values, strict=True)) | {names[i]: WIDE for i in picked}
    first = Record("a", b"1")  # 30 bytes, a name of one and one of data
    data = build(first, Record("b", b"12345", extra=extra, **fields))
    # In the local header the sizes are not looked at.
    read = opened(data)
    assert read.entries["b"] == archive.Entry(63, 5, zlib.crc32(b"12345"))
    read.verify()
    short = extra.replace(struct.pack("<2H", 1, len(body)), struct.pack("<2H", 1, len(body) - 1))
    data = build(first, Record("b", b"12345", extra=short, **fields))
    refused(opened, data, "lacks its 64-bit sizes")


def test_the_64_bit_end_record_counts(opened):
    records = Record("a", b"1"), Record("b", b"22")
    read = opened(build(*records, end64=True))
    read.verify()
    assert bytes(read.data("b")) == b"22"
    refused(opened, build(*records, end64=True, count=1), "entry count disagree")
    refused(opened, build(*records, end64=True, disk=1), "in parts")
    refused(opened, build(*records, end64=True, first_disk=1), "in parts")
    refused(opened, build(*records, end64=True, offset=3), "directory is not where")
    data = bytearray(build(*records, end64=True))
    data[-22 - 20 + 8] ^= 1  # where it says that record is
    refused(opened, bytes(data), "no whole zip archive")


def test_limits_are_kept_exactly(opened, monkeypatch):
    good = build(*(Record(f"{i}", b"") for i in range(5)))
    size = struct.unpack_from("<L", good, len(good) - 10)[0]
    with monkeypatch.context() as patch:
        patch.setattr(archive, "MAX_ENTRIES", 5)
        patch.setattr(archive, "MAX_DIRECTORY_BYTES", size)
        assert len(opened(good).entries) == 5
    for name, limit in (("MAX_ENTRIES", 4), ("MAX_DIRECTORY_BYTES", size - 1)):
        with monkeypatch.context() as patch:
            patch.setattr(archive, name, limit)
            refused(opened, good, f"5 entries in {size} bytes of zip directory are too many")


def test_released_pages_are_read_again(opened):
    data = np.random.default_rng(0).bytes(1 << 16)
    read = opened(build(Record("a", data)))
    view = read.data("a")
    for start, size in ((0, len(read.map)), (5000, 1), (len(read.map) - 1, 1), (4096, 4096)):
        read.release(start, size)
        assert bytes(view) == data
    archive.release_pages(read.map)
    assert bytes(view) == data


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    """(a place to write, the bytes of a good file, what reading it gives)"""
    folder = tmp_path_factory.mktemp("any")
    write_arrays(folder / "m.bin", small_arrays())
    data = (folder / "m.bin").read_bytes()
    views = {
        "w": contiguous(FLOAT, (3, 4)),
        "tied": contiguous(FLOAT, (3, 4)),
        "part": Tensor(FLOAT, 1, (3, 2), (4, 2)),
    }
    return folder / "changed.bin", (data, torch_bytes(tensors=views))


def everything(path):
    """Names and bytes of all tensors, or None if the file is refused in one line."""
    try:
        file = TorchFile(path)
        try:
            file.verify()
            return {
                name: (file.specs[name], file.read(name).tobytes(), file.same_bytes(name, name))
                for name in file.specs
            }
        finally:
            file.close()
    except CheckpointFileError as error:
        assert "\n" not in str(error) and str(path) in str(error)
        return None


CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "put", "copy"]),
        st.floats(0, 1, exclude_max=True),
        st.binary(min_size=1, max_size=8),
    ),
    min_size=1,
    max_size=3,
)


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 1), CHANGES)
def test_any_change_is_refused_or_means_nothing(valid, which, changes):
    """Flipped, cut, inserted, replaced and repeated bytes: the same tensors or one line."""
    path, good = valid
    data = bytearray(good[which])
    for kind, where, values in changes:
        at = int(where * len(data)) if data else 0
        if kind == "flip" and data:
            data[at] ^= 1 << values[0] % 8
        elif kind == "cut":
            del data[at : at + 1 + values[0]]
        elif kind == "insert":
            data[at:at] = values
        elif kind == "put":
            data[at : at + len(values)] = values
        elif kind == "copy":
            data[at:at] = data[at : at + values[0]]
    path.write_bytes(good[which])
    whole = everything(path)
    assert whole is not None
    path.write_bytes(bytes(data))
    found = everything(path)
    assert found is None or found == whole


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.binary(max_size=200), st.integers(0, 2))
def test_any_bytes_at_all(valid, data, kind):
    """Noise, noise with a good end record, and noise as the pickle of a good archive."""
    path, good = valid
    if kind == 1:
        data += good[0][-22:]
    elif kind == 2:
        data = torch_bytes(pickle=b"\x80\x02" + data)
    path.write_bytes(data)
    everything(path)
