"""A lock that is an object in a bucket."""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import tensorstore as ts

from mlra_jax.storage.paths import BucketPath, DestinationError, kvstore, telling

# Seconds between two signs of life of an owner, and without one until the lock is taken over.
_BEAT, _PATIENCE = 10.0, 60.0
# That the end of a run waits for a bucket.
_ENDING = 10.0


class BucketLock:
    """Keeps all others from writing a folder of a bucket, until it is released or its owner ends.

    The lock is an object that names its owner. It is only ever written on the condition that it is
    what it was when it was read, which the bucket's service checks. No kernel frees it, so the
    owner writes a sign of life into it every 10 seconds; one that gave none for 60 seconds, or
    whose process is known to have ended on this host, is taken over. No two clocks are compared.

    Args:
      path: of the lock.
      folder: what messages say is locked.

    Raises:
      DestinationError: another process has the lock; the message names its host and number.
      OSError: the bucket does not answer.
    """

    def __init__(self, path: BucketPath, folder: BucketPath):
        self._folder, self._key, self._path = folder, path.name, path
        self._name = {"host": socket.gethostname(), "process": os.getpid()}
        self._name |= {"kernel": _kernel(), "token": uuid.uuid4().hex}
        with telling(path):
            self._store = ts.KvStore.open(kvstore(path.parent)).result()
        self._generation = self._take()
        self._released = threading.Event()
        self._life = threading.Thread(target=self._live, daemon=True)
        self._life.start()

    def held(self) -> bool:
        """False if the lock was removed, or another process took it over."""
        return _owner(self._read()).get("token") == self._name["token"]

    def check(self) -> None:
        """Raises DestinationError unless the lock is held."""
        found = self._read()
        if found.state == "missing":
            raise DestinationError(f"{self._folder}: moved or removed while it was being written")
        if _owner(found).get("token") != self._name["token"]:
            raise self._refusal(found)

    def release(self) -> None:
        """Lets the next one in; where the bucket does not answer, it will take the lock over."""
        self._released.set()
        self._life.join(_ENDING)
        with contextlib.suppress(OSError), telling(self._path):
            found = self._store.read(self._key).result(_ENDING)
            if _owner(found).get("token") == self._name["token"]:
                generation = found.stamp.generation
                self._store.write(self._key, None, if_equal=generation).result(_ENDING)

    def _take(self) -> bytes:
        """The generation of the lock, once it is ours."""
        found, began = self._read(), time.monotonic()
        while not (found.state == "missing" or self._has_ended(found)):
            if time.monotonic() - began > _PATIENCE:
                break
            time.sleep(_PATIENCE / 20)
            before, found = found, self._read()
            if found.state != "missing" and found.stamp.generation != before.stamp.generation:
                raise self._refusal(found)
        if written := self._sign(0, found.stamp.generation):
            return written
        raise self._refusal(self._read())

    def _sign(self, beat: int, generation: bytes) -> bytes:
        """The generation that was written, empty if the lock was no longer of `generation`."""
        text = json.dumps(self._name | {"beat": beat}).encode()
        with telling(self._path):
            return self._store.write(self._key, text, if_equal=generation).result().generation

    def _live(self) -> None:
        beat = 0
        while not self._released.wait(_BEAT):
            beat += 1
            # A network that is away for a moment is told by what is written there.
            with contextlib.suppress(OSError):
                if written := self._sign(beat, self._generation):
                    self._generation = written
                    continue
                # Either another's, or our own write of which the answer was lost.
                found = self._read()
                if _owner(found).get("token") != self._name["token"]:
                    return
                self._generation = found.stamp.generation

    def _has_ended(self, found: ts.KvStore.ReadResult) -> bool:
        """Whether the owner's process was one of this host and is no more."""
        owner = _owner(found)
        if owner.get("kernel") != self._name["kernel"]:
            return False
        try:
            os.kill(int(owner["process"]), 0)
        except ProcessLookupError:
            return True
        except (PermissionError, KeyError, ValueError):
            pass
        return False

    def _read(self) -> ts.KvStore.ReadResult:
        with telling(self._path):
            return self._store.read(self._key).result()

    def _refusal(self, found: ts.KvStore.ReadResult) -> DestinationError:
        owner = _owner(found)
        who = f"process {owner.get('process')} on {owner.get('host')}" if owner else "another run"
        return DestinationError(
            f"{self._folder}: {who} is writing it; let it end first, or choose another folder"
        )


def _owner(found: ts.KvStore.ReadResult) -> dict[str, Any]:
    try:
        owner = json.loads(found.value)
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _kernel() -> str:
    """What processes that see each other by their numbers have in common."""
    boot, space = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    if not boot.exists():
        return uuid.uuid4().hex
    return f"{boot.read_text().strip()} {os.readlink(space)}"
