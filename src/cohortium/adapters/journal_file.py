"""The journal's file: its tables, how it is made and opened, the approvals in it, and large values beside it."""

import os
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cohortium.adapters.private_files import is_open
from cohortium.core.errors import SiteError

JOURNAL, SPOOL = "journal.sqlite", "spool"
_APPLICATION = 0x436F6C6A
"""Tells SQLite files of this kind from others ("Colj")."""
_VERSION = 1
_LARGE = 256 * 1024
"""Bytes from which a value is a file of its own."""
PATIENCE = 30.0
"""Seconds to wait for another process that writes."""
_PUBLIC = "this site's journal cannot be used"
_VALUE = "data BLOB, file TEXT, size INTEGER NOT NULL, checksum BLOB NOT NULL"
_TABLES = (
    "CREATE TABLE owner (digest BLOB NOT NULL, agent INTEGER NOT NULL)",
    "CREATE TABLE approvals (study TEXT PRIMARY KEY, name TEXT NOT NULL, runs INTEGER NOT NULL, time TEXT NOT NULL)",
    "CREATE TABLE runs (seq INTEGER PRIMARY KEY, run TEXT NOT NULL UNIQUE, study TEXT NOT NULL, last_word BLOB, "
    "open INTEGER NOT NULL)",
    f"CREATE TABLE parts (run TEXT NOT NULL, name TEXT NOT NULL, {_VALUE}, PRIMARY KEY (run, name))",
    "CREATE TABLE answers (run TEXT NOT NULL, kind TEXT NOT NULL, round INTEGER NOT NULL, place INTEGER NOT NULL, "
    f"{_VALUE}, PRIMARY KEY (run, kind, round, place))",
    "CREATE TABLE intents (run TEXT NOT NULL, round INTEGER NOT NULL, digest BLOB NOT NULL, PRIMARY KEY (run, round))",
)

Value = tuple[bytes | None, str | None, int, bytes]
"""A value as a row has it: the bytes, or the name of a file, its size and its checksum."""
_checksum = AESGCM(bytes(16))


def in_row(data: bytes) -> Value:
    """Returns a value that is no file, whatever its size: what is deleted from a row is overwritten."""
    return data, None, len(data), b""


def unusable(where: object, reason: str) -> SiteError:
    """Returns the error for a journal that cannot be relied on, so that nothing is sent."""
    return SiteError(f"{where} {reason}. Nothing was sent.", public=_PUBLIC)


@contextmanager
def speaking(where: Path) -> Iterator[None]:
    """Turns what SQLite and the system raise into sentences; none of them holds anything that the file does."""
    try:
        yield
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", type(error).__name__)
        raise unusable(where, f"cannot be read or written ({name})") from None
    except OSError as error:
        raise unusable(where, f"cannot be read or written ({error.strerror})") from None


@contextmanager
def writing(connection: sqlite3.Connection) -> Iterator[None]:
    """Holds the write lock; at the end all that was written is on the disk, or nothing is."""
    try:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            with suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
        raise


def opened(folder: Path) -> sqlite3.Connection:
    """Opens the journal of a site's home, and begins one if there is none.

    Raises:
        SiteError: it is no journal, or others than its owner may read it, or it cannot be read or written.
    """
    path = folder / JOURNAL
    if not folder.is_dir():
        raise unusable(folder, "is no folder: name a site's home")
    if is_open(folder.stat().st_mode, 0o022):
        raise unusable(folder, "can be written by others, who could put another journal there: chmod 700 it, and look")
    with speaking(path):
        # made here, so that it is private from the first moment on. A file that is there must not be opened and closed
        # beside SQLite: that lets go of the locks that this process's other connections hold on it (POSIX), and whoever
        # closes it elsewhere then takes its log away from under them
        with suppress(FileExistsError):
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        if is_open(path.stat().st_mode, 0o077):
            raise unusable(path, "can be read by others, and holds secrets of the runs that are open: chmod 600 it")
        address = f"file:{quote(str(path.absolute()))}?mode=rw"
        connection = sqlite3.connect(address, PATIENCE, isolation_level=None, check_same_thread=False, uri=True)
    try:
        with speaking(path):
            for setting in ("journal_mode = WAL", "synchronous = FULL", "fullfsync = ON", "secure_delete = ON"):
                connection.execute(f"PRAGMA {setting}")
            _prepare(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    with writing(connection):
        if not connection.execute("SELECT 1 FROM sqlite_master").fetchone():
            for table in _TABLES:
                connection.execute(table)
            connection.execute(f"PRAGMA application_id = {_APPLICATION}")
            connection.execute(f"PRAGMA user_version = {_VERSION}")
    (application,), (version,) = (
        connection.execute(f"PRAGMA {name}").fetchone() for name in ("application_id", "user_version")
    )
    if application != _APPLICATION:
        raise unusable(path, "is no journal")
    if version != _VERSION:
        raise unusable(path, f"is a journal of version {version}, and this program reads version {_VERSION}: update it")


@dataclass(frozen=True)
class Spool:
    """The folder of large values. A file is written before the row that names it, and never changed.

    Files are not forced to the disk: a machine that loses its power may tear one, which its size and sum then show.
    """

    folder: Path

    def take_in(self, data: bytes) -> Value:
        """Returns a value to be put in a row, writing its file if it is large."""
        if len(data) < _LARGE:
            return in_row(data)
        handle, name = tempfile.mkstemp(dir=self.folder, prefix="part-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
        except BaseException:
            self.clear(iter([name]))
            raise
        return None, Path(name).name, len(data), _sum(data)

    def give(self, value: Value) -> bytes | None:
        """Returns what was taken in, or None if it was lost."""
        data, name, size, checksum = value
        if name is None:
            return data
        try:
            data = (self.folder / name).read_bytes()
        except OSError:
            return None
        return data if len(data) == size and _sum(data) == checksum else None

    def clear(self, names: Iterator[str | None]) -> None:
        """Deletes files that no row names any more."""
        for name in names:
            if name is not None:
                with suppress(OSError):
                    (self.folder / name).unlink()

    def clean(self, named: set[str]) -> None:
        """Deletes what a crash left without a row."""
        self.clear(name for name in os.listdir(self.folder) if name not in named)


def _sum(data: bytes) -> bytes:
    """Returns 16 bytes that show whether a file was torn: GMAC under a key that anybody knows, faster than CRC-32."""
    return _checksum.encrypt(bytes(12), b"", data)


def spool(folder: Path) -> Spool:
    """Returns the spool of a site's home, made if it is missing.

    Raises:
        SiteError: others than its owner may read it, or it cannot be made.
    """
    path = folder / SPOOL
    with speaking(path):
        path.mkdir(mode=0o700, exist_ok=True)
        if is_open(path.stat().st_mode, 0o077):
            raise unusable(path, "can be read by others, and holds secrets of the runs that are open: chmod 700 it")
    return Spool(path)
