"""What a file is by its first bytes, whatever its name says."""

from __future__ import annotations

from typing import NamedTuple

from mlra_jax.extras import install_line

HEAD_BYTES = 512
_SHORTEST = 100


class Kind(NamedTuple):
    """A kind of file that is neither plain text nor what this package writes.

    `what` completes "FILE is …", `remedy` says how to get text of it.
    """

    what: str
    remedy: str


GZIP = Kind("gzip data", "decompress it: gzip -d")
ZSTD = Kind("Zstandard data", f"{install_line('zstd')}, or decompress it: zstd -d")
TOKENS = Kind("a file of tokens", "give it a name that ends with .bin")
OLD_TORCH = Kind("weights as PyTorch saved them before 1.6", "there is no text in it")
PICKLE = Kind("a Python pickle", "it is a program and not run")
_UNPACK = "unpack it first"
_NO_TEXT = "there is no text in it"
_EXTRACT = "extract its text first"
_ROWS = (
    "make JSON lines of it, with pandas or the datasets library: pandas.read_parquet(FILE)"
    ".to_json(NEW, orient='records', lines=True)"
)
_RECODE = "make it UTF-8: iconv -f {0} -t UTF-8 FILE > NEW"
_ZEROS = Kind("no text, but many zeros", "if they are UTF-16's, " + _RECODE.format("UTF-16LE"))
# Where the signature lies, the signature, and what it says. The first that is there counts.
_SIGNATURES = (
    (0, b"\x1f\x8b", GZIP),
    (0, b"\x28\xb5\x2f\xfd", ZSTD),
    (0, b"\x88\xd8\x34\x01", TOKENS),
    (0, b"\xa1\xd9\x34\x01", TOKENS),
    (0, b"PAR1", Kind("a Parquet file", _ROWS)),
    (0, b"ARROW1", Kind("an Arrow file", _ROWS.replace("parquet", "feather"))),
    (0, b"Obj\x01", Kind("an Avro file", "make JSON lines of it")),
    (0, b"PK\x03\x04", Kind("a zip archive (or an office document, which is one)", _UNPACK)),
    (0, b"PK\x05\x06", Kind("an empty zip archive", _UNPACK)),
    (257, b"ustar", Kind("a tar archive", _UNPACK)),
    (4, b"1AY&SY", Kind("bzip2 data", "decompress it: bzip2 -d")),
    (0, b"\xfd7zXZ\x00", Kind("xz data", "decompress it: xz -d")),
    (0, b"\x04\x22\x4d\x18", Kind("LZ4 data", "decompress it: lz4 -d")),
    (0, b"7z\xbc\xaf\x27\x1c", Kind("a 7z archive", _UNPACK)),
    (0, b"Rar!\x1a\x07", Kind("a RAR archive", _UNPACK)),
    (0, b"%PDF-", Kind("a PDF document", f"{_EXTRACT}: pdftotext")),
    (0, b"{\\rtf", Kind("an RTF document", _EXTRACT)),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", Kind("an office document", _EXTRACT)),
    (0, b"SQLite format 3\x00", Kind("an SQLite database", "export its text as JSON lines")),
    (0, b"\x89HDF\r\n\x1a\n", Kind("an HDF5 file", "export its text as JSON lines")),
    (
        0,
        b"\x93NUMPY",
        Kind("a NumPy array", "if it has tokens, token_file.write makes a .bin of it"),
    ),
    (0, b"GGUF", Kind("a GGUF model", _NO_TEXT)),
    (0, b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19", OLD_TORCH),
    *((0, b"\x80%c" % protocol, PICKLE) for protocol in range(2, 6)),
    (0, b"\x7fELF", Kind("a program", _NO_TEXT)),
    (0, b"\x89PNG\r\n\x1a\n", Kind("a picture", _NO_TEXT)),
    (0, b"\xff\xd8\xff", Kind("a picture", _NO_TEXT)),
    (0, b"GIF8", Kind("a picture", _NO_TEXT)),
    (0, b"version https://git-lfs", Kind("a pointer of git-lfs", "get the file: git lfs pull")),
    (0, b"\xff\xfe\x00\x00", Kind("UTF-32 text", _RECODE.format("UTF-32"))),
    (0, b"\x00\x00\xfe\xff", Kind("UTF-32 text", _RECODE.format("UTF-32"))),
    (0, b"\xff\xfe", Kind("UTF-16 text", _RECODE.format("UTF-16"))),
    (0, b"\xfe\xff", Kind("UTF-16 text", _RECODE.format("UTF-16"))),
)


def kind(head: bytes) -> Kind | None:
    """What begins with these bytes (`HEAD_BYTES` of them or all), None for text and unknown."""
    for offset, signature, found in _SIGNATURES:
        if head.startswith(signature, offset):
            return found
    return None


def in_place_of_text(head: bytes) -> Kind | None:
    """As `kind`, and what is valid UTF-8 but a third zeros, as UTF-16 text without a mark is."""
    zeros = len(head) >= _SHORTEST and head.count(0) * 3 >= len(head)
    return kind(head) or (_ZEROS if zeros else None)
