"""Commands keep compiled programs for other runs; libraries and whoever says so do not."""

import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from mlra_jax.command import Parser, compile_time, run

COMMAND = """
import collections, sys
import jax, jax.numpy as jnp
import mlra_jax
from mlra_jax.command import Parser, run

counts = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: counts.update([event.split("/")[-1]]))
assert jax.config.jax_compilation_cache_dir is None
parser = Parser("mlra_jax.tried", "")
parser.parse_args(sys.argv[1:])

def work():
    print(jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((3, 3)))[0, 0])
    print(counts["cache_misses"], counts["cache_hits"])

sys.exit(run(parser, work))
"""


def run_command(home: Path) -> tuple[str, int, int]:
    """(what it computed, programs compiled, programs found) in a process of its own."""
    environment = os.environ | {"XDG_CACHE_HOME": str(home)}
    del environment["JAX_ENABLE_COMPILATION_CACHE"]
    done = subprocess.run(
        [sys.executable, "-c", COMMAND],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[1],
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    value, counts = done.stdout.splitlines()
    return value, *map(int, counts.split())


def test_a_second_run_compiles_nothing_and_a_cut_entry_is_not_taken_for_whole(tmp_path):
    value, compiled, found = run_command(tmp_path)
    assert compiled > 0 == found
    assert run_command(tmp_path) == (value, 0, compiled)
    entries = [p for p in (tmp_path / "mlra_jax").rglob("*-cache") if p.is_file()]
    assert len(entries) == compiled
    for entry in entries:
        entry.write_bytes(entry.read_bytes()[: entry.stat().st_size // 2])
    again, _, found = run_command(tmp_path)
    assert (again, found) == (value, 0)


@pytest.fixture
def settings(monkeypatch, tmp_path):
    """JAX's own, on and as after the tests before; those of this test are undone."""
    names = ("enable_compilation_cache", "compilation_cache_dir")
    names = [f"jax_{name}" for name in (*names, "persistent_cache_min_compile_time_secs")]
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    jax.config.update("jax_enable_compilation_cache", True)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def told(*arguments: str) -> str | None:
    """The folder that JAX is told of while a command with these flags works."""
    parser, found = Parser("mlra_jax.tried", ""), []
    parser.parse_args(list(arguments))

    def work():
        on = jax.config.jax_enable_compilation_cache
        found.append(jax.config.jax_compilation_cache_dir if on else None)

    assert run(parser, work) == 0
    return found[0]


def test_the_folder_is_the_flag_s_or_jax_s_or_the_user_s(settings, tmp_path, monkeypatch):
    assert told() == str(tmp_path / "home/mlra_jax")
    assert (tmp_path / "home/mlra_jax").is_dir()
    jax.config.update("jax_compilation_cache_dir", "/elsewhere")
    assert told() == "/elsewhere"
    monkeypatch.chdir(tmp_path)
    assert told("--compilation_cache=mine") == str(tmp_path / "mine")
    assert told("--compilation_cache=off") is None
    jax.config.update("jax_compilation_cache_dir", None)
    assert told() is None, "JAX was told to keep nothing"


def test_a_folder_that_cannot_be_written_is_no_error(settings, tmp_path, capsys):
    (tmp_path / "home").write_text("a file")
    assert told() is None
    said = capsys.readouterr().err
    assert said == f"{tmp_path}/home/mlra_jax keeps no compiled programs: Not a directory\n"


def test_seconds_of_compiling_count_once():
    @jax.jit
    def inner(x):
        time.sleep(0.2)  # while it is traced
        return x + 1

    began = time.perf_counter()
    with compile_time() as compiling:
        jax.jit(lambda x: inner(x) * 2)(jnp.ones(2))
        spent = compiling()
        assert 0.2 < spent < time.perf_counter() - began
        time.sleep(0.1)
        assert compiling() == spent
    jax.jit(lambda x: x * 3)(jnp.ones(2))
    assert compiling() == spent
