import random
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlra_jax.data import sources, text_reader, token_file
from mlra_jax.data.sources import Segment, Windows, load_source
from mlra_jax.data.text_reader import read_pieces
from mlra_jax.data.tokenizers import get_tokenizer
from mlra_jax.storage import paths

BYTES = get_tokenizer("bytes")


def load(spec, **options):
    options = {"tokenizer": BYTES, "vocab_size": 300} | options
    return load_source(str(spec), **options)


def tokens_of(segments):
    return np.concatenate([part.tokens for part in segments]).tolist()


def test_a_token_file_has_the_reference_header_and_little_endian_tokens(tmp_path):
    path = tmp_path / "a.bin"
    assert token_file.write(path, np.array([1, 2, 50256])) == 3
    expected = struct.pack("<256i", 20240520, 1, 3, *[0] * 253) + struct.pack("<3H", 1, 2, 50256)
    assert path.read_bytes() == expected
    assert token_file.read(path).tolist() == [1, 2, 50256]
    assert not token_file.read(path).flags.writeable


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.bin"
    token_file.write(path, np.arange(5))
    before = path.read_bytes()
    for bad in (65536, -1):
        with pytest.raises(ValueError, match="0 to 65535"):
            token_file.write(path, iter([np.arange(9), np.array([bad])]))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.bin"]


def header(magic=20240520, version=1, count=4):
    return struct.pack("<256i", magic, version, count, *[0] * 253)


@pytest.mark.parametrize(
    "content, message",
    [
        (header(), "truncated: 1024 bytes, expected 1032"),
        (header() + bytes(7), "truncated: 1031 bytes, expected 1032"),
        (header() + bytes(9), "does not fit its header: 1033 bytes, expected 1032"),
        (header(magic=20240521) + bytes(8), "magic number 20240521, expected 20240520"),
        (header(version=2) + bytes(8), "version 2, expected 1"),
        (header(version=0) + bytes(8), "version 0, expected 1"),
        (header(count=-1) + bytes(8), "expected 1022"),
        (header()[:1000], "1000 bytes, expected a header of 1024"),
        (b"", "0 bytes, expected a header of 1024"),
    ],
)
def test_damaged_token_files_are_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "damaged.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_an_id_outside_the_vocabulary_is_named_with_file_and_position(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    tokens = np.zeros(1000, np.uint16)
    tokens[777] = 300
    token_file.write(path, tokens)
    message = f"{path}: token id 300 at position 777 is outside the vocabulary of 300"
    with pytest.raises(ValueError, match=message):
        load(path)
    load(path, vocab_size=301)
    # Beyond the part that is checked first, the window that holds the id is refused.
    monkeypatch.setattr(sources, "_TOKENS_CHECKED_FIRST", 700)
    source = load(path, validation_fraction=0.5)
    windows = Windows(source.validation, 50, 300)
    for index in range(len(windows)):
        if index == (777 - 500) // 50:
            with pytest.raises(ValueError, match=message):
                windows[index]
        else:
            windows[index]


def test_windows_cover_each_segment_without_crossing_into_the_next():
    generator = np.random.default_rng(0)
    arrays = [generator.integers(0, 60000, size).astype(np.uint16) for size in (23, 3, 5, 41, 1)]
    windows = Windows([Segment("x", array) for array in arrays], 4, 65536)
    expected = [
        array[start : start + 5].tolist()
        for array in arrays
        for start in range(0, len(array) - 4, 4)
    ]
    assert [windows[index].tolist() for index in range(len(windows))] == expected
    assert windows[0].dtype == np.int32
    for index in (-1, len(windows)):
        with pytest.raises(IndexError):
            windows[index]


def test_too_few_tokens_for_one_window():
    with pytest.raises(ValueError, match="training data in x: 8 tokens are less than .* = 9"):
        Windows([Segment("x", np.zeros(8, np.uint16))], 8, 10)


def test_a_folder_of_text_is_read_in_order_of_path_with_documents_marked(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "b" / "x.txt").write_text("second")
    (tmp_path / "a.md").write_text("first é")
    (tmp_path / "c.txt").write_text("third")
    (tmp_path / ".hidden" / "d.txt").write_text("never")
    (tmp_path / ".e").write_text("never")
    source = load(tmp_path, validation_fraction=0.25)
    expected = [token for text in ("first é", "second", "third") for token in [256, *text.encode()]]
    assert tokens_of(source.train) + tokens_of(source.validation) == expected
    assert len(tokens_of(source.validation)) == len(expected) // 4


def test_pydoc_is_the_language_reference():
    source = load("pydoc")
    train, validation = tokens_of(source.train), tokens_of(source.validation)
    assert len(train) + len(validation) > 300_000
    assert 0.049 < len(validation) / (len(train) + len(validation)) <= 0.05
    assert "assert_stmt" in BYTES.decode(train)


def test_the_held_out_tail_is_capped_and_may_begin_in_any_file(tmp_path, monkeypatch):
    files = [tmp_path / f"{i}.bin" for i in range(3)]
    for i, path in enumerate(files):
        token_file.write(path, np.arange(100 * i, 100 * i + 100))
    spec = ",".join(map(str, files))
    for cap in (1, 99, 100, 101, 150, 200, 250):
        monkeypatch.setattr(sources, "_MAX_HELD_OUT", cap)
        source = load(spec, tokenizer=None, validation_fraction=0.9)
        assert tokens_of(source.train) == list(range(300 - cap))
        assert tokens_of(source.validation) == list(range(300 - cap, 300))
        # Messages name the place in the file.
        first = source.validation[0]
        assert (first.name, first.offset) == (str(files[(300 - cap) // 100]), (300 - cap) % 100)
    monkeypatch.undo()
    assert sources._MAX_HELD_OUT == 10_000_000
    small = load(files[0], tokenizer=None, validation_fraction=0.001)
    assert len(small.train[0].tokens) == 100 and small.validation[0].tokens.size == 0


def test_the_check_before_the_start_covers_each_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_TOKENS_CHECKED_FIRST", 100)
    monkeypatch.setattr(sources, "_TOKENS_CHECKED_AT_ONCE", 7)
    files = [tmp_path / f"{i}.bin" for i in range(2)]
    for place, found in ((0, True), (6, True), (7, True), (48, True), (49, True), (50, False)):
        for path in files:
            tokens = np.zeros(200, np.uint16)
            tokens[place] = 300 if path == files[1] else 299
            token_file.write(path, tokens)
        if found:
            with pytest.raises(ValueError, match=f"1.bin: token id 300 at position {place} "):
                load(tmp_path, tokenizer=None)
        else:
            load(tmp_path, tokenizer=None)


def test_a_fingerprint_sees_the_ends_of_every_part_and_its_length():
    tokens = np.random.default_rng(0).integers(0, 9, 200_000).astype(np.uint16)
    parts = lambda *arrays: sources.fingerprint([Segment("x", a) for a in arrays])
    seen = [parts(tokens), parts(tokens[:-1]), parts(tokens[:9], tokens[9:])]
    for place in (0, 65535, len(tokens) - 65536, len(tokens) - 1):
        other = tokens.copy()
        other[place] += 1
        seen += [parts(other), parts(tokens[:5], other)]
    # Of the same ends, another middle.
    seen.append(parts(np.concatenate([tokens[:70_000], tokens[69_000:]])))
    assert len(set(seen)) == len(seen)
    assert (
        parts(tokens)
        == parts(tokens.astype(np.uint32))
        == sources.fingerprint([Segment("elsewhere", tokens.copy(), 7)])
    )
    assert len(seen[0]) == 8 and int(seen[0], 16) >= 0


def test_text_and_token_files_together(tmp_path):
    token_file.write(tmp_path / "a.bin", np.array([5, 6, 7]))
    (tmp_path / "b.txt").write_text("xy")
    (tmp_path / "c.txt").write_text("z")
    # A folder with token files is those alone; by name each is what it is.
    assert tokens_of(load(tmp_path).train) == [5, 6, 7]
    spec = f"{tmp_path}/b.txt, {tmp_path}/a.bin ,{tmp_path}/c.txt"
    assert tokens_of(load(spec).train) == [5, 6, 7, 256, *b"xy", 256, *b"z"]
    both = load(f"pydoc,{tmp_path}/c.txt")
    assert tokens_of(both.train)[0] == 256 and tokens_of(both.validation)[-2:] == [256, *b"z"]
    assert tokens_of(load(f"{tmp_path}/**/*.txt").train) == [256, *b"xy", 256, *b"z"]
    assert tokens_of(load(tmp_path / "a.bin", validation="pydoc").train) == [5, 6, 7]


def test_text_is_ordered_folder_by_folder_and_never_validation_by_its_name(tmp_path):
    """By the parts of the path: as strings, a-b/x would come before a/y."""
    for name in ("a/y", "a-b/x", "a.txt", "b/c_val_d.txt", "B"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    source = load(tmp_path, validation_fraction=0.01)
    assert BYTES.decode(tokens_of(source.train)) == "Ba/ya-b/xa.txtb/c_val_d.txt"
    assert not source.validation[0].tokens.size


def test_a_pattern_is_read_in_order_whatever_the_folder_says(tmp_path, monkeypatch):
    for i in range(3):
        token_file.write(tmp_path / f"{i}.bin", np.array([i, i]))
    listed = paths.glob.glob
    monkeypatch.setattr(paths.glob, "glob", lambda *a, **k: sorted(listed(*a, **k))[::-1])
    assert tokens_of(load(f"{tmp_path}/*.bin", validation="pydoc").train) == [0, 0, 1, 1, 2, 2]


def test_ids_of_a_large_vocabulary_are_kept_whole(tmp_path):
    class Large:
        name, vocab_size, end_of_text = "large", 70_000, 69_999

        def encode_array(self, text):
            return np.array([65_536 + ord(c) for c in text], np.uint32)

    (tmp_path / "a.txt").write_text("ab")
    source = load(tmp_path / "a.txt", tokenizer=Large(), vocab_size=70_000)
    assert tokens_of(source.train) == [69_999, 65_633, 65_634]
    # 65536 ids still fit 16 bits.
    Large.vocab_size, Large.end_of_text = 65_536, 65_535
    Large.encode_array = lambda self, text: np.array([65_534] * len(text), np.uint32)
    source = load(tmp_path / "a.txt", tokenizer=Large(), vocab_size=65_536)
    assert tokens_of(source.train) == [65_535, 65_534, 65_534]
    assert source.train[0].tokens.dtype == np.uint16
    with pytest.raises(ValueError, match="has 65536 ids, more than the model's vocab_size 65535"):
        load(tmp_path / "a.txt", tokenizer=Large(), vocab_size=65_535)


def test_pydoc_is_every_topic_by_name():
    from pydoc_data.topics import topics

    documents = sources.pydoc_documents()
    assert documents == [topics[name] for name in sorted(topics)] and len(documents) > 50
    whole = load("pydoc")
    tokens = tokens_of(whole.train) + tokens_of(whole.validation)
    assert tokens == [t for text in documents for t in (256, *text.encode())]


WORDS = ["a", "é\n", "界\n", "b\n", "\n", " ", "\r\n", "😀", "\u3000", "\t"]


@given(st.lists(st.sampled_from(WORDS), max_size=150).map("".join), st.integers(1, 12))
@settings(max_examples=80, deadline=None)
def test_any_text_in_pieces_of_any_size(tmp_path_factory, text, size):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(text_reader, "_PIECE_CHARACTERS", size)
        pieces = list(read_pieces(path))
        assert "".join(piece for _, piece in pieces) == text
        starts = np.cumsum([0] + [len(piece.encode()) for _, piece in pieces])
        assert [start for start, _ in pieces] == starts[: len(pieces)].tolist()
        for i in range(len(pieces)):
            assert list(read_pieces(path, pieces[i][0])) == pieces[i:]
        # A cut is made at the first newline between visible characters behind `size` characters,
        # or, if there is none before twice as many, in front of the last of some blanks.
        for i, (_, piece) in enumerate(pieces):
            assert len(piece) <= 2 * size and (len(piece) >= size or i == len(pieces) - 1)
        for _, piece in pieces:
            assert not text_reader._CUT.search(piece, size)
        broken = tmp_path_factory.mktemp("text") / "b.txt"
        broken.write_bytes(text.encode() + b"\xff")
        with pytest.raises(ValueError, match=f"byte {len(text.encode())} cannot be read"):
            list(read_pieces(broken))


SEPARATORS = [
    "\n",
    "\n\n",
    "\r\n",
    "\r\n\r\n",
    " ",
    "\r",
    "  \n\t",
    "\t",
    "\n \n",
    " \x1c",
    "\x85 ",
]


@pytest.mark.parametrize("separator", SEPARATORS, ids=ascii)
def test_pieces_are_bounded_and_encode_by_themselves_whatever_parts_the_words(
    tmp_path, monkeypatch, ranks_file, separator
):
    monkeypatch.setattr(text_reader, "_PIECE_CHARACTERS", 50)
    text = separator.join(["alpha", "it's", "界隈", "x1.", "(b)"] * 300)
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    pieces = [piece for _, piece in read_pieces(path)]
    assert "".join(pieces) == text
    assert all(50 <= len(piece) <= 100 for piece in pieces[:-1]) and len(pieces[-1]) <= 100
    tokenizer = get_tokenizer(ranks_file)
    assert sum(map(tokenizer.encode, pieces), []) == tokenizer.encode(text)


@pytest.mark.parametrize("word", ["a", "界", " ", "\n", "\r\n"], ids=ascii)
def test_a_word_without_end_is_cut(tmp_path, word):
    path = tmp_path / "a.txt"
    path.write_bytes((word * 5_000_000)[:5_000_000].encode())
    sizes = [len(piece) for _, piece in read_pieces(path)]
    assert sizes == [2 << 20, 2 << 20, 5_000_000 - (4 << 20)]


@pytest.mark.parametrize("text", ["", "a", "a\nb\n", "\ufeffa", "é" * 50, "a\n" * 50])
def test_a_byte_order_mark_is_in_no_piece_and_shifts_every_place(tmp_path, monkeypatch, text):
    monkeypatch.setattr(text_reader, "_PIECE_CHARACTERS", 5)
    plain, marked = tmp_path / "a.txt", tmp_path / "b.txt"
    plain.write_bytes(text.removeprefix("\ufeff").encode())
    marked.write_bytes(b"\xef\xbb\xbf" + text.removeprefix("\ufeff").encode())
    pieces = list(read_pieces(marked))
    assert pieces == [(at + 3 if at else 0, piece) for at, piece in read_pieces(plain)]
    for i, (at, _) in enumerate(pieces):
        assert list(read_pieces(marked, at)) == pieces[i:]
    if pieces:
        assert tokens_of(load(marked).train + load(marked).validation)[:2] != [256, 0xEF]


def test_only_three_signs_end_a_line(tmp_path):
    path = tmp_path / "a.txt"
    others = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
    parts = [("\ufeffone" + others, "\r\n"), ("", "\n"), ("\ufefftwo", "\r"), ("", "\r"), ("x", "")]
    path.write_bytes("".join(map("".join, parts)).encode())
    lines = list(text_reader.read_lines(path))
    assert [line.decode() for _, line in lines] == ["one" + others, *(p for p, _ in parts[1:])]
    for number, (start, _) in enumerate(lines, 1):
        assert list(text_reader.read_lines(path, start)) == lines[number - 1 :]
        assert text_reader.line_number(path, start) == number


@pytest.mark.parametrize("block", [1, 2, 3, 100])
def test_the_number_of_a_line_does_not_depend_on_the_blocks_it_is_counted_in(
    tmp_path, monkeypatch, block
):
    monkeypatch.setattr(text_reader, "_BLOCK_BYTES", block)
    path = tmp_path / "a.txt"
    path.write_bytes(b"a\r\n\r\nb\rc\n\n\r\xff")
    assert [text_reader.line_number(path, at) for at in (0, 3, 5, 7, 9, 10)] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(ValueError, match=r"byte 11 cannot be read \(line 7\)$"):
        list(read_pieces(path))


def test_token_shards_by_folder_list_and_pattern(tmp_path):
    for number, name in enumerate(["x_val_000000.bin", "x_train_000001.bin", "x_train_000002.bin"]):
        token_file.write(tmp_path / name, np.full(10, number))
    one, two = tmp_path / "x_train_000001.bin", tmp_path / "x_train_000002.bin"
    for spec in (tmp_path, tmp_path / "*.bin"):
        source = load(spec, tokenizer=None)
        assert tokens_of(source.train) == [1] * 10 + [2] * 10
        assert tokens_of(source.validation) == [0] * 10
    held_out = load(f"{two},{one}", tokenizer=None, validation_fraction=0.75)
    assert tokens_of(held_out.train) == [2] * 5
    assert tokens_of(held_out.validation) == [2] * 5 + [1] * 10
    explicit = load(tmp_path, tokenizer=None, validation=str(two))
    assert tokens_of(explicit.validation) == [2] * 10
    alone = load(tmp_path / "x_val_000000.bin", tokenizer=None, validation_fraction=0.5)
    assert tokens_of(alone.train) == tokens_of(alone.validation) == [0] * 5


@pytest.mark.parametrize(
    "train, validation",
    [
        # The word alone, at the end, in front, between any signs, next to digits, in capitals.
        (["train.bin"], ["val.bin"]),
        (["TinyStories_train.bin"], ["TinyStories_val.bin"]),
        (["a.bin", "b.bin"], ["test.bin"]),
        (["wiki.train.bin"], ["wiki.valid.bin", "wiki.test.bin"]),
        (["x-train-01.bin"], ["x-validation-00.bin"]),
        (["000.bin"], ["VAL01.bin"]),
        (["x_train_000001.bin"], ["x_val_000000.bin"]),
        # Parts of words are none.
        (["a.bin", "interval_1.bin", "latest.bin", "valley.bin", "eval.bin"], ["b_val.bin"]),
        # The data's own name has such a word; the last one is the role, or what names differ in.
        (["my_val_set_train_1.bin", "my_val_set_train_2.bin"], ["my_val_set_val_0.bin"]),
        (["test_suite_1.bin", "test_suite_2.bin"], ["test_suite_val_0.bin"]),
        (["val_train_1.bin", "other.bin"], ["train_val_1.bin"]),
    ],
)
@pytest.mark.parametrize("folder", ["data", "my_val_data", "test", "val/x"])
def test_validation_files_are_known_by_the_words_of_their_own_names(
    tmp_path, folder, train, validation
):
    folder = tmp_path / folder
    folder.mkdir(parents=True)
    for i, name in enumerate(train + validation):
        token_file.write(folder / name, np.full(10 + i, i))
    source = load(folder, tokenizer=None)
    names = lambda segments: sorted(part.name for part in segments)
    assert names(source.train) == sorted(str(folder / name) for name in train)
    assert names(source.validation) == sorted(str(folder / name) for name in validation)
    assert not source.notes


@pytest.mark.parametrize(
    "names", [["val.bin"], ["test_0.bin", "test_1.bin"], ["a_val_0.bin", "b_test_1.bin"]]
)
def test_files_that_all_say_validation_train_and_a_line_says_so(tmp_path, names):
    for name in names:
        token_file.write(tmp_path / name, np.arange(100))
    source = load(tmp_path, tokenizer=None, validation_fraction=0.25)
    assert tokens_of(source.train) + tokens_of(source.validation) == [*range(100)] * len(names)
    files = ", ".join(str(tmp_path / name) for name in names)
    assert (
        sources.describe(source)[0] == f"all names say validation, so all are trained on: {files}"
    )


def test_what_trains_and_what_validates_is_told_in_a_line_each(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 1999)
    a, text = tmp_path / "train.bin", tmp_path / "a.txt"
    assert sources.describe(load(text, validation_fraction=0.25)) == [
        f"training on 1,500 tokens: {text}",
        f"validating on 500 tokens: {text} from token 1,500 on",
    ]
    token_file.write(a, np.zeros(1000))
    b, c = tmp_path / "val.bin", tmp_path / "test.bin"
    for path in (b, c):
        token_file.write(path, np.zeros(30))
    assert sources.describe(load(tmp_path, tokenizer=None)) == [
        f"training on 1,000 tokens: {a}",
        f"validating on 60 tokens: {c} (30), {b} (30)",
    ]
    # A setting decides: what the names say is then neither.
    assert sources.describe(load(tmp_path, validation=str(text)))[0] == (
        f"neither trained nor validated on, by their names: {c}, {b}"
    )
    many = tmp_path / "many"
    many.mkdir()
    for i in range(9):
        token_file.write(many / f"{i}.bin", np.zeros(10))
    assert sources.describe(load(many, tokenizer=None, validation=str(b))) == [
        f"training on 90 tokens: {', '.join(f'{many}/{i}.bin (10)' for i in range(3))} and 6 more",
        f"validating on 30 tokens: {b}",
    ]
    for limit, said in ((29, "29 of 30"), (30, "30"), (31, "30")):
        lines = sources.describe(load(many, tokenizer=None, validation=str(b)), limit)
        assert lines[1] == f"validating on {said} tokens: {b}"


def test_bad_sources_are_refused_in_one_line(tmp_path):
    text = tmp_path / "a.txt"
    text.write_bytes(b"good " * 300_000 + b"\xff bad")
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"text": "x"}\n')
    (tmp_path / "empty").mkdir()
    cases = [
        (text, {}, f"{text} is not UTF-8 text: byte 1500000 "),
        (text, {"tokenizer": None}, "is text: give a tokenizer"),
        (text, {"vocab_size": 256}, "tokenizer bytes has 257 ids, more than .* vocab_size 256"),
        (lines, {}, "mlra_jax.data.prepare"),
        (tmp_path / "empty", {}, "has no files"),
        (tmp_path / "absent.txt", {}, "absent.txt"),
        ("", {}, "empty"),
        (lines, {"validation_fraction": 1.0}, "validation_fraction"),
    ]
    for spec, options, message in cases:
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            load(spec, **options)
        assert "\n" not in str(error.value)


def test_pieces_join_to_the_file_can_be_entered_anywhere_and_encode_by_themselves(
    tmp_path, monkeypatch, ranks_file
):
    monkeypatch.setattr(text_reader, "_PIECE_CHARACTERS", 64)
    generator = random.Random(3)
    words = ["a", "界", "é\n", "\n", " ", "\n\n", "\r\n", "\u2028", "x\ny", "😀\n", "\u3000\n"]
    text = "".join(generator.choice(words) for _ in range(4000))
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    pieces = list(read_pieces(path))
    assert "".join(piece for _, piece in pieces) == text
    assert len(pieces) > 50
    for offset, piece in pieces[:-1]:
        assert path.read_bytes()[offset:].startswith(piece.encode())
        assert piece[-1] == "\n" and not piece[-2].isspace()
    assert not any(piece[0].isspace() for _, piece in pieces[1:])
    tokenizer = get_tokenizer(ranks_file)
    assert sum((tokenizer.encode(piece) for _, piece in pieces), []) == tokenizer.encode(text)
    assert list(read_pieces(path, pieces[7][0])) == pieces[7:]
