"""Connections to PostgreSQL: few, short, never waited for without end, and every failure of them is `Unavailable`.

A pool of its own, because an outage must end when the database is back: there is no background worker with a backoff
of its own, so the first statement after an outage connects. What is idle and broken is found by the first failure and
thrown away all at once. A statement that does not come back in time is abandoned, not waited for.

Services connect as `cohortium_coordinator`, which owns nothing and is no superuser; `as_site` narrows a transaction to
one site's rows, which the database enforces. An attacker who holds the services' URL can read every run's state and
stop or fake runs' progress; he cannot change events, applied rounds, or the schema, and no patient's value is there.
"""

import asyncio
import secrets  # noqa: TID251
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

import psycopg
from psycopg import errors
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import TransactionStatus

from cohortium.coordinator.ports import Unavailable
from cohortium.core.errors import CohortiumError

T = TypeVar("T")
Connection = psycopg.AsyncConnection[tuple[Any, ...]]
Work = Callable[[Connection], Awaitable[T]]

CHANNEL = "cohortium"
SECONDS = 10.0
"""How long a statement may take before its fate is unknown."""
_TRIES = 6
_ABANDONED = 32
"""Statements given up at most before no more are begun: their connections are still open."""
_TRANSIENT = (errors.DeadlockDetected, errors.SerializationFailure)
_OUTAGES = (psycopg.OperationalError, psycopg.InterfaceError, errors.ReadOnlySqlTransaction, OSError)
_DEFAULTS = {
    "application_name": "cohortium",
    "connect_timeout": "5",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "2",
    "tcp_user_timeout": "10000",
    # whoever is stopped in the middle of a transaction must not hold a run's row for ever
    "options": "-c timezone=UTC -c statement_timeout=60s -c lock_timeout=10s "
    "-c idle_in_transaction_session_timeout=10s -c search_path=cohortium,pg_temp -c plan_cache_mode=force_generic_plan",
}


class Database:
    """A pool of connections. Use `connected`. It belongs to one event loop.

    Args:
        url: a connection URL or string, as libpq takes it.
        most: connections at most.
        seconds: how long one piece of work may take.
    """

    def __init__(self, url: str, most: int = 8, seconds: float = SECONDS) -> None:
        self._conninfo = conninfo(url)
        self._idle: list[Connection] = []
        self._slots = asyncio.Semaphore(most)
        self._seconds = seconds
        self._abandoned: set[asyncio.Task[Any]] = set()
        self._closed = False

    async def close(self) -> None:
        """Closes every connection."""
        self._closed = True
        for task in list(self._abandoned):
            task.cancel()
        await self._drop_idle()

    async def do(self, work: Work[T], seconds: float | None = None) -> T:
        """Returns what work gives on a connection, repeated when the database asks for it (deadlocks).

        Work must stand in one transaction, or be one statement: a connection commits each statement by itself.

        Raises:
            Unavailable: the database is away, or did not answer in time; whether the work stands is not known.
        """
        for attempt in range(_TRIES):
            try:
                return await self._in_time(work, seconds or self._seconds)
            except _TRANSIENT:
                # two that met must not meet again at once
                await asyncio.sleep(0.002 * 2**attempt * (1 + secrets.randbelow(100) / 20))
        raise Unavailable("the database is too busy with others' transactions; try again")

    async def connect(self) -> Connection:
        """Returns a new connection, which the caller closes.

        Raises:
            Unavailable: there is none to be had.
        """
        if self._closed:
            raise Unavailable("the database's connections were closed")
        try:
            # libpq's own limit counts from the first packet; a socket whose server is stopped has none
            return await asyncio.wait_for(psycopg.AsyncConnection.connect(self._conninfo, autocommit=True), 10)
        except (*_OUTAGES, TimeoutError) as error:
            raise Unavailable(f"the database cannot be reached: {sentence(error)}") from None

    async def _in_time(self, work: Work[T], seconds: float) -> T:
        if len(self._abandoned) >= _ABANDONED:
            raise Unavailable("the database does not answer")
        task = asyncio.ensure_future(self._on_connection(work))
        try:
            done, _ = await asyncio.wait({task}, timeout=seconds)
        except asyncio.CancelledError:
            self._abandon(task)
            raise
        if not done:
            self._abandon(task)
            raise Unavailable(f"the database did not answer within {seconds:g} seconds")
        return task.result()

    def _abandon(self, task: asyncio.Task[Any]) -> None:
        task.cancel()
        self._abandoned.add(task)
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._abandoned.discard(task)
        if not task.cancelled():
            task.exception()

    async def _on_connection(self, work: Work[T]) -> T:
        async with self._slots:
            connection = self._idle.pop() if self._idle else await self.connect()
            connection.prepare_threshold = 1
            try:
                result = await work(connection)
            except _TRANSIENT:
                await self._put_back(connection)
                raise
            except _OUTAGES as error:
                await _closed(connection)
                await self._drop_idle()
                raise Unavailable(f"the database went away: {sentence(error)}") from None
            except BaseException:
                await self._put_back(connection)
                raise
            await self._put_back(connection)
            return result

    async def _put_back(self, connection: Connection) -> None:
        if self._closed or connection.closed or connection.info.transaction_status != TransactionStatus.IDLE:
            await _closed(connection)
        else:
            self._idle.append(connection)

    async def _drop_idle(self) -> None:
        idle, self._idle = self._idle, []
        for connection in idle:
            await _closed(connection)


@asynccontextmanager
async def connected(url: str, most: int = 8, seconds: float = SECONDS) -> AsyncGenerator[Database, None]:
    """Yields a database; connects only when something is asked of it."""
    database = Database(url, most, seconds)
    try:
        yield database
    finally:
        await database.close()


@asynccontextmanager
async def as_site(connection: Connection, site: str) -> AsyncGenerator[Connection, None]:
    """Yields a connection in a transaction that sees one site's rows and no others, and may change nothing."""
    async with connection.transaction():
        await connection.execute("SELECT set_config('cohortium.site', %s, true)", (site,))
        await connection.execute("SET LOCAL ROLE cohortium_site")
        yield connection


def conninfo(url: str) -> str:
    """Returns a connection string with limits and time-outs for what it leaves open.

    Raises:
        CohortiumError: it is none.
    """
    try:
        given = conninfo_to_dict(url)
        options = f"{_DEFAULTS['options']} {given.get('options', '')}".strip()
        return make_conninfo("", **{**_DEFAULTS, **given, "options": options})
    except psycopg.ProgrammingError:
        # libpq quotes the string in its message, and a password may stand there
        raise CohortiumError("the database's URL cannot be read; write postgresql://USER@HOST/DATABASE") from None


def sentence(error: BaseException) -> str:
    """Returns the first line of what a driver says. Details, which may hold values, stand in later lines."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


async def _closed(connection: Connection) -> None:
    with suppress(psycopg.Error, OSError):
        await connection.close()
