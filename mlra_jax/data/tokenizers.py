"""Tokenizers: raw bytes, GPT-2's byte pairs, or any byte-pair ranks file in tiktoken's format."""

from __future__ import annotations

import base64
import binascii
import codecs
import hashlib
import re
from collections.abc import Iterable
from typing import Protocol

import numpy as np
import tiktoken

from mlra_jax.data.text_reader import read_lines
from mlra_jax.files import whole_file
from mlra_jax.storage import paths
from mlra_jax.storage.paths import AnyPath, PathLike

# GPT-2's way to cut text into words before byte pairs are merged (as in tiktoken's `gpt2`).
_GPT2_PATTERN = (
    r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
)
# SHA-256 of GPT-2's ranks, written as a ranks file: tiktoken publishes it for `r50k_base`.
_GPT2_RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
# How the name of a ranks file's tokenizer begins; a checksum of the ranks follows.
RANKS_PREFIX = "tiktoken:"
RANKS_FILE = "tokenizer.tiktoken"
"""In a checkpoint's folder: the ranks of its tokenizer, where they came from a file."""
_END_OF_TEXT = "<|endoftext|>"
# Ranks files that this process has met, by the names of their tokenizers, which are checksums.
_met: dict[str, AnyPath] = {}


class Tokenizer(Protocol):
    """What the package asks of a tokenizer. Ids run from 0 to `vocab_size` - 1.

    Attributes:
      name: what a checkpoint stores, so that `get_tokenizer(name)` finds the tokenizer again.
      vocab_size: number of real ids, end-of-text included. A model's vocabulary may be padded
        beyond it; ids from `vocab_size` on are never produced and never to be sampled.
      end_of_text: the id that begins each document. No text encodes to it.
    """

    name: str
    vocab_size: int
    end_of_text: int

    def encode_array(self, text: str) -> np.ndarray:
        """Ids of `text`, uint32 [tokens], without end-of-text."""

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one id, empty for end-of-text. ValueError for an id outside."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without end-of-text."""

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of `tokens`; end-of-text gives nothing, bytes that are not UTF-8 give U+FFFD."""


class _Coding:
    """`encode` and `decode`, given `encode_array` and `token_bytes`."""

    def encode(self, text: str) -> list[int]:
        return self.encode_array(text).tolist()

    def decode(self, tokens: Iterable[int]) -> str:
        decoder = StreamDecoder(self)
        return "".join(map(decoder.push, tokens)) + decoder.flush()

    def _check(self, token: int) -> int:
        if not 0 <= token < self.vocab_size:
            raise ValueError(
                f"token id {token} is outside tokenizer {self.name} (0 to {self.vocab_size - 1})"
            )
        return int(token)


class ByteTokenizer(_Coding):
    """Each byte of UTF-8 is its own id; 256 is end-of-text."""

    name = "bytes"
    vocab_size = 257
    end_of_text = 256

    def encode_array(self, text: str) -> np.ndarray:
        # Lone surrogates (undecodable command-line bytes) have no UTF-8 form.
        return np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.uint32)

    def token_bytes(self, token: int) -> bytes:
        token = self._check(token)
        return b"" if token == self.end_of_text else bytes([token])


class BytePairTokenizer(_Coding):
    """A tiktoken encoding whose only special token is end-of-text."""

    def __init__(self, name: str, encoding: tiktoken.Encoding):
        self.name = name
        self.end_of_text = encoding.eot_token
        self.vocab_size = encoding.max_token_value + 1
        self._encoding = encoding

    def encode_array(self, text: str) -> np.ndarray:
        # "<|endoftext|>" in a text is text: only the package itself marks documents.
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:
            text = text.encode("utf-8", "replace").decode("utf-8")
            return self._encoding.encode_to_numpy(text, disallowed_special=())

    def token_bytes(self, token: int) -> bytes:
        token = self._check(token)
        if token == self.end_of_text:
            return b""
        return self._encoding.decode_single_token_bytes(token)


class StreamDecoder:
    """Text of tokens that come one at a time; a character is given out once it is whole."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The characters that `token` completes; often empty inside a multi-byte character."""
        if token == self._tokenizer.end_of_text:
            return self.flush()
        return self._utf8.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that never became whole."""
        return self._utf8.decode(b"", final=True)


def is_tokenizer_name(name: object) -> bool:
    """Whether a checkpoint may store it: a known name, or a checksum of ranks."""
    return name in (ByteTokenizer.name, "gpt2") or (
        isinstance(name, str) and re.fullmatch(f"{RANKS_PREFIX}[0-9a-f]{{16}}", name) is not None
    )


def keep_ranks(name: str | None, file: AnyPath) -> None:
    """Copies the ranks of a tokenizer that came from a file, unless `file` is there already."""
    if name in _met and not file.exists():
        ranks = _met[name].read_bytes()
        with whole_file(file, "wb") as copy:
            copy.write(ranks)


def meet_ranks(name: str | None, file: AnyPath) -> None:
    """From here on `get_tokenizer(name)` looks into `file`, if it is there."""
    if name is not None and name != ByteTokenizer.name and file.is_file():
        _met.setdefault(name, file)


def get_tokenizer(name: PathLike) -> Tokenizer:
    """The tokenizer of a name or of a ranks file.

    Args:
      name: "bytes"; "gpt2" (fetched once by tiktoken, 50257 ids, end-of-text 50256); or the path
        of a ranks file, one `base64-of-token rank` a line, for hosts without network. Its texts
        are cut as GPT-2 cuts them, and end-of-text is the id after the last rank. Also the name
        of such a tokenizer, if its ranks were met (`meet_ranks`).

    Raises:
      FileNotFoundError: neither a known name nor a file.
      ValueError: the file is no ranks file.
      ConnectionError: "gpt2" is not on this host and cannot be fetched.
    """
    if str(name) == ByteTokenizer.name:
        return ByteTokenizer()
    met = _met.get(str(name))
    if met is not None and met.is_file():
        tokenizer = _read_ranks_file(met)
        if tokenizer.name != name:
            raise ValueError(
                f"{met} holds the ranks of {tokenizer.name} and not of {name}; put the right file "
                "there"
            )
        return tokenizer
    if str(name) == "gpt2":
        return _fetch_gpt2()
    if str(name).startswith(RANKS_PREFIX):
        raise FileNotFoundError(
            f"tokenizer {name} came from a ranks file; name that file with --tokenizer=FILE (in "
            "training --config.data.tokenizer=FILE)"
        )
    file = paths.path(name)
    if not file.is_file():
        raise FileNotFoundError(
            f"no tokenizer {str(name)!r}: give bytes, gpt2, or the path of a tiktoken ranks file"
        )
    return _read_ranks_file(file)


def _fetch_gpt2() -> Tokenizer:
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except Exception as error:  # tiktoken promises no type: requests, OSError, hash mismatch
        raise ConnectionError(
            "tokenizer gpt2 is not on this host and could not be fetched "
            f"({type(error).__name__}); give its ranks with --tokenizer=FILE (gpt2.tiktoken or "
            "r50k_base.tiktoken)"
        ) from error
    return BytePairTokenizer("gpt2", encoding)


def _read_ranks_file(path: AnyPath) -> Tokenizer:
    ranks: dict[bytes, int] = {}
    for number, (_, line) in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(
                f"{path} is no tiktoken ranks file: line {number} is not 'base64-of-token rank'"
            ) from None
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    if [rank for _, rank in ordered] != list(range(len(ranks))) or not ranks:
        raise ValueError(f"{path}: ranks must be 0, 1, 2, … without gap or repetition")
    missing = next((byte for byte in range(256) if bytes([byte]) not in ranks), None)
    if missing is not None:
        raise ValueError(f"{path} lacks the single byte {missing}: not every text has an encoding")
    lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in ordered)
    digest = hashlib.sha256(b"".join(lines)).hexdigest()
    # The same ranks are the same tokenizer, wherever they came from.
    name = "gpt2" if digest == _GPT2_RANKS_SHA256 else f"{RANKS_PREFIX}{digest[:16]}"
    _met[name] = path
    encoding = tiktoken.Encoding(
        name,
        pat_str=_GPT2_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={_END_OF_TEXT: len(ranks)},
    )
    return BytePairTokenizer(name, encoding)
