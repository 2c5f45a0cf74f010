"""Token files: each field of the header, any tokens there and back, whole or not at all."""

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlra_jax.data import token_file
from mlra_jax.data.sources import Segment, Windows, load_source


@given(st.lists(st.lists(st.integers(0, 65535), max_size=9), max_size=4))
@settings(max_examples=30, deadline=None)
def test_any_tokens_come_back_from_any_chunks(tmp_path_factory, chunks):
    path = tmp_path_factory.mktemp("tokens") / "a.bin"
    flat = [token for chunk in chunks for token in chunk]
    assert token_file.write(path, [np.array(chunk, np.int64) for chunk in chunks]) == len(flat)
    assert path.read_bytes() == struct.pack(f"<3i1012x{len(flat)}H", 20240520, 1, len(flat), *flat)
    tokens = token_file.read(path)
    assert tokens.tolist() == flat and tokens.dtype == np.dtype("<u2")
    assert [file.name for file in path.parent.iterdir()] == ["a.bin"]


def test_the_largest_vocabulary_and_file():
    assert (token_file.HEADER_BYTES, token_file.MAX_VOCAB_SIZE) == (1024, 65536)
    assert token_file._MAX_TOKENS == 2**31 - 1


def test_a_file_of_too_many_tokens_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(token_file, "_MAX_TOKENS", 5)
    path = tmp_path / "a.bin"
    assert token_file.write(path, [np.arange(3), np.arange(2)]) == 5
    with pytest.raises(ValueError, match=f"{path}: a token file holds at most 5 tokens"):
        token_file.write(path, [np.arange(3), np.arange(3)])
    assert token_file.read(path).tolist() == [0, 1, 2, 0, 1]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no token file {tmp_path}/a.bin"):
        token_file.read(tmp_path / "a.bin")
    with pytest.raises(FileNotFoundError, match="no token file"):
        token_file.read(tmp_path)


def test_an_empty_file_is_a_file(tmp_path):
    token_file.write(tmp_path / "a.bin", np.empty(0, np.int32))
    assert token_file.read(tmp_path / "a.bin").size == 0


def with_header(magic, version, tokens, dtype):
    header = struct.pack("<256i", magic, version, len(tokens), *[0] * 253)
    return header + np.asarray(tokens, dtype).tobytes()


FOREIGN = {
    "nanogpt": (np.asarray([5, 50256, 65535], "<u2").tobytes(), "uint16", [5, 50256, 65535]),
    "uint32": (np.asarray([5, 128_000], "<u4").tobytes(), "uint32", [5, 128_000]),
    "empty": (b"", "uint16", []),
    "llama_3": (with_header(20240801, 7, [1, 128_000, 2], "<u4"), "header", [1, 128_000, 2]),
    "gpt_2": (with_header(20240520, 1, [1, 50_256], "<u2"), "header", [1, 50_256]),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_token_files_are_read(tmp_path, name):
    content, token_format, expected = FOREIGN[name]
    path = tmp_path / "a.bin"
    path.write_bytes(content)
    tokens = token_file.read(path, token_format)
    assert tokens.tolist() == expected and not (tokens.size and tokens.flags.writeable)


def test_a_source_takes_the_format_and_the_vocabulary_decides(tmp_path):
    path = tmp_path / "a.BIN"
    path.write_bytes(np.arange(1000, dtype="<u2").tobytes())
    load = lambda **options: load_source(str(path), tokenizer=None, vocab_size=1000, **options)
    source = load(token_format="uint16")
    assert [int(part.tokens[0]) for part in (*source.train, *source.validation)] == [0, 950]
    with pytest.raises(ValueError, match="token_format=uint16"):
        load()
    with pytest.raises(ValueError, match="token_format='int8' is none of header, uint16, uint32"):
        load(token_format="int8")
    path.write_bytes(with_header(20240801, 7, [7, 128_000, 9], "<u4"))
    with pytest.raises(ValueError, match="id 128000 at position 1 is outside the vocabulary of 10"):
        load()
    # Not even where int32 would make it negative, and beyond what is checked at the start.
    windows = Windows([Segment("x", np.array([1, 2**32 - 1], np.uint32))], 1, 1000)
    with pytest.raises(ValueError, match="id 4294967295 at position 1 is outside"):
        windows[0]


@pytest.mark.parametrize(
    ("content", "token_format", "message"),
    [
        (
            np.arange(900, dtype="<u2").tobytes(),
            "header",
            "magic number .* say token_format=uint16",
        ),
        (np.arange(9, dtype="<u2").tobytes() * 5, "header", "90 bytes, expected a header .*uint16"),
        (b"\xfe\x00" * 700 + b"\x01", "header", "magic number 16646398, expected 20240520$"),
        (b"\xfe\x00\x01", "uint16", "is not uint16 tokens: 3 bytes, expected 2 for 1 tokens"),
        (b"\xfe\x00\x01\x00\x02\x00", "uint32", "is not uint32 tokens: 6 bytes, expected 4"),
        (with_header(20240520, 1, [1], "<u2"), "uint16", "with a header, not uint16 .*=header"),
        (with_header(20240801, 1, [1], "<u4"), "header", "version 1, expected 7"),
        (with_header(20240801, 7, [1, 2], "<u2"), "header", "truncated: 1028 .* expected 1032"),
        (with_header(20240522, 1, [], "<u2"), "header", "it is an evaluation set of llm.c"),
        (with_header(20240326, 3, [], "<u2"), "header", "it is a model of llm.c"),
        (b"PK\x03\x04" + b"\0" * 2000, "header", "it is a zip archive"),
        (b"PK\x03\x04" + b"\0" * 2000, "uint16", "is a zip archive .*, not uint16 tokens"),
        (b"\x80\x02}" + b"\0" * 2000, "header", "it is a Python pickle"),
        (
            b"Once upon a time, " * 100,
            "header",
            "it is text; call it otherwise, and mlra_jax.data.prepare makes",
        ),
        ("Überall é".encode() * 100, "header", "it is text; call it otherwise"),
    ],
)
def test_what_is_no_token_file_is_named(tmp_path, content, token_format, message):
    path = tmp_path / "a.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        token_file.read(path, token_format)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
