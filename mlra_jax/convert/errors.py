"""What a conversion refuses, and how a failure of the system is told in one line."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from mlra_jax.files import DestinationError


class CheckpointFileError(ValueError):
    """A weight file, index or config that cannot be read; the message names file and fault."""


def reason(error: Exception) -> str:
    """One line of what went wrong; the array libraries append whole specifications."""
    text = " ".join(str(error).split())
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in text:
        return "the disk is full"
    if system := re.search(r"os_error_code='(\d+)'", text):
        return f"not done ({os.strerror(int(system[1]))})"
    return f"not done ({text.split(' [')[0][:300] or type(error).__name__})"


@contextlib.contextmanager
def in_one_line(destination: Path) -> Iterator[None]:
    """Whatever goes wrong inside, the array libraries' errors too, is a CheckpointFileError."""
    try:
        yield
    except CheckpointFileError:
        raise
    except DestinationError as error:
        raise CheckpointFileError(str(error)) from None
    except Exception as error:
        raise CheckpointFileError(f"{destination}: {reason(error)}") from error
