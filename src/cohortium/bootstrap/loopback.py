"""A whole consortium on this machine: its stores, its coordinators and its hospitals' agents, each a process.

For the demo, the benches and the trials of faults. Everything lies in one folder, everything listens on loopback.
"""

import importlib.util
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cohortium.bootstrap.enrolment import create_consortium, enrol_site, invite_site
from cohortium.bootstrap.fleet import connect
from cohortium.bootstrap.homes import approve
from cohortium.core.errors import RunFailed, StudyError
from cohortium.core.study import Study
from cohortium.engines.fleet.client import Consortium

log = logging.getLogger("cohortium.loopback")
_LOOK = 0.02
_TEND = 0.5
_HOST = "127.0.0.1"
Progress = Callable[[int, int, str], None]
COMMAND = (sys.executable, "-m", "cohortium")


@dataclass
class Daemon:
    """A process of the consortium.

    Attributes:
        arguments: the whole command.
        log: the file with what it printed.
        health: where its health page is, `host:port`.
        environment: what is set for it beside this process's own.
    """

    name: str
    arguments: tuple[str, ...]
    log: Path
    health: str
    environment: Mapping[str, str] = field(default_factory=dict)
    process: "subprocess.Popen[bytes] | None" = None
    _wanted: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def start(self) -> None:
        """Starts it, in a session of its own."""
        with self._lock:
            self._wanted = True
            self._begin()

    def tend(self) -> int | None:
        """Starts it again if it ended by itself, and returns how: as a service manager does."""
        with self._lock:
            if not self._wanted or self.process is None or self.process.poll() is None:
                return None
            how = self.process.returncode
            self._begin()
        return how

    def _begin(self) -> None:
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(  # noqa: S603  the command is this package's own
                self.arguments,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=os.environ | dict(self.environment),
                start_new_session=True,
            )

    @property
    def running(self) -> bool:
        """Whether it runs."""
        return self.process is not None and self.process.poll() is None

    @property
    def pid(self) -> int:
        """Its process id."""
        if self.process is None:
            raise RunFailed(f"{self.name} was not started")
        return self.process.pid

    def kill(self) -> None:
        """Ends it as a crash would."""
        self._end(signal.SIGKILL)

    def stop(self, seconds: float = 20.0) -> None:
        """Asks it to end, and makes it end if it does not."""
        self._end(signal.SIGTERM, seconds)

    def tell_to_end(self, how: signal.Signals) -> None:
        """Sends it a signal that ends it, and waits for nothing."""
        with self._lock:
            self._wanted = False
            if self.process is not None:
                with suppress(ProcessLookupError):
                    self.process.send_signal(how)

    def ready(self) -> bool:
        """Returns whether it says that it can do its work."""
        facts = self.facts()
        return facts is not None and bool(facts.get("ready"))

    def facts(self) -> Mapping[str, Any] | None:
        """Returns what its health page says, or None if it says nothing."""
        try:
            with urllib.request.urlopen(f"http://{self.health}/readyz", timeout=2) as reply:
                return dict(json.load(reply))
        except urllib.error.HTTPError as error:
            with error, suppress(ValueError):
                return dict(json.load(error))
        except (OSError, ValueError):
            pass
        return None

    def last_words(self, lines: int = 5) -> str:
        """Returns the end of its log."""
        with suppress(OSError):
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        return ""

    def _end(self, how: signal.Signals, seconds: float = 20.0) -> None:
        self.tell_to_end(how)
        if self.process is None:
            return
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@dataclass
class Loopback:
    """A consortium of processes; `begin` makes one, `close` ends it.

    Attributes:
        folder: all that belongs to it.
        coordinators, agents: its processes, by name. One that ends by itself is started again.
        addresses: where the coordinators listen.
    """

    folder: Path
    coordinators: dict[str, Daemon]
    agents: dict[str, Daemon]
    addresses: tuple[str, ...]
    program: tuple[str, ...] = COMMAND
    _closed: threading.Event = field(default_factory=threading.Event, repr=False)

    @staticmethod
    def begin(
        folder: Path,
        sites: Mapping[str, Path],
        dataset: str,
        coordinators: int = 1,
        program: Path | None = None,
        progress: Progress = lambda done, total, what: None,
    ) -> "Loopback":
        """Makes a consortium and starts it: keys and certificates, coordinators, and one enrolled agent a site.

        Args:
            folder: an empty or new folder.
            sites: each site's data file.
            dataset: what studies call these data.
            program: a script that stands in for the `cohortium` command.
            progress: is told how much is done, of how much, and what is next.

        Raises:
            CohortiumError: something could not be made or started; the message names the log.
        """
        ports = free_ports(3 * coordinators)
        addresses = tuple(f"{_HOST}:{port}" for port in ports[:coordinators])
        home = folder / "consortium"
        create_consortium(home, "loopback", addresses, (f"{_HOST}:{ports[coordinators]}",))
        command = COMMAND if program is None else (sys.executable, str(program))
        consortium = Loopback(folder, {}, {}, addresses, command)
        for index, address in enumerate(addresses):
            consortium._coordinate(f"coordinator-{index + 1}", address, *ports[coordinators + 2 * index :][:2])
        try:
            total = len(sites) + 2
            progress(0, total, "coordinators and their stores")
            consortium._started(consortium.coordinators)
            for done, (name, data) in enumerate(sites.items(), 1):
                progress(done, total, f"{name} enrols")
                consortium._enrolled(name, data, dataset)
            progress(total - 1, total, "agents")
            consortium._started(consortium.agents)
            threading.Thread(target=consortium._tend, name="tending", daemon=True).start()
        except BaseException:
            consortium.close()
            raise
        return consortium

    def __enter__(self) -> "Loopback":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def home(self) -> Path:
        """The consortium's own folder, with the operator's certificate."""
        return self.folder / "consortium"

    def site_home(self, site: str) -> Path:
        """Returns a site's folder."""
        return self.folder / "sites" / site

    def connect(self) -> Consortium:
        """Connects as the operator."""
        return connect(self.home)

    def approve(self, study: Study, runs: int = 1) -> None:
        """Has every site of a study approve it, as their stewards would."""
        for site in study.sites.include:
            approve(self.site_home(site), study, runs)

    def _tend(self) -> None:
        while not self._closed.wait(_TEND):
            for daemon in (*self.coordinators.values(), *self.agents.values()):
                how = daemon.tend()
                if how is not None:
                    log.warning(
                        "%s ended with code %d, and was started again; %s says more", daemon.name, how, daemon.log
                    )

    def close(self) -> None:
        """Ends all processes; the folder stays."""
        self._closed.set()
        for daemon in self.agents.values():
            daemon.tell_to_end(signal.SIGTERM)
        for daemon in [*self.agents.values(), *self.coordinators.values()]:
            daemon.stop()

    def wait(self, until: Callable[[], bool], seconds: float, what: str) -> None:
        """Waits until something holds.

        Raises:
            RunFailed: it did not in time.
        """
        ends = time.monotonic() + seconds
        while not until():
            if time.monotonic() > ends:
                raise RunFailed(f"{what} did not come about within {seconds:.0f} s; logs are in {self.folder}")
            time.sleep(_LOOK)

    def _coordinate(self, name: str, address: str, enrol_port: int, health_port: int) -> None:
        health = f"{_HOST}:{health_port}"
        arguments = (*self.program, "coordinator", "run", str(self.home), "--listen", address)
        arguments += ("--enrol", f"{_HOST}:{enrol_port}", "--health", health)
        self.coordinators[name] = Daemon(name, arguments, self.folder / f"{name}.log", health)

    def _enrolled(self, name: str, data: Path, dataset: str) -> None:
        home = self.site_home(name)
        enrol_site(invite_site(self.home, name, 1.0), home)
        health = f"{_HOST}:{free_ports(1)[0]}"
        settings = {"datasets": {dataset: str(data.resolve())}, "health": {"listen": health}}
        path = home / "site.yaml"
        path.write_text(json.dumps(settings) + "\n")
        path.chmod(0o600)
        (home / "policy.yaml").write_text("privacy: {}\n")
        arguments = (*self.program, "site", "run", str(home))
        self.agents[name] = Daemon(name, arguments, self.folder / f"{name}.log", health)

    def _started(self, daemons: Mapping[str, Daemon]) -> None:
        for daemon in daemons.values():
            daemon.start()
        for daemon in daemons.values():
            self.wait(lambda daemon=daemon: daemon.ready() or not daemon.running, 60.0, daemon.name)  # type: ignore[misc]
            if not daemon.running:
                raise RunFailed(f"{daemon.name} ended at once: {daemon.last_words()}")


def begin_loopback(folder: Path, sites: Mapping[str, Path], dataset: str, progress: Progress) -> Loopback:
    """Returns a running consortium of one coordinator and an agent for each site; see `Loopback.begin`.

    Raises:
        StudyError: what a coordinator needs is not installed.
    """
    if importlib.util.find_spec("psycopg") is None or importlib.util.find_spec("redis") is None:
        raise StudyError("a coordinator needs more packages: pip install 'cohortium[coordinator]'")
    return Loopback.begin(folder, sites, dataset, progress=progress)


def free_ports(count: int) -> list[int]:
    """Returns ports of loopback that nobody listens at now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind((_HOST, 0))
        return [int(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()
