"""A folder's own servers: shared by processes, kept alive by one of them at a time, stopped by the last."""

import asyncio
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from cohortium.adapters import servers
from cohortium.adapters.embedded import embedded

from .world import until

CHILD = """
import asyncio, sys
from pathlib import Path
from cohortium.adapters.embedded import embedded
async def main():
    async with embedded(Path(sys.argv[1])) as stores:
        print(stores.owner_url, flush=True)
        await asyncio.to_thread(sys.stdin.readline)
asyncio.run(main())
"""


def child(folder: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", CHILD, str(folder)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def leave(process: "subprocess.Popen[str]") -> None:
    process.communicate("\n", timeout=60)


def places(folder: Path, sockets: Path | None = None) -> servers.Places:
    base = folder / "stores"
    return servers.Places(base / "postgres", sockets or base / "sockets", base, servers.account())


async def _selects(url: str) -> bool:
    try:
        async with await psycopg.AsyncConnection.connect(url) as connection:
            await connection.execute("SELECT 1")
    except psycopg.OperationalError:
        return False
    return True


def test_processes_share_servers_which_outlive_their_supervisor(short_folder: Path) -> None:
    folder = short_folder / "two"
    where = places(folder)
    first, second = child(folder), child(folder)
    assert first.stdout and second.stdout
    urls = {first.stdout.readline(), second.stdout.readline()}
    assert len(urls) == 1
    url = urls.pop().strip().replace("/cohortium?", "/postgres?")
    database, valkey = where.sockets / servers.POSTGRES_SOCKET, where.sockets / servers.VALKEY_SOCKET

    async def scenario() -> None:
        assert await _selects(url)
        assert await servers.answers(valkey)
        # whichever of them supervised, the other one does from now on
        first.kill()
        first.communicate()
        assert await _selects(url)
        before = servers.postmaster(where)
        assert before is not None
        os.kill(before, signal.SIGKILL)

        async def another() -> bool:
            return servers.postmaster(where) not in (None, before) and await _selects(url)

        await until(another)
        await asyncio.to_thread(leave, second)
        assert second.returncode == 0
        assert not await servers.answers(database)
        assert not await servers.answers(valkey)
        assert servers.postmaster(where) is None

    asyncio.run(scenario())


def test_nobody_else_may_enter_and_paths_may_be_long(short_folder: Path) -> None:
    folder = short_folder / ("long" * 30)

    async def scenario() -> None:
        async with embedded(folder) as stores:
            sockets = Path((folder / "stores" / "sockets.txt").read_text().strip())
            where = places(folder, sockets)
            for path in (folder / "stores", where.data, sockets):
                assert stat.S_IMODE(path.stat().st_mode) == 0o700
            url = stores.owner_url.replace("/cohortium?", "/postgres?")
            with psycopg.connect(url) as connection:
                assert connection.execute("SHOW listen_addresses").fetchone() == ("",)
                assert connection.execute("SHOW fsync").fetchone() == ("on",)
            # the kernel says who connects; he is not whom he names
            with pytest.raises(psycopg.OperationalError, match="eer authentication failed"):
                psycopg.connect(url.replace("cohortium_admin", "postgres"))
            # once more in the same process, and the first to leave stops nothing
            async with embedded(folder) as again:
                assert again == stores
            assert await _selects(url)
        assert not await servers.answers(sockets / servers.POSTGRES_SOCKET)
        sockets.rmdir() if not any(sockets.iterdir()) else None

    asyncio.run(scenario())
