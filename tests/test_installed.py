"""The package as pip installs it: all its files, its commands and the configs, from any folder."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import first_hour
from mlra_jax.__main__ import COMMANDS
from mlra_jax.training.shipped import config_files, find_config

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder into which pip has installed the package from a copy of the checkout."""
    copy, target = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("site-packages")
    for folder in ("mlra_jax", "configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignored)
    for file in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-index", "--no-deps", "--no-build-isolation", f"--target={target}"]
    done = subprocess.run([*pip, *offline, str(copy)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return target


def test_every_module_every_config_and_every_command_is_installed(installed):
    sources = lambda folder: {str(path.relative_to(folder)) for path in folder.rglob("*.py")}
    configs = {f"configs/{name}" for name in sources(ROOT / "configs")}
    assert sources(installed / "mlra_jax") == sources(ROOT / "mlra_jax") | configs
    assert {path.name for path in (installed / "bin").iterdir()} == COMMANDS.keys()


def test_an_installed_command_finds_the_installed_configs(installed, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(installed)}
    run = lambda *arguments: subprocess.run(
        [sys.executable, installed / "bin" / "mlra-jax", *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    done = run("configs")
    assert done.returncode == 0, done.stderr
    folder = installed / "mlra_jax" / "configs"
    assert f"{folder}/paper.py: 2,873,220,096 parameters" in done.stdout
    assert not list(tmp_path.iterdir())


def test_the_newcomers_page_is_of_commands_that_are_installed():
    found = first_hour.commands((ROOT / "docs" / "first_hour.md").read_text())
    programs = [line.split()[0] for line in found]
    assert programs[0] == "make" and programs[-1] == ".venv/bin/mlra-decode"
    scripts = {name.removeprefix(".venv/bin/") for name in programs if name.startswith(".venv")}
    assert "mlra-train" in scripts <= COMMANDS.keys()


def test_a_config_is_the_users_own_or_the_shipped_one_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = ROOT / "configs" / "paper.py"
    assert shipped in config_files()
    for file in ("configs/paper.py", "paper.py", "paper", "./paper"):
        assert find_config(file) == str(shipped)
        assert find_config(f"{file}:a:b") == f"{shipped}:a:b"
    for file in ("elsewhere/paper.py", "/paper.py", "../paper.py", "configs/mine.py:x"):
        assert find_config(file) == file
    (tmp_path / "paper.py").write_text("")
    assert find_config("paper.py:gqa") == "paper.py:gqa"
    assert find_config("configs/paper.py") == str(shipped)
