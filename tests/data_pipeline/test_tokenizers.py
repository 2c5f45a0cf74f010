import base64
import hashlib
import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlra_jax.data import tokenizers
from mlra_jax.data.tokenizers import StreamDecoder, get_tokenizer


@pytest.fixture(scope="module", params=["bytes", "file"])
def tokenizer(request, ranks_file):
    return get_tokenizer("bytes" if request.param == "bytes" else ranks_file)


def random_text(generator, length):
    ranges = [(32, 127), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]
    return "".join(chr(generator.randint(*generator.choice(ranges))) for _ in range(length))


def tokens_of_byte(tokenizer, byte):
    return [id for id in range(256) if tokenizer.token_bytes(id) == bytes([byte])]


def test_bytes_are_their_own_ids():
    tokenizer = get_tokenizer("bytes")
    assert tokenizer.encode("aé") == [97, 0xC3, 0xA9]
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.end_of_text) == ("bytes", 257, 256)


def test_a_ranks_file_merges_by_rank_and_puts_end_of_text_last(ranks_file):
    tokenizer = get_tokenizer(str(ranks_file))
    byte = lambda character: 255 - ord(character)
    assert tokenizer.encode("the") == [257]
    assert tokenizer.encode("x the  y") == [byte("x"), 259, byte(" "), byte(" "), byte("y")]
    assert tokenizer.end_of_text == 256 + 11
    assert tokenizer.vocab_size == tokenizer.end_of_text + 1
    assert get_tokenizer(ranks_file).name == tokenizer.name != "gpt2"


def test_text_that_looks_like_end_of_text_is_text(tokenizer):
    tokens = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.end_of_text not in tokens
    assert tokenizer.decode(tokens) == "a<|endoftext|>b"


def test_streaming_never_splits_a_character(tokenizer):
    generator = random.Random(7)
    for _ in range(200):
        text = random_text(generator, generator.randint(0, 40))
        tokens = tokenizer.encode(text)
        decoder = StreamDecoder(tokenizer)
        so_far = ""
        for token in tokens:
            so_far += decoder.push(token)
            assert text.startswith(so_far)
        assert so_far == text and decoder.flush() == ""
        assert tokenizer.decode(tokens) == text


@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_any_tokens_stream_as_their_bytes_decode(tokenizer, data):
    """Whatever is cut where: what is given out so far is a beginning, the end is the whole."""
    ids = st.integers(0, tokenizer.vocab_size - 1)
    text = st.text(max_size=6).map(tokenizer.encode)
    of_byte = {tokenizer.token_bytes(i): i for i in range(257)}
    half = st.sampled_from([c.encode()[:k] for c in "é界😀" for k in (1, 2, 3)])
    half = half.map(lambda part: [of_byte[bytes([byte])] for byte in part])
    end = st.just([tokenizer.end_of_text])
    parts = data.draw(st.lists(st.one_of(text, half, end, st.lists(ids, max_size=4)), max_size=6))
    tokens = [token for part in parts for token in part]
    documents = [b""]
    for token in tokens:
        if token == tokenizer.end_of_text:
            documents.append(b"")
        else:
            documents[-1] += tokenizer.token_bytes(token)
    expected = "".join(document.decode("utf-8", "replace") for document in documents)
    decoder, so_far = StreamDecoder(tokenizer), ""
    for token in tokens:
        so_far += decoder.push(token)
        assert expected.startswith(so_far)
    assert so_far + decoder.flush() == expected == tokenizer.decode(tokens)
    # A decoder that was flushed begins anew.
    assert decoder.push(tokenizer.encode("a")[0]) == "a" and decoder.flush() == ""


def test_each_id_has_its_bytes_and_end_of_text_none(tokenizer):
    assert tokenizer.token_bytes(tokenizer.end_of_text) == b""
    whole = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    assert len(set(whole)) == tokenizer.vocab_size
    assert tokenizer.encode_array("aé").dtype == np.uint32
    assert tokenizer.encode_array("").size == 0
    decoder = StreamDecoder(tokenizer)
    assert [decoder.push(tokenizer.end_of_text), decoder.flush()] == ["", ""]


def test_words_are_cut_as_gpt2_cuts_them(tmp_path):
    """No merge reaches from one word into the next: each rank below would, if it could."""
    merges = [b"a1", b"1a", b"a ", b"a.", b".a", b"'sa", b"  a", b"\na", b"a'", b"'s", b" a", b"aa"]
    ranks = [bytes([b]) for b in range(256)] + merges
    path = tmp_path / "ranks"
    path.write_text(
        "\n".join(f"{base64.b64encode(t).decode()} {rank}" for rank, t in enumerate(ranks))
    )
    tokenizer = get_tokenizer(path)
    pieces = lambda text: [tokenizer.token_bytes(i).decode() for i in tokenizer.encode(text)]
    for text, words in (
        ("aa1aa", ["aa", "1", "aa"]),
        ("aa aa", ["aa", " a", "a"]),
        ("aa  aa", ["aa", " ", " a", "a"]),
        ("aa.aa", ["aa", ".", "aa"]),
        ("aa'saa", ["aa", "'s", "aa"]),
        ("\naa", ["\n", "aa"]),
    ):
        assert pieces(text) == words


def test_a_tokenizers_name_is_of_its_ranks_not_of_its_file(ranks_file, tmp_path, monkeypatch):
    text = ranks_file.read_text()
    other = tmp_path / "elsewhere"
    other.write_text("\n" + "\n".join(reversed(text.splitlines())) + "\n\n")
    name = get_tokenizer(ranks_file).name
    assert get_tokenizer(other).name == name and re.fullmatch("tiktoken:[0-9a-f]{16}", name)
    assert get_tokenizer(other).encode("the thing") == get_tokenizer(ranks_file).encode("the thing")
    swapped = text.splitlines()
    (a, i), (b, j) = (line.split() for line in swapped[256:258])
    swapped[256:258] = [f"{a} {j}", f"{b} {i}"]
    other.write_text("\n".join(swapped))
    assert get_tokenizer(other).name != name
    # Ranks that are GPT-2's are gpt2, wherever they came from.
    digest = hashlib.sha256(text.encode()).hexdigest()
    monkeypatch.setattr(tokenizers, "_GPT2_RANKS_SHA256", digest)
    assert get_tokenizer(ranks_file).name == "gpt2"


def test_gpt2_is_tiktokens(monkeypatch, ranks_file):
    encoding = get_tokenizer(ranks_file)._encoding
    asked = []
    monkeypatch.setattr("tiktoken.get_encoding", lambda name: asked.append(name) or encoding)
    tokenizer = get_tokenizer("gpt2")
    assert asked == ["gpt2"] == [tokenizer.name]
    assert (tokenizer.end_of_text, tokenizer.vocab_size) == (267, 268)


def test_broken_bytes_give_replacement_characters_and_do_not_leak_into_the_next_document(tokenizer):
    whole = [token for byte in "界".encode() for token in tokens_of_byte(tokenizer, byte)]
    half = whole[:1]
    letter = tokenizer.encode("a")
    assert tokenizer.decode(half) == "\ufffd"
    assert tokenizer.decode(half + letter) == "\ufffda"
    assert tokenizer.decode(half + [tokenizer.end_of_text] + letter) == "\ufffda"
    assert tokenizer.decode([whole[0], tokenizer.end_of_text, *whole[1:]]) == "\ufffd" * 3
    for seed in range(50):
        generator = random.Random(seed)
        tokens = [generator.randrange(tokenizer.vocab_size) for _ in range(60)]
        expected, run = "", b""
        for token in tokens + [tokenizer.end_of_text]:
            if token == tokenizer.end_of_text:
                expected, run = expected + run.decode("utf-8", "replace"), b""
            else:
                run += tokenizer.token_bytes(token)
        assert tokenizer.decode(tokens) == expected


def test_lone_surrogates_do_not_stop_encoding(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\udc80b")) == "a?b"


def test_ids_outside_are_refused(tokenizer):
    for token in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"token id {token} is outside"):
            tokenizer.decode([token])


def test_without_network_gpt2_names_the_remedy(monkeypatch):
    import tiktoken

    def fail(name):
        raise OSError("name resolution\nfailed")

    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    with pytest.raises(ConnectionError, match="--tokenizer=FILE") as error:
        get_tokenizer("gpt2")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content, message",
    [
        ("nothing here\n", "line 1"),
        ("IQ== 0\nIg==\n", "line 2"),
        ("I!Q== 0\n", "line 1 is not 'base64-of-token rank'"),
        ("IQ== 0\nIg== one\n", "line 2"),
        ("IQ== 0\nIg== 0\n", "without gap or repetition"),
        ("IQ== 0\nIg== 2\n", "without gap"),
        ("IQ== 0\n", "lacks the single byte 0"),
        ("", "ranks must be"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    path = tmp_path / "other"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        get_tokenizer(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_unknown_names_are_refused():
    with pytest.raises(FileNotFoundError, match="gpt3"):
        get_tokenizer("gpt3")
    with pytest.raises(FileNotFoundError, match="--tokenizer=FILE"):
        get_tokenizer("tiktoken:0123456789abcdef")


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_a_ranks_file_may_have_a_mark_and_any_line_end(tmp_path, ranks_file, mark, end):
    path = tmp_path / "other.tiktoken"
    path.write_bytes(mark + ranks_file.read_bytes().replace(b"\n", end))
    assert get_tokenizer(path).name == get_tokenizer(ranks_file).name
