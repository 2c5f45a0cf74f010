"""What a file holds is read or named by its content, whatever it is called."""

import gzip
import io
import json
import re
import struct
import tarfile
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlra_jax.data import documents, file_kinds, text_reader
from mlra_jax.data.documents import layout, read_documents
from mlra_jax.data.inputs import open_input
from mlra_jax.data.sources import load_source, text_files
from mlra_jax.data.tokenizers import get_tokenizer
from mlra_jax.extras import install_line

TEXTS = ["first é", "second\nline", "", "third \U0001f600 " * 50]
OBJECTS = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(value) + "\n" for value in OBJECTS)
PLAIN = "[Chapter 1]\n{a brace} is text.\n" * 40


def texts(path, **options):
    """Whole documents, their parts joined; each can be read on from where it begins."""
    parts = list(read_documents(path, options.pop("text_key", "text")))
    for i in range(len(parts)):
        assert list(read_documents(path, "text", parts[i].start))[0] == parts[i] or options
    whole = []
    for part in parts:
        if part.begins_document:
            whole.append("")
        whole[-1] += part.text
    return whole


READ = {
    "a.jsonl": (LINES, TEXTS),
    "UP.JSONL": (LINES, TEXTS),
    "a.ndjson": (LINES.replace("\n", "\r\n\r\n"), TEXTS),
    "lines.json": (LINES, TEXTS),
    "lines.txt": (LINES, TEXTS),
    "no_ending": ("\ufeff\n  " + LINES, TEXTS),
    "array.json": (json.dumps(OBJECTS), TEXTS),
    "pretty.JSON": ("\ufeff" + json.dumps(OBJECTS, indent=4, ensure_ascii=False), TEXTS),
    "strings.json": (json.dumps(TEXTS, indent=1), TEXTS),
    "array.txt": (json.dumps(OBJECTS), TEXTS),
    "none.json": (" [ ] ", []),
    "one.json": (json.dumps(OBJECTS[1], indent=2), TEXTS[1:2]),
    "several.json": ("\n".join(json.dumps(o, indent=2) for o in OBJECTS), TEXTS),
    "config.json": ('{\n  "steps": 3\n}\n', None),
    "numbers.json": ("[1, 2, 3]", None),
    "book.txt": (PLAIN, None),
    "commented.json": ('{\n  // a comment\n  "strict": true\n}\n', None),
    "code.txt": ("{}\nint main() {}\n", None),
    "quote.txt": ('["a quotation"] he said', None),
    "bracket.txt": ("[{not json}]", None),
    "empty.txt": ("", []),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", READ)
def test_the_content_says_how_documents_lie(tmp_path, monkeypatch, name, packed):
    content, expected = READ[name]
    expected = [content] if expected is None else expected
    path = tmp_path / (name + ".gz" * packed)
    path.write_bytes(gzip.compress(content.encode()) if packed else content.encode())
    for block in (1 << 16, 3):
        monkeypatch.setattr(documents, "_BLOCK_BYTES", max(block, 64))
        monkeypatch.setattr(text_reader, "_BLOCK_BYTES", block)
        assert texts(path) == expected


@given(
    values=st.lists(st.dictionaries(st.sampled_from(["text", "b"]), st.text(max_size=9))),
    indent=st.sampled_from([None, 0, 3]),
    block=st.integers(1, 40),
)
def test_any_array_in_blocks_of_any_size(tmp_path_factory, values, indent, block):
    path = tmp_path_factory.mktemp("array") / "a.json"
    path.write_text(json.dumps(values, indent=indent, ensure_ascii=False), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "_BLOCK_BYTES", block)
        found = list(documents._values(path, 0, True))
        assert [value for _, value in found] == values
        for i, (place, _) in enumerate(found):
            assert list(documents._values(path, place, True)) == found[i:]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"text": "a"}, {"text": "b"}', "line 1 at byte 29: no JSON"),
        ("a.json", '[{"text": "a"},\n {"text": "b"},]', "line 2 at byte 31: no JSON"),
        ("a.json", '[{"text": "a"}] and more', "line 1 at byte 16: no JSON"),
        ("a.json", '[{"text": "a"}\n{"text": "b"}]', "line 2 at byte 15: no JSON"),
        ("a.json", '[{"text": "a"}, {"body": "b"}]', "byte 16: no field 'text'; name it with --te"),
        ("a.json", '[{"text": "a"}, 3]', "byte 16: no field 'text'"),
        ("a.json", '[{"text": "a"}, {"text": ["b"]}]', "byte 16: field 'text' holds no text"),
        ("a.json", "[{broken", "line 1 at byte 1: no JSON"),
        ("a.json", "[] {}", "line 1 at byte 3: no JSON"),
        ("a.json", '{"text": "cut of', "line 1 at byte 0: no JSON"),
        ("a.json", '{\n"text": "a"\n}\n{\n"text"', "line 4 at byte 16: no JSON"),
        ("a.json", "[" * 5000, "byte 1: no JSON"),
        ("a.json", '{"text": "a"}\n{"text": "b"\n', "line 2 at byte 14: no JSON"),
        ("a.json", '{"body": "a"}\n{"body": "b"}\n', "line 1 at byte 0: no field 'text'"),
        ("A.JSONL", '{"text": "a"}\n[' + "{" * 5000, "line 2 at byte 14: no JSON"),
    ],
)
def test_broken_json_is_named_with_its_place(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        texts(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_line_or_value_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(text_reader, "MAX_DOCUMENT_BYTES", 1000)
    monkeypatch.setattr(documents, "MAX_DOCUMENT_BYTES", 1000)
    monkeypatch.setattr(text_reader, "_BLOCK_BYTES", 100)
    monkeypatch.setattr(documents, "_BLOCK_BYTES", 100)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "' + "x" * 5000)
    with pytest.raises(ValueError, match="a.jsonl: the line at byte 14 is longer than .* part it"):
        texts(path)
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"}, {"text": "' + "x" * 5000)
    with pytest.raises(ValueError, match="at byte 16: no JSON"):
        texts(path)


def packed(kind):
    file = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("a.txt", "text")
    elif kind == "tar":
        with tarfile.open(fileobj=file, mode="w") as archive:
            archive.addfile(tarfile.TarInfo("a.txt"))
    else:
        np.save(file, np.arange(9))
    return file.getvalue()


KINDS = {
    "parquet": (b"PAR1\x15\x04", "a Parquet file: make JSON lines of it, .*read_parquet"),
    "arrow": (b"ARROW1\0\0", "an Arrow file: make JSON lines"),
    "zip": (packed("zip"), "a zip archive .*: unpack it first"),
    "tar": (packed("tar"), "a tar archive: unpack it first"),
    "bzip2": (b"BZh91AY&SY\x93", "bzip2 data: decompress it: bzip2 -d"),
    "xz": (b"\xfd7zXZ\0\0", "xz data: decompress it: xz -d"),
    "pdf": (b"%PDF-1.7\n", "a PDF document: extract its text first: pdftotext"),
    "word": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an office document"),
    "sqlite": (b"SQLite format 3\0", "an SQLite database: export"),
    "numpy": (packed("numpy"), "a NumPy array: if it has tokens"),
    "pickle": (b"\x80\x04\x95", "a Python pickle: it is a program and not run"),
    "picture": (b"\x89PNG\r\n\x1a\n", "a picture"),
    "pointer": (
        b"version https://git-lfs.github.com/spec/v1\n",
        "a pointer of git-lfs: get the file: git",
    ),
    "utf16": ("text".encode("utf-16"), "UTF-16 text: make it UTF-8: iconv -f UTF-16"),
    "utf16 without a mark": (
        ("text, " * 50).encode("utf-16-le"),
        "no text, but many zeros: if they are UTF-16's, make it UTF-8",
    ),
    "zeros": (bytes(4096), "no text, but many zeros: "),
    "utf32": ("text".encode("utf-32"), "UTF-32 text: make it UTF-8: iconv -f UTF-32"),
    "tokens": (struct.pack("<256i", 20240520, 1, 0, *[0] * 253), "a file of tokens: .* with .bin"),
    "llama": (struct.pack("<256i", 20240801, 7, 0, *[0] * 253), "a file of tokens: .* with .bin"),
}


@pytest.mark.parametrize("name", KINDS)
def test_what_is_no_text_is_named_with_a_remedy(tmp_path, name):
    content, message = KINDS[name]
    for path, data, said in (
        (tmp_path / "data.txt", content, f"data.txt is {message}"),
        (tmp_path / "data.jsonl", content, f"data.jsonl is {message}"),
        (
            tmp_path / "data.gz",
            gzip.compress(content),
            f"data.gz is {message.replace(':', ' within gzip data: decompress it, then', 1)}",
        ),
    ):
        path.write_bytes(data)
        for read in (
            lambda path: list(open_input(str(path)).pieces((0, 0))),
            lambda path: load_source(str(path), tokenizer=get_tokenizer("bytes"), vocab_size=300),
        ):
            with pytest.raises(ValueError, match=said) as error:
                read(path)
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "gzip_by_content.txt"])
def test_damaged_gzip_is_not_taken_for_whole(tmp_path, name):
    content = (LINES if "json" in name else PLAIN).encode() * 30
    whole = gzip.compress(content, mtime=0)
    path = tmp_path / name
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    for damaged in (whole[:-1], whole[: len(whole) // 2], whole[:12], bytes(flipped)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{name} is damaged gzip data .*; get it again"):
            list(read_documents(path, "text"))
    path.write_bytes(whole + whole)
    parts = list(read_documents(path, "text"))
    assert sum(len(part.text) for part in parts) > 0


def test_zstandard_is_read_where_a_library_is_and_named_where_none_is(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd" + b"stand-in")
    monkeypatch.setattr(text_reader, "_DECOMPRESSORS", {})
    advice = f"a.jsonl.zst is Zstandard data: {install_line('zstd')}, or decompress it: zstd -d"
    with pytest.raises(ValueError, match=re.escape(advice)):
        list(read_documents(path, "text"))
    content = LINES.encode()
    opened = {file_kinds.ZSTD: lambda file: io.BytesIO(content)}
    monkeypatch.setattr(text_reader, "_DECOMPRESSORS", opened)
    assert texts(path) == TEXTS


def test_zstandard_for_real(tmp_path):
    if text_reader.zstd is None:
        pytest.skip("neither Python 3.14 nor backports.zstd is installed")
    path = tmp_path / "a.jsonl.zst"
    whole = text_reader.zstd.compress(LINES.encode() * 100)
    path.write_bytes(whole + whole)
    assert texts(path) == TEXTS * 200
    path.write_bytes(whole[:-9])
    with pytest.raises(ValueError, match="damaged Zstandard data"):
        list(read_documents(path, "text"))


def test_linked_folders_are_followed_and_loops_end(tmp_path):
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    (folder / "sub").mkdir(parents=True)
    (elsewhere / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("a")
    (elsewhere / "b.txt").write_text("b")
    (elsewhere / "deep" / "c.txt").write_text("c")
    (folder / "linked").symlink_to("../elsewhere")
    (folder / "sub" / "again").symlink_to("../../elsewhere/deep")
    (folder / "sub" / "up").symlink_to("..")
    (elsewhere / "back").symlink_to(folder)
    (folder / "self").symlink_to("self")
    (folder / "gone.txt").symlink_to("nowhere")
    names = [str(path.relative_to(folder)) for path in text_files(folder)]
    assert names == ["a.txt", "linked/b.txt", "linked/deep/c.txt"]
    source = load_source(str(folder), tokenizer=get_tokenizer("bytes"), vocab_size=300)
    tokens = np.concatenate([part.tokens for part in (*source.train, *source.validation)])
    assert bytes(tokens[tokens < 256].tolist()) == b"abc"


def test_json_is_prepared_from_any_place(tmp_path):
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(json.dumps(OBJECTS, indent=2).encode()))
    source = open_input(str(path))
    pieces = list(source.pieces((0, 0)))
    assert [piece.text for piece in pieces] == TEXTS
    for i, piece in enumerate(pieces):
        assert list(source.pieces(piece.position)) == pieces[i:]
        assert 0 <= source.done(piece.position) <= source.size


def test_training_on_json_says_how_to_prepare_it(tmp_path):
    for name in ("lines.json", "LINES.JSONL", "lines.txt", "array.json"):
        path = tmp_path / name
        path.write_text(READ["array.json" if name[0] == "a" else "a.jsonl"][0])
        with pytest.raises(ValueError, match=f"{name} holds documents in JSON.*prepare --source="):
            load_source(str(path), tokenizer=get_tokenizer("bytes"), vocab_size=300)
        assert layout(path, "text") in ("lines", "array")
