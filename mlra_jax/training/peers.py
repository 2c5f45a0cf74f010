"""The processes of a run know each other: all come, all run the same, and all end when one does.

Process 0 holds a roll call at the coordinator's address before JAX takes that over. The connections
stay: a process that dies closes its own, one whose host dies or which is stopped falls silent, and
one that fails says why. Process 0 tells the others, who end with one line that names it.
"""

import contextlib
import dataclasses
import json
import os
import select
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from mlra_jax.files import reason

JOIN_SECONDS = 60.0
SILENT_SECONDS = 40.0
_BEAT_SECONDS = 5.0
_GRACE_SECONDS = 2.0
_SETTLE_SECONDS = 1.0
_LAST_SECONDS = 5.0
_SHOWN = 3


class PeerError(ValueError):
    """The processes of a run cannot go on together; one line."""


@dataclasses.dataclass(frozen=True)
class Member:
    """What a process was started as."""

    index: int
    count: int
    coordinator: str
    """HOST:PORT of process 0."""

    def __post_init__(self):
        if not 0 <= self.index < self.count:
            raise PeerError(
                f"process {self.index} of {self.count}: numbers go from 0 to {self.count - 1}"
            )
        if not self.coordinator.rpartition(":")[2].isdigit():
            raise PeerError(f"coordinator {self.coordinator} is no HOST:PORT")

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port)


class Peers:
    """The others of a run while it is entered, from the roll call on.

    Args:
      me: this process.
      facts: what must be the same on all, by the name that an error has for it.
      say: prints a line, on process 0.
      end: ends this process with a line, because another one has ended.
      join: seconds within which all must come.
      silent: seconds after which one that says nothing is taken for dead.

    Raises:
      PeerError: on entering, not all have come or they do not agree; on leaving, another one has
        ended; all in one line that names the process.
    """

    def __init__(
        self,
        me: Member,
        facts: Mapping[str, Any],
        say: Callable[[str], None],
        end: Callable[[str], object],
        join: float = JOIN_SECONDS,
        silent: float = SILENT_SECONDS,
    ):
        self._me, self._say, self._end, self._join, self._silent = me, say, end, join, silent
        self._hello = {
            "process": me.index,
            "of": me.count,
            "who": f"process {me.index} on {socket.gethostname()} (PID {os.getpid()})",
            "facts": json.loads(json.dumps(facts)),
        }
        self._lines: dict[int, _Line] = {}
        self._here: Callable[[], str] = lambda: "before its first step"
        self._stands: dict[int, str] = {}
        self._verdict, self._over, self._left = "", threading.Event(), threading.Event()

    def __enter__(self) -> "Peers":
        self._lines = self._call_roll() if self._me.index == 0 else self._report()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        try:
            self._leave(error)
        finally:
            self._left.set()
            self._thread.join(_LAST_SECONDS + _SETTLE_SECONDS)

    def _leave(self, error: BaseException | None) -> None:
        if error is None:
            return self._tell({"done": True})
        # What failed here may be that another one is gone, which is known soon; memory is its own.
        lost = type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" not in str(error)
        self._over.wait(self._silent + _BEAT_SECONDS if lost else _SETTLE_SECONDS / 2)
        own = isinstance(error, ValueError | OSError) and "\n" not in str(error)
        why = str(error).strip() if own else type(error).__name__
        # What all find wrong, each says for itself.
        if self._verdict and not self._verdict.endswith(f" ended: {why}"):
            raise PeerError(self._verdict) from None
        end = {"end": f"{self._hello['who']} ended: {why}"}
        self._tell(end if self._me.index == 0 else {"ended": why})
        if own and self._me.index > 0:
            raise PeerError(f"process {self._me.index}: {error}") from None

    @property
    def first(self) -> bool:
        """Whether this is process 0."""
        return self._me.index == 0

    def stand_at(self, here: Callable[[], str]) -> None:
        """Process 0 may ask where this one stands; `here` answers, in another thread."""
        self._here = here

    def stands(self, seconds: float) -> dict[int, str]:
        """On process 0: where each of the others stands; empty for one that does not say so in
        time."""
        self._stands = {}
        self._tell({"where": True})
        deadline = time.monotonic() + seconds
        while len(self._stands) < len(self._lines) and time.monotonic() < deadline:
            if self._left.wait(0.05):
                break
        return {i: self._stands.get(i, "") for i in self._lines}

    def _call_roll(self) -> dict[int, "_Line"]:
        """On process 0: waits for all others, compares them and lets them go on."""
        deadline, told = time.monotonic() + self._join, time.monotonic() + _BEAT_SECONDS
        lines: dict[int, _Line] = {}
        with _server(self._me.address[1]) as server:
            while missing := sorted(set(range(1, self._me.count)) - lines.keys()):
                names = f"process{'es'[: 2 * (len(missing) > 1)]} {', '.join(map(str, missing))}"
                if (now := time.monotonic()) > deadline:
                    where = f"{self._me.coordinator} within {self._join:.0f} s"
                    _refuse(lines, f"{names} of {self._me.count} did not come to {where}")
                if now > told:
                    self._say(f"waiting for {names} of {self._me.count} at {self._me.coordinator}")
                    told = deadline
                with contextlib.suppress(OSError):
                    server.settimeout(min(1.0, deadline - now + 0.1))
                    line = _Line(server.accept()[0])
                    _, hello = line.wait_for(("hello",), min(5.0, self._join))
                    if not isinstance(hello, dict) or not hello.keys() >= self._hello.keys():
                        continue
                    if trouble := self._trouble(hello, lines):
                        _refuse(lines | {-1: line}, trouble)
                    line.who = hello["who"]
                    lines[hello["process"]] = line
        for line in lines.values():
            line.send({"go": self._hello["who"]})
        return lines

    def _trouble(self, hello: dict[str, Any], lines: Mapping[int, "_Line"]) -> str:
        """Why a process does not belong to those that are there; empty if it does."""
        index, mine, theirs = hello["process"], self._hello["facts"], hello["facts"]
        if hello["of"] != self._me.count:
            return f"{hello['who']} is one of {hello['of']}, and process 0 one of {self._me.count}"
        if index == 0 or (index in lines and not lines[index].closed()):
            first = self._hello["who"] if index == 0 else lines[index].who
            return f"two have the same number: {first} and {hello['who']}"
        names = [n for n in {**mine, **theirs} if mine.get(n) != theirs.get(n)]
        if not names:
            return ""
        shown = [
            f"{name} is {theirs.get(name)} there and {mine.get(name)} on process 0"
            for name in names[:_SHOWN]
        ]
        more = [f"{len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
        return f"{hello['who']} does not run the same: {'; '.join(shown + more)}"

    def _report(self) -> dict[int, "_Line"]:
        """On the others: comes to process 0 and waits until it has seen all."""
        deadline, where = time.monotonic() + self._join, f"process 0 at {self._me.coordinator}"
        why = "it does not answer"
        while (left := deadline - time.monotonic()) > 0:
            try:
                line = _Line(socket.create_connection(self._me.address, min(5.0, left)))
                # Where nobody listens, the system may connect a port of this host with itself.
                if line.socket.getsockname() == line.socket.getpeername():
                    line.socket.close()
                    continue
                line.send({"hello": self._hello})
                # Process 0 may have come later than this one.
                answer, text = line.wait_for(("refused", "go"), 2 * self._join)
            except OSError as error:
                answer, why = "", reason(error)
            if answer == "refused":
                raise PeerError(text)
            if answer:
                line.who = text
                return {0: line}
            time.sleep(0.2)
        raise PeerError(f"{where} cannot be reached within {self._join:.0f} s: {why}")

    def _tell(self, message: dict[str, Any]) -> None:
        for line in list(self._lines.values()):
            line.send(message)

    def _watch(self) -> None:
        """The thread that listens, and ends the process when another one has ended."""
        beaten = 0.0
        with selectors.DefaultSelector() as selector:
            for index, line in self._lines.items():
                selector.register(line.socket, selectors.EVENT_READ, index)
            while not self._left.is_set():
                for key, _ in selector.select(_SETTLE_SECONDS / 4):
                    if not self._lines[key.data].read():
                        selector.unregister(key.fileobj)
                if time.monotonic() - beaten > _BEAT_SECONDS:
                    beaten = time.monotonic()
                    self._tell({"beat": 1})
                if verdict := self._judged():
                    break
            else:
                return self._close()
        self._verdict = verdict
        self._tell({"end": verdict})
        self._over.set()
        # Without process 0, JAX ends this one at once.
        died = self._me.index > 0 and "end" not in self._lines[0].heard
        if died or not self._left.wait(_GRACE_SECONDS):
            self._end(verdict)
        self._close()

    def _close(self) -> None:
        """What was said last must arrive: a connection closed with something unread is broken off,
        and the other end loses what it has not read."""
        deadline = time.monotonic() + _LAST_SECONDS
        for line in self._lines.values():
            line.finish()
        for line in self._lines.values():
            line.socket.settimeout(max(0.01, deadline - time.monotonic()))
            while line.read() and time.monotonic() < deadline:
                pass
            line.socket.close()

    def _judged(self) -> str:
        """Why the run is over, if it is: for one that died, before one that failed of it."""
        now, failed = time.monotonic(), ""
        for index, line in self._lines.items():
            if text := line.heard.pop("stands", ""):
                self._stands[index] = text
            if line.heard.pop("where", False):
                line.send({"stands": self._here()})
            if "end" in line.heard:
                return line.heard["end"]
            if "done" in line.heard:
                continue
            if "ended" in line.heard:
                if now - line.latest > _SETTLE_SECONDS:
                    failed = failed or f"{line.who} ended: {line.heard['ended']}"
            elif line.gone:
                return f"{line.who} died"
            elif now - line.latest > self._silent:
                return f"{line.who} was not heard of for {self._silent:.0f} s"
        return failed


class _Line:
    """A connection for messages, each a line of JSON."""

    def __init__(self, connection: socket.socket):
        connection.settimeout(5.0)
        self.socket, self._unread, self._lock = connection, b"", threading.Lock()
        self.who, self.gone, self.latest = "", False, time.monotonic()
        self.heard: dict[str, Any] = {}
        """The latest that was said of each kind."""

    def send(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError), self._lock:
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def finish(self) -> None:
        """Nothing more will be sent."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)

    def read(self) -> bool:
        """Takes in what has come; False if the other end is closed."""
        try:
            received = self.socket.recv(1 << 16)
        except TimeoutError:
            return True
        except OSError:
            received = b""
        self.gone = not received
        *lines, self._unread = (self._unread + received).split(b"\n")
        # Whoever else finds the port says nothing that is understood.
        with contextlib.suppress(ValueError, TypeError):
            for line in lines:
                self.heard |= json.loads(line)
                self.latest = time.monotonic()
        return not self.gone

    def wait_for(self, names: tuple[str, ...], seconds: float) -> tuple[str, Any]:
        """The first of `names` that is said, and what; two empty texts if none is in time."""
        deadline = time.monotonic() + seconds
        while True:
            for name in names:
                if name in self.heard:
                    return name, self.heard.pop(name)
            if time.monotonic() > deadline or not self.read():
                return "", ""

    def closed(self) -> bool:
        """Whether the other end is, though not everything may have been read."""
        readable, _, _ = select.select([self.socket], [], [], 0)
        with contextlib.suppress(OSError):
            return bool(readable) and not self.socket.recv(1, socket.MSG_PEEK)
        return True


def _server(port: int) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=1024)
    except OSError as error:
        raise PeerError(
            f"process 0 cannot listen at port {port}: {reason(error)}; give another coordinator"
        ) from None


def _refuse(lines: Mapping[int, _Line], why: str) -> NoReturn:
    for line in lines.values():
        line.send({"refused": why})
        line.socket.close()
    raise PeerError(why)
