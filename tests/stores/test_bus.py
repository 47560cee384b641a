"""The bus over Valkey: in order, short-lived, and never an error where the server comes back."""

import asyncio
import os
import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from cohortium.adapters import bus, servers
from cohortium.adapters.bus import RedisBus
from cohortium.adapters.embedded import Stores
from cohortium.coordinator.ports import Unavailable

from .world import until

Fresh = Callable[[str], str]


async def reading(messages: RedisBus, box: str) -> tuple[list[bytes], "asyncio.Task[None]"]:
    """Reads a box from now on: until a first message shows that it does."""
    found: list[bytes] = []

    async def read() -> None:
        async for data in messages.take(box):
            found.append(data)

    task = asyncio.ensure_future(read())

    async def arrived() -> bool:
        with suppress(Unavailable):
            await messages.put(box, b"?")
        return bool(found)

    await until(arrived)
    return found, task


async def ended(task: "asyncio.Task[None]") -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


def test_messages_come_in_order_whatever_their_size(stores: Stores, fresh: Fresh) -> None:
    async def scenario() -> None:
        async with bus.connected(stores.redis_url) as messages:
            box = fresh("box")
            await messages.put(box, b"before")
            found, task = await reading(messages, box)
            sent = [b"%d" % number for number in range(50)] + [bytes(3 << 20), b""]
            for data in sent:
                await messages.put(box, data)

            async def all_there() -> bool:
                return len([data for data in found if data != b"?"]) == len(sent)

            await until(all_there)
            assert [data for data in found if data != b"?"] == sent
            raw = messages._redis

            async def trimmed() -> bool:
                return await raw.xlen(f"cohortium:box:{box}") == 0

            await until(trimmed)
            await ended(task)
            for key in await raw.keys("cohortium:*"):
                assert await raw.ttl(key) > 0

    asyncio.run(scenario())


def test_values_are_kept_for_a_while(stores: Stores, fresh: Fresh) -> None:
    async def scenario() -> None:
        async with bus.connected(stores.redis_url) as messages:
            one, two = fresh("key"), fresh("key")
            await messages.keep(one, b"1", 60)
            await messages.keep(two, b"2", 0.05)
            assert (await messages.look([one]))[one] == b"1"

            async def gone() -> bool:
                return two not in await messages.look([one, two])

            await until(gone)
            await messages.forget(one)
            assert await messages.look([one, two]) == {}
            assert await messages.look([]) == {}

    asyncio.run(scenario())


def test_a_rate_is_shared(stores: Stores, fresh: Fresh) -> None:
    async def scenario() -> None:
        async with bus.connected(stores.redis_url) as one, bus.connected(stores.redis_url) as two:
            key = fresh("rate")
            answers = [await each.allow(key, 0.001, 3) for each in (one, two) * 3]
            assert answers == [True] * 3 + [False] * 3
            key = fresh("rate")
            assert await one.allow(key, 50, 1)

            async def again() -> bool:
                return await two.allow(key, 50, 1)

            await until(again)

    asyncio.run(scenario())


def test_a_reader_goes_on_after_a_kill_of_the_server(stores: Stores, short_folder: Path, fresh: Fresh) -> None:
    socket = short_folder / "shared" / "stores" / "sockets" / servers.VALKEY_SOCKET

    async def scenario() -> None:
        async with bus.connected(stores.redis_url) as messages:
            box = fresh("box")
            found, task = await reading(messages, box)
            process = int((await messages._redis.info("server"))["process_id"])
            subprocess.run(["/bin/kill", "-9", str(process)], check=True)

            async def back() -> bool:
                with suppress(Unavailable):
                    await messages.put(box, b"after")
                return b"after" in found

            await until(back)
            assert await servers.answers(socket)
            assert not task.done()
            await ended(task)

    asyncio.run(scenario())


def test_a_server_that_hangs_holds_nobody_for_long(stores: Stores, fresh: Fresh) -> None:
    async def scenario() -> None:
        async with bus.connected(stores.redis_url) as messages:
            key = fresh("key")
            await messages.keep(key, b"1", 60)
            process = int((await messages._redis.info("server"))["process_id"])
            os.kill(process, signal.SIGSTOP)
            try:
                async with asyncio.timeout(10):
                    with pytest.raises(Unavailable):
                        await messages.look([key])
            finally:
                os.kill(process, signal.SIGCONT)

            async def back() -> bool:
                with suppress(Unavailable):
                    # each answer is that of its own question
                    found = await asyncio.gather(*(messages.look([key, str(place)]) for place in range(10)))
                    return found == [{key: b"1"}] * 10
                return False

            await until(back)

    asyncio.run(scenario())
