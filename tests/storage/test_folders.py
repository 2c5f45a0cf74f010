"""Folders of a bucket appear whole, also after a copy that was interrupted."""

import pytest

from mlra_jax.files import DestinationError, check_absent, whole_file, whole_folder
from mlra_jax.storage import folders
from mlra_jax.storage.paths import path

PLACE = path("gs://bucket/made/model")


def fill(folder):
    for name in ("config.json", "a/b.bin", "z.bin", "0/commit_success.txt"):
        (folder / name).write_text(name)


def test_what_makes_a_folder_whole_is_copied_last(bucket):
    with whole_folder(PLACE, 100) as partial:
        fill(partial)
        assert bucket.names("made/model/") == []
    copies = [p.rpartition("/")[2] for _, p, _ in bucket.requests if "/rewriteTo/" in p]
    assert sorted(copies[:2]) == ["made%2Fmodel%2Fa%2Fb.bin", "made%2Fmodel%2Fz.bin"]
    assert copies[2:] == ["made%2Fmodel%2Fconfig.json", "made%2Fmodel%2F0%2Fcommit_success.txt"]
    assert bucket.names() == sorted(
        f"made/model/{n}" for n in ("config.json", "a/b.bin", "z.bin", "0/commit_success.txt")
    )
    assert bucket.objects["made/model/a/b.bin"].data == b"a/b.bin"


def test_an_error_leaves_nothing(bucket):
    with pytest.raises(ZeroDivisionError), whole_folder(PLACE, 100) as partial:
        fill(partial)
        raise ZeroDivisionError
    assert bucket.names() == []


def test_an_interrupted_copy_is_made_anew(bucket, monkeypatch):
    def cut(self, target, last):
        (target / "z.bin").write_text("half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(PLACE), "copy_tree", cut)
        with pytest.raises(KeyboardInterrupt), whole_folder(PLACE, 100) as partial:
            fill(partial)
    assert bucket.names() == ["made/.model.copying", "made/model/z.bin"]
    check_absent(PLACE)
    with whole_folder(PLACE, 100) as partial:
        (partial / "new").write_text("new")
    assert bucket.names() == ["made/model/new"]


def test_what_is_there_is_not_replaced(bucket):
    with pytest.raises(DestinationError, match="gs://bucket/made/model: exists already"):  # noqa: SIM117
        with whole_folder(PLACE, 100) as partial:
            fill(partial)
            bucket.put("made/model/theirs", b"1")
    assert bucket.names() == ["made/model/theirs"]
    with pytest.raises(DestinationError, match="exists already"), whole_folder(PLACE, 100):
        raise AssertionError
    assert folders.is_there(PLACE)


def test_a_file_is_put_up_when_all_of_it_is_written(bucket):
    file = path("gs://bucket/made/x.txt")
    file.write_text("old")
    with pytest.raises(ZeroDivisionError), whole_file(file) as opened:
        opened.write("new")
        raise ZeroDivisionError
    assert bucket.objects["made/x.txt"].data == b"old"
    with whole_file(file, "wb") as opened:
        opened.write(b"12345")
        opened.seek(0)
        opened.write(b"ab")
    assert bucket.objects["made/x.txt"].data == b"ab345"
