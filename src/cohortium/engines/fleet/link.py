"""A site's end of its stream: it keeps one open to any of the coordinators, for as long as the agent lives.

No message is lost by a broken stream as long as this process lives: what was not sent whole is sent again, and so is
the last message of each run unless the coordinator has spoken of the run since. Some messages arrive twice.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import grpc

from cohortium.core.codec import MAX_MESSAGE_BYTES, Data
from cohortium.core.errors import ProtocolError
from cohortium.core.messages import CONTROL_BYTES
from cohortium.engines.fleet.chunks import (
    MOST_DATA,
    Assembler,
    Outgoing,
    Queue,
    packs,
    parse_downstream,
    partials_of,
)
from cohortium.engines.fleet.stream import EOF, PROTOCOL
from cohortium.engines.fleet.stream import OPTIONS as STREAM
from cohortium.engines.fleet.v1 import fleet_pb2 as pb

log = logging.getLogger("cohortium.fleet")
METHOD = "/cohortium.fleet.v1.Fleet/Attach"
_WAITING = 16  # messages that the agent has not taken yet; more stay on the network
_REMEMBERED = 64  # runs whose last message may be sent again
_OPTIONS = [
    *STREAM,
    ("grpc.use_local_subchannel_pool", 1),  # or a new connection might use an old certificate
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
]


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a link waits, in seconds.

    Attributes:
        first: before it tries again; twice as long each time in vain.
        most: at the most.
        greeting: for a connection and the coordinator's Welcome.
        sound: a stream that held so long begins again with `first`.
        flush: for queued messages before it detaches or reconnects.
    """

    first: float = 0.2
    most: float = 30.0
    greeting: float = 15.0
    sound: float = 5.0
    flush: float = 10.0


@dataclass(frozen=True)
class State:
    """How the link is. `since` is when that began, `error` what was wrong last."""

    connected: str | None
    since: float
    error: str | None


class Link:
    """One site's link.

    Args:
        addresses: coordinators, `host:port`, the best first.
        credentials: returns PEM: the authority's certificates, the site's chain and its key; asked at each connect.
        draw: returns a random number from 0 to 1, to spread reconnects.
        clock: seconds since 1970, for `state`.
        software: this software's version.
        patience: how long it waits.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        credentials: Callable[[], tuple[bytes, bytes, bytes]],
        draw: Callable[[], float],
        clock: Callable[[], float],
        software: str = "",
        patience: Patience = Patience(),
    ) -> None:
        if not addresses:
            raise ValueError("a link needs an address")
        self._addresses, self._credentials, self._draw, self._clock = tuple(addresses), credentials, draw, clock
        self._software, self._patience = software, patience
        self._queue, self._limits = Queue(), dict[str, int]()
        self._queue.hold(self._limits)
        self._assembler = Assembler(default=MAX_MESSAGE_BYTES, most_open=256)
        self._last: dict[str, bytes] = {}
        self._incoming: asyncio.Queue[tuple[str, Data] | None] = asyncio.Queue(_WAITING)
        self._wake = asyncio.Event()
        self._ending = self._stopped = False
        self._state = State(None, clock(), None)
        self._task: asyncio.Task[None] | None = None

    @property
    def state(self) -> State:
        """How the link is now."""
        return self._state

    def start(self) -> None:
        """Begins to connect."""
        if self._task is None:
            self._task = asyncio.ensure_future(self._keep())

    async def messages(self) -> AsyncIterator[tuple[str, Data]]:
        """Yields (run, message) as they come, until the link is detached. For one reader."""
        while (message := await self._incoming.get()) is not None:
            self._incoming.task_done()
            yield message

    async def send(self, run: str, data: bytes) -> None:
        """Queues a message; it is sent as soon as there is a stream and the coordinator allows its length."""
        self._queue.put(run, data)
        self._wake.set()

    def renewed(self) -> None:
        """Reconnects with new credentials as soon as nothing is being sent."""
        self._ending = True
        self._wake.set()

    async def detach(self) -> None:
        """Sends what is queued, ends the stream and the link."""
        self._stopped = self._ending = True
        self._wake.set()
        if self._task is not None:
            if self._state.connected:
                await asyncio.wait({self._task}, timeout=self._patience.flush + 2)
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        self._note(None, self._state.error)
        while self._incoming.full():
            self._incoming.get_nowait()  # nobody acts on it any more: the coordinator says it again
        self._incoming.put_nowait(None)

    def _note(self, connected: str | None, error: str | None) -> None:
        self._state = State(connected, self._clock(), error)

    async def _keep(self) -> None:
        loop, vain = asyncio.get_running_loop(), 0
        for turn in count():
            address, begun = self._addresses[turn % len(self._addresses)], loop.time()
            try:
                while await self._attached(address):
                    vain = 0
                error = "the coordinator ended the stream"
            except grpc.aio.AioRpcError as failed:
                error = f"{failed.code().name}: {failed.details()}"
            except TimeoutError:
                error = "the coordinator did not answer in time"
            except Exception as failed:  # noqa: BLE001 (whatever it is, the hospital stays on the air)
                error = f"{type(failed).__name__}: {failed}"
            if self._stopped:
                return
            lived = self._state.connected is not None and loop.time() - begun >= self._patience.sound
            vain = 0 if lived else vain + 1
            self._note(None, error)
            log.warning("the stream was lost", extra={"address": address, "reason": error[:500]})
            # each address is tried once before the wait grows
            tries = max(0, vain - 1) // len(self._addresses)
            wait = min(self._patience.most, self._patience.first * 2.0 ** min(tries, 30))
            await asyncio.sleep(wait * (0.5 + self._draw() / 2))

    async def _attached(self, address: str) -> bool:
        """Serves one stream; returns whether to open the next at once, because the credentials are renewed."""
        self._ending = self._stopped
        authorities, chain, key = self._credentials()
        channel: Any = grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(authorities, key, chain), _OPTIONS)
        try:
            call = channel.stream_stream(METHOD)()
            async with asyncio.timeout(self._patience.greeting):
                await self._greet(call)
            self._note(address, None)
            log.info("attached", extra={"address": address})
            await self._exchange(call)
        finally:
            await channel.close()
        return self._ending and not self._stopped

    async def _greet(self, call: Any) -> None:
        partials = [pb.Partial(transfer=name, received=received) for name, received in self._assembler.fresh()]
        hello = pb.Hello(protocol=PROTOCOL, software=self._software, codecs=[pb.CODEC_ZSTD], partials=partials)
        # a call that is refused ends before it is written to; its status says why
        with contextlib.suppress(asyncio.InvalidStateError):
            await call.write(pb.Upstream(hello=hello).SerializeToString())
        frame = parse_downstream(await _read(call))
        if frame.WhichOneof("kind") != "welcome":
            raise ProtocolError("the coordinator's first message is no greeting")
        self._limits.clear()
        self._queue.restart(partials_of(frame.welcome), packs(frame.welcome.codecs))
        for run, data in self._last.items():
            self._queue.put(run, data, first=True)
        self._last.clear()

    async def _exchange(self, call: Any) -> None:
        reader, writer = asyncio.ensure_future(self._read(call)), asyncio.ensure_future(self._write(call))
        try:
            await asyncio.wait({reader, writer}, return_when=asyncio.FIRST_COMPLETED)
            if writer.done() and not reader.done() and writer.exception() is None:
                # this side has ended the stream; the coordinator ends it, too
                await asyncio.wait({reader}, timeout=2)
            elif not reader.done():
                await asyncio.wait({reader}, timeout=2)  # it knows the status, which says more
            for task in (reader, writer):
                if task.done():
                    task.result()
        finally:
            for task in (reader, writer):
                task.cancel()
            await asyncio.gather(reader, writer, return_exceptions=True)

    async def _write(self, call: Any) -> None:
        loop, until = asyncio.get_running_loop(), None
        while True:
            if self._ending and until is None:
                until = loop.time() + self._patience.flush
            found = self._queue.next()
            if found is not None and (until is None or loop.time() < until):
                for message in found[1]:
                    self._remember(message)
                await call.write(found[0])
            elif self._ending:
                await call.done_writing()
                return
            else:
                self._wake.clear()
                await self._wake.wait()

    def _remember(self, message: Outgoing) -> None:
        self._last.pop(message.run, None)
        self._last[message.run] = message.data
        if len(self._last) > _REMEMBERED:
            del self._last[next(iter(self._last))]

    async def _read(self, call: Any) -> None:
        while (data := await call.read()) is not EOF:
            frame = parse_downstream(data)
            if frame.WhichOneof("kind") != "chunks":
                raise ProtocolError("the coordinator greets twice")
            for chunk in frame.chunks.chunks:
                message = self._assembler.take(chunk)
                if message is not None:
                    self._heard(message[0], chunk.allowance)
                    await self._incoming.put(message)
                    if len(message[1]) > MOST_DATA:
                        # one long message waits at a time; more stay on the network
                        await self._incoming.join()
        await _raise_status(call)

    def _heard(self, run: str, allowance: int) -> None:
        """Notes what the coordinator wants of a run now: neither what it has, nor what is longer."""
        self._last.pop(run, None)
        if allowance > CONTROL_BYTES:
            self._limits[run] = allowance
        else:
            self._limits.pop(run, None)
        self._queue.drop_longer(run, max(allowance, CONTROL_BYTES))
        self._wake.set()


async def _read(call: Any) -> bytes:
    data = await call.read()
    if data is EOF:
        await _raise_status(call)
        raise ProtocolError("the coordinator ended the stream without a greeting")
    return bytes(data)


async def _raise_status(call: Any) -> None:
    """Raises the status of a call that has ended, unless it is fine."""
    code = await call.code()
    if code is not grpc.StatusCode.OK:
        nothing = grpc.aio.Metadata()
        raise grpc.aio.AioRpcError(code, nothing, nothing, await call.details(), None)
