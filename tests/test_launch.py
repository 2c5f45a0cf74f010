"""The recipes of launch/: linted, valid, explained, run with stand-ins for clusters' commands."""

import contextlib
import json
import os
import re
import signal
import string
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
import yaml
from jax._src.clusters import cloud_tpu_cluster

from mlra_jax.command import STOPPED

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
JOBSET = LAUNCH / "gke_jobset.yaml"
VALUES = dict(
    NAME="mlra-4",
    IMAGE="europe-docker.pkg.dev/mine/mlra:1",
    SLICES="2",
    HOSTS="16",
    CHIPS="4",
    ACCELERATOR="tpu-v5p-slice",
    TOPOLOGY="4x4x4",
    ACCOUNT="trainer",
    TRAIN_FLAGS="--config=configs/paper.py:mlra_4 --workdir=gs://mine/mlra_4",
)


def stand_in(folder: Path, name: str, script: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)
    return path


def run(*command, env=None, cwd=ROOT):
    environment = {**os.environ, "PAUSE": "0", **(env or {})}
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=cwd,
        env=environment,
    )


def test_scripts_are_linted():
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = run(shellcheck, "--enable=quote-safe-variables,check-set-e-suppressed", *SCRIPTS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(SCRIPTS) >= 3 and all(os.access(script, os.X_OK) for script in SCRIPTS)


@pytest.mark.parametrize("path", sorted(LAUNCH.iterdir()), ids=lambda path: path.name)
def test_every_placeholder_is_explained_in_a_line(path):
    text = path.read_text()
    code = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    own = set(re.findall(r"^\s*(?:local |for )?([A-Z_]+)(?:=| in )", code, re.MULTILINE))
    known = {"PWD", "BASH_SOURCE"}
    # Also in the commands of the first lines, and those that are checked by name.
    used = set(re.findall(r"\$\{?!?([A-Z][A-Z_]*)", text)) - own - known
    for names in re.findall(r"require ((?:[A-Z]+ ?)+)", code):
        used |= set(names.split())
    explained = set(re.findall(r"^#   ([A-Z_]+) {2,}\S.{10,}$", text, re.MULTILINE))
    assert used <= explained, f"not explained: {used - explained}"
    assert explained <= used, f"not used: {explained - used}"


def jobset(**changes) -> dict:
    return yaml.safe_load(string.Template(JOBSET.read_text()).substitute(VALUES | changes))


def schema() -> jsonschema.Draft202012Validator:
    text = json.loads((ROOT / "tests" / "data" / "jobset.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(text)
    return jsonschema.Draft202012Validator(text)


def test_the_manifest_is_valid_and_asks_for_the_whole_slice():
    manifest = jobset()
    schema().validate(manifest)
    (job,) = manifest["spec"]["replicatedJobs"]
    hosts, pod = job["template"]["spec"], job["template"]["spec"]["template"]["spec"]
    assert job["replicas"] == 2 and hosts["parallelism"] == hosts["completions"] == 16
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["command"][-1] == f"exec python train.py {VALUES['TRAIN_FLAGS']}"
    assert {"containerPort": int(cloud_tpu_cluster.coordinator_port)} in container["ports"]
    assert pod["restartPolicy"] == "Never" and manifest["spec"]["failurePolicy"]["maxRestarts"] > 0


@pytest.mark.parametrize(
    "wrong",
    [
        lambda m: m["spec"].update(replicatedJob=[]),
        lambda m: m["spec"]["replicatedJobs"][0].update(replicas="two"),
        lambda m: m["spec"]["replicatedJobs"][0]["template"]["spec"].update(paralelism=4),
        lambda m: m.update(apiVersion="jobset.x-k8s.io/v1alpha1"),
        lambda m: m["metadata"].update(name="My run"),
    ],
)
def test_a_wrong_manifest_is_refused(wrong):
    manifest = jobset()
    wrong(manifest)
    assert not schema().is_valid(manifest)


def test_the_container_file_copies_what_is_there():
    lines = (LAUNCH / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    lines = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    assert lines[0][0] == "FROM"
    assert {word for word, _ in lines} <= {"FROM", "ARG", "WORKDIR", "COPY", "RUN", "CMD"}
    for word, rest in lines:
        if word == "COPY":
            *sources, to = rest.split()
            assert sources and all((ROOT / source).exists() for source in sources), rest
            # A folder's content goes into a folder of its name.
            folders = [source for source in sources if (ROOT / source).is_dir()]
            assert not folders or (len(sources) == 1 and to.strip("./") == folders[0]), rest
        if word == "CMD":
            assert all(isinstance(part, str) for part in json.loads(rest))
    copied = " ".join(rest for word, rest in lines if word == "COPY").split()
    needed = {"train.py", "launch", "mlra_jax", "configs", "requirements.txt", "setup.py"}
    assert needed <= set(copied)


COUNTED = """
echo run >>"$RUNS"
read -ra codes <<<"$CODES"
exit "${codes[$(wc -l <"$RUNS") - 1]}"
"""


@pytest.mark.parametrize(
    ("codes", "restarts", "code", "runs"),
    [
        ("0", 5, 0, 1),
        ("1 137 0", 5, 0, 3),
        (f"{STOPPED} {STOPPED} 0", 5, 0, 3),
        ("1 1 1 1", 2, 1, 3),
        ("1 2 0", 5, 2, 2),
        ("130 0", 5, 130, 1),
        ("1 0", 0, 1, 1),
    ],
)
def test_again_repeats_what_failed_or_has_more_to_do(tmp_path, codes, restarts, code, runs):
    env = dict(RUNS=str(tmp_path / "runs"), CODES=codes, RESTARTS=str(restarts))
    done = run(LAUNCH / "again.sh", "bash", "-c", COUNTED, env=env)
    assert done.returncode == code, done.stderr
    assert len((tmp_path / "runs").read_text().splitlines()) == runs
    assert done.stdout.count("again in 0 s") == runs - 1


def wait_for(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_again_hands_a_signal_on_and_waits_for_the_save(tmp_path, heeds_ctrl_c, number):
    saved, begun = tmp_path / "saved", tmp_path / "begun"
    training = (
        f'trap "sleep 0.3; echo saved >>{saved}; exit {STOPPED}" TERM; touch {begun}; '
        "while :; do sleep 0.05; done"
    )
    command = [LAUNCH / "again.sh", "bash", "-c", training]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        wait_for(begun.exists)
        process.send_signal(number)
        assert process.wait(30) == STOPPED
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert saved.read_text() == "saved\n"


def test_slurm_starts_a_process_for_each_gpu(tmp_path):
    text = (LAUNCH / "slurm.sh").read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", text, re.MULTILINE))
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert options["signal"].startswith("B:TERM@")
    # Bound GPUs would all have the number 0.
    assert "gpus-per-task" not in options
    stand_in(tmp_path, "srun", 'printf "%s\\n" "$@"')
    env = dict(PATH=f"{tmp_path}:{os.environ['PATH']}", VENV="/envs/mlra")
    done = run("bash", LAUNCH / "slurm.sh", "--config=a b.py", "--workdir=w", env=env)
    assert done.stdout.splitlines() == [
        "--kill-on-bad-exit=1",
        "/envs/mlra/bin/python",
        "train.py",
        "--config=a b.py",
        "--workdir=w",
    ]
    done = run("bash", LAUNCH / "slurm.sh", env=env, cwd=tmp_path)
    assert done.returncode == 2 and "submit from the clone" in done.stderr


# `ssh` runs the command here, in a folder that stands for the host's home; `scp` copies into it.
GCLOUD = r"""
printf '%s\x1f' "$@" >>"$CALLS"; printf '\x1e' >>"$CALLS"
[[ $4 != scp ]] || cp "$5" "$HOME/${6#*:}"
for argument; do
    [[ $argument != --command=* ]] || (cd "$HOME" && bash -c "${argument#--command=}")
done
"""


TRAINING = r"""
[[ $1 == train.py ]] || exit 0
printf '%s\n' "$@" >"$HOME/argv"
trap 'touch "$HOME/saved"; exit' TERM
while :; do sleep 0.05; done
"""


@pytest.fixture
def tpu(tmp_path):
    """A function that runs tpu_vm.sh with a stand-in for gcloud; gives (result, calls so far)."""
    home, calls = tmp_path / "home", tmp_path / "calls"
    stand_in(tmp_path / "bin", "gcloud", GCLOUD)
    stand_in(tmp_path / "bin", "python3", 'printf "%s " "$@" >>"$HOME/python3"')
    stand_in(home / "mlra_jax/.venv/bin", "python", TRAINING)
    stand_in(home / "mlra_jax/launch", "again.sh", (LAUNCH / "again.sh").read_text())

    def call(*arguments, **env):
        env = dict(TPU="t", ZONE="z", HOME=str(home), CALLS=str(calls)) | env
        env["PATH"] = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        done = run(LAUNCH / "tpu_vm.sh", *arguments, env=env)
        made = calls.read_text().split("\x1e")[:-1] if calls.exists() else []
        return done, [one.split("\x1f")[:-1] for one in made]

    call.home = home
    return call


def test_tpu_vms_are_created_and_deleted_by_name(tpu):
    flags = dict(ACCELERATOR="v5p-128", IMAGE="v2-alpha-tpuv5", CREATE_FLAGS="--spot --tags=a")
    done, calls = tpu("create", **flags)
    assert done.returncode == 0, done.stderr
    made = ["--zone=z", "--accelerator-type=v5p-128", "--version=v2-alpha-tpuv5"]
    tpus = ["compute", "tpus", "tpu-vm"]
    assert calls == [[*tpus, "create", "t", *made, "--spot", "--tags=a"]]
    done, calls = tpu("delete")
    assert calls[1:] == [[*tpus, "delete", "t", "--zone=z"]]


def test_tpu_vms_get_what_is_committed_with_its_packages(tpu):
    done, calls = tpu("install")
    assert done.returncode == 0, done.stderr
    scp, ssh = calls
    assert scp[3] == "scp" and scp[5:] == ["t:mlra_jax.tar.gz", "--zone=z", "--worker=all"]
    assert not Path(scp[4]).exists(), "nothing is left here"
    assert ssh[3:7] == ["ssh", "t", "--zone=z", "--worker=all"]
    assert (tpu.home / "mlra_jax/train.py").is_file()
    assert os.access(tpu.home / "mlra_jax/launch/again.sh", os.X_OK)
    installed = (tpu.home / "python3").read_text()
    assert "-r requirements.txt jax[tpu]" in installed and "--python 3.12" in installed


def test_tpu_vms_train_with_the_flags_as_given_until_they_are_stopped(tpu):
    flags = ["--config=a b.py", "--workdir=gs://x/$HOME", "--config.data.source='f/*.bin'"]
    argv = tpu.home / "argv"
    try:
        done, calls = tpu("run", *flags)
        assert done.returncode == 0, done.stderr
        assert "--worker=all" in calls[0]
        wait_for(lambda: argv.exists() and len(argv.read_text().splitlines()) == 4)
        assert argv.read_text().splitlines() == ["train.py", *flags]
        done, _ = tpu("run", *flags)
        assert done.returncode == 1 and "it runs already" in done.stderr
    finally:
        done, _ = tpu("stop")
    assert done.returncode == 0, done.stderr
    wait_for((tpu.home / "saved").exists)


@pytest.mark.parametrize(
    ("arguments", "env", "told"),
    [
        ([], {}, "say what to do"),
        (["creat"], {}, "unknown action creat"),
        (["run"], {}, "takes the flags of train.py"),
        (["create"], {}, "ACCELERATOR is not set"),
        (["delete"], {"TPU": ""}, "TPU is not set"),
    ],
)
def test_what_is_missing_for_tpu_vms_is_named(tpu, arguments, env, told):
    done, calls = tpu(*arguments, **env)
    assert done.returncode == 2 and told in done.stderr and not calls
    assert len(done.stderr.splitlines()) == 1
