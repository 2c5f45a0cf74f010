"""train.py as a user meets it: killed, stopped, resumed, on two processes, given wrong input."""

import functools
import http.server
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from mlra_jax import checkpoints
from mlra_jax.command import STOPPED
from mlra_jax.files import only_writer
from mlra_jax.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]
STEPS = 60


class Process:
    """A train.py that `fork.py` started; the part of `subprocess.Popen` that the tests use."""

    def __init__(self, starter: "Starter", arguments, environment):
        self._starter = starter
        self._out, self._err = (
            starter.folder / f"{len(starter.codes)}.{x}" for x in ("out", "err")
        )
        self._number = starter.start(arguments, self._out, self._err, environment)
        self.pid = starter.pids[self._number]

    @property
    def returncode(self) -> int | None:
        return self._starter.codes[self._number]

    def said(self) -> str:
        """On stdout, so far."""
        return self._out.read_text()

    def poll(self) -> int | None:
        self._starter.listen(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            assert time.monotonic() < deadline, self._err.read_text()
            self._starter.listen(1)
        return self._out.read_text(), self._err.read_text()


class Starter:
    """The process that imports everything once and forks for each command line."""

    def __init__(self, folder: Path, environment: dict[str, str]):
        self.folder, self._unread = folder, b""
        # Of each process by its number; the system uses a PID again.
        self.pids: list[int] = []
        self.codes: list[int | None] = []
        self._running: dict[int, int] = {}
        self._process = subprocess.Popen(
            [sys.executable, "tests/training/fork.py"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def start(self, arguments, out: Path, err: Path, environment: dict[str, str]) -> int:
        before, files = len(self.codes), {"out": str(out), "err": str(err)}
        line = json.dumps({"arguments": arguments, "environment": environment} | files)
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()
        while len(self.codes) == before:
            self.listen(300)
        return before

    def listen(self, seconds: float) -> None:
        """Notes what has started and ended; waits at most so long for the first news."""
        while select.select([self._process.stdout], [], [], seconds)[0]:
            read = os.read(self._process.stdout.fileno(), 1 << 16)
            assert read, "fork.py has ended"
            *lines, self._unread = (self._unread + read).split(b"\n")
            for line in map(json.loads, lines):
                if "started" in line:
                    self._running[line["started"]] = len(self.codes)
                    self.pids.append(line["started"])
                    self.codes.append(None)
                else:
                    self.codes[self._running.pop(line["ended"])] = line["code"]
            seconds = 0

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()


class Command:
    """Starts train.py on the tiny experiment; all runs share a text and a compilation cache."""

    def __init__(self, folder: Path):
        self.text = folder / "text.txt"
        self.text.write_text("".join(f"{i} bottles of beer on the wall\n" for i in range(3000)))
        hidden = ("XLA_FLAGS", "JAX_PLATFORMS")
        # How much LLVM does; the devices are a run's own.
        flags = [x for x in os.environ["XLA_FLAGS"].split() if "device_count" not in x]
        self.environment = {k: v for k, v in os.environ.items() if k not in hidden} | {
            "XLA_FLAGS": " ".join(flags),
            "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "PYTHONPATH": str(ROOT),
            "TPU_SKIP_MDS_QUERY": "1",
        }
        self.starter = Starter(folder, self.environment)

    def arguments(self, workdir, *arguments) -> list[str]:
        config = ("--config=tests/training/tiny.py", f"--config.data.source={self.text}")
        return list(map(str, (*config, f"--workdir={workdir}", *arguments)))

    def train(self, workdir, *arguments, environment=()) -> Process:
        return Process(self.starter, self.arguments(workdir, *arguments), dict(environment))


def finish(process, code: int = 0) -> str:
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == code, err
    return out


def wait_for_step(workdir: Path, step: int, *processes) -> None:
    deadline = time.monotonic() + 300
    while not any(line["step"] >= step for line in read_metrics(workdir)):
        for process in processes:
            assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def losses(workdir: Path) -> list[tuple[int, str, float]]:
    return [
        (line["step"], name, line[name])
        for line in read_metrics(workdir)
        for name in ("loss", "gradient_norm", "validation_loss")
        if name in line
    ]


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    command = Command(tmp_path_factory.mktemp("command"))
    yield command
    command.starter.close()


@pytest.fixture(scope="module")
def undisturbed(command, tmp_path_factory):
    """The one run that is started as users start it."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    process = subprocess.Popen(
        [sys.executable, "train.py", *command.arguments(workdir)],
        cwd=ROOT,
        env=command.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    out = finish(process)
    assert f"step {STEPS}/{STEPS}" in out and "tokens/s" in out and "left" in out
    return workdir


def test_a_run_leaves_what_it_promises(undisturbed):
    assert (undisturbed / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert list((undisturbed / "tensorboard").iterdir())
    assert checkpoints.finished_steps(undisturbed) == [STEPS - 4, STEPS]
    lines = read_metrics(undisturbed)
    trained = [line for line in lines if "loss" in line]
    assert [line["step"] for line in trained] == list(range(1, STEPS + 1))
    assert {"tokens", "tokens_per_second", "learning_rate", "seconds"} <= trained[0].keys()
    validated = [line for line in lines if "validation_loss" in line]
    assert [line["step"] for line in validated] == [20, 40, 60]
    # The text is easy: a run that learns is far below a uniform guess.
    assert validated[-1]["validation_loss"] < np.log(260) / 2
    opened = checkpoints.open_checkpoint(undisturbed)
    assert (opened.step, opened.tokenizer) == (STEPS, "bytes")


def test_killed_twice_and_stopped_once_gives_the_undisturbed_losses(command, undisturbed, tmp_path):
    """SIGKILL goes on from the last checkpoint, SIGTERM saves the step at which it came."""
    seed = random.randrange(10**6)
    moments = sorted(random.Random(seed).sample(range(1, STEPS - 3), 3))
    print(f"killed after steps {moments[:2]}, stopped after {moments[2]} (seed {seed})")
    for moment in moments[:2]:
        process = command.train(tmp_path)
        wait_for_step(tmp_path, moment, process)
        process.kill()
        process.communicate()
    process = command.train(tmp_path, "--config.save_every=1000")
    wait_for_step(tmp_path, moments[2], process)
    process.terminate()
    out, err = process.communicate()
    stopped_at = checkpoints.finished_steps(tmp_path)[-1]
    assert moments[2] <= stopped_at <= STEPS
    assert process.returncode == (STOPPED if stopped_at < STEPS else 0), err
    resumed = f"resuming {tmp_path} from step {stopped_at}"
    if stopped_at < STEPS:
        assert f"stopped and saved at step {stopped_at}; the same command resumes" in out
        assert resumed in finish(command.train(tmp_path))
    assert losses(tmp_path) == losses(undisturbed)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def several(command, workdir, count, *arguments, kind="") -> list[Process]:
    """The processes of one run, on eight devices together, by flags or as a cluster starts them."""
    join = [f"--coordinator=localhost:{free_port()}", f"--num_processes={count}"]
    join = [] if kind or count == 1 else join
    environments = as_cluster(kind, count) if kind else [{}] * count
    devices = f"--config.virtual_cpu_devices={8 // count}"
    started = []
    for i, environment in enumerate(environments):
        flags = [*join, f"--process_id={i}"] if join else []
        started.append(command.train(workdir, devices, *flags, *arguments, environment=environment))
    return started


def as_cluster(kind: str, count: int) -> list[dict[str, str]]:
    """The environments in which a cluster of this kind starts its processes, all on this host.

    In Kubernetes without TPUs JAX asks the cluster's own server, whom it knows by files of the pod
    (`jax._src.clusters.k8s_cluster._namespace`, under /var/run/secrets): not on this host.
    """
    others = {"JAX_COORDINATOR_PORT": str(free_port())}
    slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost,b"}
    mpi = {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp://127.0.0.1:1", "OMPI_VERSION": "4.1"}
    alone = {"MEGASCALE_COORDINATOR_ADDRESS": "", "MEGASCALE_NUM_SLICES": ""}
    slices = {"MEGASCALE_COORDINATOR_ADDRESS": "localhost:8080", "MEGASCALE_NUM_SLICES": "2"}
    hosts = lambda n: {"TPU_WORKER_HOSTNAMES": ",".join(["localhost", "b", "c", "d"][:n])}
    if kind == "slurm":
        of = lambda i: slurm | {"SLURM_NTASKS": count, "SLURM_PROCID": i, "SLURM_LOCALID": i}
    elif kind == "open mpi":
        named = lambda i: {"SIZE": count, "RANK": i, "LOCAL_RANK": i}
        of = lambda i: mpi | {f"OMPI_COMM_WORLD_{name}": x for name, x in named(i).items()}
    elif kind == "tpu slice":
        of = lambda i: alone | hosts(count) | {"TPU_WORKER_ID": i, "MEGASCALE_SLICE_ID": ""}
    elif kind == "jobset":
        # Of slices GKE says nothing where there is one, and JAX asks the machine in vain.
        pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "GCE_METADATA_IP": nothing_known()}
        of = lambda i: pod | hosts(count) | {"TPU_WORKER_ID": i, "JOB_COMPLETION_INDEX": i}
    elif kind == "jobset of two slices":
        half = count // 2
        pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"} | slices | hosts(half)
        of = lambda i: (
            pod
            | {
                "TPU_WORKER_ID": i % half,
                "JOB_COMPLETION_INDEX": i % half,
                "MEGASCALE_SLICE_ID": i // half,
            }
        )
    return [{k: str(v) for k, v in (others | of(i)).items()} for i in range(count)]


@functools.cache
def nothing_known() -> str:
    """Address of a machine's metadata server that has nothing of what it is asked for."""

    class Handler(http.server.BaseHTTPRequestHandler):
        do_GET = lambda self: self.send_error(404)
        log_message = lambda *_: None

    server = http.server.ThreadingHTTPServer(("localhost", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"localhost:{server.server_port}"


ENDURANCE = int(os.environ.get("ENDURANCE_ROUNDS", "0"))


@pytest.mark.skipif(not ENDURANCE, reason="four processes a cluster; set ENDURANCE_ROUNDS=1")
@pytest.mark.parametrize(
    "kind", ["slurm", "open mpi", "tpu slice", "jobset", "jobset of two slices"]
)
def test_four_processes_of_a_cluster_train_as_one(command, undisturbed, tmp_path, kind):
    """The same command on every host, without a word about the others."""
    outs = [finish(process) for process in several(command, tmp_path, 4, kind=kind)]
    assert not any("step" in out for out in outs[1:]), "one process speaks for all"
    got, want = ({x[:2]: x[2] for x in losses(folder)} for folder in (tmp_path, undisturbed))
    assert got.keys() == want.keys()
    # Sums over processes are rounded otherwise, and at this learning rate that grows.
    np.testing.assert_allclose(list(got.values()), [want[k] for k in got], rtol=1e-2)


def said_after(step: int, *processes) -> int:
    """Waits until the first process, which is alive as all are, has said that a step is done; which
    is the latest then."""
    deadline = time.monotonic() + 300
    while True:
        steps = re.findall(r"^step (\d+)/\d+  loss", processes[0].said(), re.MULTILINE)
        if steps and int(steps[-1]) >= step:
            return int(steps[-1])
        for process in processes:
            assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ends_of(processes, but=()):
    """(exit code, lines on stderr) of each that ends now, within a minute."""
    began, ends = time.monotonic(), {}
    for i, process in enumerate(processes):
        if i not in but:
            _, err = process.communicate(timeout=120)
            ends[i] = process.returncode, err.splitlines()
    assert time.monotonic() - began < 60 + 20 * bool(ENDURANCE)
    return ends


def told(pattern: str, end: tuple[int, list[str]]) -> bool:
    """Whether a process failed with such a line. JAX may add its own when process 0 is gone."""
    code, lines = end
    return code == 1 and any(re.fullmatch(pattern, line) for line in lines)


MESHES = (("data=2", "tensor=4"), ("data=4", "tensor=2"), ("fsdp=2", "tensor=4"))


def test_processes_killed_stopped_hung_and_told_to_end_at_random(command, tmp_path):
    """Others end with the number of one that is gone; what goes on has the undisturbed losses.

    A kill of one of two processes as Slurm starts them, and a SIGTERM in two slices of a JobSet;
    with ENDURANCE_ROUNDS=50 in the environment so many events, on one to four processes and three
    meshes, a SIGSTOP for good and one for a while, too.
    """
    seed = int(os.environ.get("ENDURANCE_SEED", random.randrange(10**6)))
    print(f"seed {seed}")
    chance, events = random.Random(seed), ("kill", "term", "stop", "hang")
    kinds = ("", "slurm", "open mpi", "jobset of two slices")
    choices = (events, (1, 2, 2, 4), MESHES, kinds)
    rounds = [tuple(map(chance.choice, choices)) for _ in range(ENDURANCE)]
    few = [("kill", 2, MESHES[0], "slurm"), ("term", 2, MESHES[0], "jobset of two slices")]
    # Rounding does not grow over hundreds of steps, so that one on other data would be seen.
    slow = ["--config.optimizer.peak_learning_rate=1e-4"]
    for event, count, mesh, kind in rounds or few:
        sizes = dict.fromkeys(("data", "fsdp", "tensor"), 1) | dict(x.split("=") for x in mesh)
        sizes = [f"--config.mesh.{name}={size}" for name, size in sizes.items()]
        often = ["--config.save_minutes=0.02"]
        flags = ["--config.steps=100000", *often, *sizes, *slow]
        processes = several(command, tmp_path, count, *flags, kind=kind if count > 1 else "")
        done = max([0, *checkpoints.finished_steps(tmp_path)])
        at = said_after(done + chance.randint(7, 12), *processes)
        one = chance.randrange(count)
        where = f"process {one} of {count} after step {at} ({' x '.join(mesh)}, {kind or 'flags'})"
        print(f"{event} {where}", flush=True)
        died = rf"train\.py: process {one} on \S+ \(PID {processes[one].pid}\) "
        if event == "kill":
            processes[one].kill()
            ends = ends_of(processes)
            assert ends.pop(one)[0] == -signal.SIGKILL
            assert all(told(died + "died", end) for end in ends.values()), ends
        elif event == "stop":
            processes[one].send_signal(signal.SIGSTOP)
            ends = ends_of(processes, but=(one,))
            silent = died + r"was not heard of for \d+ s"
            assert all(told(silent, end) for end in ends.values()), ends
            processes[one].kill()
            processes[one].communicate()
        else:
            if event == "hang":
                before = len(processes[0].said())
                processes[one].send_signal(signal.SIGSTOP)
                # Ten steps' time, however slow they are.
                deadline = time.monotonic() + (30 if one > 0 else 12)
                while "no answer" not in processes[0].said()[before:]:
                    if time.monotonic() > deadline:
                        break
                    time.sleep(0.1)
                processes[one].send_signal(signal.SIGCONT)
                said_after(at + 3, *processes)
            for i in {one, chance.randrange(count)}:
                processes[i].send_signal(chance.choice((signal.SIGTERM, signal.SIGINT)))
            outs = [finish(process, STOPPED) for process in processes]
            stopped = re.search(r"stopped and saved at step (\d+); the same", outs[0])
            assert int(stopped[1]) == checkpoints.finished_steps(tmp_path)[-1] >= at
            assert "step" not in "".join(outs[1:]), "one process speaks for all"
            if event == "hang" and one > 0:
                told_of = re.search(
                    rf"^(.*step \d+) takes \d+ s so far; (.*\n)+?  process {one}: no answer; it is "
                    r"stopped or its host hangs\n(.*\n)*\1 has ended after \d+ s$",
                    outs[0][before:],
                    re.MULTILINE,
                )
                assert told_of, outs[0]
    last = max(STEPS, checkpoints.finished_steps(tmp_path)[-1] + 3)
    finish(command.train(tmp_path, f"--config.steps={last}", *slow))
    steps = [step for step, name, _ in losses(tmp_path) if name == "loss"]
    assert steps == list(range(1, last + 1))
    undisturbed = tmp_path / "undisturbed"
    finish(command.train(undisturbed, f"--config.steps={last}", *slow))
    got, want = ({x[:2]: x[2] for x in losses(folder)} for folder in (tmp_path, undisturbed))
    both = sorted(got.keys() & want.keys())
    assert len(both) >= 12
    pairs = [got[k] for k in both], [want[k] for k in both]
    np.testing.assert_allclose(*pairs, rtol=1e-3)


ROUNDS = int(os.environ.get("WRITER_ROUNDS", "0"))


@pytest.mark.parametrize("together", [2, 4, 8] if ROUNDS else [3])
def test_of_runs_that_start_together_one_goes_on(command, undisturbed, tmp_path, together):
    """It is killed at random, they start together again, and the losses are undisturbed.

    With WRITER_ROUNDS=20 in the environment two, four and eight start together, twenty times each.
    """
    seed, rounds = random.randrange(10**6), ROUNDS or 2
    print(f"seed {seed}")
    moments = sorted(random.Random(seed).choices(range(1, STEPS), k=rounds - 1))
    for moment in (*moments, STEPS + 1):
        runs = [command.train(tmp_path, "--config.steps=100000") for _ in range(together)]
        deadline = time.monotonic() + 300
        while sum(run.poll() is None for run in runs) > 1:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        (owner,) = (run for run in runs if run.poll() is None)
        for run in runs:
            if run is not owner:
                out, err = run.communicate()
                assert (run.returncode, out) == (1, "")
                who = f"process {owner.pid} on {socket.gethostname()}"
                assert err.startswith(f"train.py: {tmp_path}: {who} is writing it"), err
                assert len(err.splitlines()) == 1
        wait_for_step(tmp_path, moment, owner)
        owner.kill()
        owner.communicate()
        assert owner.returncode == -signal.SIGKILL
    assert [line for line in losses(tmp_path) if line[0] <= STEPS] == losses(undisturbed)


def test_processes_of_one_run_are_refused_together(command, tmp_path):
    with only_writer(tmp_path / ".lock", tmp_path):
        for process in several(command, tmp_path, 2):
            out, err = process.communicate()
            assert process.returncode == 1
            assert f"{tmp_path}: process {os.getpid()} on " in err and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_processes_that_disagree_or_do_not_come_end_in_one_line_and_write_nothing(
    command, tmp_path
):
    address, workdir = f"--coordinator=localhost:{free_port()}", tmp_path / "run"
    joins = [(address, "--num_processes=2", f"--process_id={i}") for i in range(2)]
    changes = [(), ("--config.seed=7", "--config.log_every=2")]
    started = [command.train(workdir, *join, *c) for join, c in zip(joins, changes, strict=True)]
    line = (
        rf"train\.py: process 1 on \S+ \(PID {started[1].pid}\) does not run the same: "
        r"log_every is 2 there and 1 on process 0; seed is 7 there and 0 on process 0\n"
    )
    for process in started:
        out, err = process.communicate()
        assert (process.returncode, out) == (1, "") and re.fullmatch(line, err), err
    for who, text in (
        (joins[0], "train.py: process 1 of 2 did not come to localhost:"),
        (joins[1], "train.py: process 0 at localhost:"),
        (["--distributed"], "train.py: no cluster is detected; say --coordinator=HOST:PORT, "),
        ((*joins[0][:2], "--process_id=2"), "train.py: process 2 of 2: numbers go from 0 to 1"),
    ):
        process = command.train(workdir, *who, "--join_seconds=0.5")
        out, err = process.communicate()
        assert (process.returncode, out) == (1, "") and err.startswith(text), err
        assert len(err.splitlines()) == 1
    assert not workdir.exists()


@pytest.mark.parametrize("fault", ["full", "lost"])
def test_a_run_that_cannot_write_ends_soon_and_names_the_last_checkpoint(command, tmp_path, fault):
    """A disk that is full for arrays (no file may be longer than some); a folder that was moved."""
    workdir, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    process = command.train(workdir, "--config.steps=100000", "--config.log_every=100000")
    deadline = time.monotonic() + 300
    while not (steps := checkpoints.finished_steps(workdir)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    if fault == "full":
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (9000, 9000))
    else:
        workdir.rename(elsewhere)
    began = time.monotonic()
    out, err = process.communicate()
    assert process.returncode == 1 and time.monotonic() - began < 30
    assert len(err.splitlines()) == 1, err
    if fault == "full":
        last = checkpoints.finished_steps(workdir)[-1]
        assert f"File too large); last good checkpoint: {workdir}/checkpoints/{last}" in err
        opened = checkpoints.open_checkpoint(workdir)
        assert opened.step == last >= steps[-1]
    else:
        assert str(workdir) in err and "last good checkpoint: " in err


def test_a_loss_that_is_not_finite_stops_the_run(command, tmp_path):
    process = command.train(
        tmp_path, "--config.optimizer.peak_learning_rate=1e38", "--config.save_every=1"
    )
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1
    (line,) = err.strip().splitlines()
    last = checkpoints.finished_steps(tmp_path)[-1]
    assert "at step" in line and f"last good checkpoint: {tmp_path}/checkpoints/{last}" in line
    assert all(np.isfinite(loss) for _, _, loss in losses(tmp_path))


WRONG = [
    ("--config.optimizer.peak_lr=1", "did you mean --config.optimizer.peak_learning_rate?"),
    ("--config.stpes=9", "unknown setting --config.stpes; did you mean --config.steps?"),
    ("--config.steps.x=9", "config.steps has no parts"),
    ("--config.steps=many", "invalid literal for int() with base 10: 'many'"),
    ("--confg.steps=9", "Unknown command line flag 'confg.steps'"),
    ("steps=9", "unexpected argument 'steps=9'"),
    ("--config=configs/none.py", "configs/none.py"),
    ("--workdir=", "workdir"),
    ("--workdir=train.py", "is a file"),
    ("--config.steps=0", "steps=0 must be at least 1"),
    ("--config.mesh.data=0", "mesh.data=0 must be at least 1"),
    ("--config.data.source=/no/such/text", "/no/such/text"),
    ("--config.data.source={short}", "truncated"),
    ("--config.data.source={foreign}", "is no token file"),
    ("--config.data.source={beyond}", "token id 260 "),
    ("--config.data.tokenizer=byte", "no tokenizer 'byte'"),
    ("--config.mesh.fsdp=2", "needs 16 devices and there are 8"),
    ("--config.data.global_batch=9", "data.global_batch=9 does not divide"),
    ("--config.model.attention.groups=3", "num_heads=4 does not divide into groups=3"),
    ("--config.model.attention.latent_dim=18", "latent_dim=18 does not divide into 4"),
    ("--config.model.mlp_dim=26", "mlp=26 "),
    ("--config.model.vocab_size=259", "vocab=259 "),
]


# In a workdir that holds the undisturbed run.
ELSEWHERE = [
    ("--config.model.mlp_dim=32", "holds another model: model.mlp_dim is 24 there and 32 here"),
    ("--config.model.attention.gated=true", "model.attention.gated is False there and True here"),
    ("--config.seed=1", "seed was 0 in the saved run and is 1 now"),
    ("--config.data.global_batch=16", "global_batch was 8 in the saved run and is 16 now"),
    ("--config.data.source=pydoc", "windows was 7749 in the saved run"),
    ("--workdir={damaged}", "delete {damaged}/checkpoints/60 to go on from step 56"),
    ("--workdir={weights}", "has weights but no training state"),
]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def answers(command, undisturbed, tmp_path_factory):
    """What each wrong command says. One process imports everything and forks for each."""
    folder = tmp_path_factory.mktemp("wrong")
    copies = {name: shutil.copytree(undisturbed, folder / name) for name in ("damaged", "weights")}
    for file in (copies["damaged"] / "checkpoints/60/params/d").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    for item in ("optimizer", "iterator", "progress"):
        shutil.rmtree(copies["weights"] / "checkpoints/60" / item)
    header = np.zeros(256, "<i4")
    for name, magic, count, tokens in (
        ("short", 20240520, 500, np.zeros(499, "<u2")),
        ("foreign", 1, 500, np.zeros(500, "<u2")),
        ("beyond", 20240520, 500, np.full(500, 260, "<u2")),
    ):
        header[:3] = magic, 1, count
        (folder / f"{name}.bin").write_bytes(header.tobytes() + tokens.tobytes())
    names = copies | {path.stem: path for path in folder.glob("*.bin")}
    workdirs = [folder / f"run{i}" for i in range(len(WRONG))] + [undisturbed] * len(ELSEWHERE)
    before, answers = [tree(folder), tree(undisturbed)], []
    for workdir, (wrong, text) in zip(workdirs, WRONG + ELSEWHERE, strict=True):
        process = command.train(workdir, wrong.format(**names))
        out, err = process.communicate()
        answers.append((text.format(**names), (process.returncode, out, err)))
    assert [tree(folder), tree(undisturbed)] == before, "nothing may be written or changed"
    return answers


@pytest.mark.parametrize(
    "i", range(len(WRONG + ELSEWHERE)), ids=[wrong for wrong, _ in WRONG + ELSEWHERE]
)
def test_wrong_input_is_one_line_and_touches_nothing(answers, i):
    text, (code, out, err) = answers[i]
    assert code in (1, 2)
    assert len(err.strip().splitlines()) == 1 and text in err, err
    assert out == ""
