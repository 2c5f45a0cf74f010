"""Files that appear whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def whole_file(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """Gives a file beside `path` to write to, and renames it when all of it is on the disk.

    A file that is there is replaced. On an error it stays as it was and nothing else is left; a
    full disk is reported with this path.
    """
    path = Path(path)
    new = path.with_name(f".{path.name}.new")
    try:
        with open(new, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException as error:
        new.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise
