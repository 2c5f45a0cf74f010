"""Files and folders appear whole or not at all, and only once everything is on the disk."""

import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from mlra_jax import files
from mlra_jax.files import (
    DestinationError,
    Lock,
    check_absent,
    only_writer,
    whole_file,
    whole_folder,
)

ROOT = Path(__file__).parents[1]


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
    synced.remove(str(tmp_path / "new/parents/.out.lock"))
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
        refused(f"out: process {os.getpid()} on {socket.gethostname()} is writing it", out)
        assert (partial / "mine").read_text() == "mine"
    assert os.listdir(out) == ["mine"] and os.listdir(tmp_path) == ["out"]
    with whole_folder(tmp_path / "next", 0):
        pass


@pytest.fixture
def clock(monkeypatch):
    """Time goes by in sleeps alone; `during(seconds)` is called in each."""
    clock = types.SimpleNamespace(now=0.0, during=lambda seconds: None)

    def sleep(seconds):
        clock.now += seconds
        clock.during(seconds)

    monkeypatch.setattr(
        files, "time", types.SimpleNamespace(monotonic=lambda: clock.now, sleep=sleep)
    )
    return clock


def left(path, **owner):
    """A lock as a process that is gone left it."""
    owner = {"host": "far", "process": 77, "kernel": "another", "token": "t", "beat": 3} | owner
    path.write_text(json.dumps(owner))
    return owner


def test_a_lock_names_its_owner_and_goes_with_it(tmp_path):
    path = tmp_path / ".lock"
    with only_writer(path, tmp_path) as lock:
        owner = json.loads(path.read_text())
        assert (owner["host"], owner["process"]) == (socket.gethostname(), os.getpid())
        lock.check()
        with pytest.raises(DestinationError, match=f"process {os.getpid()} on {owner['host']}"):
            Lock(path, tmp_path)
        lock.check()
    assert not os.listdir(tmp_path)
    with only_writer(path, tmp_path):
        pass


def test_a_lock_of_a_dead_process_of_this_host_is_no_obstacle(tmp_path, clock):
    """SIGKILL: the file stays, and the kernel's lock is gone."""
    path = tmp_path / ".lock"
    program = (
        "import sys; from pathlib import Path; from mlra_jax.files import Lock;"
        "Lock(Path(sys.argv[1]), Path('.')); print(flush=True); input()"
    )
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", program, path], cwd=ROOT, **pipes) as owner:
        assert owner.stdout.readline()
        with pytest.raises(DestinationError, match=f"process {owner.pid} on "):
            Lock(path, tmp_path)
        owner.kill()
    assert path.exists()
    clock.now = 0.0
    with only_writer(path, tmp_path) as lock:
        lock.check()
    assert clock.now <= files._SETTLE


@pytest.mark.parametrize("flocks", [True, False])
def test_a_lock_of_another_host_is_watched_for_signs_of_life(tmp_path, clock, monkeypatch, flocks):
    """Where its flock is not seen here, and where there is none at all."""
    path = tmp_path / ".lock"
    if not flocks:

        def unsupported(*_):
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr(fcntl, "flock", unsupported)
    owner = left(path) if flocks else left(path, kernel=files._kernel())
    with only_writer(path, tmp_path) as lock:
        assert clock.now > 20
        lock.check()
    left(path)
    clock.now = 0.0
    clock.during = lambda _: left(path, beat=4) if clock.now > 5 else None
    with pytest.raises(DestinationError, match="process 77 on far is writing it"):
        Lock(path, tmp_path)
    assert 5 < clock.now < 10
    assert json.loads(path.read_text()) == owner | {"beat": 4, "kernel": "another"}
    # Its owner lets go meanwhile.
    clock.now, clock.during = 0.0, lambda _: path.unlink() if clock.now == 1 else None
    with only_writer(path, tmp_path):
        assert clock.now < 5


def test_of_two_hosts_that_lock_at_once_the_later_one_has_it(tmp_path, clock, monkeypatch):
    """On a folder whose device another host may have mounted as well."""
    path = tmp_path / ".lock"
    monkeypatch.setattr(os, "major", lambda device: 0)
    clock.during = lambda _: left(path)
    with pytest.raises(DestinationError, match="process 77 on far is writing it"):
        Lock(path, tmp_path)
    assert json.loads(path.read_text())["process"] == 77
    path.unlink()
    clock.during = lambda _: None
    with only_writer(path, tmp_path) as lock:
        assert clock.now > 0
        lock.check()


def test_a_lock_gives_signs_of_life_until_it_is_released_or_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_BEAT", 0.01)
    path = tmp_path / ".lock"

    def wait(condition):
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.005)

    lock = Lock(path, tmp_path)
    wait(lambda: json.loads(path.read_text())["beat"] > 2)
    lock.check()
    taken = left(path)
    with pytest.raises(DestinationError, match="process 77 on far is writing it"):
        lock.check()
    time.sleep(0.1)
    lock.release()
    assert json.loads(path.read_text()) == taken, "another's lock is neither signed nor removed"
    path.unlink()
    with pytest.raises(DestinationError, match="moved or removed while it was being written"):
        lock.check()


def test_what_another_host_writes_by_now_is_left_alone(tmp_path):
    out = tmp_path / "out"
    with (
        pytest.raises(DestinationError, match="process 77 on far"),
        whole_folder(out, 0) as partial,
    ):
        (partial / "theirs").write_text("")
        left(tmp_path / ".out.lock")
    assert sorted(os.listdir(tmp_path)) == [".out.lock", ".out.partial"]
    assert os.listdir(partial) == ["theirs"]


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
