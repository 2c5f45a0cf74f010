"""Token files: each field of the header, any tokens there and back, whole or not at all."""

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlra_jax.data import token_file


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
