"""Whatever is cut comes together again; whatever is wrong is refused and disturbs nothing else."""

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from cohortium.core.errors import ProtocolError
from cohortium.core.messages import CONTROL_BYTES
from cohortium.engines.fleet import chunks
from cohortium.engines.fleet.chunks import LEAST_DATA, MOST_DATA, Assembler, Outgoing, Queue
from cohortium.engines.fleet.v1 import fleet_pb2 as pb

LARGE = 1 << 30


def parsed(frame: bytes) -> list[pb.Chunk]:
    return list(chunks.parse_upstream(frame).chunks.chunks)


def drain(queue: Queue, assembler: Assembler, most: int = MOST_DATA, frames: int = 1 << 30) -> list[tuple[str, bytes]]:
    found = []
    while frames and (cut := queue.next(most)) is not None:
        frames -= 1
        found += [message for chunk in parsed(cut[0]) if (message := assembler.take(chunk)) is not None]
    return found


def message(size: int, seed: int, packable: bool) -> bytes:
    random = np.random.default_rng(seed)
    return random.integers(0, 4 if packable else 256, size, dtype=np.uint8).tobytes()


messages = st.builds(message, st.integers(0, 120_000), st.integers(0, 9), st.booleans())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), messages), max_size=6),
    st.integers(1, 60_000),
    st.booleans(),
    st.lists(st.integers(0, 6), max_size=4),
)
def test_any_messages_cut_and_interrupted_anyhow_come_together(sent, most, pack, interruptions) -> None:
    queue, assembler = Queue(), Assembler(default=LARGE)
    queue.packs = pack
    for run, data in sent:
        queue.put(run, data)
    found = []
    for frames in interruptions:
        found += drain(queue, assembler, most, frames)
        queue.restart(dict(assembler.fresh()), pack)
    found += drain(queue, assembler, most)
    assert len(queue) == queue.backlog == assembler.held == 0
    for name in "abc":
        expected = [data for run, data in sent if run == name]
        # the very same message is queued once while it waits
        assert [data for run, data in found if run == name] == list(dict.fromkeys(expected))


def test_what_has_arrived_is_not_sent_again() -> None:
    data = message(3 * MOST_DATA, 1, packable=False)
    queue, assembler = Queue(), Assembler(default=LARGE)
    queue.put("a", data)
    drain(queue, assembler, frames=2)
    anew = Queue()  # another process says the same bytes again
    anew.restart(dict(assembler.fresh()), packs=False)
    anew.put("a", bytes(bytearray(data)))
    cut = anew.next()
    assert cut is not None
    (chunk,) = parsed(cut[0])
    assert chunk.offset > 0 and chunk.HasField("check") == (chunk.offset + len(chunk.data) == len(data))
    found = assembler.take(chunk)
    assert (drain(anew, assembler) or [found]) == [("a", data)]


def test_a_message_that_goes_on_otherwise_than_it_began_is_refused() -> None:
    data = bytearray(message(3 * MOST_DATA, 1, packable=False))
    queue, assembler = Queue(), Assembler(default=LARGE)
    queue.put("a", bytes(data))
    drain(queue, assembler, frames=1)
    data[200_000] ^= 1  # where the transfer's name does not look
    anew = Queue()
    anew.restart(dict(assembler.fresh()), packs=False)
    anew.put("a", bytes(data))
    with pytest.raises(ProtocolError, match="cut off"):
        drain(anew, assembler)
    assert assembler.held == 0


def test_small_messages_do_not_wait_for_large_ones() -> None:
    queue, assembler = Queue(), Assembler(default=LARGE)
    queue.put("large", message(20 * MOST_DATA, 1, packable=False))
    for run in ("b", "c", "d"):
        queue.put(run, b"small")
    assert [run for run, _ in drain(queue, assembler, frames=2)] == ["b", "c", "d"]


def test_frames_are_bounded_and_small_messages_share_them() -> None:
    queue = Queue()
    for number in range(40):
        queue.put(f"run {number}", message(4000, number, packable=False))
    cut = queue.next()
    assert cut is not None and len(parsed(cut[0])) == 40
    queue.put("large", message(3 * MOST_DATA, 1, packable=False))
    while (cut := queue.next()) is not None:
        assert len(cut[0]) <= chunks.MOST_FRAME
        assert all(len(chunk.data) <= MOST_DATA for chunk in parsed(cut[0]))


def test_packing_pays_or_is_left_out() -> None:
    for packable in (True, False):
        outgoing = Outgoing("a", message(200_000, 1, packable))
        chunk = pb.Chunk.FromString(b"".join(outgoing.chunk(pack=True)))
        assert (chunk.codec == pb.CODEC_ZSTD) == packable
        assert (len(chunk.data) < 100_000) == packable


def test_messages_are_held_until_they_may_be_sent() -> None:
    queue, limits = Queue(), dict[str, int]()
    queue.hold(limits)
    queue.put("a", bytes(CONTROL_BYTES + 1))
    assert queue.next() is None
    limits["a"] = CONTROL_BYTES + 1
    assert queue.next() is not None


def test_of_short_messages_that_nobody_reads_the_last_ones_are_kept() -> None:
    queue, most, long = Queue(), chunks.MOST_SHORT, bytes(CONTROL_BYTES + 1)
    queue.hold({"long": len(long)})
    queue.put("long", long)
    for number in range(2 * most):
        # many runs, and many messages of one
        queue.put("one" if number % 2 else f"run {number}", b"%d" % number)
    assert len(queue) == most + 1
    found = [data for _, data in drain(queue, Assembler(default=LARGE))]
    assert sorted(found) == sorted([long, *(b"%d" % number for number in range(most, 2 * most))])
    assert len(queue) == queue.backlog == 0
    for number in range(most):
        queue.put("one", b"%d" % number)
    assert len(queue) == most  # what was sent does not count


def test_a_coordinator_keeps_all_that_it_says() -> None:
    queue = Queue()
    for number in range(2 * chunks.MOST_SHORT):
        queue.put(f"run {number}", b"%d" % number)
    assert len(queue) == 2 * chunks.MOST_SHORT


def test_what_is_too_long_for_a_run_now_is_forgotten() -> None:
    queue = Queue()
    queue.hold({})
    for run, size in (("a", 10), ("a", 5000), ("b", 5000), ("a", 20)):
        queue.put(run, bytes(size))
    queue.drop_longer("a", 15)
    queue.drop_longer("c", 15)
    assert (len(queue), queue.backlog) == (2, 5010)
    assert drain(queue, Assembler(default=LARGE)) == [("a", bytes(10))]


def chunk(**changes) -> pb.Chunk:
    data = {"run": "a", "transfer": b"t" * 16, "total": 10_000, "offset": 0, "data": bytes(5_000)}
    return pb.Chunk(**(data | changes))


BOMB = zstandard.ZstdCompressor().compress(bytes(50_000_000))
UNSIZED = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(5_000))


@pytest.mark.parametrize(
    "bad",
    [
        chunk(run=""),
        chunk(run="x" * 81),
        chunk(transfer=b"t" * 15),
        chunk(total=10_001),
        chunk(total=1 << 63),
        chunk(total=4_999),
        chunk(offset=5_000),
        chunk(offset=1 << 63),
        chunk(data=b""),
        chunk(data=b"tiny"),
        chunk(codec=7),
        chunk(codec=pb.CODEC_ZSTD),
        chunk(codec=pb.CODEC_ZSTD, data=BOMB),
        chunk(codec=pb.CODEC_ZSTD, data=UNSIZED),
        chunk(codec=pb.CODEC_ZSTD, data=BOMB[:-3]),
    ],
)
def test_wrong_chunks_are_refused_and_others_go_on(bad: pb.Chunk) -> None:
    assembler = Assembler()
    for run in ("a", "b"):
        assembler.allow(run, 10_000)
    assembler.take(chunk(run="b"))
    before = assembler.partials()
    with pytest.raises(ProtocolError):
        assembler.take(bad)
    assert assembler.partials() == before
    assert assembler.take(chunk(run="b", offset=5_000)) == ("b", bytes(10_000))


def test_repeated_and_skipping_chunks_are_refused() -> None:
    assembler = Assembler(default=LARGE)
    assembler.take(chunk(total=20_000))
    for offset in (10_000, 4_999, 15_000):
        with pytest.raises(ProtocolError):
            assembler.take(chunk(total=20_000, offset=offset))
    with pytest.raises(ProtocolError):
        assembler.take(chunk(total=20_001, offset=5_000))
    assert assembler.held == 5_000


def test_a_site_keeps_to_the_latest_allowance() -> None:
    assembler = Assembler()
    with pytest.raises(ProtocolError):
        assembler.take(chunk(total=CONTROL_BYTES + 1))
    assembler.allow("a", 10_000)
    assembler.allow("a", 100)
    assert assembler.take(chunk()) is None  # it may have been on its way
    assert assembler.held == 0
    assert assembler.take(chunk(offset=5_000)) is None
    assembler.allow("a", 10_000)
    assembler.take(chunk())
    assert assembler.take(chunk(offset=5_000)) == ("a", bytes(10_000))


def test_allowances_end_with_the_stream() -> None:
    assembler = Assembler()
    assembler.allow("a", 10_000)
    assembler.take(chunk())
    assert assembler.fresh() == [(b"t" * 16, 5_000)]
    with pytest.raises(ProtocolError):
        assembler.take(chunk(offset=5_000))
    assembler.allow("a", 10_000)
    with pytest.raises(ProtocolError, match="cut off"):  # without its checksum
        assembler.take(chunk(offset=5_000))


def test_the_number_of_open_messages_is_bounded() -> None:
    assembler = Assembler(default=LARGE, most_open=3)
    for run in ("a", "b", "c"):
        assembler.take(chunk(run=run))
    with pytest.raises(ProtocolError):
        assembler.take(chunk(run="d"))
    assembler.fresh()
    assembler.take(chunk(run="d"))
    assert assembler.held == 15_000


def test_the_bytes_of_open_messages_are_bounded() -> None:
    assembler = Assembler(default=LARGE, most_held=25_000)
    for run in ("a", "b", "c"):
        assembler.take(chunk(run=run))
    assert assembler.held == 10_000
    # the third was passed over, to its end, and a message that replaces one of its run counts alone
    assert assembler.take(chunk(run="c", offset=5_000)) is None
    assembler.take(chunk(run="a", transfer=b"u" * 16))
    assert assembler.take(chunk(run="a", transfer=b"u" * 16, offset=5_000)) == ("a", bytes(10_000))
    # those of an older stream make way
    assembler.take(chunk(run="a"))
    assembler.fresh()
    assembler.take(chunk(run="c"))
    assert assembler.take(chunk(run="c", offset=5_000)) == ("c", bytes(10_000))
    assert [length for _, length in assembler.partials()] == [5_000]


def test_another_message_of_a_run_ends_the_one_before() -> None:
    assembler = Assembler(default=LARGE)
    assembler.take(chunk())
    assert assembler.take(chunk(transfer=b"u" * 16, total=3, data=b"new")) == ("a", b"new")
    assert assembler.held == 0


def test_what_protobuf_writes_is_what_is_written_here() -> None:
    data = message(LEAST_DATA, 3, packable=False)
    ours = chunks.parse_upstream(chunks.frame([Outgoing("a", data, 77).chunk()]))
    theirs = pb.Upstream()
    theirs.chunks.chunks.add(run="a", transfer=chunks.transfer_id("a", data), total=len(data), data=data, allowance=77)
    assert ours == theirs
