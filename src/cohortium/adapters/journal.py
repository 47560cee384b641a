"""A site's journal in SQLite: one transaction for each message that is answered, on the disk before the answer leaves.

Write-ahead log, synchronous FULL, rows that are deleted are overwritten. Large values lie as files beside it.

Trust: the file holds the secrets of the runs that are open, and nothing of those that are over but their names. Who
reads it could take the site's place in an open run. Who puts an older copy in its place has the site answer anew, with
the same masks: never restore one; delete it with `spool/` instead, which ends the open runs.
"""

import hashlib
import hmac
import os
import sqlite3
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import RLock

from cohortium.adapters import journal_file
from cohortium.adapters.journal_file import JOURNAL, PATIENCE, Spool, Value, in_row, speaking, unusable, writing
from cohortium.core.errors import ProtocolError, RoundRefused
from cohortium.core.messages import Noted, kind_of
from cohortium.core.signature import framed
from cohortium.site.ports import Frozen, KeptRun, Request

_CORE = ""
"""The name under which a session's core is kept among its parts."""
_ROUNDS = 2
"""The latest rounds whose answers are kept."""
_MOMENT = 0.1
"""Seconds to wait for those who read, before the log is emptied another time."""


class SqliteJournal:
    """A site's journal (`cohortium.site.ports.Journal`). Use `connect`; one process at a time has it."""

    def __init__(self, connection: sqlite3.Connection, folder: Path, spool: Spool, lock: int, agent: int) -> None:
        self._connection, self._where, self._spool, self._held = connection, folder / JOURNAL, spool, lock
        self._lock, self._agent = RLock(), agent
        # nobody else writes to these tables, so what is in them need not be looked for each time
        self._known = {run for (run,) in connection.execute("SELECT run FROM runs")}
        self._intending = {run for (run,) in connection.execute("SELECT run FROM intents")}
        self._spooled = {run for (run,) in connection.execute("SELECT run FROM parts WHERE file IS NOT NULL")}
        # a kill may have come before it was emptied
        self._log_is_due = True
        self._empty_log()

    def __enter__(self) -> "SqliteJournal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file, and lets another agent have it."""
        with self._lock:
            self._connection.close()
            if self._held >= 0:
                os.close(self._held)
                self._held = -1

    def runs(self, but: Collection[str] = ()) -> Sequence[KeptRun]:
        """Returns all runs that were ever served but those named, in the order in which they were opened."""
        with self._lock, speaking(self._where):
            rows = self._connection.execute("SELECT run, study, open FROM runs ORDER BY seq").fetchall()
            wanted = (row for row in rows if row[0] not in but)
            return [KeptRun(run, study, self._frozen(run) if is_open else None) for run, study, is_open in wanted]

    def answers(self, request: Request) -> Sequence[bytes] | None:
        """Returns what was answered to a request, or None if nothing was."""
        key = (request.run, request.kind, request.round)
        with self._lock, speaking(self._where):
            row = self._connection.execute("SELECT last_word FROM runs WHERE run = ?", key[:1]).fetchone()
            if row is None:
                return None
            if row[0] is not None:
                return [row[0]]
            rows = self._connection.execute(
                "SELECT place, data, file, size, checksum FROM answers WHERE run = ? AND kind = ? AND round = ? "
                "ORDER BY place",
                key,
            ).fetchall()
        if not rows:
            return None
        said = [self._spool.give(value) for place, *value in rows if place >= 0]
        whole = [data for data in said if data is not None]
        if len(whole) < len(said):
            raise RoundRefused(f"round {request.round} was refused: this site lost what it had answered")
        return whole

    def intend(self, request: Request, digest: bytes, *, charged: bool) -> bool:
        """Keeps that a round is about to be charged for something; returns whether that was kept before."""
        key = (request.run, request.round)
        with self._lock, speaking(self._where), self._writing():
            row = self._connection.execute("SELECT digest FROM intents WHERE run = ? AND round = ?", key).fetchone()
            if row is None:
                if not charged:
                    self._connection.execute("INSERT INTO intents VALUES (?, ?, ?)", (*key, digest))
                    self._intending.add(request.run)
                return False
        if not hmac.compare_digest(row[0], digest):
            raise ProtocolError(f"round {request.round} was refused: it was asked for before, with another broadcast")
        return True

    def keep(self, study: str, request: Request, answers: Sequence[bytes], after: Frozen | None) -> None:
        """Keeps answers and the session after them, both or neither."""
        run = request.run
        said: dict[int, Value] = {}
        parts: dict[str, Value] = {}
        with self._lock, speaking(self._where):
            try:
                if after is not None:
                    for place, data in enumerate(answers):
                        said[place] = self._spool.take_in(data)
                    # it holds keys, which must be overwritten in the end
                    parts[_CORE] = in_row(after.core)
                    for name, data in after.parts.items():
                        parts[name] = self._spool.take_in(data)
                with self._writing():
                    if run not in self._known:
                        self._connection.execute(
                            "INSERT INTO runs (run, study, open) VALUES (?, ?, 1) ON CONFLICT (run) DO NOTHING",
                            (run, study),
                        )
                    old = self._ended(run, answers) if after is None else self._dropped(request, parts)
                    self._put(request, said, parts)
            except BaseException:
                # a row names them if it was committed nevertheless
                with suppress(sqlite3.Error):
                    named = set(_files(self._connection))
                    self._spool.clear(value[1] for value in (*said.values(), *parts.values()) if value[1] not in named)
                raise
            self._known.add(run)
            self._spooled |= {run for value in (*said.values(), *parts.values()) if value[1] is not None}
            self._spool.clear(iter(old))
            self._log_is_due |= after is None
            self._empty_log()

    def _put(self, request: Request, said: Mapping[int, Value], parts: Mapping[str, Value]) -> None:
        self._connection.executemany(
            "INSERT OR REPLACE INTO parts VALUES (?, ?, ?, ?, ?, ?)",
            [(request.run, name, *value) for name, value in parts.items()],
        )
        if parts:
            # that nothing was said is an answer, too
            rows = [(place, *value) for place, value in said.items()] or [(-1, b"", None, 0, b"")]
            self._connection.executemany(
                "INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                [(request.run, request.kind, request.round, *row) for row in rows],
            )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Holds the write lock, if no other agent has taken the journal."""
        with writing(self._connection):
            row = self._connection.execute("SELECT 1 FROM owner WHERE agent = ?", (self._agent,)).fetchone()
            if row is None:
                raise unusable(self._where, "was taken by another agent of this site: end this one")
            yield

    def _empty_log(self) -> None:
        """Empties the log, which still has what is overwritten in the file. While others read it, that stays due."""
        if self._log_is_due:
            self._wait(_MOMENT)
            try:
                (busy, *_) = self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            finally:
                self._wait(PATIENCE)
            self._log_is_due = bool(busy)

    def _wait(self, seconds: float) -> None:
        self._connection.execute(f"PRAGMA busy_timeout = {round(seconds * 1000)}")

    def _dropped(self, request: Request, parts: Mapping[str, object]) -> list[str | None]:
        """Deletes what is replaced or no longer needed; returns the files that no row names then."""
        run, oldest = request.run, request.round - _ROUNDS + 1
        if run in self._intending:
            self._connection.execute("DELETE FROM intents WHERE run = ? AND round <= ?", (run, request.round))
        rows = self._connection.execute(
            "DELETE FROM answers WHERE run = ? AND ((round > 0 AND round < ?) OR (kind = ? AND round = ?)) "
            "RETURNING file, kind, round, data",
            (run, oldest, request.kind, request.round),
        ).fetchall()
        # whoever only noted a round may still contribute to it; nothing else is ever answered twice
        if any(row[1:3] == (request.kind, request.round) and not _noted(row[3]) for row in rows):
            raise unusable(self._where, f"has an answer for round {request.round} already, and gives no other one")
        rows = [row[:1] for row in rows]
        for name in parts if run in self._spooled else ():
            rows += self._connection.execute(
                "SELECT file FROM parts WHERE run = ? AND name = ?", (run, name)
            ).fetchall()
        return [file for (file,) in rows]

    def _ended(self, run: str, answers: Sequence[bytes]) -> list[str | None]:
        """Deletes all of a run but its name, its study and its last word; returns the files that no row names then."""
        word = answers[-1] if answers else None
        self._connection.execute("UPDATE runs SET open = 0, last_word = ? WHERE run = ?", (word, run))
        self._connection.execute("DELETE FROM intents WHERE run = ?", (run,))
        rows = []
        for table in ("answers", "parts"):
            rows += self._connection.execute(f"DELETE FROM {table} WHERE run = ? RETURNING file", (run,)).fetchall()
        return [file for (file,) in rows]

    def _frozen(self, run: str) -> Frozen:
        rows = self._connection.execute(
            "SELECT name, data, file, size, checksum FROM parts WHERE run = ?", (run,)
        ).fetchall()
        parts = {name: self._spool.give(value) for name, *value in rows}
        whole = {name: data for name, data in parts.items() if data is not None}
        core = whole.pop(_CORE, b"")
        return Frozen(core, whole) if len(whole) == len(parts) - 1 else Frozen(b"", {})


@dataclass(frozen=True)
class Approval:
    """A study that the steward approved.

    Attributes:
        runs: how many runs in all.
        had: how many of them were opened.
        time: when it was approved last.
    """

    study: str
    name: str
    runs: int
    had: int
    time: str


class Approved:
    """The steward's approvals (`cohortium.site.ports.Approvals`), as the journal's file has them at each moment."""

    def __init__(self, folder: Path) -> None:
        self._connection, self._where = journal_file.opened(folder), folder / JOURNAL
        self._lock = RLock()

    def __enter__(self) -> "Approved":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        with self._lock:
            self._connection.close()

    def get(self, study: str, default: int, /) -> int:
        """Returns how many runs of a study are approved in all."""
        with self._lock, speaking(self._where):
            row = self._connection.execute("SELECT runs FROM approvals WHERE study = ?", (study,)).fetchone()
        return int(row[0]) if row else default

    def approve(self, study: str, name: str, runs: int, time: str) -> Approval:
        """Allows a study so many more runs, from now on, whatever was allowed before."""
        with self._lock, speaking(self._where), writing(self._connection):
            had = self._had(study)
            self._connection.execute(
                "INSERT OR REPLACE INTO approvals VALUES (?, ?, ?, ?)", (study, name, had + runs, time)
            )
        return Approval(study, name, had + runs, had, time)

    def revoke(self, study: str) -> bool:
        """Allows a study no further runs; those that are open go on. Returns whether it was approved."""
        with self._lock, speaking(self._where), writing(self._connection):
            return self._connection.execute("DELETE FROM approvals WHERE study = ?", (study,)).rowcount > 0

    def all(self) -> list[Approval]:
        """Returns all approvals, the oldest first."""
        with self._lock, speaking(self._where):
            rows = self._connection.execute("SELECT study, name, runs, time FROM approvals ORDER BY time, study")
            return [Approval(study, name, runs, self._had(study), time) for study, name, runs, time in rows.fetchall()]

    def _had(self, study: str) -> int:
        (count,) = self._connection.execute("SELECT count(*) FROM runs WHERE study = ?", (study,)).fetchone()
        return int(count)


def connect(folder: Path, site: str, identity: bytes) -> SqliteJournal:
    """Opens the journal of a site's home for its agent; it is begun if there is none.

    Args:
        site: the site's name.
        identity: its public Ed25519 key. The journal is bound to both by whoever opens it first.

    Raises:
        SiteError: it is another site's, another agent has it, others may read it, or it cannot be read or written.
    """
    connection, lock = journal_file.opened(folder), -1
    try:
        spool = journal_file.spool(folder)
        lock = _locked(spool.folder)
        with speaking(folder / JOURNAL):
            owner = hashlib.sha256(framed(b"cohortium journal 1", site.encode(), identity)).digest()
            agent = _claim(connection, folder, owner)
            spool.clean(set(_files(connection)))
            return SqliteJournal(connection, folder, spool, lock, agent)
    except BaseException:
        connection.close()
        if lock >= 0:
            os.close(lock)
        raise


def _claim(connection: sqlite3.Connection, folder: Path, owner: bytes) -> int:
    """Takes the journal from whichever agent had it; returns the number that the file has until another one does."""
    with writing(connection):
        row = connection.execute("SELECT digest FROM owner").fetchone()
        if row is None:
            connection.execute("INSERT INTO owner VALUES (?, 0)", (owner,))
        elif not hmac.compare_digest(row[0], owner):
            raise unusable(
                folder / JOURNAL, "is the journal of another site or identity: restore this site's own, or delete it"
            )
        (agent,) = connection.execute("UPDATE owner SET agent = agent + 1 RETURNING agent").fetchone()
    return int(agent)


def _noted(answer: bytes | None) -> bool:
    return bool(answer) and kind_of(answer or b"") == Noted.__name__


def _files(connection: sqlite3.Connection) -> Iterator[str]:
    for table in ("answers", "parts"):
        for (file,) in connection.execute(f"SELECT file FROM {table} WHERE file IS NOT NULL"):
            yield file


def _locked(folder: Path) -> int:
    """Holds a folder for this process until it ends, however it ends."""
    if os.name != "posix":
        return -1
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise unusable(folder.parent, "is in use: another agent of this site runs already") from None
    return handle
