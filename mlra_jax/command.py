"""One way for all command lines.

Wrong flags end with exit code 2, a failure of the work with 1, an interruption (Ctrl-C, SIGTERM)
with 130, each in one line on stderr. Training that was told to stop, and has saved before its last
step, ends with 75. `--help` lists the flags and ends with 0.
"""

import argparse
import contextlib
import difflib
import io
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import jax
from absl import logging
from tqdm import tqdm

from mlra_jax.storage import paths

STOPPED = 75
"""As EX_TEMPFAIL of sysexits.h: nothing failed, and the same command has more to do."""

_SECONDS_TO_END = 3.0


class Parser(argparse.ArgumentParser):
    """Flags as `--name=value`; what is wrong with them is one line and exit code 2.

    Args:
      module: the command's module, as in `python -m mlra_jax.convert`.
      description: one line for `--help`.
    """

    def __init__(self, module: str, description: str, **settings):
        # As it was started: a console script, a script of the repository, or a module.
        started = Path(sys.argv[0]).name
        script = started.startswith("mlra-") or started in ("train.py", "decode.py")
        prog = started if script else f"python -m {module}"
        super().__init__(prog, description=description, allow_abbrev=False, **settings)
        self.compilation_cache: str | None = None
        self.add_argument(
            "--compilation_cache",
            metavar="DIR|off",
            help="folder where compiled programs are kept for other runs; default: that of "
            "JAX_COMPILATION_CACHE_DIR, or mlra_jax in the user's cache folder",
        )

    def parse_known_args(self, args=None, namespace=None):
        flags, rest = super().parse_known_args(args, namespace)
        self.compilation_cache = flags.compilation_cache
        return flags, rest

    def parse_args(self, args=None, namespace=None):
        flags, rest = self.parse_known_args(args, namespace)
        if rest:
            self.error(self.unknown(rest[0]))
        return flags

    def unknown(self, argument: str) -> str:
        """What is wrong with an argument that is no flag of this command."""
        name = argument.partition("=")[0]
        if not name.startswith("-"):
            return f"unexpected argument {argument!r}"
        known = [option for option in self._option_string_actions if option.startswith("--")]
        near = difflib.get_close_matches(name, known, 1)
        return f"unknown flag {name}" + (f"; did you mean {near[0]}?" if near else "")

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists the flags)\n")


class Switch(argparse.Action):
    """`--stop`, `--nostop`, `--stop=false`."""

    def __init__(self, option_strings, dest, default=None, help=None):
        names = [*option_strings, *(f"--no{name[2:]}" for name in option_strings)]
        super().__init__(names, dest, nargs="?", default=default, metavar="true|false", help=help)

    def __call__(self, parser, namespace, value, option_string=None):
        on = option_string == self.option_strings[0]
        if value is not None and (value not in ("true", "false") or not on):
            parser.error(f"{option_string}={value}: give true or false, or only the name")
        setattr(namespace, self.dest, on and value != "false")


def run(parser: Parser, work: Callable[[], object], interrupted: str = "nothing written") -> int:
    """Runs `work` and returns the exit code of the command.

    ValueError and OSError are what the package raises with one line for the user; one of several
    lines comes from elsewhere, and passes with its traceback. Characters that the terminal or file
    has no bytes for are printed as `?`, on stderr as their escape; printing never fails for them.

    Args:
      parser: of the command, for its name.
      work: without arguments; prints what there is to say.
      interrupted: what an interruption leaves.
    """
    _print_anything()
    # The checkpoint library says much, of an error the traces of all its threads.
    logging.set_verbosity(logging.FATAL)
    try:
        with _sigterm_is_ctrl_c():
            _keep_compiled(parser.compilation_cache)
            work()
    except KeyboardInterrupt:
        return _fail(parser, f"interrupted; {interrupted}", 130)
    except (ValueError, OSError) as error:
        message = str(error).strip() or type(error).__name__
        if "\n" in message:
            _end_in_time(1)
            raise
        return _fail(parser, message, 1)
    except Exception as error:
        if paths.is_refusal(error):
            return _fail(parser, paths.one_line(error), 1)
        _end_in_time(1)
        raise
    return 0


def end_now(parser: Parser, message: str) -> None:
    """Ends the process at once as a failure of the work, whatever its main thread waits for."""
    say(f"{parser.prog}: {message}", sys.stderr)
    os._exit(1)


def say(line: str, stream: TextIO | None = None) -> None:
    """Prints a line in one piece, to stdout or a stream: other threads and libraries print there,
    too, and Python may be told not to buffer."""
    print(f"{line}\n", end="", file=stream, flush=True)


def use_cpu(devices: int | None = None) -> None:
    """Before anything touches a device: the host's CPU, as so many devices if that is said.

    Accelerators stay free for others.
    """
    jax.config.update("jax_platforms", "cpu")
    if devices:
        jax.config.update("jax_num_cpu_devices", devices)


def claim_gpu_memory(share: float) -> None:
    """Before anything touches a device: JAX reserves so much of GPUs' memory, instead of 0.75.

    What the environment says of it already stays.
    """
    names = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"
    if not any(os.environ.get(name) for name in names):
        os.environ[names[0]] = str(share)


@contextlib.contextmanager
def compile_time() -> Iterator[Callable[[], float]]:
    """Gives the function that says how many seconds JAX has traced and compiled meanwhile."""
    spans: list[tuple[float, float]] = []

    def add(event: str, begin: float, end: float, **_) -> None:
        if event.startswith("/jax/core/compile/"):
            # What was traced within this has ended before.
            while spans and spans[-1][0] >= begin:
                spans.pop()
            spans.append((begin, end))

    jax.monitoring.register_event_time_span_listener(add)
    try:
        yield lambda: sum(end - begin for begin, end in spans)
    finally:
        jax.monitoring.unregister_event_time_span_listener(add)


@contextlib.contextmanager
def progress_bar(text: str, total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A bar of bytes on stderr; gives the function to tell it how many more are done.

    While it is there, Ctrl-C (and SIGTERM, where a handler is set) takes effect when that function
    is called: not in the middle of the array libraries, which would go on writing in the
    background. A second Ctrl-C takes effect at once.
    """
    asked: list[int] = []
    handlers = {}

    def ask(number, frame):
        asked.append(number)
        signal.signal(number, handlers[number])

    def update(done: int) -> None:
        bar.update(done)
        if asked:
            raise RuntimeError("interrupted")

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if callable(signal.getsignal(number)):
                handlers[number] = signal.signal(number, ask)
    # Cleared at its end, so that an error is the only line left.
    bar = tqdm(
        desc=text,
        total=total,
        unit="B",
        unit_scale=True,
        disable=quiet,
        mininterval=0.5,
        leave=False,
    )
    try:
        with bar:
            yield update
    except Exception:
        if not asked:
            raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if asked:
        raise KeyboardInterrupt


def _keep_compiled(folder: str | None) -> None:
    """Has JAX keep compiled programs in a folder, so that the next run need not compile them.

    What JAX was told by its own settings stays, unless `folder` says otherwise. One that cannot be
    written is no error: a line says so.
    """
    if folder == "off":
        jax.config.update("jax_enable_compilation_cache", False)
    told = folder is None and jax.config.jax_compilation_cache_dir is not None
    if told or not jax.config.jax_enable_compilation_cache:
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    path = paths.path(folder or home / "mlra_jax").absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not paths.in_bucket(path):
            tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        why = error.strerror or error
        say(f"{path} keeps no compiled programs: {why}", sys.stderr)
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def _print_anything() -> None:
    """Text is not always printable: an ASCII terminal, prompt bytes that are not UTF-8."""
    for stream, errors in ((sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        # What stands in for them, as in notebooks, may be no stream of bytes.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def _fail(parser: Parser, message: str, code: int) -> int:
    say(f"{parser.prog}: {message}", sys.stderr)
    _end_in_time(code)
    return code


def _end_in_time(code: int) -> None:
    """Ends the process soon after its main thread, whatever its other threads still wait for.

    They may wait for many minutes: for what will never be written, or for other processes.
    """

    def watch():
        threading.main_thread().join()
        time.sleep(_SECONDS_TO_END)
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(code)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _sigterm_is_ctrl_c() -> Iterator[None]:
    """Being told to end (by a cluster, by `kill`) cleans up as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(*_):
    raise KeyboardInterrupt
