"""The bus over Redis (`cohortium.coordinator.ports.Bus`): everything on it expires, and nothing on it is needed.

A box is a stream with one reader at a time, who trims what was read. Its time to live is set by the first message and
renewed by its reader, so a box that nobody reads goes, however much is put into it.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from redis import asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import ConstantBackoff
from redis.exceptions import RedisError

from cohortium.adapters.postgres import sentence
from cohortium.coordinator.ports import Unavailable
from cohortium.core.errors import CohortiumError

_PREFIX = "cohortium:"
_BOX_SECONDS = 120
_MOST = 4096
"""Messages in a box at most; older ones go first."""
_BLOCK_SECONDS = 5.0
_SECONDS = 15.0
_AT_MOST = 3.0
"""Seconds of a short call, whatever a server that hangs does to the connection: leaders wait for these."""
_AT_ONCE = 16
_FIELD = b"d"
_OUTAGES = (RedisError, OSError, TimeoutError)

# the server's clock, so that processes need not agree on theirs
_ALLOW = """
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1000000
local rate, burst = tonumber(ARGV[1]), tonumber(ARGV[2])
local kept = redis.call('HMGET', KEYS[1], 'left', 'at')
local left, at = tonumber(kept[1] or burst), tonumber(kept[2] or now)
left = math.min(burst, left + math.max(0, now - at) * rate)
local allowed = 0
if left >= 1 then left = left - 1; allowed = 1 end
redis.call('HSET', KEYS[1], 'left', string.format('%.6f', left), 'at', string.format('%.6f', now))
redis.call('EXPIRE', KEYS[1], math.ceil(math.min(86400, burst / math.max(rate, 0.000001))) + 1)
return allowed
"""


class RedisBus:
    """Use `connected`. It belongs to one event loop."""

    def __init__(self, url: str) -> None:
        retry = Retry(ConstantBackoff(0.02), 1)
        try:
            self._redis: redis.Redis = redis.Redis.from_url(
                url,
                protocol=2,
                decode_responses=False,
                socket_connect_timeout=3,
                socket_timeout=_SECONDS,
                **({} if url.startswith("unix") else {"socket_keepalive": True}),
                health_check_interval=0,
                retry=retry,
            )
        except ValueError:
            # what the library says may hold a password
            raise CohortiumError("the Redis URL cannot be read; write redis://HOST:PORT/0 or unix:///PATH") from None
        self._allow = self._redis.register_script(_ALLOW)

    async def close(self) -> None:
        """Closes every connection."""
        with suppress(*_OUTAGES):
            await self._redis.aclose()

    async def put(self, box: str, data: bytes) -> None:
        """Puts a message into a box. After `Unavailable` it may be there, and then it may come twice."""
        key = _PREFIX + "box:" + box
        async with _speaking(_SECONDS):
            pipeline = self._redis.pipeline(transaction=True)
            pipeline.xadd(key, {_FIELD: data}, maxlen=_MOST, approximate=True)
            pipeline.expire(key, _BOX_SECONDS, nx=True)
            await pipeline.execute()

    async def take(self, box: str) -> AsyncGenerator[bytes, None]:
        """Yields what is put into a box after this was first asked, for ever; it never raises for a lost server."""
        key = _PREFIX + "box:" + box
        last: bytes | None = None
        pause = 0.02
        while True:
            _end_if_cancelled()
            try:
                newest = await self._newest(key)
                # a stream of its own after a restart, or another clock: all in it is new
                if last is None:
                    last = newest
                elif _order(newest) < _order(last):
                    last = b"0-0"
                found = await self._redis.xread({key: last}, count=_AT_ONCE, block=int(_BLOCK_SECONDS * 1000))
                pause = 0.02
                for identity, fields in _entries(found):
                    last = identity
                    data = fields.get(_FIELD)
                    if data is not None:
                        yield data
                if found:
                    await self._read(key, last)
                else:
                    await self._redis.expire(key, _BOX_SECONDS)
            except _OUTAGES:
                await asyncio.sleep(pause)
                pause = min(2 * pause, 1.0)

    async def keep(self, key: str, value: bytes, seconds: float) -> None:
        """Keeps a value for some seconds."""
        async with _speaking():
            await self._redis.set(_PREFIX + key, value, px=max(1, round(seconds * 1000)))

    async def look(self, keys: Sequence[str]) -> Mapping[str, bytes]:
        """Returns the values that are still kept, by key."""
        if not keys:
            return {}
        async with _speaking():
            values = await self._redis.mget([_PREFIX + key for key in keys])
        return {key: _bytes(value) for key, value in zip(keys, values, strict=True) if value is not None}

    async def forget(self, key: str) -> None:
        """Forgets a value."""
        async with _speaking():
            await self._redis.delete(_PREFIX + key)

    async def allow(self, key: str, per_second: float, burst: int) -> bool:
        """Returns whether one more is within a rate that all processes share."""
        async with _speaking():
            return bool(await self._allow(keys=[f"{_PREFIX}rate:{key}"], args=[per_second, burst]))

    async def _newest(self, key: str) -> bytes:
        entries = await self._redis.xrevrange(key, count=1)
        if entries:
            return _bytes(entries[0][0])
        # read and trimmed: the stream knows its last id; no stream: nothing is older than what comes
        try:
            return _bytes((await self._redis.xinfo_stream(key))["last-generated-id"])
        except RedisError as error:
            if "no such key" in str(error):
                return b"0-0"
            raise

    async def _read(self, key: str, last: bytes) -> None:
        milliseconds, number = _order(last)
        pipeline = self._redis.pipeline(transaction=False)
        pipeline.xtrim(key, minid=f"{milliseconds}-{number + 1}", approximate=False)
        pipeline.expire(key, _BOX_SECONDS)
        await pipeline.execute()


@asynccontextmanager
async def connected(url: str) -> AsyncGenerator[RedisBus, None]:
    """Yields a bus; connects only when something is asked of it."""
    bus = RedisBus(url)
    try:
        yield bus
    finally:
        await bus.close()


@asynccontextmanager
async def _speaking(seconds: float = _AT_MOST) -> AsyncGenerator[None, None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except _OUTAGES as error:
        raise Unavailable(f"the bus cannot be reached: {sentence(error)}") from None


def _end_if_cancelled() -> None:
    """Ends a task that was cancelled while the library reconnected, which turns that into an error of the link."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def _bytes(value: Any) -> bytes:
    assert isinstance(value, bytes)
    return value


def _order(identity: bytes) -> tuple[int, int]:
    milliseconds, _, number = identity.partition(b"-")
    return int(milliseconds), int(number or 0)


def _entries(found: Any) -> list[tuple[bytes, dict[bytes, bytes]]]:
    return [(identity, fields or {}) for _, entries in found or () for identity, fields in entries]
