"""The coordinator's end of the sites' streams.

A site's name is read from the certificate that TLS has checked, and from nowhere else. What a site sends is bounded
before it is kept, and whatever is wrong with it closes its own stream only.
"""

import asyncio
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol

import grpc

from cohortium.coordinator.authority import Principal, principal_of
from cohortium.core.codec import Data
from cohortium.core.errors import ProtocolError
from cohortium.engines.fleet.chunks import (
    Assembler,
    Queue,
    packs,
    parse_upstream,
    partials_of,
)
from cohortium.engines.fleet.stream import EOF, KEEPALIVE, PROTOCOL
from cohortium.engines.fleet.stream import OPTIONS as STREAM
from cohortium.engines.fleet.v1 import fleet_pb2 as pb

log = logging.getLogger("cohortium.fleet")
SERVICE = "cohortium.fleet.v1.Fleet"
Code = grpc.StatusCode


class Outbox(Protocol):
    """A site's stream, as it is written to. Both methods return at once."""

    def send(self, run: str, data: bytes, answer_limit: int) -> None:
        """Queues a message; the site may answer the run with at most `answer_limit` bytes from now on."""

    def close(self, reason: str) -> None:
        """Ends the stream."""


class Exchange(Protocol):
    """Where the streams' messages go to and come from."""

    async def attach(self, site: str, outbox: Outbox, version: str = "") -> None:
        """Takes a site's stream into use, in place of an older one."""

    async def detach(self, site: str, outbox: Outbox) -> None:
        """Forgets a site's stream, unless another one is in use by now."""

    async def heard(self, site: str, run: str, data: Data) -> None:
        """Brings a site's message to the run's leader."""


Admit = Callable[[str, int, datetime], str | None]
"""Returns why a site with a certificate (name, serial, issued) is not let in, or None. It must not block."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a site may ask of a gateway.

    Attributes:
        hello: seconds until its first message.
        backlog: bytes that wait for it, at the most; a slower site's stream is closed.
        keep: seconds that unfinished messages are kept after its stream was lost.
        pause: returns, for a site and a frame's bytes, how many seconds to wait before the next is read; infinity
            closes the stream.
    """

    hello: float = 10.0
    backlog: int = 1 << 30
    keep: float = 600.0
    pause: Callable[[str, int], float] = field(default=lambda site, size: 0.0)


class _Closed(Exception):
    def __init__(self, code: grpc.StatusCode, reason: str) -> None:
        super().__init__(reason)
        self.code, self.reason = code, reason


class _Stream:
    """One site's stream."""

    def __init__(self, who: Principal, assembler: Assembler, limits: Limits) -> None:
        self.who, self.assembler, self.queue = who, assembler, Queue()
        self.closed: asyncio.Future[_Closed] = asyncio.get_running_loop().create_future()
        self._limits = limits
        self._wake = asyncio.Event()

    def send(self, run: str, data: bytes, answer_limit: int) -> None:
        if self.closed.done():
            return
        self.assembler.allow(run, answer_limit)
        self.queue.put(run, data, answer_limit)
        if self.queue.backlog > self._limits.backlog:
            self.end(Code.RESOURCE_EXHAUSTED, "too much waits for this site")
        self._wake.set()

    def close(self, reason: str) -> None:
        self.end(Code.ABORTED, reason)

    def end(self, code: grpc.StatusCode, reason: str) -> None:
        if not self.closed.done():
            self.closed.set_result(_Closed(code, reason))

    async def write(self, context: Any) -> None:
        """Writes what is queued, for ever."""
        while True:
            found = self.queue.next()
            if found is None:
                self._wake.clear()
                await self._wake.wait()
            else:
                await context.write(found[0])

    async def read(self, context: Any, exchange: Exchange) -> None:
        """Reads until the site ends its stream."""
        site = self.who.name
        while (data := await context.read()) is not EOF:
            frame = parse_upstream(data)
            if frame.WhichOneof("kind") != "chunks":
                raise ProtocolError("a frame was refused: a greeting comes first, and once")
            for chunk in frame.chunks.chunks:
                # a newer stream may have taken the assembler over while this one waited
                if self.closed.done():
                    return
                message = self.assembler.take(chunk)
                if message is not None:
                    await exchange.heard(site, *message)
            pause = self._limits.pause(site, len(data))
            if pause > 0:
                if math.isinf(pause):
                    raise _Closed(Code.RESOURCE_EXHAUSTED, "this site sends too much")
                await asyncio.sleep(pause)


class Gateway:
    """Serves `Fleet` for any number of sites.

    Args:
        exchange: where messages go.
        admit: says who is let in.
        name: this coordinator's, for people.
        software: its version, for people.
        clock: the time, with its zone.
        limits: what sites may ask.
    """

    def __init__(
        self,
        exchange: Exchange,
        admit: Admit,
        name: str,
        software: str,
        clock: Callable[[], datetime],
        limits: Limits = Limits(),
    ) -> None:
        self._exchange, self._admit, self._clock, self._limits = exchange, admit, clock, limits
        self._name, self._software = name, software
        self._streams: dict[str, _Stream] = {}
        self._assemblers: dict[str, Assembler] = {}
        self._forget: dict[str, asyncio.TimerHandle] = {}

    def handler(self) -> "grpc.GenericRpcHandler[Any, Any]":
        """Returns what a server serves; frames stay bytes until they are bounded."""
        attach = grpc.stream_stream_rpc_method_handler(self._attach)
        return grpc.method_handlers_generic_handler(SERVICE, {"Attach": attach})

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that are attached here."""
        return tuple(self._streams)

    def recheck(self) -> None:
        """Asks about every open stream again whether it is let in, and closes those that are not."""
        for stream in list(self._streams.values()):
            reason = self._refused(stream.who)
            if reason is not None:
                stream.end(Code.PERMISSION_DENIED, reason)

    def stop(self) -> None:
        """Ends all streams, so that the sites go to another coordinator."""
        for stream in list(self._streams.values()):
            stream.end(Code.UNAVAILABLE, "this coordinator stops")
        for timer in self._forget.values():
            timer.cancel()
        self._forget.clear()

    def _refused(self, who: Principal) -> str | None:
        if who.role != "site":
            return "only a site's certificate opens a stream"
        if who.not_after <= self._clock():
            return "the certificate has expired"
        return self._admit(who.name, who.serial, who.issued)

    async def _attach(self, _: object, context: Any) -> None:
        who = None
        try:
            who = peer(context)
            await self._serve(who, context)
        except (_Closed, ProtocolError) as error:
            code = error.code if isinstance(error, _Closed) else Code.INVALID_ARGUMENT
            site = who.name if who else None
            log.warning("a stream was closed", extra={"site": site, "code": code.name, "reason": str(error)})
            await context.abort(code, str(error)[:500])

    async def _serve(self, who: Principal, context: Any) -> None:
        reason = self._refused(who)
        if reason is not None:
            raise _Closed(Code.PERMISSION_DENIED, reason)
        hello = await self._hello(context)
        # nothing is awaited from here until the stream is the site's only one
        stream, older = _Stream(who, self._assembler(who.name), self._limits), self._streams.get(who.name)
        if older is not None:
            older.end(Code.ABORTED, "a newer stream of this site took over")
        self._streams[who.name] = stream
        ahead = (who.not_after - self._clock()).total_seconds()
        timer = asyncio.get_running_loop().call_later(
            ahead, stream.end, Code.PERMISSION_DENIED, "the certificate has expired"
        )
        try:
            stream.queue.restart(partials_of(hello), packs(hello.codecs))
            await context.write(self._welcome(stream.assembler.fresh()))
            if (reason := self._refused(who)) is not None:  # it may have been revoked before it said Hello
                raise _Closed(Code.PERMISSION_DENIED, reason)
            await self._exchange.attach(who.name, stream, hello.software[:100])
            log.info("a site attached", extra={"site": who.name, "software": hello.software[:100]})
            await _until_closed(stream, context, self._exchange)
        finally:
            timer.cancel()
            stream.end(Code.CANCELLED, "the stream has ended")
            if self._streams.get(who.name) is stream:
                del self._streams[who.name]
                self._forget_later(who.name)
            await self._exchange.detach(who.name, stream)

    async def _hello(self, context: Any) -> pb.Hello:
        try:
            async with asyncio.timeout(self._limits.hello):
                data = await context.read()
        except TimeoutError:
            raise _Closed(Code.DEADLINE_EXCEEDED, "no greeting came in time") from None
        if data is EOF:
            raise ProtocolError("a stream was refused: it ended without a greeting")
        frame = parse_upstream(data)
        if frame.WhichOneof("kind") != "hello" or frame.hello.protocol < 1:
            raise ProtocolError("a stream was refused: its first message is no greeting")
        partials_of(frame.hello)
        return frame.hello

    def _welcome(self, partials: list[tuple[bytes, int]]) -> bytes:
        welcome = pb.Welcome(
            protocol=PROTOCOL,
            software=self._software,
            codecs=[pb.CODEC_ZSTD],
            partials=[pb.Partial(transfer=transfer, received=received) for transfer, received in partials],
            keepalive_seconds=KEEPALIVE,
            coordinator=self._name,
        )
        return pb.Downstream(welcome=welcome).SerializeToString()

    def _assembler(self, site: str) -> Assembler:
        timer = self._forget.pop(site, None)
        if timer is not None:
            timer.cancel()
        return self._assemblers.setdefault(site, Assembler())

    def _forget_later(self, site: str) -> None:
        if not self._assemblers[site].held:
            del self._assemblers[site]
            return

        def forget() -> None:
            self._assemblers.pop(site, None)
            self._forget.pop(site, None)

        self._forget[site] = asyncio.get_running_loop().call_later(self._limits.keep, forget)


async def _until_closed(stream: _Stream, context: Any, exchange: Exchange) -> None:
    """Reads and writes until the site ends the stream; raises why it ends otherwise."""
    reader = asyncio.ensure_future(stream.read(context, exchange))
    writer = asyncio.ensure_future(stream.write(context))
    waited: set[asyncio.Future[Any]] = {reader, writer, stream.closed}
    try:
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if stream.closed.done():
            raise stream.closed.result()
        for task in (reader, writer):
            if task.done():
                task.result()
    finally:
        for task in (reader, writer):
            task.cancel()
        await asyncio.gather(reader, writer, return_exceptions=True)


def peer(context: Any) -> Principal:
    """Returns whom the certificate of a call's connection names.

    Raises:
        _Closed: it has none, or one that names nobody of a consortium.
    """
    found = context.auth_context().get("x509_pem_cert", ())
    if len(found) != 1:
        raise _Closed(Code.UNAUTHENTICATED, "a certificate of the consortium is needed")
    try:
        return principal_of(found[0])
    except ProtocolError as error:
        raise _Closed(Code.UNAUTHENTICATED, str(error)) from None


OPTIONS: Sequence[tuple[str, int]] = (
    *STREAM,
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.max_concurrent_streams", 64),
    ("grpc.so_reuseport", 0),
)


def server(handlers: Sequence["grpc.GenericRpcHandler[Any, Any]"]) -> grpc.aio.Server:
    """Returns a server of these services, to be given a port and started."""
    return grpc.aio.server(handlers=tuple(handlers), options=list(OPTIONS))
