"""Interruptions take effect where nothing goes on behind one's back; errors are one line."""

import errno
import os
import signal

import pytest

from mlra_jax.command import progress_bar
from mlra_jax.convert.errors import CheckpointFileError, in_one_line, reason
from mlra_jax.files import DestinationError


@pytest.fixture(autouse=True)
def handlers():
    """As a command sets them; parallel test workers ignore the signals."""

    def interrupt(*_):
        raise KeyboardInterrupt

    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    for number, _ in before:
        signal.signal(number, interrupt)
    yield
    for number, handler in before:
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_waits_for_the_next_update(number):
    before, reached = signal.getsignal(number), []
    with pytest.raises(KeyboardInterrupt), progress_bar("text", 10, True) as update:
        update(1)
        os.kill(os.getpid(), number)
        reached.append("after the signal")
        update(1)
        reached.append("after the update")
    assert reached == ["after the signal"]
    assert signal.getsignal(number) is before


def test_an_interruption_without_another_update_takes_effect_at_the_end():
    with pytest.raises(KeyboardInterrupt), progress_bar("text", 10, True):
        os.kill(os.getpid(), signal.SIGINT)


def test_errors_that_follow_from_an_interruption_are_not_told():
    with pytest.raises(KeyboardInterrupt), progress_bar("text", 10, True) as update:
        os.kill(os.getpid(), signal.SIGINT)
        try:
            update(1)
        except RuntimeError:
            raise ValueError("what the library makes of it") from None


def test_a_second_interruption_takes_effect_at_once():
    reached = []
    with pytest.raises(KeyboardInterrupt), progress_bar("text", 10, True):
        os.kill(os.getpid(), signal.SIGINT)
        reached.append(1)
        os.kill(os.getpid(), signal.SIGINT)
        reached.append(2)
    assert reached == [1]


def test_other_errors_come_through_and_handlers_come_back():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError, match="mine"), progress_bar("text", 10, True):
        assert signal.getsignal(signal.SIGINT) is not before
        raise ValueError("mine")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_that_is_ignored_stays_so():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with progress_bar("text", 10, True) as update:
        os.kill(os.getpid(), signal.SIGINT)
        update(1)


def test_a_bar_shows_its_name_and_leaves_nothing(capsys):
    with progress_bar("some text", 2000, False) as update:
        update(1000)
    shown = capsys.readouterr().err
    assert "some text" in shown and shown.endswith("\r")
    with progress_bar("some text", 2000, True) as update:
        update(1000)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "whatever"), "the disk is full"),
        (RuntimeError("ts: No space left on device [x]"), "the disk is full"),
        (RuntimeError("a [source='x'] os_error_code='27'"), "not done (File too large)"),
        (RuntimeError("first\n second [and a whole specification]"), "not done (first second)"),
        (RuntimeError("x" * 500), f"not done ({'x' * 300})"),
        (KeyError(), "not done (KeyError)"),
    ],
)
def test_reasons_are_one_short_line(error, line):
    assert reason(error) == line


def test_errors_while_writing_are_one_line(tmp_path):
    out = tmp_path / "out"
    for error, line in (
        (ValueError("two\nlines"), f"{out}: not done (two lines)"),
        (OSError(errno.ENOSPC, "No space left on device"), f"{out}: the disk is full"),
        (DestinationError("as it is"), "as it is"),
        (CheckpointFileError("as it is"), "as it is"),
    ):
        with pytest.raises(CheckpointFileError) as caught, in_one_line(out):
            raise error
        assert str(caught.value) == line
    with pytest.raises(KeyboardInterrupt), in_one_line(out):
        raise KeyboardInterrupt
    with in_one_line(out):
        pass
