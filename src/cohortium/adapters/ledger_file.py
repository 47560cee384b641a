"""The ledger's file: its tables, how it is made and opened, and what goes wrong with files, in sentences."""

import os
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from urllib.parse import quote

from msgspec.structs import replace

from cohortium.core.errors import SiteError
from cohortium.site import chain
from cohortium.site.chain import Entry, Keys, Opened

VERSION = 1
_APPLICATION = 0x436F6C67
"""Tells SQLite files of this kind from others ("Colg")."""
_PUBLIC = "this site's privacy ledger cannot be used"

# replacing a row deletes one without firing a trigger, so what would be replaced is refused where it is inserted
_TABLES = (
    "CREATE TABLE cohorts (digest BLOB NOT NULL UNIQUE, members BLOB NOT NULL)",
    "CREATE TABLE entries (seq INTEGER PRIMARY KEY, previous BLOB NOT NULL, kind TEXT NOT NULL, time TEXT NOT NULL, "
    "run TEXT NOT NULL, study TEXT NOT NULL, round INTEGER NOT NULL, cohort BLOB NOT NULL, body BLOB NOT NULL, "
    "signature BLOB NOT NULL, hash BLOB NOT NULL)",
    "CREATE UNIQUE INDEX charged_once ON entries (run, round) WHERE kind = 'charge'",
    "CREATE TRIGGER cohorts_add BEFORE INSERT ON cohorts "
    "WHEN EXISTS (SELECT 1 FROM cohorts WHERE digest = NEW.digest OR rowid = NEW.rowid) "
    "BEGIN SELECT RAISE(ABORT, 'a cohort is written once'); END",
    "CREATE TRIGGER entries_add BEFORE INSERT ON entries "
    "WHEN NEW.seq IS NOT (SELECT coalesce(max(seq), -1) + 1 FROM entries) OR (NEW.seq > 0 AND NEW.previous IS NOT "
    "(SELECT hash FROM entries ORDER BY seq DESC LIMIT 1)) OR (NEW.kind = 'charge' AND EXISTS "
    "(SELECT 1 FROM entries WHERE kind = 'charge' AND run = NEW.run AND round = NEW.round)) "
    "BEGIN SELECT RAISE(ABORT, 'an entry is appended once'); END",
    *(
        f"CREATE TRIGGER {table}_{change.lower()} BEFORE {change} ON {table} "
        "BEGIN SELECT RAISE(ABORT, 'the ledger is only appended to'); END"
        for table in ("cohorts", "entries")
        for change in ("UPDATE", "DELETE")
    ),
)
ENTRIES = "SELECT seq, previous, kind, time, run, study, round, cohort, body, hash FROM entries"
_APPEND = "INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_SENTENCES = {
    sqlite3.SQLITE_BUSY: "is busy: another process keeps it from being written",
    sqlite3.SQLITE_LOCKED: "is busy: another process keeps it from being written",
    sqlite3.SQLITE_FULL: "cannot grow: the disk is full",
    sqlite3.SQLITE_READONLY: "cannot be written: the file or its folder is read-only",
    sqlite3.SQLITE_PERM: "cannot be opened: this user may not",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened: the file or its folder is missing, or this user may not",
    sqlite3.SQLITE_NOTADB: "is no ledger",
    sqlite3.SQLITE_CORRUPT: "is damaged: restore the newest copy that holds",
    sqlite3.SQLITE_CONSTRAINT: "was written by another program meanwhile",
}


@dataclass(frozen=True)
class Keeper:
    """What a site brings to its ledger.

    Attributes:
        key: 32 bytes under which identifiers become pseudonyms; the same for as long as the ledger lives.
        clock: tells the time that entries are given.
        sign: signs an entry's digest with the site's own key; None: entries are not signed.
    """

    key: bytes = field(repr=False)
    clock: Callable[[], datetime]
    sign: Callable[[bytes], bytes] | None = field(default=None, repr=False)


def unusable(where: str, reason: str) -> SiteError:
    """Returns the error for a ledger that cannot be relied on, so that nothing is released."""
    return SiteError(f"{where} {reason}. Nothing was released.", public=_PUBLIC)


def changed(where: str, seq: int) -> SiteError:
    """Returns the error for an entry that is not as it was written."""
    return unusable(where, f"was changed: entry {seq} is not as it was written; restore the newest copy that holds")


@contextmanager
def speaking(where: str) -> Iterator[None]:
    """Turns what SQLite raises into sentences; none of them holds anything that the file does."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0)
        name = getattr(error, "sqlite_errorname", type(error).__name__)
        # the lowest byte is the kind, the others say more
        raise unusable(where, _SENTENCES.get(code & 0xFF, f"cannot be read or written ({name})")) from None


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


def append(connection: sqlite3.Connection, keeper: Keeper, entry: Entry) -> None:
    """Writes an entry with the time, its signature and its digest; inside a transaction."""
    entry = replace(entry, time=keeper.clock().isoformat(timespec="seconds"))
    digest = entry.digest
    signature = keeper.sign(digest) if keeper.sign else b""
    fields = (entry.seq, entry.previous, entry.kind, entry.time, entry.run, entry.study, entry.round)
    connection.execute(_APPEND, (*fields, entry.cohort, entry.body, signature, digest))


def store(connection: sqlite3.Connection, digest: bytes, keys: Keys) -> None:
    """Writes a cohort, if it is new; inside a transaction."""
    if not connection.execute("SELECT 1 FROM cohorts WHERE digest = ?", (digest,)).fetchone():
        connection.execute("INSERT INTO cohorts VALUES (?, ?)", (digest, keys.tobytes()))


def create(path: Path, keeper: Keeper) -> None:
    """Makes an empty ledger that only its owner can read, whole or not at all.

    Raises:
        SiteError: there is one already, or it cannot be written.
    """
    temporary = None
    try:
        # mkstemp's file is its owner's alone, and so are the files that SQLite puts beside it
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        with speaking(str(path)), closing(_connected(Path(temporary), "rw", 0)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            begin(connection, keeper)
        # a link, unlike a move, replaces nothing
        os.link(temporary, path)
    except FileExistsError:
        raise unusable(str(path), "is there already, and a ledger is never replaced") from None
    except OSError as error:
        raise unusable(str(path), f"cannot be written ({error.strerror})") from None
    finally:
        if temporary is not None:
            os.unlink(temporary)
    _sync_folder(path.parent)


def begin(connection: sqlite3.Connection, keeper: Keeper) -> None:
    """Makes the tables and the first entry."""
    with writing(connection):
        connection.execute(f"PRAGMA application_id = {_APPLICATION}")
        connection.execute(f"PRAGMA user_version = {VERSION}")
        for statement in _TABLES:
            connection.execute(statement)
        body = chain.body(Opened(chain.key_digest(keeper.key)))
        append(connection, keeper, Entry(0, chain.START, "open", "", "", "", 0, b"", body))


def opened(path: Path, seconds: float) -> sqlite3.Connection:
    """Returns a connection that charges durably and waits up to some seconds for others; the file must be there.

    Raises:
        SiteError: it is not there, is no ledger, or others than its owner may write it.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise unusable(str(path), f"cannot be opened ({error.strerror}): restore it, never begin another") from None
    if os.name == "posix" and mode & 0o022:
        raise unusable(str(path), "can be written by others than its owner: chmod 600 it, and verify it")
    connection = _connected(path, "rw", seconds)
    try:
        with speaking(str(path)):
            check(connection, str(path))
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA fullfsync = ON")
    except BaseException:
        connection.close()
        raise
    return connection


@contextmanager
def opened_for_reading(path: Path) -> Iterator[sqlite3.Connection]:
    """Yields a connection that writes nothing, not even the files that SQLite keeps beside an open one.

    Raises:
        SiteError: the ledger is not there, is none, or was written meanwhile.
    """
    # beside a ledger that is open, or that a crash left, lies its log; without one nothing is read but the file
    log = path.with_name(f"{path.name}-wal")
    alone, before = not log.exists(), _state(path)
    mode = "ro&immutable=1" if alone else "ro"
    try:
        with closing(_connected(path, mode, 10.0)) as connection:
            with speaking(str(path)):
                check(connection, str(path))
            yield connection
    finally:
        if alone and (log.exists() or _state(path) != before):
            raise unusable(str(path), "was written meanwhile: ask again")


def check(connection: sqlite3.Connection, where: str) -> None:
    """Checks that a file is a ledger of this version, with all its tables and triggers and no other.

    Raises:
        SiteError: it is not.
    """
    (application,), (version,) = (connection.execute(f"PRAGMA {name}").fetchone() for name in _HEADER)
    if application != _APPLICATION:
        raise unusable(where, "is no ledger")
    if version != VERSION:
        raise unusable(where, f"is a ledger of version {version}, and this program reads version {VERSION}: update it")
    rows = connection.execute("SELECT sql FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'").fetchall()
    if sorted(sql for (sql,) in rows if isinstance(sql, str)) != sorted(_TABLES):
        raise unusable(where, "was changed: its tables or the triggers that keep them are not as they were made")


_HEADER = ("application_id", "user_version")


def check_pages(connection: sqlite3.Connection, where: str) -> None:
    """Checks every page and index of the file.

    Raises:
        SiteError: one is damaged.
    """
    if connection.execute("PRAGMA integrity_check(1)").fetchall() != [("ok",)]:
        raise unusable(where, _SENTENCES[sqlite3.SQLITE_CORRUPT])


def in_memory(keeper: Keeper) -> sqlite3.Connection:
    """Returns a new ledger that ends with its connection."""
    connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    begin(connection, keeper)
    return connection


def _connected(path: Path, mode: str, seconds: float) -> sqlite3.Connection:
    address = f"file:{quote(str(path.absolute()))}?mode={mode}"
    with speaking(str(path)):
        return sqlite3.connect(address, seconds, isolation_level=None, check_same_thread=False, uri=True)


def _state(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _sync_folder(folder: Path) -> None:
    """Makes a new name in a folder outlast a crash, where the system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
