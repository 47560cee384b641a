"""A hundred thousand hostile inputs: none raises anything but a `ProtocolError`, and none touches another site."""

import numpy as np
import pytest

from cohortium.core.errors import ProtocolError
from cohortium.engines.fleet import chunks
from cohortium.engines.fleet.chunks import MOST_DATA, Assembler, Outgoing, frame
from cohortium.engines.fleet.v1 import fleet_pb2 as pb

ROUNDS = 100_000
ALLOWED = 20_000


def seeds() -> list[bytes]:
    packable = Outgoing("run", b"packs well " * 10_000)
    hello = pb.Hello(protocol=1, software="x", codecs=[1], partials=[pb.Partial(transfer=bytes(16), received=9)])
    long = Outgoing("run", bytes(ALLOWED))
    return [
        frame([Outgoing("run", b"short").chunk()]),
        frame([Outgoing("a", b"x").chunk(), Outgoing("b", b"y").chunk(), Outgoing("c", b"z" * 9).chunk()]),
        frame([packable.chunk(4096, pack=True)]),
        frame([long.chunk(5000)]),
        frame([long.chunk(5000)]),
        pb.Upstream(hello=hello).SerializeToString(),
    ]


def mutated(data: bytes, draws: np.ndarray) -> bytes:
    kind, place, value, more = (int(draw) for draw in draws)
    out = bytearray(data)
    at = place % len(out)
    match kind % 6:
        case 0:
            out[at] ^= value % 255 + 1
        case 1:
            del out[at : at + value % 30]
        case 2:
            out[at:at] = draws.tobytes()[: value % 32]
        case 3:
            out = out[: at + 1]
        case 4:
            out[at] ^= value % 255 + 1
            out[more % len(out)] = value >> 8 & 255
        case _:
            out[at:at] = out[: value % 200]
    return bytes(out)


@pytest.mark.parametrize("downward", [False, True])
def test_hostile_frames_raise_nothing_else_and_touch_nobody_else(downward: bool) -> None:
    random = np.random.default_rng(7 + downward)
    others, site = Assembler(), Assembler()
    others.allow("run", ALLOWED)
    begun = pb.Chunk.FromString(b"".join(Outgoing("run", bytes(ALLOWED)).chunk(8192)))
    others.take(begun)
    before = others.partials()
    parse = chunks.parse_downstream if downward else chunks.parse_upstream
    good = seeds()
    taken = 0
    for draws in random.integers(0, 1 << 32, (ROUNDS // 2, 4), dtype=np.uint32):
        site.allow("run", ALLOWED)
        random_bytes = draws[0] % 10 == 0
        data = draws.tobytes() if random_bytes else mutated(good[int(draws[1] >> 8) % len(good)], draws)
        try:
            message = parse(data)
            for chunk in message.chunks.chunks:
                site.take(chunk)
                taken += 1
        except ProtocolError:
            if draws[2] % 4 == 0:
                site.fresh()
        assert site.held <= ALLOWED + 32 * 4096
    assert taken > 1000
    assert others.partials() == before
    assert site.held < MOST_DATA
