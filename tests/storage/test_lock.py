"""One process at a time writes a folder of a bucket, however the last one ended."""

import json
import socket
import subprocess
import time

import pytest

from mlra_jax.files import DestinationError, only_writer
from mlra_jax.storage import lock
from mlra_jax.storage.lock import BucketLock
from mlra_jax.storage.paths import path

FOLDER = path("gs://bucket/run")
FILE = FOLDER / ".lock"


@pytest.fixture(autouse=True)
def quick(monkeypatch, bucket):
    monkeypatch.setattr(lock, "_BEAT", 0.05)
    monkeypatch.setattr(lock, "_PATIENCE", 0.5)


def another(bucket, **changes):
    """A lock that another host's process has left."""
    owner = {"host": "elsewhere", "process": 7, "kernel": "x", "token": "t", "beat": 0}
    return bucket.put("run/.lock", json.dumps(owner | changes).encode())


def test_the_second_is_refused_until_the_first_has_ended(bucket):
    with only_writer(FILE, FOLDER) as first:
        assert first.held()
        with pytest.raises(DestinationError, match=f"is writing it.*{socket.gethostname()}|on"):
            BucketLock(FILE, FOLDER)
        first.check()
    assert bucket.names() == []
    BucketLock(FILE, FOLDER).release()


def test_a_silent_owner_on_another_host_is_waited_for_and_then_replaced(bucket):
    another(bucket)
    began = time.monotonic()
    mine = BucketLock(FILE, FOLDER)
    assert 0.5 < time.monotonic() - began < 5
    assert mine.held()
    mine.release()


def test_a_process_of_this_host_that_is_no_more_is_replaced_at_once(bucket, monkeypatch):
    monkeypatch.setattr(lock, "_PATIENCE", 60.0)
    ended = subprocess.Popen(["true"])
    ended.wait()
    another(bucket, process=ended.pid, kernel=lock._kernel())
    BucketLock(FILE, FOLDER).release()


def test_a_process_of_another_name_space_is_not_taken_for_dead(bucket):
    """Its number means another process here, or none."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    another(bucket, process=ended.pid, kernel=lock._kernel() + "0")
    began = time.monotonic()
    BucketLock(FILE, FOLDER).release()
    assert time.monotonic() - began > 0.5


def test_of_two_that_lock_at_once_one_gets_it(bucket, monkeypatch):
    found = BucketLock._read

    def late(self):
        answer = found(self)
        if answer.state == "missing":
            another(bucket)  # wrote between our reading and our writing
        return answer

    monkeypatch.setattr(BucketLock, "_read", late)
    with pytest.raises(DestinationError, match="process 7 on elsewhere is writing it"):
        BucketLock(FILE, FOLDER)
    assert json.loads(bucket.objects["run/.lock"].data)["token"] == "t"


def test_an_owner_that_was_replaced_learns_it_and_leaves_the_lock_alone(bucket):
    mine = BucketLock(FILE, FOLDER)
    theirs = another(bucket)
    time.sleep(0.3)
    assert not mine.held() and bucket.objects["run/.lock"] == theirs
    with pytest.raises(DestinationError, match="process 7 on elsewhere is writing it"):
        mine.check()
    mine.release()
    assert bucket.objects["run/.lock"] == theirs
    del bucket.objects["run/.lock"]
    with pytest.raises(DestinationError, match="moved or removed while it was being written"):
        mine.check()


def test_a_sign_of_life_whose_answer_was_lost_is_no_loss_of_the_lock(bucket):
    mine, lost = BucketLock(FILE, FOLDER), []

    def once(method, request):
        if method == "POST" and not lost:
            return lost.append(1) or "lost"
        return None

    bucket.fault = once
    generations = set()
    while len(generations) < 4:
        generations.add(bucket.objects["run/.lock"].generation)
        time.sleep(0.02)
    assert lost and mine.held()
    mine.release()
    assert bucket.names() == []


def test_a_bucket_that_is_away_does_not_keep_a_run_from_ending(bucket, monkeypatch):
    monkeypatch.setattr(lock, "_ENDING", 0.5)
    mine = BucketLock(FILE, FOLDER)
    bucket.fault = lambda method, request: 503
    time.sleep(0.2)
    began = time.monotonic()
    mine.release()
    assert time.monotonic() - began < 5
