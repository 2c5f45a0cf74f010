"""What a conversion refuses, and how a failure of the system is told in one line."""

import errno
import os
import re


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
