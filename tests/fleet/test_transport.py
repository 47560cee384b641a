"""Sites and coordinators over real sockets with real certificates."""

import asyncio
from collections.abc import Coroutine
from datetime import timedelta
from typing import Any

import grpc
import numpy as np
import pytest
from cryptography import x509

from cohortium.core.messages import CONTROL_BYTES
from cohortium.engines.fleet import chunks
from cohortium.engines.fleet.chunks import LEAST_DATA, Outgoing, frame
from cohortium.engines.fleet.link import METHOD
from cohortium.engines.fleet.v1 import fleet_pb2 as pb

from . import wires

EOF_ = grpc.aio.EOF
HELLO = pb.Upstream(hello=pb.Hello(protocol=1)).SerializeToString()


@pytest.fixture(scope="module")
def authority():
    return wires.Authority()


def run(work: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await work

    asyncio.run(bounded())


async def first(link) -> tuple[str, bytes]:
    async with asyncio.timeout(10):
        return await anext(link.messages())


def noise(size: int) -> bytes:
    return np.random.default_rng(1).bytes(size)


async def refusal(files, address: str, *frames: bytes) -> grpc.StatusCode:
    """Returns how a bare stream ends that sends these frames."""
    # gRPC says INTERNAL now and then if a call ends while it is being written to
    while (code := await ended(files, address, *frames)) is grpc.StatusCode.INTERNAL:
        pass
    return code


async def ended(files, address: str, *frames: bytes) -> grpc.StatusCode:
    authorities, chain, key = files
    async with grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(authorities, key, chain)) as channel:
        call = channel.stream_stream(METHOD)()
        try:
            for data in frames:
                await call.write(data)
            while await call.read() is not EOF_:
                pass
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass
        return await call.code()


def test_messages_go_both_ways(authority) -> None:
    async def work() -> None:
        async with wires.coordinator(authority) as (one, address), wires.link(authority.person("a"), address) as link:
            exchange = one.exchange
            await exchange.until(lambda: "a" in exchange.outboxes)
            small, large = b"small", noise(5 << 20)
            exchange.outboxes["a"].send("r", small, len(large))
            assert await first(link) == ("r", small)
            assert link.state.connected == address
            await link.send("r", large)
            await link.send("other", small)
            await exchange.until(lambda: len(exchange.heard_of) == 2)
            assert sorted(exchange.heard_of) == [("a", "other", small), ("a", "r", large)]
            text = b"packs well " * 100_000
            exchange.outboxes["a"].send("r", text, CONTROL_BYTES)
            assert await first(link) == ("r", text)
        assert not exchange.outboxes

    run(work())


def test_one_long_message_waits_at_a_time(authority) -> None:
    async def work() -> None:
        async with wires.coordinator(authority) as (one, address), wires.link(authority.person("a"), address) as link:
            exchange, long = one.exchange, noise(1 << 20)
            await exchange.until(lambda: "a" in exchange.outboxes)
            for number in range(5):
                exchange.outboxes["a"].send(f"r{number}", long, CONTROL_BYTES)
            await exchange.until(lambda: link._incoming.qsize() == 1)
            await asyncio.sleep(0.3)
            assert link._incoming.qsize() == 1
            heard = [await first(link) for _ in range(5)]
            assert sorted(heard) == [(f"r{number}", long) for number in range(5)]

    run(work())


def test_a_long_message_stays_until_it_may_be_sent(authority) -> None:
    async def work() -> None:
        async with wires.coordinator(authority) as (one, address), wires.link(authority.person("a"), address) as link:
            exchange, large = one.exchange, noise(100_000)
            await link.send("r", large)
            await link.send("s", b"small")
            await exchange.until(lambda: bool(exchange.heard_of))
            assert exchange.heard_of == [("a", "s", b"small")]
            exchange.outboxes["a"].send("r", b"again", len(large))
            await exchange.until(lambda: len(exchange.heard_of) == 2)
            assert exchange.heard_of[1] == ("a", "r", large)

    run(work())


@pytest.mark.parametrize("upward", [True, False])
def test_a_long_message_goes_on_after_the_server_was_killed(authority, upward, monkeypatch) -> None:
    async def work() -> None:
        data = noise(20 << 20)
        one = wires.Coordinator(authority)
        address = await one.serve()
        exchange, send = one.exchange, chunks.Queue.next

        def some(queue: chunks.Queue, *given: int) -> Any:
            half_way = any(message.sent > 5 << 20 for waiting in queue._runs.values() for message in waiting)
            return None if half_way else send(queue, *given)

        monkeypatch.setattr(chunks.Queue, "next", some)
        exchange.outstanding["a"] = ("r", b"asks", len(data)) if upward else ("r", data, CONTROL_BYTES)
        async with wires.link(authority.person("a"), address) as link:
            if upward:
                await link.send("r", data)
                inside = lambda: one.gateway._assemblers["a"].held if one.gateway._assemblers else 0  # noqa: E731
            else:
                inside = lambda: link._assembler.held  # noqa: E731
            await exchange.until(lambda: inside() > 4 << 20)
            await one.server.stop(None)
            before = inside()
            assert 0 < before < len(data)
            monkeypatch.setattr(chunks.Queue, "next", send)
            begun: list[int] = []
            take = chunks.Assembler.take
            monkeypatch.setattr(
                chunks.Assembler,
                "take",
                lambda self, chunk: (chunk.total == len(data) and begun.append(chunk.offset)) or take(self, chunk),
            )
            await one.serve(int(address.rsplit(":", 1)[1]))
            if upward:
                await exchange.until(lambda: ("a", "r", data) in exchange.heard_of, 20)
            else:
                assert await first(link) == ("r", data)
            assert begun[0] == before
        await one.stop()

    run(work())


def test_a_link_goes_to_the_next_address(authority) -> None:
    async def work() -> None:
        async with wires.coordinator(authority) as (second, other):
            one = wires.Coordinator(authority)
            address = await one.serve()
            async with wires.link(authority.person("a"), address, other) as link:
                await one.exchange.until(lambda: "a" in one.exchange.outboxes)
                await one.stop()
                await link.send("r", b"not lost")
                await second.exchange.until(lambda: bool(second.exchange.heard_of))
                assert second.exchange.heard_of == [("a", "r", b"not lost")]
                assert link.state.connected == other

    run(work())


def test_nothing_is_lost_by_many_broken_streams(authority) -> None:
    async def work() -> None:
        async with wires.coordinator(authority) as (one, address), wires.link(authority.person("a"), address) as link:
            exchange = one.exchange
            for number in range(60):
                if number % 10 == 5:
                    await exchange.until(lambda: "a" in exchange.outboxes)
                    exchange.outboxes["a"].close("a test")
                await link.send(f"run {number}", b"%d" % number)
            await exchange.until(lambda: len(set(exchange.heard_of)) == 60)

    run(work())


def test_who_has_no_site_certificate_of_this_authority_is_refused(authority) -> None:
    async def work() -> None:
        stranger, refused = wires.Authority(), grpc.StatusCode.PERMISSION_DENIED
        down, nobody = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNAUTHENTICATED
        uri = x509.UniformResourceIdentifier
        async with wires.coordinator(authority) as (one, address), wires.link(authority.person("b"), address) as other:
            await one.exchange.until(lambda: "b" in one.exchange.outboxes)
            site = authority.person("a")
            _, chain, key = stranger.person("a")
            for files, expected in [
                ((authority.pem, None, None), down),
                ((authority.pem, chain, key), down),
                ((stranger.pem, *site[1:]), down),  # the site refuses the coordinator
                (authority.person("a", lasts=timedelta(hours=-1)), down),
                (authority.host(), down),  # not for clients
                (authority.person("b", role="operator"), refused),
                (authority.person("b", role="researcher"), refused),
                (authority.person("b", role="root"), nobody),
                (authority.issue([uri("cohortium:site:a"), uri("cohortium:site:b")]), nobody),
                (authority.issue([uri("cohortium:site:b/../a")]), nobody),
                (authority.issue([x509.DNSName("b")]), nobody),
            ]:
                found = await refusal(files, address, HELLO)
                assert found is expected, (found, expected, files[1])
            assert list(one.exchange.outboxes) == ["b"] and one.exchange.attached == 1
            one.exchange.outboxes["b"].send("r", b"undisturbed", 0)
            assert await first(other) == ("r", b"undisturbed")

    run(work())


def test_a_name_is_taken_from_the_certificate_only(authority) -> None:
    async def work() -> None:
        async with wires.coordinator(authority) as (one, address), wires.link(authority.person("a"), address) as link:
            await link.send("r", b"MaskedUpdate of site b")
            await one.exchange.until(lambda: bool(one.exchange.heard_of))
            assert one.exchange.heard_of[0][0] == "a"

    run(work())


def test_a_newer_stream_takes_over(authority) -> None:
    async def work() -> None:
        async with wires.coordinator(authority) as (one, address), wires.link(authority.person("a"), address):
            await one.exchange.until(lambda: "a" in one.exchange.outboxes)
            before = one.exchange.outboxes["a"]
            patient = wires.Patience(first=60, most=60)
            async with wires.link(authority.person("a"), address, patience=patient):
                await one.exchange.until(lambda: one.exchange.outboxes.get("a") not in (before, None))
                await one.exchange.until(before.closed.done)
                assert one.gateway.sites == ("a",)

    run(work())


def test_revocation_closes_an_open_stream_at_once(authority) -> None:
    async def work() -> None:
        async with (
            wires.coordinator(authority) as (one, address),
            wires.link(authority.person("a"), address) as link,
            wires.link(authority.person("b"), address),
        ):
            await one.exchange.until(lambda: len(one.exchange.outboxes) == 2)
            one.refused["a"] = "revoked"
            one.gateway.recheck()
            await one.exchange.until(lambda: list(one.exchange.outboxes) == ["b"])
            await one.exchange.until(lambda: "revoked" in (link.state.error or ""))
            assert one.exchange.attached == 2

    run(work())


def test_a_stream_ends_with_its_certificate(authority) -> None:
    async def work() -> None:
        async with wires.coordinator(authority) as (one, address):
            # it is valid for an hour, and long enough for a busy machine to attach
            one.ahead = timedelta(minutes=59, seconds=54)
            async with wires.link(authority.person("a"), address) as link:
                await one.exchange.until(lambda: "a" in one.exchange.outboxes)
                await one.exchange.until(lambda: "expired" in (link.state.error or ""), 20)
                assert not one.exchange.outboxes

    run(work())


def test_renewed_credentials_are_used_on_both_sides(authority) -> None:
    async def work() -> None:
        async with wires.coordinator(authority) as (one, address):
            files = [authority.person("a")]
            async with wires.link(lambda: files[0], address) as link:
                await one.exchange.until(lambda: "a" in one.exchange.outboxes)
                before = one.exchange.outboxes["a"].who.serial
                files[0] = authority.person("a")
                one.files = authority.host()
                link.renewed()
                await link.send("r", b"meanwhile")
                await one.exchange.until(
                    lambda: "a" in one.exchange.outboxes and one.exchange.outboxes["a"].who.serial != before
                )
                await one.exchange.until(lambda: bool(one.exchange.heard_of))
                assert link.state.error is None

    run(work())


def test_the_server_certificate_changes_without_a_restart(authority) -> None:
    async def work() -> None:
        later = wires.Authority()
        async with wires.coordinator(authority) as (one, address):
            site = (later.pem, *authority.person("a")[1:])
            assert await refusal(site, address, HELLO) is grpc.StatusCode.UNAVAILABLE
            _, chain, key = later.host()
            one.files = (authority.pem, chain, key)
            async with wires.link(site, address):
                await one.exchange.until(lambda: "a" in one.exchange.outboxes)

    run(work())


def chunk(**changes: Any) -> bytes:
    fields = {"run": "r", "transfer": b"t" * 16, "total": 3, "offset": 0, "data": b"abc"}
    return frame([(pb.Chunk(**(fields | changes)).SerializeToString(), b"")])


BAD = {
    "no frame": [b"\xff" * 40],
    "nothing": [b""],
    "chunks before the greeting": [chunk()],
    "no protocol": [pb.Upstream(hello=pb.Hello()).SerializeToString()],
    "two greetings": [HELLO, HELLO],
    "rubbish": [HELLO, b"\xff\x00\xff"],
    "oversized": [HELLO, chunk(total=CONTROL_BYTES + 1, data=bytes(CONTROL_BYTES + 1))],
    "out of order": [HELLO, chunk(offset=1)],
    "longer than stated": [HELLO, chunk(total=2)],
    "no name": [HELLO, chunk(run="")],
    "a codec": [HELLO, chunk(codec=5)],
    "too many chunks": [HELLO, frame([Outgoing("r", b"x").chunk()] * 65)],
    "partials": [pb.Upstream(hello=pb.Hello(protocol=1, partials=[pb.Partial()])).SerializeToString()],
}


def test_wrong_frames_close_their_own_stream_only(authority) -> None:
    async def work() -> None:
        async with wires.coordinator(authority) as (one, address), wires.link(authority.person("b"), address) as other:
            await one.exchange.until(lambda: "b" in one.exchange.outboxes)
            files = authority.person("a")
            for name, frames in BAD.items():
                assert await refusal(files, address, *frames) is grpc.StatusCode.INVALID_ARGUMENT, name
            enormous = await refusal(files, address, HELLO, bytes(chunks.MOST_FRAME + LEAST_DATA))
            assert enormous is not grpc.StatusCode.OK
            await one.exchange.until(lambda: list(one.exchange.outboxes) == ["b"])
            assert not one.exchange.heard_of
            await other.send("r", b"undisturbed")
            await one.exchange.until(lambda: bool(one.exchange.heard_of))

    run(work())


def test_who_does_not_greet_or_sends_too_much_is_closed(authority) -> None:
    async def work() -> None:
        files, limits = authority.person("a"), {"hello": 0.1, "pause": lambda site, size: float("inf")}
        async with wires.coordinator(authority, **limits) as (_, address):
            assert await refusal(files, address) is grpc.StatusCode.DEADLINE_EXCEEDED
            assert await refusal(files, address, HELLO, chunk()) is grpc.StatusCode.RESOURCE_EXHAUSTED
        async with (
            wires.coordinator(authority, backlog=1000) as (one, address),
            wires.link(files, address),
        ):
            await one.exchange.until(lambda: "a" in one.exchange.outboxes)
            box = one.exchange.outboxes["a"]
            box.send("r", bytes(2000), 0)
            assert box.closed.result().code is grpc.StatusCode.RESOURCE_EXHAUSTED

    run(work())


def test_random_frames_over_a_real_socket_close_their_own_stream_only(authority) -> None:
    async def work() -> None:
        random = np.random.default_rng(3)
        good = [HELLO, chunk(), chunk(total=5000, data=bytes(4500))]
        async with wires.coordinator(authority) as (one, address), wires.link(authority.person("b"), address) as other:
            await one.exchange.until(lambda: "b" in one.exchange.outboxes)
            authorities, chain, key = authority.person("a")
            secrets = grpc.ssl_channel_credentials(authorities, key, chain)
            async with grpc.aio.secure_channel(address, secrets) as channel:
                for _ in range(300):
                    call = channel.stream_stream(METHOD)()
                    data = bytearray(good[random.integers(len(good))])
                    data[random.integers(len(data))] ^= random.integers(1, 256)
                    try:
                        await call.write(HELLO)
                        await call.write(bytes(data))
                        await call.done_writing()
                        while await call.read() is not EOF_:
                            pass
                    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                        pass
                    await call.code()
            assert all(site == "a" for site, *_ in one.exchange.heard_of)
            await other.send("r", b"undisturbed")
            await one.exchange.until(lambda: ("b", "r", b"undisturbed") in one.exchange.heard_of)

    run(work())
