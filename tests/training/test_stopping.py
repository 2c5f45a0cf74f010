"""What makes a run stop: the machine's own news, and signals among several processes."""

import http.server
import os
import signal
import threading
import time

import pytest

from mlra_jax.training import stopping
from mlra_jax.training.stopping import StopSignals


@pytest.fixture
def metadata(monkeypatch):
    """A machine of Google Cloud, as its metadata server tells it; gives what that answers."""
    answers = {"maintenance-event": "NONE", "preempted": "FALSE"}
    asked = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            folder, _, name = self.path.rpartition("/")
            known = folder == "/computeMetadata/v1/instance" and name in answers
            asked.append((name, self.headers["Metadata-Flavor"]))
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(answers.get(name, "").encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("localhost", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("GCE_METADATA_HOST", f"localhost:{server.server_port}")
    monkeypatch.setattr(stopping, "_ASK_SECONDS", 0.02)
    yield answers, asked
    server.shutdown()
    server.server_close()


def until(event):
    deadline = time.monotonic() + 20
    while not event():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    "what, ending",
    [("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE"), ("preempted", "TRUE")],
)
def test_a_machine_that_will_be_taken_away_stops_the_run(metadata, what, ending):
    answers, asked = metadata
    with StopSignals() as stop:
        until(lambda: len(asked) > 3)
        assert not stop.after(1)
        answers["maintenance-event"] = "MIGRATE_ON_HOST_MAINTENANCE"  # It goes on elsewhere.
        before = len(asked)
        until(lambda: len(asked) > before + 3)
        assert not stop.after(2)
        answers[what] = ending
        until(lambda: stop.after(3))
    assert {flavor for _, flavor in asked} == {"Google"}


def test_what_was_known_when_the_run_was_started_again_does_not_stop_it(metadata):
    answers, asked = metadata
    answers["maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
    with StopSignals() as stop:
        until(lambda: len(asked) > 5)
        assert not stop.after(1)
        answers["preempted"] = "TRUE"
        until(lambda: stop.after(2))


def test_a_server_that_does_not_answer_changes_nothing(monkeypatch):
    monkeypatch.setenv("GCE_METADATA_HOST", "localhost:1")
    monkeypatch.setattr(stopping, "_ASK_SECONDS", 0.01)
    with StopSignals() as stop:
        time.sleep(0.1)
        assert not stop.after(1)


def test_ctrl_c_at_one_of_several_becomes_the_signal_that_reaches_all(monkeypatch, heeds_ctrl_c):
    monkeypatch.setattr(stopping.jax, "process_count", lambda: 2)
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("SIGTERM"))
    try:
        with StopSignals():
            os.kill(os.getpid(), signal.SIGINT)
            until(lambda: heard)
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == ["SIGTERM"]
