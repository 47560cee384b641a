"""Enrolment over real sockets: who gets a certificate, who does not, and what a lost answer costs."""

import asyncio
import itertools
import logging
from collections.abc import Coroutine
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from cohortium.adapters.credentials import request
from cohortium.coordinator.authority import establish, principal_of
from cohortium.core.errors import CohortiumError, PolicyRefused, ProtocolError
from cohortium.core.identity import prove_joining, prove_renewal
from cohortium.core.invitation import Invitation, digest
from cohortium.engines.fleet.enrolment import network
from cohortium.engines.fleet.joining import Joined, Unreachable, enrol, keep_renewed, renew, roster
from cohortium.engines.fleet.v1 import fleet_pb2 as pb
from cohortium.engines.fleet.v1 import fleet_pb2_grpc as pb_grpc
from cohortium.site.enrolled import Credential, Enrolled
from cohortium.site.peers import meet

from .registry import SECRET, Registry

T = TypeVar("T")
NORTH, SOUTH = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
REQUEST = request()


def now() -> datetime:
    return datetime.now(UTC)


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(work, 30))


async def join(invitation: Invitation, identity: Ed25519PrivateKey = NORTH) -> Joined:
    return await enrol(invitation, identity, REQUEST[1], now())


async def member(registry: Registry, identity: Ed25519PrivateKey = NORTH) -> tuple[Enrolled, Credential]:
    """Enrols the site north."""
    joined = await join(await registry.invitation(), identity)
    return place(registry, joined), Credential(REQUEST[0], joined.chain)


def place(registry: Registry, joined: Joined) -> Enrolled:
    return Enrolled(
        site="north",
        consortium="heart",
        enrolment=(registry.enrolment,),
        fleet=joined.fleet,
        authority=registry.pem(),
        coordinator=registry.identity.public_key().public_bytes_raw(),
    )


class TestEnrolling:
    def test_an_invited_site_gets_its_certificate(self) -> None:
        async def work() -> None:
            async with Registry().serving() as registry:
                joined = await join(await registry.invitation())
                principal = principal_of(joined.chain)
                assert (principal.role, principal.name) == ("site", "north")
                assert joined.fleet == (registry.fleet,)
                assert registry.store.rows["north"].identity == NORTH.public_key().public_bytes_raw()
                [(name, serial, expires)] = registry.store.certificates
                assert (name, serial, expires) == ("north", principal.serial, principal.not_after)
                assert SECRET not in repr(registry.store).encode()

        run(work())

    def test_after_a_lost_answer_the_same_identity_goes_on(self) -> None:
        async def work() -> None:
            async with Registry().serving() as registry:
                invitation = await registry.invitation()
                await join(invitation)
                again = await enrol(invitation, NORTH, request()[1], now())
                assert principal_of(again.chain).name == "north"
                assert len(registry.store.rows) == 1

        run(work())

    def test_nobody_else_can_use_it_again(self) -> None:
        async def work() -> None:
            async with Registry().serving() as registry:
                invitation = await registry.invitation()
                await join(invitation)
                with pytest.raises(PolicyRefused, match="used by somebody else"):
                    await join(invitation, SOUTH)
                assert registry.store.rows["north"].identity == NORTH.public_key().public_bytes_raw()

        run(work())

    def test_two_at_once_are_one(self) -> None:
        async def work() -> None:
            async with Registry().serving() as registry:
                invitation = await registry.invitation()
                done = await asyncio.gather(*(join(invitation, one) for one in (NORTH, SOUTH)), return_exceptions=True)
                assert sorted(type(one).__name__ for one in done) == ["Joined", "PolicyRefused"]

        run(work())

    def test_what_is_refused(self) -> None:
        async def work() -> None:
            async with Registry().serving() as registry:
                await registry.invitation()
                for token, reason in (
                    (registry.token(secret=bytes(32)), "no such invitation"),
                    (registry.token(site="south"), "no such invitation"),
                ):
                    with pytest.raises(PolicyRefused, match=reason):
                        await join(token)
                with pytest.raises(PolicyRefused, match="has expired"):
                    await join(registry.token(expires=1))
                # a hospital whose clock is wrong is told the same by the coordinator
                await registry.invitation(seconds=-1)
                with pytest.raises(PolicyRefused, match="has expired"):
                    await join(registry.token())
                assert not registry.store.rows
                assert not registry.store.certificates

        run(work())

    def test_a_revoked_site_does_not_come_back_by_its_old_invitation(self) -> None:
        async def work() -> None:
            async with Registry().serving() as registry:
                invitation = await registry.invitation()
                await join(invitation)
                await registry.store.revoke("north", "test")
                with pytest.raises(PolicyRefused):
                    await join(invitation)
                await join(await registry.invitation(secret=b"n" * 32))
                assert registry.store.rows["north"].revoked is None

        run(work())

    def test_only_the_tokens_authority_is_believed(self) -> None:
        async def work() -> None:
            other = establish("heart", ec.generate_private_key(ec.SECP256R1()), now(), 1).certificate
            async with Registry().serving() as registry:
                await registry.invitation()
                with pytest.raises(Unreachable, match="no coordinator of this consortium"):
                    await join(registry.token(authority=other.public_bytes(Encoding.DER)))
                with pytest.raises(ProtocolError, match="another key"):
                    await join(registry.token(coordinator=bytes(32)))
                port = registry.enrolment.rpartition(":")[2]
                with pytest.raises(Unreachable):
                    await join(registry.token(enrolment=(f"127.0.0.1:{port}",)))

        run(work())

    def test_the_next_address_is_asked(self) -> None:
        async def work() -> None:
            async with Registry().serving() as registry:
                invitation = await registry.invitation()
                await join(registry.token(enrolment=("localhost:1", registry.enrolment), expires=invitation.expires))
                with pytest.raises(Unreachable, match="no coordinator answers at localhost:1"):
                    await join(registry.token(enrolment=("localhost:1",)))

        run(work())

    def test_while_the_store_is_away_nothing_is_used_up(self) -> None:
        async def work() -> None:
            async with Registry().serving() as registry:
                invitation = await registry.invitation()
                registry.store.away = True
                with pytest.raises(Unreachable):
                    await join(invitation)
                registry.store.away = False
                await join(invitation)

        run(work())


class TestHostileRequests:
    def test_they_do_not_use_up_the_invitation(self, caplog: pytest.LogCaptureFixture) -> None:
        _, csr = REQUEST
        mine, used = NORTH.public_key().public_bytes_raw(), digest(SECRET)
        good = {
            "site": "north",
            "secret": SECRET,
            "csr": csr,
            "identity": mine,
            "proof": prove_joining(NORTH, used, "north", csr),
        }
        changes: list[dict[str, object]] = [
            {"site": ""},
            {"site": "no\nrth"},
            {"site": "south"},
            {"secret": SECRET[:31]},
            {"secret": b""},
            {"csr": b""},
            {"csr": csr[:-1]},
            {"csr": request()[1]},
            {"identity": SOUTH.public_key().public_bytes_raw()},
            {"identity": bytes(32)},
            {"identity": mine + b"0"},
            {"proof": b""},
            {"proof": bytes(64)},
            {"proof": prove_renewal(NORTH, "north", csr)},
            {"proof": prove_joining(NORTH, used, "south", csr)},
            {"csr": bytes(20_000)},
        ]

        async def work() -> None:
            async with Registry().serving() as registry:
                await registry.invitation()
                trusted = grpc.ssl_channel_credentials(registry.pem())
                async with grpc.aio.secure_channel(registry.enrolment, trusted) as channel:
                    stub = pb_grpc.EnrolmentStub(channel)
                    for change in changes:
                        with pytest.raises(grpc.aio.AioRpcError) as raised:
                            await stub.Enrol(pb.EnrolRequest(**(good | change)))
                        allowed = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED)
                        assert raised.value.code() in allowed
                    assert not registry.store.rows
                    await stub.Enrol(pb.EnrolRequest(**good))  # type: ignore[arg-type]

        with caplog.at_level(logging.DEBUG, "cohortium"):
            run(work())
        told = " ".join(f"{record.getMessage()} {record.__dict__}" for record in caplog.records)
        assert "refused" in told
        assert repr(SECRET)[2:-1] not in told
        assert SECRET.hex() not in told

    def test_nobody_asks_too_often(self) -> None:
        async def work() -> None:
            async with Registry(allowed=3).serving() as registry:
                await registry.invitation()
                for _ in range(3):
                    with pytest.raises(PolicyRefused):
                        await join(registry.token(secret=bytes(32)))
                with pytest.raises(Unreachable, match="too many requests"):
                    await join(registry.token(secret=bytes(32)))

        run(work())


class TestRenewing:
    def test_over_the_old_certificate(self) -> None:
        async def work() -> None:
            async with Registry().serving() as registry:
                enrolled, old = await member(registry)
                fresh = request()
                new = await renew(enrolled, old, NORTH, fresh, now())
                assert new.key == fresh[0]
                assert principal_of(new.chain).serial > principal_of(old.chain).serial
                assert "renew:north" in registry.rates
                assert not any(key.startswith("enrol:") for key in registry.rates[2:])

        run(work())

    def test_after_the_old_one_has_expired(self) -> None:
        async def work() -> None:
            async with Registry().serving() as registry:
                enrolled, _ = await member(registry)
                old = registry.authority.certify(REQUEST[1], "site", "north", now() - timedelta(hours=13), 9)
                gone = Credential(REQUEST[0], old.public_bytes(Encoding.PEM))
                assert gone.expires < now()
                with pytest.raises(Unreachable):
                    await roster(enrolled, gone)
                new = await renew(enrolled, gone, NORTH, request(), now())
                assert await roster(enrolled, new)

        run(work())

    def test_a_wrong_clock_is_named(self) -> None:
        async def work() -> None:
            async with Registry().serving() as registry:
                enrolled, old = await member(registry)
                with pytest.raises(ProtocolError, match="clock is right"):
                    await renew(enrolled, old, NORTH, request(), now() - timedelta(hours=2))

        run(work())

    def test_not_without_the_identity(self) -> None:
        async def work() -> None:
            async with Registry().serving() as registry:
                enrolled, old = await member(registry)
                with pytest.raises(PolicyRefused, match="no member"):
                    await renew(enrolled, old, SOUTH, request(), now())
                expired = replace(enrolled, fleet=("localhost:1",))
                with pytest.raises(PolicyRefused, match="no member"):
                    await renew(expired, old, SOUTH, request(), now())
                assert len(registry.store.certificates) == 1

        run(work())

    def test_not_for_another_name(self) -> None:
        async def work() -> None:
            async with Registry().serving() as registry:
                enrolled, old = await member(registry)
                await enrol(await registry.invitation("south", b"s" * 32), SOUTH, request()[1], now())
                # over its own link the name is that of the certificate, so the signature for another does not fit
                with pytest.raises(PolicyRefused, match="no member"):
                    await renew(replace(enrolled, site="south"), old, SOUTH, request(), now())

        run(work())

    def test_not_when_revoked(self) -> None:
        async def work() -> None:
            async with Registry().serving() as registry:
                enrolled, old = await member(registry)
                await registry.store.revoke("north", "test")
                for place in (enrolled, replace(enrolled, fleet=("localhost:1",))):
                    with pytest.raises(PolicyRefused, match="no member"):
                        await renew(place, old, NORTH, request(), now())
                with pytest.raises(PolicyRefused, match="no member"):
                    await roster(enrolled, old)

        run(work())

    def test_people_and_strangers_are_no_sites(self) -> None:
        async def work() -> None:
            async with Registry().serving() as registry:
                enrolled, _ = await member(registry)
                made = registry.authority.certify(REQUEST[1], "operator", "north", now(), 7)
                person = Credential(REQUEST[0], made.public_bytes(Encoding.PEM))
                with pytest.raises(PolicyRefused, match="no site's"):
                    await roster(enrolled, person)
                own = establish("heart", ec.generate_private_key(ec.SECP256R1()), now(), 1)
                forged = own.certify(REQUEST[1], "site", "north", now(), 8)
                with pytest.raises(Unreachable):
                    await roster(enrolled, Credential(REQUEST[0], forged.public_bytes(Encoding.PEM)))

        run(work())

    def test_the_roster_introduces_the_members(self) -> None:
        async def work() -> None:
            async with Registry().serving() as registry:
                enrolled, credential = await member(registry)
                for name in ("south", "west"):
                    await enrol(await registry.invitation(name, name[:1].encode() * 32), SOUTH, request()[1], now())
                registry.store.rows["south"] = replace(registry.store.rows["south"], identity=b"s" * 32)
                await registry.store.revoke("west", "test")
                told = await roster(enrolled, credential)
                assert [one.site for one in told] == ["north", "south"]
                me = ("north", NORTH.public_key().public_bytes_raw())
                met = meet({}, told, enrolled.coordinator, me, 5)
                assert (met.new, met.changed) == (("south",), ())

        run(work())


class TestKeepingRenewed:
    """The clock is the test's own: it moves on when something sleeps."""

    def credential(self, begin: datetime) -> Credential:
        made = establish("heart", ec.generate_private_key(ec.SECP256R1()), begin, 1).certify(
            REQUEST[1], "site", "north", begin, 3
        )
        return Credential(REQUEST[0], made.public_bytes(Encoding.PEM))

    def kept(self, results: list[CohortiumError | None]) -> tuple[list[timedelta], list[Credential]]:
        """Returns when renewing was tried, and what came of it; ends with the results."""
        begin = datetime(2026, 3, 1, tzinfo=UTC)
        clock, tried, told = [begin], list[timedelta](), list[Credential]()

        async def sleep(seconds: float) -> None:
            assert 0 < seconds <= 60
            clock[0] += timedelta(seconds=seconds)

        async def renewal(old: Credential) -> Credential:
            tried.append(clock[0] - begin)
            if not results:
                raise PolicyRefused("revoked")
            if failure := results.pop(0):
                raise failure
            return self.credential(clock[0])

        async def renewed(new: Credential) -> None:
            told.append(new)

        with pytest.raises(PolicyRefused, match="revoked"):
            run(keep_renewed(self.credential(begin), renewal, renewed, lambda: clock[0], sleep))
        return tried, told

    def test_when_a_third_is_left(self) -> None:
        tried, told = self.kept([None, None])
        assert len(told) == 2
        for before, at in zip([timedelta(0), *tried], tried, strict=False):
            assert timedelta(hours=7.9) < at - before < timedelta(hours=8.1)

    def test_failures_are_tried_again_ever_more_slowly(self) -> None:
        tried, told = self.kept([Unreachable("away")] * 10 + [None])
        assert len(told) == 1
        pauses = [(later - one).total_seconds() for one, later in itertools.pairwise(tried)]
        assert pauses[:10] == [5, 10, 20, 40, 80, 160, 320, 600, 600, 600]


def test_keys_are_not_shown() -> None:
    assert "PRIVATE" not in repr(Credential(*REQUEST))


@pytest.mark.parametrize(
    ("host", "counts_as"),
    [
        ("ipv4:10.0.0.7", "ipv4:10.0.0.7"),
        ("ipv6:%5B2001:db8:1:2:3:4:5:6%5D", "ipv6:2001:db8:1:2::/64"),
        ("ipv6:[2001:db8:1:2::9]", "ipv6:2001:db8:1:2::/64"),
        ("ipv6:%5Bfe80::1%25eth0%5D", "ipv6:fe80::/64"),
        ("ipv6:nonsense", "ipv6:nonsense"),
        ("", ""),
    ],
)
def test_whoever_has_a_whole_network_is_one_stranger(host: str, counts_as: str) -> None:
    assert network(host) == counts_as
