"""Files and folders appear whole or not at all, and only once everything is on the disk."""

import fcntl
import os
import shutil

import pytest

from mlra_jax.files import DestinationError, check_absent, whole_file, whole_folder


def refused(match, out, nbytes=0):
    with pytest.raises(DestinationError, match=match), whole_folder(out, nbytes):
        raise AssertionError("begun")


@pytest.fixture
def order(monkeypatch):
    """What is synced and renamed, in its order, by path."""
    happened = []
    real_fsync, real_rename, real_replace = os.fsync, os.rename, os.replace

    def fsync(file):
        number = file if isinstance(file, int) else file.fileno()
        happened.append(("sync", os.readlink(f"/proc/self/fd/{number}")))
        real_fsync(file)

    def renaming(real):
        def rename(old, new):
            happened.append(("rename", str(old), str(new)))
            real(old, new)

        return rename

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", renaming(real_rename))
    monkeypatch.setattr(os, "replace", renaming(real_replace))
    return happened


def test_a_file_is_synced_and_then_renamed(tmp_path, order):
    path, new = tmp_path / "a.txt", tmp_path / ".a.txt.new"
    path.write_text("old")
    with whole_file(path) as file:
        file.write("new text")
        assert path.read_text() == "old" and new.exists()
    assert path.read_text() == "new text" and os.listdir(tmp_path) == ["a.txt"]
    assert order == [("sync", str(new)), ("rename", str(new), str(path))]
    with whole_file(str(path), "wb") as file:
        file.write(b"\xff\x00")
        file.seek(0)
        file.write(b"\xfe")
    assert path.read_bytes() == b"\xfe\x00"


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), OSError(28, "full")])
def test_a_file_that_fails_stays_as_it_was(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(type(error)) as caught, whole_file(path) as file:
        file.write("half")
        raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]
    if isinstance(error, OSError):
        assert caught.value.filename == str(path)
    with pytest.raises(OSError) as caught, whole_file(path) as file:
        raise OSError(2, "gone", "elsewhere")
    assert caught.value.filename == "elsewhere"


def test_a_folder_is_synced_whole_and_then_renamed(tmp_path, order):
    out = tmp_path / "new" / "parents" / "out"
    with whole_folder(out, 10) as partial:
        assert partial == out.parent / ".out.partial"
        (partial / "sub").mkdir()
        (partial / "sub" / "a").write_text("a")
        (partial / "b").write_text("b")
        assert not out.exists()
    assert (out / "sub" / "a").read_text() == "a" and (out / "b").read_text() == "b"
    assert os.listdir(out.parent) == ["out"]
    renamed = order.index(("rename", str(partial), str(out)))
    synced = [os.path.normpath(path) for kind, path, *_ in order[:renamed]]
    assert set(synced) == {str(partial / name) for name in ("", "sub", "sub/a", "b")}
    # Names after what they name, the folder's own name last of all.
    assert synced.index(str(partial / "sub/a")) < synced.index(str(partial / "sub"))
    assert synced[-1] == str(partial)
    assert order[renamed + 1 :] == [("sync", str(out.parent))]


def test_a_folder_that_fails_leaves_nothing(tmp_path):
    out = tmp_path / "new" / "out"
    for error in (
        ValueError("two\nlines"),
        OSError(28, "No space left on device"),
        DestinationError("as it is"),
        KeyboardInterrupt(),
    ):
        with pytest.raises(type(error)) as caught, whole_folder(out, 0) as partial:
            (partial / "half").write_text("half")
            raise error
        assert caught.value is error and not os.listdir(tmp_path)
    # Parents that were there before, or that hold something else by now, stay.
    (tmp_path / "there").mkdir()
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "there" / "x" / "out", 0):
        (tmp_path / "there" / "x" / "other").write_text("")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path / "there") == ["x"]


def test_a_folder_needs_so_much_disk_and_no_more(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with whole_folder(tmp_path / "out", 1000):
        pass
    with (
        pytest.raises(DestinationError, match="needs 0.00 GB"),
        whole_folder(tmp_path / "more", 1001),
    ):
        raise AssertionError("not begun")
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_is_written_by_one_run_at_a_time(tmp_path):
    out = tmp_path / "out"
    with whole_folder(out, 0) as partial:
        (partial / "mine").write_text("mine")
        refused("another run is writing it", out)
        assert (partial / "mine").read_text() == "mine"
    assert os.listdir(out) == ["mine"]
    # The lock ends with the run: whoever opens the folder now may have it.
    lock = os.open(out, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(lock)


def test_what_a_killed_run_left_is_swept(tmp_path):
    partial = tmp_path / ".out.partial"
    (partial / "deep" / "er").mkdir(parents=True)
    (partial / "deep" / "er" / "file").write_text("half")
    (partial / "file").write_text("half")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("mine")
    (partial / "link").symlink_to(tmp_path / "kept")
    with whole_folder(tmp_path / "out", 0) as again:
        assert again == partial and not os.listdir(again)
        (again / "whole").write_text("")
    assert os.listdir(tmp_path / "out") == ["whole"]
    assert (tmp_path / "kept" / "file").read_text() == "mine"


def test_nothing_is_written_over(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(DestinationError, match="exists already"), whole_folder(out, 0):
        out.mkdir()  # meanwhile, by someone else
        (out / "theirs").write_text("theirs")
    assert os.listdir(tmp_path) == ["out"] and os.listdir(out) == ["theirs"]
    check_absent(tmp_path / "absent")
    (tmp_path / "dangling").symlink_to(tmp_path / "absent")
    for there in ("out", "dangling"):
        with pytest.raises(DestinationError, match=f"{there}: exists already"):
            check_absent(tmp_path / there)
    (tmp_path / "file").write_text("")
    refused("cannot be made", tmp_path / "file" / "out")
