"""Folders of a bucket that appear whole: what makes them whole is copied last."""

import contextlib
from collections.abc import Iterator

from mlra_jax.storage.lock import BucketLock
from mlra_jax.storage.paths import BucketPath, DestinationError

EXISTS = "{}: exists already; delete it or choose another"
# Without these a folder holds no weights as released, and no step of a checkpoint.
_LAST = ("config.json", "commit_success.txt")


@contextlib.contextmanager
def whole_prefix(destination: BucketPath) -> Iterator[BucketPath]:
    """Gives a folder beside `destination` to write into, and copies it there when all went well.

    The bucket copies: nothing is downloaded. A copy that is interrupted is removed by the next run.

    Raises:
      DestinationError: another run writes it, or was faster.
      OSError: the bucket does not answer.
    """
    partial, copying = beside(destination, "partial"), beside(destination, "copying")
    lock = BucketLock(beside(destination, "lock"), destination)
    try:
        partial.rmtree(missing_ok=True)
        yield partial
        lock.check()
        if is_there(destination):
            raise DestinationError(EXISTS.format(destination))
        destination.rmtree(missing_ok=True)
        copying.write_bytes(b"")
        partial.copy_tree(destination, _LAST)
        copying.unlink()
    finally:
        try:
            if lock.held():
                partial.rmtree(missing_ok=True)
        finally:
            lock.release()


def is_there(destination: BucketPath) -> bool:
    """Whether something is there that is no interrupted copy."""
    return destination.exists() and not beside(destination, "copying").exists()


def beside(path: BucketPath, what: str) -> BucketPath:
    return path.with_name(f".{path.name}.{what}")
