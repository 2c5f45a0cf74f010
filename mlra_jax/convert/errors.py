"""What a conversion refuses, and how a failure of the system is told in one line."""

import contextlib
from collections.abc import Iterator

from mlra_jax.files import DestinationError, reason
from mlra_jax.storage.paths import AnyPath


class CheckpointFileError(ValueError):
    """A weight file, index or config that cannot be read; the message names file and fault."""


@contextlib.contextmanager
def in_one_line(destination: AnyPath) -> Iterator[None]:
    """Whatever goes wrong inside, the array libraries' errors too, is a CheckpointFileError."""
    try:
        yield
    except CheckpointFileError:
        raise
    except DestinationError as error:
        raise CheckpointFileError(str(error)) from None
    except Exception as error:
        raise CheckpointFileError(f"{destination}: {reason(error)}") from error
