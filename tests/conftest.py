"""Every test sees eight virtual CPU devices; released checkpoints are converted once."""

import gc
import os
import signal
from pathlib import Path

import hypothesis
import pytest

# The same examples on every machine; compiling in one of them is no reason to fail.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repeatable")

# Most of the time of these tests is LLVM's, on programs that run once.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
    ]
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Commands keep no compiled programs in the user's folder.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
# gcsfs would ask Google over gRPC what kind of bucket the emulated one is.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
# Most of what is made here stays: to look through it all for garbage so often takes time.
gc.set_threshold(10_000)
# The ahead-of-time TPU compiler, in several test processes at once, on a machine without TPU.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")

RELEASED = Path(__file__).parent / "data" / "released"


@pytest.fixture(scope="session")
def released(tmp_path_factory):
    """A function from a released folder's name to its converted checkpoint."""
    from mlra_jax.convert import convert

    folder, made = tmp_path_factory.mktemp("converted"), {}

    def converted(name: str) -> Path:
        if name not in made:
            variant = name if name.endswith("_no_scale") else None
            made[name] = folder / name
            convert(RELEASED / name, made[name], variant=variant, quiet=True)
        return made[name]

    return converted


@pytest.fixture(scope="session")
def emulator():
    """A storage emulator for all tests of this process."""
    from tests import bucket

    with bucket.serve() as (emulated, environment):
        os.environ.update(environment)
        yield emulated


@pytest.fixture
def bucket(emulator):
    """An empty bucket, `gs://bucket`, that works as it should until a test says otherwise."""
    emulator.objects.clear()
    emulator.requests.clear()
    yield emulator
    emulator.fault = lambda method, path: None


@pytest.fixture(scope="session", autouse=True)
def patience():
    """A command that failed in a test does not end the process of the tests, however slow."""
    from mlra_jax import command

    command._SECONDS_TO_END = 600.0


@pytest.fixture(autouse=True)
def no_ranks_met(monkeypatch):
    """A test knows of no other's ranks files."""
    from mlra_jax.data import tokenizers

    monkeypatch.setattr(tokenizers, "_met", {})


@pytest.fixture
def heeds_ctrl_c():
    """As in a terminal: what a shell begins in the background has Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
