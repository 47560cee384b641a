"""Files that only their owner may read, written whole or not at all."""

import os
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def is_open(mode: int, bits: int) -> bool:
    """Returns whether others than the owner may do what the bits say, where the system keeps such bits."""
    return os.name == "posix" and bool(stat.S_IMODE(mode) & bits)


def create(path: Path, data: bytes) -> None:
    """Writes a new private file; one that is there stays as it is.

    Raises:
        FileExistsError: there is something of that name.
        OSError: it cannot be written.
    """
    # a link, unlike a move, replaces nothing
    _write(path, data, os.link)


def replace(path: Path, data: bytes) -> None:
    """Writes a private file over what is there: whoever reads finds the old one or the new one, whole.

    Raises:
        OSError: it cannot be written.
    """
    _write(path, data, os.replace)


def read(path: Path, most: int) -> tuple[int, bytes]:
    """Returns a file's mode and its first `most + 1` bytes.

    They are looked at and read through one handle, so that the file cannot be exchanged in between.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return os.fstat(file.fileno()).st_mode, file.read(most + 1)


def _write(path: Path, data: bytes, put: Callable[[str, Path], None]) -> None:
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o600)
        put(temporary, path)
        _settle(path.parent)
    finally:
        if temporary is not None:
            with suppress(OSError):
                os.unlink(temporary)


def _settle(folder: Path) -> None:
    """Has the disk keep the folder's names; without it a crash may bring a replaced file back."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
