"""Which identities of other sites count: the first stays, a later one is refused until somebody confirms it."""

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from cohortium.core.errors import CohortiumError, PolicyRefused, ProtocolError, StudyError
from cohortium.core.identity import Introduction, fingerprint, introduce
from cohortium.site.peers import Met, Peers, Pinned, confirm, meet, pinned

COORDINATOR = Ed25519PrivateKey.generate()
TRUSTED = COORDINATOR.public_key().public_bytes_raw()
ME = ("north", b"n" * 32)
SITES = st.sampled_from(["south", "west", "east"])
IDENTITIES = st.sampled_from([b"1" * 32, b"2" * 32, b"3" * 32])


def told(site: str, identity: bytes) -> Introduction:
    return introduce(COORDINATOR, site, identity, 7)


def met(known: Peers, *sites: tuple[str, bytes], now: int = 1) -> Met:
    return meet(known, [told(*site) for site in sites], TRUSTED, ME, now)


@given(st.lists(st.lists(st.tuples(SITES, IDENTITIES), max_size=3), max_size=6))
def test_without_a_confirmation_the_first_identity_stays(history: list[list[tuple[str, bytes]]]) -> None:
    peers: Peers = {}
    first: dict[str, bytes] = {}
    for day, sites in enumerate(history):
        for site, identity in sites:
            first.setdefault(site, identity)
        peers = met(peers, *sites, now=day).peers
    assert pinned(peers, "first-use", ME) == first | dict([ME])
    assert pinned(peers, "confirmed", ME) == dict([ME])


def test_new_and_changed_sites_are_told() -> None:
    one = met({}, ("south", b"1" * 32), ("west", b"2" * 32))
    assert (one.new, one.changed) == (("south", "west"), ())
    two = met(one.peers, ("south", b"3" * 32), ("west", b"2" * 32))
    assert (two.new, two.changed) == ((), ("south",))
    assert two.peers["south"].other == b"3" * 32
    assert pinned(two.peers, "first-use", ME)["south"] == b"1" * 32


def test_a_confirmed_change_is_taken() -> None:
    peers = met(met({}, ("south", b"1" * 32)).peers, ("south", b"3" * 32)).peers
    kept = confirm(peers, "south", fingerprint(b"1" * 32).lower())
    assert pinned(kept, "confirmed", ME)["south"] == b"1" * 32
    assert kept["south"].other == b"3" * 32
    taken = confirm(peers, "south", fingerprint(b"3" * 32).replace("-", " "))
    assert pinned(taken, "confirmed", ME)["south"] == b"3" * 32
    assert taken["south"].other is None


def test_who_looks_while_identities_are_replaced_sees_all_of_the_old_or_all_of_the_new() -> None:
    old, new = {f"site{number}": bytes([number]) * 32 for number in range(4)}, {"south": b"1" * 32}
    view = Pinned(old)
    seen = view.keys()
    assert (dict(view), set(old) - seen, len(view)) == (old, set(), 4)
    view.now = new
    assert (dict(view), set(seen), "south" in view, view.get("site1")) == (new, {"south"}, True, None)
    assert len(old) == 4


@pytest.mark.parametrize(
    ("name", "words", "error"),
    [
        ("south", fingerprint(b"9" * 32), PolicyRefused),
        ("south", "", PolicyRefused),
        ("south", fingerprint(b"1" * 32)[:-1], PolicyRefused),
        ("sout", fingerprint(b"1" * 32), StudyError),
    ],
)
def test_what_is_not_confirmed(name: str, words: str, error: type[CohortiumError]) -> None:
    with pytest.raises(error):
        confirm(met({}, ("south", b"1" * 32)).peers, name, words)


def test_only_the_coordinator_introduces() -> None:
    good = told("south", b"1" * 32)
    other = introduce(Ed25519PrivateKey.generate(), "south", b"1" * 32, 7)
    for bad in (
        other,
        replace(good, site="west"),
        replace(good, identity=b"2" * 32),
        replace(good, enrolled=8),
        replace(good, enrolled=-1),
        replace(good, enrolled=1 << 70),
        replace(good, identity=b"1"),
        replace(good, signature=b""),
    ):
        with pytest.raises(ProtocolError):
            meet({}, [bad], TRUSTED, ME, 1)
    with pytest.raises(StudyError):
        meet({}, [told("so/uth", b"1" * 32)], TRUSTED, ME, 1)
    with pytest.raises(ProtocolError, match="is the most"):
        meet({}, [good] * 1001, TRUSTED, ME, 1)


def test_somebody_in_this_sites_place_is_found() -> None:
    assert met({}, ME).peers == {}
    with pytest.raises(PolicyRefused, match="tell the consortium's operator"):
        met({}, ("north", b"x" * 32))
