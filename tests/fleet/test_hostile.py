"""Members that break the rules: who floods, is revoked at a bad moment or finds a fault harms its own part only."""

import asyncio
import io
import logging
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import grpc
import msgspec
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

import cohortium as co
from cohortium.adapters import logs
from cohortium.adapters.credentials import request
from cohortium.bootstrap import fleet
from cohortium.coordinator.authority import Role, establish
from cohortium.coordinator.exchange import Heard, Joined
from cohortium.coordinator.inbox import LARGE, Inbox, Wished
from cohortium.coordinator.ports import Applied, Checkpoint, SiteRow, Terms
from cohortium.core.document import canonical_bytes
from cohortium.core.errors import ProtocolError
from cohortium.core.messages import decode_from_site
from cohortium.engines.fleet.control import ConsortiumService, News
from cohortium.engines.fleet.v1 import fleet_pb2 as pb
from cohortium.plan import compile_study

from .memory import MemoryStore
from .test_service import Cluster, tolerant


def test_of_one_site_only_a_few_messages_wait() -> None:
    inbox = Inbox()
    for _ in range(1000):
        inbox.put_nowait(Heard("zurich", b"x"))
        inbox.put_nowait(Heard("zurich", bytes(LARGE + 1)))
        inbox.put_nowait(Joined("zurich"))
    assert inbox.qsize() == 16 + 2 + 1
    inbox.put_nowait(Heard("budapest", b"x"))
    inbox.put_nowait(Wished("pause"))
    assert inbox.qsize() == 21
    kept = [inbox.get_nowait() for _ in range(21)]
    assert kept[-2:] == [Heard("budapest", b"x"), Wished("pause")]
    inbox.put_nowait(Heard("zurich", b"y"))
    assert inbox.get_nowait() == Heard("zurich", b"y")


def test_a_site_that_sends_without_end_does_not_hold_up_a_round() -> None:
    async def go() -> None:
        cluster = Cluster.of(tolerant())
        process = cluster.start("one")
        await cluster.attach(process)
        cluster.sites["zurich"].deaf = True
        await cluster.submit("flooded", Terms(deadline=0.5, patience=40))

        async def flood() -> None:
            while cluster.store.rows["flooded"].ended is None:
                for _ in range(100):
                    await process.exchange.heard("zurich", "flooded", b"\xc1")
                await asyncio.sleep(0)

        row, _ = await asyncio.gather(cluster.ended("flooded"), flood())
        assert row.status == "finished", row.reason
        assert all("zurich" not in one.survivors for one in cluster.store.rounds["flooded"])
        await cluster.close()

    asyncio.run(go())


def test_a_run_whose_leader_fails_ends_and_others_go_on() -> None:
    async def go() -> None:
        cluster = Cluster.of(tolerant(), runs=2)
        await cluster.attach(cluster.start("one"))
        save = cluster.store.save

        async def broken(claim: Any, *told: Any) -> None:
            if claim.row.run == "cursed":
                raise ProtocolError("round 1 was applied before") if claim.row.round else OverflowError("a value")
            await save(claim, *told)

        cluster.store.save = broken  # type: ignore[method-assign]
        await cluster.submit("cursed")
        row = await cluster.ended("cursed")
        assert row.status == "failed" and row.reason is not None
        assert "OverflowError" in row.reason and "a value" not in row.reason
        await cluster.submit("blessed")
        assert (await cluster.ended("blessed")).status == "finished"
        await cluster.close()

    asyncio.run(go())


def test_a_loop_that_fails_goes_on() -> None:
    async def go() -> None:
        cluster = Cluster.of(co.load_example())
        claim, failures = cluster.store.claim, [ValueError("once"), KeyError("twice")]

        async def shaky(*told: Any) -> Any:
            if failures:
                raise failures.pop()
            return await claim(*told)

        cluster.store.claim = shaky  # type: ignore[method-assign]
        await cluster.attach(cluster.start("one"))
        await cluster.submit("first")
        assert (await cluster.ended("first")).status == "finished"
        await cluster.close()

    asyncio.run(go())


def _revoke(cluster: Cluster, name: str) -> None:
    now = datetime.now(UTC)
    cluster.store.members = [replace(row, revoked=now) if row.name == name else row for row in cluster.store.members]


def test_a_run_that_changes_hands_goes_on_without_a_site_that_was_revoked_meanwhile() -> None:
    async def go() -> None:
        cluster = Cluster.of(tolerant())
        first = cluster.start("one")
        await cluster.attach(first)
        await cluster.submit("orphan")
        await cluster.until(lambda: cluster.store.saves >= 2)
        await first.kill()
        _revoke(cluster, "zurich")
        second = cluster.start("two")
        await cluster.attach(second, "budapest", "cleveland", "long-beach")
        row = await cluster.ended("orphan")
        assert row.status == "finished", row.reason
        assert "zurich" not in cluster.store.rounds["orphan"][-1].survivors
        await cluster.close()

    asyncio.run(go())


def test_what_follows_from_a_revocation_during_a_pause_outlasts_the_coordinator() -> None:
    async def go() -> None:
        cluster = Cluster.of(tolerant())
        first = cluster.start("one")
        await cluster.attach(first)
        await cluster.until(lambda: bool(first.service.sites))
        zurich = cluster.sites["zurich"]
        zurich.deaf = True
        await cluster.submit("resting")
        await cluster.until(lambda: "OpenRun" in zurich.heard)
        lead = first.service.leading["resting"]
        await cluster.until(lambda: lead.lead is not None and lead.lead.state.waiting == {"zurich"})
        await cluster.store.wish("resting", "pause", "me")
        await cluster.until(lambda: cluster.store.rows["resting"].status == "paused")
        _revoke(cluster, "zurich")
        cluster.store.tell("sites")
        await cluster.until(lambda: "resting" in cluster.store.checkpoints)
        await first.kill()
        await cluster.store.wish("resting", "run", "me")
        await cluster.attach(cluster.start("two"), "budapest", "cleveland", "long-beach")
        row = await cluster.ended("resting")
        assert row.status == "finished", row.reason
        await cluster.close()

    asyncio.run(go())


class Aborted(Exception):
    pass


class Call:
    """A call over a connection with a person's certificate, which was good when the connection began."""

    def __init__(self, certificate: bytes) -> None:
        self._certificate = certificate

    def auth_context(self) -> dict[str, list[bytes]]:
        return {"x509_pem_cert": [self._certificate]}

    async def abort(self, code: grpc.StatusCode, reason: str) -> None:
        raise Aborted(code.name, reason)


class Desk:
    """The consortium's service over a store in memory, and a clock that can be set."""

    def __init__(self) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        self.now = datetime.now(UTC)
        self._authority = establish("clinics", key, self.now, 1)
        self.store = MemoryStore([], time.monotonic)

        async def allow(what: str) -> bool:
            return True

        async def present(sites: Any) -> Any:
            return {}

        sites = {
            name: SiteRow(name=name, identity=b"i" * 32, enrolled=self.now) for name in (*co.example_sites(), "oslo")
        }
        self.service = ConsortiumService(self.store, lambda: sites, present, News(), allow, lambda: self.now)  # type: ignore[arg-type]

    def call(self, role: Role, name: str) -> Any:
        certificate = self._authority.certify(request()[1], role, name, self.now, 2, timedelta(hours=1))
        return Call(certificate.public_bytes(serialization.Encoding.PEM))

    async def submit(self, run: str, owner: str) -> None:
        plan = compile_study(co.load_example())
        document = canonical_bytes(plan.study)
        await self.store.submit(run, plan.study_id, document, owner, plan.sites, Terms(), None)


def test_a_connection_gives_nothing_after_its_certificate_has_ended() -> None:
    async def go() -> None:
        desk = Desk()
        await desk.submit("mine", "researcher:ann")
        call = desk.call("researcher", "ann")
        assert (await desk.service.GetRun(pb.GetRunRequest(run="mine"), call)).run == "mine"
        events = desk.service.Events(pb.EventsRequest(run="mine"), call)
        waiting = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0)
        desk.now += timedelta(hours=2)
        with pytest.raises(Aborted, match="expired"):
            await desk.service.GetRun(pb.GetRunRequest(run="mine"), call)
        with pytest.raises(Aborted, match="expired"):
            await waiting

    asyncio.run(go())


def test_one_person_opens_so_many_streams_and_others_their_own() -> None:
    async def go() -> None:
        desk = Desk()
        for name in ("ann", "bob"):
            await desk.submit(name, f"researcher:{name}")
        call = desk.call("researcher", "ann")
        streams = [desk.service.Events(pb.EventsRequest(run="ann"), call) for _ in range(65)]
        waiting = [asyncio.ensure_future(anext(stream)) for stream in streams]
        while not waiting[-1].done():
            await asyncio.sleep(0)
        with pytest.raises(Aborted, match="64 streams of events are the most"):
            waiting[-1].result()
        other = desk.service.Events(pb.EventsRequest(run="bob"), desk.call("researcher", "bob"))
        others = asyncio.ensure_future(anext(other))
        await asyncio.sleep(0.01)
        assert not others.done()
        for task in (*waiting[:-1], others):
            task.cancel()
        await asyncio.gather(*waiting, others, return_exceptions=True)
        assert not desk.service._streams

    asyncio.run(go())


def test_people_see_how_the_sites_of_their_own_runs_stand() -> None:
    async def go() -> None:
        desk = Desk()
        for run, owner in (("mine", "researcher:ann"), ("hers", "researcher:eve"), ("operated", "operator:olga")):
            await desk.submit(run, owner)
        claims = {claim.row.run: claim for claim in await desk.store.claim("one", 1, 9)}
        applied = Applied(number=1, survivors=("budapest", "cleveland"))
        await desk.store.save(claims["mine"], Checkpoint(round=2, state=b""), applied)
        await desk.store.end(claims["operated"], "cancelled", "why not", None)
        ann, olga = desk.call("researcher", "ann"), desk.call("operator", "olga")

        async def listed(who: Any) -> list[str]:
            return [run.run for run in (await desk.service.ListRuns(pb.ListRunsRequest(most=1), who)).runs]

        assert (await listed(ann), await listed(olga)) == (["mine"], ["operated"])
        for who, runs in ((ann, ["mine"]), (olga, ["hers", "mine"])):
            whole = await desk.service.Status(pb.StatusRequest(), who)
            assert [run.run for run in whole.runs] == runs
            assert "oslo" in [site.site for site in whole.sites]
            assert not any(site.HasField("standing") for site in whole.sites)
            asked = await desk.service.Status(pb.StatusRequest(run="mine"), who)
            assert [run.run for run in asked.runs] == ["mine"]
            assert {site.site: (site.standing.word, site.standing.round) for site in asked.sites} == {
                "budapest": ("contributed", 1),
                "cleveland": ("contributed", 1),
                "long-beach": ("waiting", 0),
                "zurich": ("waiting", 0),
            }
        assert (await desk.service.Status(pb.StatusRequest(run="operated"), olga)).runs[
            0
        ].status == pb.RUN_STATUS_CANCELLED
        for run in ("hers", "none", ""):
            with pytest.raises(Aborted, match="there is no run"):
                await desk.service.Status(pb.StatusRequest(run=run), ann)

    asyncio.run(go())


def test_what_no_client_asks_is_refused_in_words() -> None:
    async def go() -> None:
        desk = Desk()
        await desk.submit("mine", "researcher:ann")
        call, stranger = desk.call("researcher", "ann"), desk.call("researcher", "eve")
        for run, who in (("mine", stranger), ("mi\0ne", call), ("m" * 100, call)):
            with pytest.raises(Aborted, match="there is no run"):
                await desk.service.GetRun(pb.GetRunRequest(run=run), who)
        wished = pb.SetWishRequest.FromString(pb.SetWishRequest(run="mine").SerializeToString() + b"\x10\x63")
        with pytest.raises(Aborted, match="say run, pause or cancel"):
            await desk.service.SetWish(wished, call)
        with pytest.raises(Aborted, match="operators and researchers"):
            await desk.service.GetRun(pb.GetRunRequest(run="mine"), desk.call("site", "zurich"))
        seeded = pb.SubmitRequest(run="new", study=canonical_bytes(co.load_example()), seed=2**64 - 1)
        with pytest.raises(Aborted, match="a seed was refused"):
            await desk.service.Submit(seeded, call)

    asyncio.run(go())


def test_a_certificate_of_an_earlier_membership_opens_no_stream() -> None:
    now = datetime.now(UTC)
    row = SiteRow(name="zurich", identity=bytes(32), enrolled=now)
    service: Any = SimpleNamespace(sites={"zurich": row})
    assert fleet._admitted(service, "zurich", now - timedelta(hours=1)) == "the certificate is of an earlier membership"
    assert fleet._admitted(service, "zurich", now - timedelta(seconds=2)) is None
    service.sites = {"zurich": replace(row, revoked=now)}
    assert fleet._admitted(service, "zurich", now) == "the site's membership was revoked"


def test_a_log_line_is_one_line_whatever_a_site_says() -> None:
    log, stream = logging.getLogger("cohortium"), io.StringIO()
    before = list(log.handlers), log.level, log.propagate
    try:
        logs.begin("info", "text", stream)
        with pytest.raises(ProtocolError) as refused:
            decode_from_site(msgspec.msgpack.encode({"type": "\x1b[2J\nWARNING forged", "run": "r", "site": "s"}))
        log.info("a message was refused", extra={"reason": str(refused.value)})
    finally:
        log.handlers, log.level, log.propagate = before
    assert stream.getvalue().count("\n") == 1 and "\x1b" not in stream.getvalue()
    assert "?[2J?WARNING forged" in stream.getvalue()
