"""PostgreSQL and Valkey of a folder's own, for whoever has none: shared by all coordinators of that folder.

Each process that uses them holds a shared lock on `users`; whoever leaves last gets it for himself and stops them.
One process at a time holds the lock `supervisor`: it starts again what died, and when it dies itself, the kernel gives
its lock to another. Servers belong to no process, so the kill of a coordinator stops nothing.
"""

import asyncio
import fcntl
import hashlib
import os
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from subprocess import SubprocessError
from typing import Any
from urllib.parse import quote

from cohortium.adapters import servers
from cohortium.adapters.servers import POSTGRES_SOCKET, VALKEY_SOCKET, Places
from cohortium.core.errors import CohortiumError

_MOST_PATH = 100
"""Bytes of a socket's path; kernels take 107 or 103."""
_STARTING = 60.0
_RETRY = 0.1
_WATCH = 20.0
_TURN = 0.2


@dataclass(frozen=True)
class Stores:
    """Where the servers are. `owner_url` is for `migrate` alone; services use `database_url`."""

    database_url: str
    owner_url: str
    redis_url: str


@asynccontextmanager
async def embedded(folder: Path) -> AsyncGenerator[Stores, None]:
    """Yields a folder's own servers, started if they were not, and keeps them alive; the last user stops them.

    Raises:
        CohortiumError: there are no programs for them, or they do not start.
    """
    places = await asyncio.to_thread(_prepared, folder)
    with _Lock(places.logs / "users") as users, _Lock(places.logs / "supervisor") as supervisor:
        await users.shared()
        try:
            # one process at a time makes and starts; the others find all there
            with _Lock(places.logs / "starting") as starting:
                await starting.alone()
                await _whole(_made(places))
            watching = asyncio.ensure_future(_supervise(places, supervisor))
            try:
                yield _stores(places)
            finally:
                watching.cancel()
                await asyncio.wait({watching})
                supervisor.release()
        finally:
            if users.try_alone():
                await servers.stop(places)


@dataclass(frozen=True)
class _Server:
    path: Path
    start: Callable[[Places], int]
    ready: Callable[[Places], Awaitable[bool]]
    places: Places
    log: str

    async def ensure(self) -> None:
        """Returns once the server answers, started anew where it does not."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _STARTING
        while not await self.ready(self.places):
            if loop.time() > deadline:
                raise CohortiumError(f"a private server does not start; {self.places.logs / self.log} says why")
            started = None
            if not await servers.answers(self.path):
                started = await asyncio.to_thread(self.start, self.places)
            # it ends at once while its predecessor's processes are still leaving: then it is started once more, and
            # not before, or the second one might come up when the first was stopped
            while loop.time() < deadline and (servers.runs(started) or await servers.answers(self.path)):
                if await self.ready(self.places):
                    return
                await asyncio.sleep(_RETRY / 4)
            await asyncio.sleep(_RETRY / 4)


async def _made(places: Places) -> None:
    await asyncio.to_thread(servers.make_cluster, places)
    for server in _servers(places):
        await server.ensure()


async def _whole(work: Coroutine[Any, Any, None]) -> None:
    """Awaits work to its end, and is cancelled only then: a server on its way up would outlive whoever stops it."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise


def _servers(places: Places) -> tuple[_Server, ...]:
    sockets = places.sockets
    return (
        _Server(sockets / POSTGRES_SOCKET, servers.start_postgres, servers.ready, places, "postgres.log"),
        _Server(sockets / VALKEY_SOCKET, servers.start_valkey, servers.valkey_ready, places, "valkey.log"),
    )


async def _supervise(places: Places, lock: "_Lock") -> None:
    await lock.alone()
    await asyncio.gather(*(_keep_alive(server, places.logs / "starting") for server in _servers(places)))


async def _keep_alive(server: _Server, turn: Path) -> None:
    while True:
        if await servers.gone(server.path, _WATCH):
            # a failure to start may pass: a full disk, too many processes
            with suppress(CohortiumError, OSError, SubprocessError):
                with _Lock(turn) as starting:
                    await starting.alone(_RETRY / 4)
                    await _whole(server.ensure())
            await asyncio.sleep(_RETRY / 4)


def _stores(places: Places) -> Stores:
    host = quote(str(places.sockets), safe="")
    url = f"postgresql://{{}}@/cohortium?host={host}"
    return Stores(
        url.format("cohortium_coordinator"), url.format(servers.ADMIN), f"unix://{places.sockets / VALKEY_SOCKET}"
    )


def _prepared(folder: Path) -> Places:
    who = servers.account()
    base = folder.absolute() / "stores"
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    base.chmod(0o700)
    places = Places(base / "postgres", base / "sockets", base, who)
    if len(os.fsencode(places.sockets / POSTGRES_SOCKET)) > _MOST_PATH:
        # the same for every process of this folder; 0700, and refused if it is somebody else's
        name = hashlib.sha256(os.fsencode(base.resolve())).hexdigest()[:16]
        places = replace(places, sockets=Path(tempfile.gettempdir()) / f"cohortium-{name}")
        (base / "sockets.txt").write_text(f"{places.sockets}\n")
    servers.private_folder(places.sockets, who)
    return places


class _Lock:
    """A file's lock, which the kernel lets go of when the process dies."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)

    def __enter__(self) -> "_Lock":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    async def shared(self) -> None:
        while not self._try(fcntl.LOCK_SH):
            await asyncio.sleep(_TURN / 4)

    async def alone(self, pause: float = _TURN) -> None:
        while not self._try(fcntl.LOCK_EX):
            await asyncio.sleep(pause)

    def try_alone(self) -> bool:
        return self._try(fcntl.LOCK_EX)

    def release(self) -> None:
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def _try(self, how: int) -> bool:
        try:
            fcntl.flock(self._descriptor, how | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
