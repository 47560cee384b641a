"""A network that can be disturbed: a relay for each agent and coordinator, and a namespace with its own link.

TLS passes through the relays untouched; they delay it, throttle it, hold it back, or cut it.

    python chaos_network.py relay LISTEN:PORT-TO:PORT ...     relays without faults, run inside a namespace
"""

import asyncio
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

_PIECE = 1 << 15
_CLOSED = struct.pack("ii", 1, 0)


@dataclass
class Relay:
    """One agent's way to one coordinator.

    Attributes:
        to: where the coordinator listens.
        held: nothing passes, and nobody is told.
        delay: seconds that each piece waits.
        rate: bytes a second, 0 for as fast as it goes.
    """

    to: tuple[str, int]
    held: bool = False
    delay: float = 0.0
    rate: float = 0.0
    _near: set[asyncio.StreamWriter] = field(default_factory=set)
    _far: set[asyncio.StreamWriter] = field(default_factory=set)
    _deaf: bool = False

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carries one connection until either end closes it."""
        far: asyncio.StreamWriter | None = None
        self._near.add(writer)
        try:
            await self._passable()
            back, far = await asyncio.open_connection(*self.to)
            self._far.add(far)
            await asyncio.gather(self._carry(reader, far), self._carry(back, writer))
        except OSError:
            pass
        finally:
            self._near.discard(writer)
            _cut(writer)
            if far is not None:
                self._far.discard(far)
                _cut(far)

    def reset(self) -> None:
        """Cuts all connections at both ends."""
        for writer in [*self._near, *self._far]:
            _cut(writer)

    def halve(self, near: bool) -> None:
        """Cuts all connections at one end; the other end hears nothing of it until the relay is `whole`."""
        self._deaf = True
        for writer in list(self._near if near else self._far):
            _cut(writer)

    def whole(self) -> None:
        """Lets everything pass again; connections with one end are cut."""
        if self._deaf:
            self._deaf = False
            self.reset()
        self.held, self.delay, self.rate = False, 0.0, 0.0

    async def _passable(self) -> None:
        while self.held:
            await asyncio.sleep(0.02)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(_PIECE):
                await self._passable()
                await asyncio.sleep(self.delay + (len(data) / self.rate if self.rate else 0.0))
                writer.write(data)
                await writer.drain()
        finally:
            while self._deaf:
                await asyncio.sleep(0.02)
        raise ConnectionResetError


def _cut(writer: asyncio.StreamWriter) -> None:
    """Resets a connection."""
    with suppress(OSError, AttributeError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _CLOSED)
    writer.transport.abort()


class Switchboard:
    """Relays on a thread of their own, by the names of agent and coordinator."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="relays", daemon=True)
        self._thread.start()
        self.relays: dict[tuple[str, str], Relay] = {}

    def add(self, agent: str, coordinator: str, to: str, host: str = "127.0.0.1") -> int:
        """Makes a relay and returns its port."""
        there, port = to.rsplit(":", 1)
        relay = self.relays[agent, coordinator] = Relay((there, int(port)))
        starting = asyncio.start_server(relay.serve, host, 0)
        server = asyncio.run_coroutine_threadsafe(starting, self._loop).result(10)
        return int(server.sockets[0].getsockname()[1])

    def each(self, what: Callable[[Relay], None], agent: str | None = None, coordinator: str | None = None) -> None:
        """Does something to the relays of an agent, of a coordinator, or to all."""
        for (near, far), relay in self.relays.items():
            if agent in (None, near) and coordinator in (None, far):
                self._loop.call_soon_threadsafe(what, relay)

    def close(self) -> None:
        """Cuts everything and ends the thread."""
        self.each(Relay.reset)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)


class Namespace:
    """A network namespace with one link, which can be taken down. Needs root; `made` says if there is one."""

    def __init__(self, number: int) -> None:
        self.name = f"chaos{number}"
        self.device, near = f"{self.name}-h", f"10.231.{number % 250}"
        self.host, self._guest = f"{near}.1", f"{near}.2"
        self._relay: subprocess.Popen[bytes] | None = None
        self.made = self._make()

    @property
    def prefix(self) -> tuple[str, ...]:
        """What a command begins with that shall run inside."""
        return ("ip", "netns", "exec", self.name)

    def relay(self, ports: Mapping[int, int]) -> None:
        """Has ports of the namespace's loopback lead to ports of this side of the link."""
        told = [f"127.0.0.1:{near}-{self.host}:{far}" for near, far in ports.items()]
        self._relay = subprocess.Popen([*self.prefix, sys.executable, str(Path(__file__)), "relay", *told])

    def up(self, up: bool) -> None:
        """Takes the link up or down."""
        _quietly(["ip", "link", "set", self.device, "up" if up else "down"])

    def close(self) -> None:
        """Removes the namespace and its link."""
        if self._relay is not None:
            self._relay.kill()
            self._relay.wait()
        _quietly(["ip", "link", "delete", self.device])
        _quietly(["ip", "netns", "delete", self.name])

    def _make(self) -> bool:
        guest = f"{self.name}-g"
        inside = ("ip", "-n", self.name)
        steps: Iterable[tuple[str, ...]] = (
            ("ip", "netns", "add", self.name),
            ("ip", "link", "add", self.device, "type", "veth", "peer", "name", guest, "netns", self.name),
            ("ip", "addr", "add", f"{self.host}/30", "dev", self.device),
            ("ip", "link", "set", self.device, "up"),
            (*inside, "addr", "add", f"{self._guest}/30", "dev", guest),
            (*inside, "link", "set", guest, "up"),
            (*inside, "link", "set", "lo", "up"),
        )
        if all(_quietly(list(step)) for step in steps):
            return True
        self.close()
        return False


def _quietly(command: list[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


async def _relayed(told: list[str]) -> None:
    for one in told:
        near, far = one.split("-")
        there, port = far.rsplit(":", 1)
        await asyncio.start_server(Relay((there, int(port))).serve, *near.rsplit(":", 1))
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_relayed(sys.argv[2:]))
