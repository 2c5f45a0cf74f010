"""Processes of a run, each a thread here: they come together or say why not, and end together."""

import contextlib
import os
import re
import socket
import threading
import time
from types import SimpleNamespace

import pytest

from mlra_jax.training import cluster, peers
from mlra_jax.training.peers import Member, PeerError, Peers

FACTS = {"steps": 60, "seed": 0, "data.source": "a.txt", "JAX": "1.2"}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, seconds in (
        ("_BEAT_SECONDS", 0.1),
        ("_GRACE_SECONDS", 0.3),
        ("_SETTLE_SECONDS", 0.2),
    ):
        monkeypatch.setattr(peers, name, seconds)


class Run:
    """Processes that each do `work(run, key, peers)`; what one is started as may be changed."""

    def __init__(self, work, changes, join=20.0, silent=20.0):
        self.errors, self.ended, self.said = {}, {}, []
        address = f"localhost:{free_port()}"
        threads = []
        for key, change in enumerate(changes):
            of = {"index": key, "count": len(changes), "facts": FACTS} | change
            me = Member(of["index"], of["count"], address)
            end = lambda line, key=key: self.ended.setdefault(key, line)
            made = Peers(me, of["facts"], self.said.append, end, join, silent)
            threads.append(threading.Thread(target=self._live, args=(key, made, work)))
            threads[-1].start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()

    def _live(self, key, made, work):
        try:
            with made:
                work(self, key, made)
        except Exception as error:
            self.errors[key] = error

    def lines(self):
        return {key: str(error) for key, error in self.errors.items()}


def until(event):
    deadline = time.monotonic() + 20
    while not event():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_all_come_work_and_leave_in_any_order():
    order = []

    def work(run, key, peers):
        time.sleep(0.2 * (2, 0, 1)[key])
        order.append(key)

    run = Run(work, [{}, {}, {}])
    assert order == [1, 2, 0] and not run.errors and not run.ended


WRONG = [
    ({"count": 4}, r"process 2 on \S+ \(PID \d+\) is one of 4, and process 0 one of 3"),
    ({"index": 1}, r"two have the same number: process 1 on .* and process 1 on .*"),
    (
        {"facts": FACTS | {"steps": 50}},
        r"process 2 on .* the same: steps is 50 there and 60 on .*0",
    ),
    (
        {"facts": {"steps": 1, "seed": 1, "data.source": 1, "lr": 1}},
        r".*: steps is 1 .*; seed is 1 .*; data.source is 1 there and a.txt on .* 0; 2 more",
    ),
]


@pytest.mark.parametrize("change, line", WRONG)
def test_processes_that_do_not_belong_together_all_say_why(change, line):
    run = Run(lambda *_: pytest.fail("must not begin"), [{}, {}, change], join=2.0)
    assert run.errors.keys() == {0, 1, 2}
    told = [text for text in run.lines().values() if re.fullmatch(line, text)]
    # One that comes later finds nobody.
    assert len(told) >= 2


def test_who_does_not_come_is_named():
    run = Run(lambda *_: None, [{"count": 5}, {"count": 5}, {"index": 3, "count": 5}], join=1.0)
    for line in run.lines().values():
        assert re.fullmatch(r"processes 2, 4 of 5 did not come to localhost:\d+ within 1 s", line)
    assert len(run.errors) == 3


def test_where_nobody_calls_the_roll_one_line_says_so():
    run = Run(lambda *_: None, [{"index": 1, "count": 2}], join=0.5)
    want = (
        r"process 0 at localhost:\d+ cannot be reached within 0 s: not done \(Connection refused\)"
    )
    assert re.fullmatch(want, run.lines()[0])
    with socket.create_server(("localhost", 0)) as taken:
        me = Member(0, 2, f"localhost:{taken.getsockname()[1]}")
        with pytest.raises(PeerError, match=r"cannot listen at port \d+: not done \(Address"):
            Peers(me, FACTS, print, print).__enter__()


def test_a_port_that_the_system_connects_with_itself_is_not_process_0(monkeypatch):
    real, own = socket.create_connection, socket.socket()
    own.bind(("localhost", 0))
    own.connect(own.getsockname())
    mirror = iter([own])
    connect = lambda *arguments: next(mirror, None) or real(*arguments)
    monkeypatch.setattr(peers.socket, "create_connection", connect)
    run = Run(lambda *_: None, [{"index": 1, "count": 2}], join=1.0)
    # It does not wait there for an answer.
    assert "cannot be reached within 1 s: not done (Connection refused)" in run.lines()[0]


def test_strangers_at_the_port_are_no_processes():
    port, came = free_port(), []
    me = [Member(i, 2, f"localhost:{port}") for i in range(2)]

    def host():
        with Peers(me[0], FACTS, print, print):
            came.append(0)

    thread = threading.Thread(target=host)
    thread.start()
    for text in (
        b"GET / HTTP/1.1\r\n\r\n",
        b"\0\xff\n",
        b'{"go": true}\n',
        b"[5]\n",
        b'{"process": 1}\n',
        b"",
    ):
        with contextlib.suppress(OSError), socket.socket() as stranger:
            until(lambda s=stranger: s.connect_ex(("localhost", port)) in (0, 106))
            stranger.sendall(text)
    with Peers(me[1], FACTS, print, print):
        until(lambda: came)
    thread.join(20)


@pytest.mark.parametrize("dead", [0, 2])
def test_of_one_that_dies_the_others_say_the_number(dead):
    """Its connections are closed by the system; the others are in the middle of their work."""
    line = rf"process {dead} on \S+ \(PID {os.getpid()}\) died"

    def work(run, key, peers):
        if key == dead:
            peers._tell = lambda message: None
            for connection in peers._lines.values():
                connection.socket.shutdown(socket.SHUT_RDWR)
        until(lambda: run.ended.keys() >= {0, 1, 2} - {dead})

    run = Run(work, [{}, {}, {}])
    told = {key: text for key, text in run.ended.items() if key != dead}
    assert told.keys() == {0, 1, 2} - {dead}
    assert all(re.fullmatch(line, text) for text in told.values()), told


@pytest.mark.parametrize("silent", [0, 1])
def test_one_that_falls_silent_is_taken_for_dead(silent):
    """Its host is cut off, or it was stopped: nothing is closed."""

    def work(run, key, peers):
        if key == silent:
            peers._tell = lambda message: None
        until(lambda: run.ended.keys() >= {0, 1, 2} - {silent})

    run = Run(work, [{}, {}, {}], silent=1.0)
    line = rf"process {silent} on .* was not heard of for 1 s"
    assert all(re.fullmatch(line, text) for key, text in run.ended.items() if key != silent)


def test_news_that_comes_with_the_leave_to_begin_is_heard():
    """Another process may die as soon as all are let in."""
    with socket.create_server(("localhost", 0)) as server:
        me, ended = Member(1, 3, f"localhost:{server.getsockname()[1]}"), []

        def process_0():
            connection, _ = server.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(b'{"go": "process 0 on a"}\n{"end": "process 2 on b died"}\n')
                until(lambda: ended)

        thread = threading.Thread(target=process_0)
        thread.start()
        with Peers(me, FACTS, print, ended.append):
            until(lambda: ended)
        thread.join(20)
    assert ended == ["process 2 on b died"]


@pytest.mark.parametrize("failing", [0, 1])
def test_the_others_say_what_one_failed_of(failing):
    def work(run, key, peers):
        if key == failing:
            raise OSError("the disk is full")
        until(lambda: run.ended.keys() >= {0, 1, 2} - {failing})

    run = Run(work, [{}, {}, {}])
    line = rf"process {failing} on .* ended: the disk is full"
    assert all(re.fullmatch(line, text) for text in run.ended.values()) and len(run.ended) == 2
    own = "the disk is full" if failing == 0 else f"process {failing}: the disk is full"
    assert run.lines() == {failing: own}


def test_what_fails_because_another_one_died_says_who():
    """The array libraries find a broken connection at the same time, and say that only."""
    JaxRuntimeError = type("JaxRuntimeError", (RuntimeError,), {})

    def work(run, key, peers):
        if key == 1:
            peers._tell = lambda message: None
            for connection in peers._lines.values():
                connection.socket.shutdown(socket.SHUT_RDWR)
            until(lambda: len(run.errors) == 2)
        elif key == 0:
            raise JaxRuntimeError("connection closed\nby peer")
        else:
            raise ValueError("checkpoint 3: connection closed by peer")

    run = Run(work, [{}, {}, {}])
    for key in (0, 2):
        assert re.fullmatch(r"process 1 on .* died", run.lines()[key]) and key not in run.ended


def test_what_fails_on_all_is_said_by_each():
    def work(run, key, peers):
        raise ValueError("steps=0 must be at least 1")

    run = Run(work, [{}, {}])
    assert run.lines()[0] == "steps=0 must be at least 1"
    assert run.lines()[1] == "process 1: steps=0 must be at least 1" and not run.ended


def test_process_0_asks_where_the_others_stand():
    ready, asked = threading.Barrier(4), threading.Event()

    def work(run, key, peers):
        if key == 2:
            peers.stand_at(lambda: "step 7")
        if key == 3:
            peers.stand_at(lambda: asked.wait(20) and "late")
        ready.wait(20)
        if key == 0:
            run.said.append(peers.stands(1.0))
            asked.set()
        assert asked.wait(20)

    (stands,) = (x for x in Run(work, [{}, {}, {}, {}]).said if isinstance(x, dict))
    assert stands == {1: "before its first step", 2: "step 7", 3: ""}


def flags(**changes):
    none = dict.fromkeys(["distributed", "coordinator", "num_processes", "process_id"])
    return SimpleNamespace(**none | {"join_seconds": 1.0, "workdir": "runs/a"} | changes)


SLURM = {
    "SLURM_JOB_ID": "70003",
    "SLURM_STEP_NODELIST": "node[007-010]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": f"{5 * 4096}.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_VERSION": "4.1.6",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}
# What is not there is asked of a server that only Google Cloud has.
NO_SLICES = dict.fromkeys(
    ["MEGASCALE_COORDINATOR_ADDRESS", "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID"], ""
)
GKE = NO_SLICES | {"TPU_WORKER_HOSTNAMES": "localhost,b,c,d", "TPU_WORKER_ID": "1"}
SLICES = GKE | {
    "MEGASCALE_COORDINATOR_ADDRESS": "localhost",
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
}
# A pod of the second of two slices that a JobSet has, as GKE tells it since JAX reads it by port.
JOBSET = {
    "KUBERNETES_SERVICE_HOST": "10.0.0.1",
    "JOB_COMPLETION_INDEX": "1",
    "TPU_PROCESS_ADDRESSES": "mlra-slice-1-0.mlra:8471,mlra-slice-1-1.mlra:8471",
    "TPU_WORKER_HOSTNAMES": "mlra-slice-1-0.mlra,mlra-slice-1-1.mlra",
    "TPU_WORKER_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "localhost:8080",
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
}
EXPLICIT = dict(coordinator="h:1", num_processes=2, process_id=1)


@pytest.mark.parametrize(
    "environment, given, want",
    [
        ({}, {}, None),
        ({}, EXPLICIT, (Member(1, 2, "h:1"), None)),
        (SLURM, {}, (Member(2, 4, f"node007:{61440 + 70003 % 4096}"), [1])),
        (SLURM, {"coordinator": "h:1"}, (Member(2, 4, "h:1"), [1])),
        (SLURM, {"distributed": False}, None),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, {}, None),
        (OPEN_MPI, {}, (Member(3, 4, "10.96.0.1:61445"), [0])),
        (GKE, {}, (Member(1, 4, "localhost:8482"), None)),
        (SLICES, {}, (Member(5, 8, "localhost:8482"), None)),
        (JOBSET, {}, (Member(3, 4, "localhost:8482"), None)),
        # A single host asks nobody.
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, {}, None),
        ({k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"}, {}, None),
        (GKE, {"distributed": False}, None),
    ],
)
def test_the_process_is_the_one_that_its_cluster_started(monkeypatch, environment, given, want):
    from jax._src.clusters import cloud_tpu_cluster
    from jax._src.clusters import cluster as detection

    for module in (cloud_tpu_cluster, detection):
        monkeypatch.setattr(
            module, "running_in_cloud_tpu_vm", "TPU_WORKER_HOSTNAMES" in environment
        )
    for name in [n for n in os.environ if n.startswith(("SLURM", "OMPI", "TPU_", "MEGASCALE"))]:
        monkeypatch.delenv(name)
    for name, value in (environment | {"TPU_SKIP_MDS_QUERY": "1"}).items():
        monkeypatch.setenv(name, value)
    assert cluster._detected(flags(**given)) == want


def test_what_is_wrong_with_the_numbers_or_the_cluster_is_one_line(monkeypatch):
    for name in [n for n in os.environ if n.startswith(("SLURM", "OMPI", "TPU_", "MEGASCALE"))]:
        monkeypatch.delenv(name)

    def refused(match, **given):
        with pytest.raises(PeerError, match=match) as error:
            cluster._detected(flags(**given))
        assert "\n" not in str(error.value)

    refused("^no cluster is detected; say --coordinator=HOST:PORT", distributed=True)
    refused("^no cluster is detected; say --coor", coordinator="h:1")
    refused("^process 2 of 2: numbers go from 0 to 1$", **EXPLICIT | {"process_id": 2})
    refused("^coordinator h is no HOST:PORT$", **EXPLICIT | {"coordinator": "h"})
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    monkeypatch.setenv("OMPI_MCA_orte_hnp_uri", "nonsense")
    refused("^the cluster is not understood .*; say --coordinator=HOST:PORT, --num_processes")
