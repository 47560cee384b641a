"""Messages in chunks: cut, queued fairly, put together again, and gone on with where a connection was lost.

Nothing here does I/O. Whatever arrives is bounded before it is kept: a message is refused at its first chunk if it is
longer than its run may send now, and a chunk unpacks to what it states, at most `MOST_DATA`.
"""

import hashlib
import zlib
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import zstandard
from google.protobuf.message import DecodeError

from cohortium.core.codec import MAX_MESSAGE_BYTES, Data
from cohortium.core.errors import ProtocolError
from cohortium.core.messages import CONTROL_BYTES
from cohortium.engines.fleet.v1 import fleet_pb2 as pb

M = TypeVar("M", pb.Upstream, pb.Downstream)

MOST_DATA = 512 << 10
"""Most bytes of a message in one chunk."""
LEAST_DATA = 4 << 10
"""Fewest bytes of a message in a chunk that does not end it: many tiny pieces would take more memory than they hold."""
MOST_CHUNKS = 64
"""Most chunks in one frame."""
MOST_FRAME = 1 << 20
"""Most bytes of a frame as it travels."""
MOST_PARTIALS = 64
MOST_SHORT = 1024
"""Most messages of at most `CONTROL_BYTES` that wait at a site."""
_PROBE = 64 << 10
_WORTH = 32 << 10  # shorter messages are not packed: that would cost more than it saves
_GAIN = 0.8  # nor are those that hardly get shorter, as weights and whatever is masked
_DATA_TAG = b"\x32"  # Chunk.data, field 6
_CHUNK_TAG = b"\x0a"  # Chunks.chunks, field 1
_FRAME_TAG = b"\x12"  # Upstream.chunks and Downstream.chunks, field 2


def transfer_id(run: str, data: bytes) -> bytes:
    """Returns the 16 bytes that name a message of a run: the same ones for the same message.

    Hashing long messages whole would cost more than sending them. Their ends say nearly always which it is, and the
    checksum of a message that was cut off finds out if they do not.
    """
    ends = hashlib.blake2b(digest_size=16, person=b"cohortium fleet")
    name = run.encode()
    ends.update(len(name).to_bytes(4, "big") + name + len(data).to_bytes(8, "big"))
    ends.update(data[:_PROBE])
    ends.update(data[-_PROBE:])
    return ends.digest()


class Outgoing:
    """A message on its way out."""

    def __init__(self, run: str, data: bytes, allowance: int = 0) -> None:
        self.run, self.data, self.allowance = run, data, allowance
        self.transfer = transfer_id(run, data)
        self.sent = 0
        self.done = False
        self._resumed = False
        self._packer: zstandard.ZstdCompressor | None = None
        self._probed = False

    @property
    def begun(self) -> bool:
        """Whether a chunk of it was cut on this stream."""
        return self.done or self.sent > 0

    def restart(self, received: int = 0) -> None:
        """Begins anew on another stream, behind the `received` bytes that the other side has."""
        # a receiver that states more than all of it, or all of it, gets it anew
        self.sent = received if 0 < received < len(self.data) else 0
        self.done, self._resumed = False, self.sent > 0

    def chunk(self, most: int = MOST_DATA, pack: bool = False) -> "Encoded":
        """Returns the next chunk, encoded, of at most `most` bytes of the message."""
        begin, end = self.sent, min(self.sent + max(most, LEAST_DATA), len(self.data))
        data: Data = memoryview(self.data)[begin:end]
        head = pb.Chunk(run=self.run, transfer=self.transfer, total=len(self.data), offset=begin)
        if self.allowance:
            head.allowance = self.allowance
        if pack and self._packs():
            assert self._packer is not None
            packed = self._packer.compress(data)
            if len(packed) < len(data):
                data, head.codec = packed, pb.CODEC_ZSTD
        self.sent, self.done = end, end == len(self.data)
        if self.done and self._resumed:
            head.check = zlib.crc32(self.data)
        # the same bytes that protobuf would write, without four copies of the data
        return b"".join((head.SerializeToString(), _DATA_TAG, _length(len(data)))), data

    def _packs(self) -> bool:
        if not self._probed:
            self._probed = True
            if len(self.data) >= _WORTH:
                packer = zstandard.ZstdCompressor(level=1)
                probe = self.data[:_PROBE]
                if len(packer.compress(probe)) < _GAIN * len(probe):
                    self._packer = packer
        return self._packer is not None


Encoded = tuple[bytes, Data]
"""A chunk as it travels: all but its data, then its data."""


def frame(chunks: Iterable[Encoded]) -> bytes:
    """Returns the encoded chunks as one Upstream or Downstream message, which are alike in this."""
    parts: list[Data] = []
    for head, data in chunks:
        parts += (_CHUNK_TAG, _length(len(head) + len(data)), head, data)
    return b"".join((_FRAME_TAG, _length(sum(map(len, parts))), *parts))


def _length(count: int) -> bytes:
    out = bytearray()
    while count > 127:
        out.append(count & 127 | 128)
        count >>= 7
    out.append(count)
    return bytes(out)


class Queue:
    """Messages that wait to be sent on one stream: in order within a run, in turn among runs, a chunk at a time.

    Attributes:
        backlog: bytes that wait.
        packs: whether the other side unpacks CODEC_ZSTD.
    """

    def __init__(self) -> None:
        self.backlog = 0
        self.packs = False
        self._runs: dict[str, deque[Outgoing]] = {}
        self._limits: dict[str, int] | None = None
        self._partials: dict[bytes, int] = {}
        self._short: dict[Outgoing, None] = {}

    def __len__(self) -> int:
        return sum(map(len, self._runs.values()))

    def put(self, run: str, data: bytes, allowance: int = 0, first: bool = False) -> None:
        """Queues a message, before its run's other ones if `first`, unless the very same one waits already."""
        waiting = self._runs.setdefault(run, deque())
        for other in waiting:
            if other.data is data or other.data == data:
                other.allowance = allowance
                return
        message = Outgoing(run, data, allowance)
        message.restart(self._partials.pop(message.transfer, 0))
        waiting.insert(0 if first else len(waiting), message)
        self.backlog += len(data)
        if self._limits is not None and len(data) <= CONTROL_BYTES:
            self._short[message] = None
            if len(self._short) > MOST_SHORT:
                self._drop(next(iter(self._short)))

    def hold(self, limits: dict[str, int]) -> None:
        """Keeps messages back from now on that are longer than `limits` allows their run, or `CONTROL_BYTES`.

        Of shorter ones the last `MOST_SHORT` are kept: whoever does not read them need not get them, and asks again.
        """
        self._limits = limits

    def restart(self, partials: Mapping[bytes, int], packs: bool) -> None:
        """Goes over to a new stream, whose other side has these beginnings of messages."""
        self._partials, self.packs = dict(partials), packs
        for waiting in self._runs.values():
            for message in waiting:
                message.restart(self._partials.pop(message.transfer, 0))

    def drop_longer(self, run: str, most: int) -> None:
        """Forgets those messages of a run that are longer than `most`: nobody wants them any more."""
        for message in [one for one in self._runs.get(run, ()) if len(one.data) > most]:
            self._drop(message)

    def next(self, most: int = MOST_DATA) -> tuple[bytes, list[Outgoing]] | None:
        """Returns the next frame and the messages that end in it, or None if nothing may be sent now.

        One chunk of each run in turn, until the frame holds about `most` bytes.
        """
        chunks: list[Encoded] = []
        ended: list[Outgoing] = []
        size = 0
        for run in list(self._runs):
            message = self._ready(self._runs[run])
            if message is None:
                continue
            chunks.append(message.chunk(most - size, self.packs))
            size += sum(map(len, chunks[-1]))
            self._runs[run] = self._runs.pop(run)  # at the end: the others' turn is first
            if message.done:
                ended.append(message)
                self._drop(message)
            if size + LEAST_DATA > most or len(chunks) == MOST_CHUNKS:
                break
        return (frame(chunks), ended) if chunks else None

    def _drop(self, message: Outgoing) -> None:
        waiting = self._runs[message.run]
        waiting.remove(message)
        if not waiting:
            del self._runs[message.run]
        self._short.pop(message, None)
        self.backlog -= len(message.data)

    def _ready(self, waiting: deque[Outgoing]) -> Outgoing | None:
        if self._limits is None:
            return waiting[0] if waiting else None
        for message in waiting:
            if len(message.data) <= self._limits.get(message.run, CONTROL_BYTES):
                return message
        return None


@dataclass
class _Open:
    transfer: bytes
    total: int
    kept: bool
    received: int = 0
    room: memoryview | None = None
    resumed: bool = False
    stale: bool = False


class Assembler:
    """Puts messages together from one site's, or the coordinator's, chunks.

    Attributes:
        default: the most bytes of a message of a run of which `allow` says nothing.
        most_open: the most messages of which a part may be here; one for each run.
        most_held: the most bytes that these may have together. Another one is passed over, and said again later.
    """

    def __init__(self, default: int = CONTROL_BYTES, most_open: int = 32, most_held: int = MAX_MESSAGE_BYTES) -> None:
        self.default, self.most_open, self.most_held = default, most_open, most_held
        self._allowed: dict[str, int] = {}
        self._highest = default
        self._open: dict[str, _Open] = {}

    @property
    def held(self) -> int:
        """Bytes of unfinished messages that are kept."""
        return sum(part.received for part in self._open.values() if part.kept)

    def allow(self, run: str, most: int) -> None:
        """Says how many bytes a message of this run may have from now on."""
        self._highest = max(self._highest, most)
        if most > self.default:
            self._allowed[run] = most
        else:
            self._allowed.pop(run, None)

    def fresh(self) -> list[tuple[bytes, int]]:
        """Goes over to a new stream: forgets what was allowed, keeps what arrived and returns (transfer, bytes)."""
        self._allowed.clear()
        self._highest = self.default
        self._open = {run: part for run, part in self._open.items() if part.kept}
        for part in self._open.values():
            part.stale = True
        return self.partials()

    def partials(self) -> list[tuple[bytes, int]]:
        """Returns the unfinished messages: transfer and bytes received."""
        found = [(part.transfer, part.received) for part in self._open.values() if part.kept and part.received]
        return found[:MOST_PARTIALS]

    def take(self, chunk: pb.Chunk) -> tuple[str, Data] | None:
        """Takes a chunk in; returns (run, message) if it ends one.

        Raises:
            ProtocolError: the chunk is malformed, out of order or more than is allowed; nothing changed by it, unless
                the message that it ends is not the one that began.
        """
        run, part = chunk.run, self._part(chunk)
        data = self._unpacked(chunk)
        end = chunk.offset + len(data)
        if end > part.total or len(data) > MOST_DATA or (end < part.total and len(data) < LEAST_DATA):
            raise ProtocolError("a chunk was refused: it is too long or too short")
        known = self._open.get(run)
        if known is not part and known is None and len(self._open) >= self.most_open:
            self._make_room()
        part.received, part.stale = end, False
        self._open[run] = part
        if part.kept and len(data) < part.total:
            if part.room is None:
                # memory that nobody has written to costs nothing yet, however long the message says it is
                part.room = np.empty(part.total, np.uint8).data
            part.room[chunk.offset : end] = data
        if end < part.total:
            return None
        del self._open[run]
        if not part.kept:
            return None
        message = data if part.room is None else part.room
        if part.resumed and (not chunk.HasField("check") or chunk.check != zlib.crc32(message)):
            raise ProtocolError("a message was refused: it was cut off and did not go on as it began")
        return run, message

    def _part(self, chunk: pb.Chunk) -> _Open:
        """Returns the message that a chunk belongs to, a new one if it begins it."""
        if not 0 < len(chunk.run) <= 80 or len(chunk.transfer) != 16:
            raise ProtocolError("a chunk was refused: its run or its transfer has no proper name")
        part = self._open.get(chunk.run)
        allowed = self._allowed.get(chunk.run, self.default)
        if part is not None and part.transfer == chunk.transfer and chunk.offset == part.received > 0:
            if chunk.total != part.total or (part.stale and part.total > allowed):
                raise ProtocolError("a chunk was refused: its message has another length, or one too many")
            part.resumed = part.resumed or part.stale
            return part
        if chunk.offset:
            raise ProtocolError("a chunk was refused: it is not the next one of its message")
        if chunk.total > self._highest:
            raise ProtocolError(f"a message of {chunk.total} bytes was refused: {allowed} is the most now")
        # it may have been sent before the site heard of a lower limit, so it is passed over rather than punished
        return _Open(chunk.transfer, chunk.total, chunk.total <= allowed and self._has_room(chunk))

    def _has_room(self, chunk: pb.Chunk) -> bool:
        """Returns whether a message may be kept beside the others; those of an older stream make way."""
        others = {run: part for run, part in self._open.items() if part.kept and run != chunk.run}
        room = self.most_held - chunk.total - sum(part.total for part in others.values())
        for run, part in others.items():
            if room < 0 and part.stale:
                room += part.total
                del self._open[run]
        return room >= 0

    def _make_room(self) -> None:
        oldest = next((run for run, part in self._open.items() if part.stale), None)
        if oldest is None:
            raise ProtocolError(f"a chunk was refused: {self.most_open} messages are open already")
        del self._open[oldest]

    @staticmethod
    def _unpacked(chunk: pb.Chunk) -> bytes:
        if chunk.codec == pb.CODEC_IDENTITY:
            return chunk.data
        if chunk.codec != pb.CODEC_ZSTD:
            raise ProtocolError("a chunk was refused: its codec is not known")
        try:
            size = zstandard.frame_content_size(chunk.data)
            if not 0 <= size <= MOST_DATA:
                raise ProtocolError("a chunk was refused: it does not state a size that is allowed")
            data = zstandard.ZstdDecompressor().decompress(chunk.data, max_output_size=size, allow_extra_data=False)
        except zstandard.ZstdError:
            raise ProtocolError("a chunk was refused: it does not unpack") from None
        if len(data) != size:
            raise ProtocolError("a chunk was refused: it unpacks to another size than it states")
        return data


def packs(codecs: Collection[int]) -> bool:
    """Returns whether whoever states these codecs unpacks CODEC_ZSTD."""
    return pb.CODEC_ZSTD in codecs


def parse_upstream(data: bytes) -> pb.Upstream:
    """Returns a site's message, or raises a `ProtocolError`."""
    return _checked(_parsed(pb.Upstream(), data))


def parse_downstream(data: bytes) -> pb.Downstream:
    """Returns a coordinator's message, or raises a `ProtocolError`."""
    return _checked(_parsed(pb.Downstream(), data))


def _parsed(message: M, data: bytes) -> M:
    if len(data) > MOST_FRAME:
        raise ProtocolError("a frame was refused: it is too long")
    try:
        message.ParseFromString(data)
    except DecodeError:
        raise ProtocolError("a frame was refused: it is malformed") from None
    return message


def _checked(message: M) -> M:
    if message.WhichOneof("kind") is None:
        raise ProtocolError("a frame was refused: it is of no known kind")
    if len(message.chunks.chunks) > MOST_CHUNKS:
        raise ProtocolError("a frame was refused: it holds too many chunks")
    return message


def partials_of(greeting: pb.Hello | pb.Welcome) -> dict[bytes, int]:
    """Returns what the other side has of messages, or raises a `ProtocolError`."""
    found = greeting.partials
    if len(found) > MOST_PARTIALS or any(len(partial.transfer) != 16 for partial in found):
        raise ProtocolError("a greeting was refused: its list of beginnings is malformed")
    return {partial.transfer: partial.received for partial in found}
