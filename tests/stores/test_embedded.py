"""A folder's own servers: shared by processes, kept alive by one of them at a time, stopped by the last."""

import asyncio
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import psycopg
import pytest

from cohortium.adapters import embedded as module
from cohortium.adapters import servers
from cohortium.adapters.embedded import embedded
from cohortium.core.errors import CohortiumError

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


FORKS = """
import ctypes, subprocess, sys
from cohortium.adapters import servers
libc, heard = ctypes.CDLL(None), []
handler = ctypes.CFUNCTYPE(None)(lambda: heard.append(1))
libc.__register_atfork(handler, None, None, None)
who = servers.Account(65534, 65534, switch=True)
done = subprocess.run([*servers._as(who), "/usr/bin/id", "-u"], capture_output=True, check=True, umask=0o077)
print(len(heard), done.stdout.decode().strip())
"""


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="only root becomes another user")
def test_servers_are_started_without_a_fork_that_libraries_hear_of() -> None:
    """gRPC's handlers of forks crash the child now and then."""
    done = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "65534"]


def test_a_folder_that_somebody_else_put_there_is_refused_and_left_alone(tmp_path: Path) -> None:
    """The sockets' folder may stand in /tmp, where anybody can make one of that name."""
    target, who = tmp_path / "target", servers.Account(os.geteuid(), os.getegid(), switch=False)
    target.mkdir()
    target.chmod(0o755)
    (tmp_path / "link").symlink_to(target)
    (tmp_path / "file").touch()
    for name in ("link", "file"):
        with pytest.raises(CohortiumError, match="somebody else's"):
            servers.private_folder(tmp_path / name, who)
    assert stat.S_IMODE(target.stat().st_mode) == 0o755
    servers.private_folder(target, who)
    assert stat.S_IMODE(target.stat().st_mode) == 0o700
    with pytest.raises(OSError):
        (tmp_path / "victim").write_text("kept")
        (tmp_path / "postmaster.pid").symlink_to(tmp_path / "victim")
        servers._write(tmp_path / "postmaster.pid", "1", who)
    assert (tmp_path / "victim").read_text() == "kept"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make somebody else's folder")
def test_somebody_elses_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    os.chown(tmp_path / "theirs", 12345, 12345)
    for who in (servers.Account(0, 0, switch=False), servers.Account(65534, 65534, switch=True)):
        with pytest.raises(CohortiumError, match="somebody else's"):
            servers.private_folder(tmp_path / "theirs", who)
    assert (tmp_path / "theirs").stat().st_uid == 12345


def test_a_start_that_crashed_is_tried_again(tmp_path: Path) -> None:
    tried: list[int] = []

    def start(_: servers.Places) -> int:
        tried.append(1)
        raise subprocess.CalledProcessError(-6, "sh")

    async def ready(_: servers.Places) -> bool:
        return False

    async def scenario() -> None:
        server = module._Server(tmp_path / "none.sock", start, ready, places(tmp_path), "none.log")
        watching = asyncio.ensure_future(module._keep_alive(server, tmp_path / "turn"))

        async def twice() -> bool:
            return len(tried) >= 2

        await until(twice)
        assert not watching.done()
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)

    asyncio.run(scenario())


def test_whoever_leaves_while_a_server_starts_waits_for_it(tmp_path: Path) -> None:
    """It would come up when nobody is left to stop it."""
    begun, go, started = threading.Event(), threading.Event(), list[int]()

    def start(_: servers.Places) -> int:
        begun.set()
        go.wait()
        started.append(os.getpid())
        return os.getpid()

    async def ready(_: servers.Places) -> bool:
        return bool(started)

    async def scenario() -> None:
        server = module._Server(tmp_path / "none.sock", start, ready, places(tmp_path), "none.log")
        watching = asyncio.ensure_future(module._keep_alive(server, tmp_path / "turn"))
        await asyncio.to_thread(begun.wait)
        watching.cancel()
        await asyncio.wait({watching}, timeout=0.1)
        assert not watching.done()
        go.set()
        await asyncio.wait({watching})
        assert watching.cancelled()
        assert len(started) == 1

    asyncio.run(scenario())


def test_a_slow_server_is_started_once(tmp_path: Path) -> None:
    started: list[int] = []
    answers = iter([False] * 80)

    def start(_: servers.Places) -> int:
        started.append(os.getpid())
        return os.getpid()

    async def ready(_: servers.Places) -> bool:
        return next(answers, True)

    asyncio.run(module._Server(tmp_path / "none.sock", start, ready, places(tmp_path), "none.log").ensure())
    assert len(started) == 1


def test_a_dead_process_does_not_run() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert servers.runs(process.pid)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert not servers.runs(process.pid)
    assert not servers.runs(None)
