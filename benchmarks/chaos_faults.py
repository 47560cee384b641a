"""The faults: what each kind does to a consortium of processes, and how it is healed.

A fault is drawn before anything runs; which process it meets is decided when it happens, by its draw, among those that
are there. What was killed is started again, what was disturbed is healed, at the fault's end.
"""

import heapq
import mmap
import os
import random  # noqa: TID251  the schedule is the same for the same seed
import signal
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import psycopg

from chaos_network import Namespace, Relay, Switchboard
from cohortium.bootstrap.loopback import Daemon, Loopback

HERE = Path(__file__).parent
_JUMPS = (-86400.0, -3600.0, -30.0, 30.0, 3600.0, 86400.0)
_MB = 1 << 20
T = TypeVar("T")
Heal = Callable[[], None]


@dataclass(frozen=True)
class Fault:
    """One fault of the schedule.

    Attributes:
        draw, size: from 0 to 1; whom it meets, and how bad it is.
        seconds: until it is healed.
        pause: seconds until the next fault.
    """

    number: int
    kind: str
    draw: float
    size: float
    seconds: float
    pause: float


class Control:
    """A process' wall clock and disk, through the preloaded library."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_bytes(bytes(16))
        path.chmod(0o644)
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 16)

    def clock(self, seconds: float) -> None:
        """Sets how far the wall clock is ahead."""
        self._memory[:8] = struct.pack("q", int(seconds * 1e9))

    def disk(self, seconds: float) -> None:
        """Sets how much longer fsync takes."""
        self._memory[8:] = struct.pack("q", int(seconds * 1e9))


class Disk:
    """A file system in memory that can be filled up. Needs root; `made` says if there is one."""

    def __init__(self, folder: Path, megabytes: int) -> None:
        self._folder, self._ballast = folder, folder / ".ballast"
        folder.mkdir(mode=0o700, parents=True)
        options = f"size={megabytes}m,mode=700"
        mount = ["mount", "-t", "tmpfs", "-o", options, "chaos", str(folder)]
        self.made = subprocess.run(mount, capture_output=True, check=False).returncode == 0

    def fill(self) -> None:
        """Leaves no byte."""
        with self._ballast.open("wb", buffering=0) as file:
            for piece in (_MB, 1 << 12):
                with suppress(OSError):
                    while True:
                        file.write(bytes(piece))

    def free(self) -> None:
        """Gives back what `fill` took."""
        self._ballast.unlink(missing_ok=True)

    def close(self) -> None:
        """Unmounts it."""
        if self.made:
            subprocess.run(["umount", "-l", str(self._folder)], capture_output=True, check=False)


@dataclass
class World:
    """The consortium, and all that can be done to it.

    Attributes:
        controls: of each process, and of 'postgres'; empty where the library could not be built.
        disks: of some agents, and of 'stores'.
        deaths: leaders that were killed: when (monotonic), and their runs with each one's last event.
        missing: kinds of faults that this machine does not allow, and why.
        heals: what ends the faults under way, with when (monotonic) and the fault's number.
    """

    fleet: Loopback
    board: Switchboard
    controls: dict[str, Control] = field(default_factory=dict)
    disks: dict[str, Disk] = field(default_factory=dict)
    namespace: Namespace | None = None
    isolated: str = ""
    deaths: list[tuple[float, str, dict[str, int]]] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    heals: list[tuple[float, int, Heal]] = field(default_factory=list)

    def rest(self, until: float) -> None:
        """Waits until then (monotonic), and ends the faults whose time comes."""
        while self.heals and self.heals[0][0] <= until:
            time.sleep(max(0.0, self.heals[0][0] - time.monotonic()))
            heapq.heappop(self.heals)[2]()
        time.sleep(max(0.0, until - time.monotonic()))

    @property
    def sockets(self) -> Path:
        """The folder of the stores' sockets."""
        stores = self.fleet.home / "stores"
        elsewhere = stores / "sockets.txt"
        return Path(elsewhere.read_text().strip()) if elsewhere.exists() else stores / "sockets"

    def database(self) -> "psycopg.Connection[tuple[object, ...]]":
        """Connects to the store as its owner."""
        return psycopg.connect(
            host=str(self.sockets), dbname="cohortium", user="cohortium_admin", autocommit=True, connect_timeout=3
        )

    def asked(self, query: str, *values: object) -> "list[tuple[object, ...]]":
        """Returns a query's rows, if need be after the database is back."""
        ends = time.monotonic() + 30
        while True:
            try:
                with self.database() as connection:
                    return connection.execute(query, values).fetchall()  # type: ignore[call-overload]
            except psycopg.OperationalError:
                if time.monotonic() > ends:
                    raise
                time.sleep(0.1)

    def leaders(self) -> dict[str, dict[str, int]]:
        """Returns the coordinators that lead, by name, with their runs and each run's last event.

        Nobody while the database is away: whoever would start it again may be frozen, and is to be thawed first.
        """
        try:
            with self.database() as connection:
                rows = connection.execute(
                    "SELECT c.address, r.run, r.events FROM cohortium.runs r "
                    "JOIN cohortium.coordinators c ON c.name = r.leader WHERE r.ended IS NULL AND r.status <> 'queued'"
                ).fetchall()
        except psycopg.OperationalError:
            return {}
        names = dict(zip(self.fleet.addresses, self.fleet.coordinators, strict=True))
        found: dict[str, dict[str, int]] = {}
        for address, run, last in rows:
            name = names[str(address)]
            if self.fleet.coordinators[name].running:
                found.setdefault(name, {})[str(run)] = int(str(last))
        return found

    def server(self, name: str) -> int | None:
        """Returns the process that listens on a store's socket."""
        with socket.socket(socket.AF_UNIX) as asking:
            try:
                asking.settimeout(1)
                asking.connect(str(self.sockets / name))
                return int(struct.unpack("3i", asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0])
            except OSError:
                return None


def picked(among: Sequence[T], draw: float) -> T:
    """Returns one of some, by a draw from 0 to 1."""
    return among[min(int(draw * len(among)), len(among) - 1)]


def _wait(world: World, until: Callable[[], T], seconds: float = 10.0) -> T:
    """Returns what is there in the end, while the faults under way end at their time."""
    ends = time.monotonic() + seconds
    while not (found := until()) and time.monotonic() < ends:
        world.rest(time.monotonic() + 0.05)
    return found


def _restart(daemon: Daemon) -> None:
    if not daemon.running:
        daemon.start()


def _kill(daemon: Daemon) -> Heal:
    daemon.kill()
    return lambda: _restart(daemon)


def _leader(world: World, fault: Fault) -> tuple[str, dict[str, int]]:
    """Returns a coordinator that leads, once there is another one to take over."""

    def found() -> list[tuple[str, dict[str, int]]]:
        ready = {name for name, daemon in world.fleet.coordinators.items() if daemon.running and daemon.ready()}
        return sorted((name, runs) for name, runs in world.leaders().items() if len(ready - {name}) > 0)

    among = _wait(world, found)
    if not among:
        raise LookupError("nobody leads a run")
    return picked(among, fault.draw)


def kill_leader(world: World, fault: Fault) -> tuple[str, Heal]:
    name, runs = _leader(world, fault)
    heal = _kill(world.fleet.coordinators[name])
    world.deaths.append((time.monotonic(), fault.kind, runs))
    return f"{name} of {len(runs)} runs", heal


def freeze_leader(world: World, fault: Fault) -> tuple[str, Heal]:
    """Stops a leader for so long that others take over; then it wakes up and believes that it still leads."""
    name, runs = _leader(world, fault)
    process = world.fleet.coordinators[name].process
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    return f"{name} of {len(runs)} runs", lambda: process.send_signal(signal.SIGCONT)


def kill_standby(world: World, fault: Fault) -> tuple[str, Heal]:
    """Kills the coordinator that leads the fewest runs; where it leads some, that is a leader's death, too."""
    running, leads = [one for one in world.fleet.coordinators.values() if one.running], world.leaders()
    if not running:
        raise LookupError("no coordinator runs")
    least = min(running, key=lambda one: len(leads.get(one.name, {})))
    heal = _kill(least)
    if least.name in leads:
        world.deaths.append((time.monotonic(), fault.kind, leads[least.name]))
    return least.name, heal


def _agent(world: World, draw: float) -> Daemon:
    running = [agent for agent in world.fleet.agents.values() if agent.running]
    if not running:
        raise LookupError("no agent runs")
    return picked(running, draw)


def kill_agent(world: World, fault: Fault) -> tuple[str, Heal]:
    agent = _agent(world, fault.draw)
    return agent.name, _kill(agent)


def freeze_agent(world: World, fault: Fault) -> tuple[str, Heal]:
    agent = _agent(world, fault.draw)
    process = agent.process
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    return agent.name, lambda: process.send_signal(signal.SIGCONT)


def _kill_server(socket_name: str) -> Callable[[World, Fault], tuple[str, Heal]]:
    def kill(world: World, fault: Fault) -> tuple[str, Heal]:
        process = _wait(world, lambda: world.server(socket_name))
        if not process:
            raise LookupError("the server is away already")
        os.kill(process, signal.SIGKILL)
        return str(process), lambda: None

    return kill


kill_postgres, kill_valkey = _kill_server(".s.PGSQL.5432"), _kill_server("valkey.sock")


def _both(first: Callable[[World, Fault], tuple[str, Heal]], second: Callable[[World, Fault], tuple[str, Heal]]):  # type: ignore[no-untyped-def]
    def act(world: World, fault: Fault) -> tuple[str, Heal]:
        one, heal = first(world, fault)
        try:
            other, heal_too = second(world, fault)
        except LookupError as error:
            return f"{one} alone ({error})", heal

        def healed() -> None:
            heal()
            heal_too()

        return f"{one} and {other}", healed

    return act


def _on_links(what: Callable[[Relay, Fault], None], of: str) -> Callable[[World, Fault], tuple[str, Heal]]:
    def act(world: World, fault: Fault) -> tuple[str, Heal]:
        names = world.fleet.agents if of == "agent" else world.fleet.coordinators
        name = picked(sorted(names), fault.draw)
        world.board.each(lambda relay: what(relay, fault), **{of: name})
        return name, lambda: world.board.each(Relay.whole, **{of: name})

    return act


def _hold(relay: Relay, fault: Fault) -> None:
    relay.held = True


def _delay(relay: Relay, fault: Fault) -> None:
    relay.delay = 0.05 + 0.4 * fault.size


def _throttle(relay: Relay, fault: Fault) -> None:
    relay.rate = 20_000 + 80_000 * fault.size


def _reset(relay: Relay, fault: Fault) -> None:
    relay.reset()


def _halve(relay: Relay, fault: Fault) -> None:
    relay.halve(fault.size < 0.5)


def link_down(world: World, fault: Fault) -> tuple[str, Heal]:
    namespace = world.namespace
    assert namespace is not None
    namespace.up(False)
    return world.isolated, lambda: namespace.up(True)


def _controlled(of: Callable[[World], Sequence[str]], what: Callable[[Control, Fault | None], None]):  # type: ignore[no-untyped-def]
    def act(world: World, fault: Fault) -> tuple[str, Heal]:
        name = picked(of(world), fault.draw)
        what(world.controls[name], fault)
        return name, lambda: what(world.controls[name], None)

    return act


def _slow(control: Control, fault: Fault | None) -> None:
    control.disk(0.05 + 0.35 * fault.size if fault else 0.0)


def _jump(control: Control, fault: Fault | None) -> None:
    control.clock(picked(_JUMPS, fault.size) if fault else 0.0)


def _agents(world: World) -> Sequence[str]:
    return sorted(world.fleet.agents)


def _coordinators(world: World) -> Sequence[str]:
    return sorted(world.fleet.coordinators)


def _postgres(world: World) -> Sequence[str]:
    return ("postgres",)


def _full(of: Callable[[World], Sequence[str]]) -> Callable[[World, Fault], tuple[str, Heal]]:
    def act(world: World, fault: Fault) -> tuple[str, Heal]:
        name = picked(of(world), fault.draw)
        world.disks[name].fill()
        return name, world.disks[name].free

    return act


KINDS: dict[str, Callable[[World, Fault], tuple[str, Heal]]] = {
    "kill-leader": kill_leader,
    "kill-standby": kill_standby,
    "kill-agent": kill_agent,
    "kill-postgres": kill_postgres,
    "kill-valkey": kill_valkey,
    "kill-leader-and-agent": _both(kill_leader, kill_agent),
    "kill-leader-and-postgres": _both(kill_leader, kill_postgres),
    "freeze-leader": freeze_leader,
    "freeze-agent": freeze_agent,
    "partition-agent": _on_links(_hold, "agent"),
    "partition-coordinator": _on_links(_hold, "coordinator"),
    "link-down": link_down,
    "delay": _on_links(_delay, "agent"),
    "throttle": _on_links(_throttle, "agent"),
    "reset": _on_links(_reset, "agent"),
    "half-open": _on_links(_halve, "agent"),
    "slow-disk-agent": _controlled(_agents, _slow),
    "slow-disk-postgres": _controlled(_postgres, _slow),
    "full-disk-agent": _full(lambda world: sorted(set(world.disks) - {"stores"})),
    "full-disk-stores": _full(lambda world: ("stores",)),
    "clock-agent": _controlled(_agents, _jump),
    "clock-coordinator": _controlled(_coordinators, _jump),
    "clock-postgres": _controlled(_postgres, _jump),
}
LEADERS = ("kill-leader", "kill-leader-and-agent", "kill-leader-and-postgres")


def schedule(seed: int, count: int, kinds: Sequence[str]) -> tuple[Fault, ...]:
    """Returns so many faults, each kind about equally often. After a leader's death there is time to take over."""
    draw = random.Random(seed)
    names: list[str] = []
    while len(names) < count:
        names += draw.sample(list(kinds), len(kinds))
    faults = []
    for number, kind in enumerate(names[:count], 1):
        seconds = draw.uniform(2.8, 4.5) if kind == "freeze-leader" else draw.uniform(0.8, 3.0)
        pause = draw.uniform(3.0, 4.0) if kind in LEADERS else draw.uniform(0.5, 2.0)
        faults.append(Fault(number, kind, draw.random(), draw.random(), seconds, pause))
    return tuple(faults)


def library() -> Path | None:
    """Builds the library for clocks and disks; None where there is no compiler. Its folder is open to all."""
    folder = Path(tempfile.mkdtemp(prefix="cohortium-chaos-"))
    folder.chmod(0o755)
    made = folder / "chaos.so"
    command = ["gcc", "-O2", "-shared", "-fPIC", "-o", str(made), str(HERE / "chaos_preload.c"), "-ldl"]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return made
