"""One error for whatever goes wrong with a file, whichever library met it.

A full disk is an OSError without a name from Python, a SafetensorError (neither ValueError nor OSError) from
safetensors; both become a FileError, which names the file, what the system said, and what to do.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


class FileError(ValueError):
    """A file that could not be written or read, or that changed; the message names it and says what to do."""


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """What the disk says while `path` is written (full, read-only, no permission), as a FileError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise FileError(
            f"{path}: could not be written ({_said(error)}); nothing was left behind, and what was there "
            "before is untouched. Make room or choose another place, then run the same command again"
        ) from error


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """What a library says of a file that it cannot read, as a FileError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise FileError(
            f"{path}: cannot be read ({_said(error)}). Download or copy it again, or run the line that wrote "
            "it again"
        ) from error


def _said(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
