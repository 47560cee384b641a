"""The fleet's processes put together: a coordinator, an agent, and a person's connection to the consortium."""

import asyncio
import logging
import os
import secrets  # noqa: TID251  chosen here
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AsyncExitStack, nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import grpc

from cohortium.adapters import credentials, limits, logs, machine, person, site_config
from cohortium.adapters import health as pages
from cohortium.adapters.consortium_folder import OPERATOR, Consortium
from cohortium.adapters.person import Person
from cohortium.adapters.telemetry import AgentMeter, CoordinatorMeter, Tracer
from cohortium.bootstrap import enrolment
from cohortium.bootstrap.homes import load_site_config, open_approvals, open_home, open_journal
from cohortium.bootstrap.stores import stores
from cohortium.coordinator.exchange import Exchange
from cohortium.coordinator.ports import Bus, RunEvent, Unavailable
from cohortium.coordinator.service import Pace, Service
from cohortium.core.codec import Data
from cohortium.core.document import from_canonical, study_id_of
from cohortium.core.errors import CohortiumError, StudyError
from cohortium.core.messages import OpenRun, decode_to_site
from cohortium.core.random import Randomness
from cohortium.engines.fleet import client
from cohortium.engines.fleet.attendant import Attendant, Trainers
from cohortium.engines.fleet.control import ConsortiumService, News
from cohortium.engines.fleet.enrolment import OPTIONS as ENTRANCE
from cohortium.engines.fleet.enrolment import EnrolmentService, MembershipService, server_credentials
from cohortium.engines.fleet.flow import Flow
from cohortium.engines.fleet.gateway import Gateway, Limits, server
from cohortium.engines.fleet.link import Link
from cohortium.engines.fleet.v1 import fleet_pb2_grpc as pb_grpc
from cohortium.plan import Compiler, compile_study
from cohortium.site.agent import Agent
from cohortium.site.peers import Pinned
from cohortium.site.ports import Approvals
from cohortium.site.session import Membership

log = logging.getLogger("cohortium.agent")
_SOFTWARE = f"cohortium {version('cohortium')}"
_RATES: Mapping[str, tuple[float, int]] = {"submit": (5.0, 500), "steer": (10.0, 100), "read": (200.0, 1000)}
"""What a person may ask for: calls a second, and at once."""
_FRAMES = 2000.0, 10_000
"""Frames that a site may send: a second, and at once."""
_TRAINERS = 4
"""Runs that an agent trains for at a time, on as many processors."""
_GRACE = 2.0
_SKEW = timedelta(minutes=1)
"""By how much coordinators' clocks may differ."""


def run_coordinator(
    folder: str | Path,
    *,
    listen: str | None = None,
    enrol: str | None = None,
    health: str | None = None,
    log: tuple[str, str] = ("info", "json"),
    compiler: Compiler = compile_study,
) -> None:
    """Leads runs of the consortium of a folder until the process is told to end.

    Args:
        listen, enrol: `host:port` of mutual TLS and of enrolment; by default those of the settings.
        health: `host:port` of the health page; without one there is none.
        log: the least level of log lines, and their format.

    Raises:
        StudyError: the folder holds no consortium that can be used.
        CohortiumError: a database or an address cannot be had.
    """
    consortium = enrolment.load_consortium(folder)
    machine.keep_memory()
    logs.begin(*log)
    host, fleet_port, enrolment_port = consortium.listen
    places = Places(listen or f"{host}:{fleet_port}", enrol or f"{host}:{enrolment_port}", health or consortium.health)
    asyncio.run(_coordinate(consortium, places, compiler))


def run_agent(home: str | Path, *, compiler: Compiler = compile_study) -> None:
    """Serves a site's runs until the process is told to end.

    Raises:
        SiteError: the site's home cannot be used.
        PolicyRefused: the site is no longer a member of its consortium.
    """
    config = load_site_config(home)
    limits.impose(config.limits)
    machine.keep_memory()
    logs.begin(config.level, config.format)
    asyncio.run(_serve(Path(home), config, compiler))


def connect(folder: str | Path, addresses: Sequence[str] = ()) -> client.Consortium:
    """Connects to a consortium as the person whose certificate is in a folder; close it, or use it in a `with`.

    Args:
        folder: a person's, as `cohortium consortium grant` wrote it, or the consortium's own, whose operator one then
            is.
        addresses: coordinators, `host:port`; by default those that the folder names.

    Raises:
        StudyError: the folder holds no certificate that can be used.
    """
    me = _person(Path(folder))
    who = client.Credentials(me.authority, me.certificate, me.key)
    return client.Consortium(addresses or me.addresses, who, _run_name, time.sleep)


def migrate(folder: str | Path) -> list[str]:
    """Brings the database of a consortium to this version's tables; returns the steps that were taken.

    A database of one's own is migrated as its owner, whose URL is in the environment as COHORTIUM_OWNER_DATABASE.

    Raises:
        StudyError: no owner's URL is given.
        CohortiumError: the database cannot be reached or changed.
    """
    from cohortium.adapters import embedded, migrations

    consortium = enrolment.load_consortium(folder)
    if consortium.database is not None:
        owner = os.environ.get("COHORTIUM_OWNER_DATABASE")
        if not owner:
            raise StudyError("set COHORTIUM_OWNER_DATABASE to the URL of a login that may make roles and tables")
        return migrations.migrate(owner)

    async def migrated() -> list[str]:
        async with embedded.embedded(consortium.folder) as stores:
            return await asyncio.to_thread(migrations.migrate, stores.owner_url)

    return asyncio.run(migrated())


@dataclass(frozen=True)
class Places:
    """Where a coordinator listens, `host:port` each."""

    fleet: str
    enrolment: str
    health: str | None


async def _coordinate(consortium: Consortium, places: Places, compiler: Compiler) -> None:
    from cohortium.adapters import bus as redis
    from cohortium.adapters import postgres
    from cohortium.adapters.postgres_desk import PostgresDesk
    from cohortium.adapters.postgres_enrolments import PostgresEnrolments
    from cohortium.adapters.postgres_runs import PostgresRuns

    stop = _told_to_stop()
    async with AsyncExitStack() as stack:
        database_url, redis_url = await stack.enter_async_context(stores(consortium))
        database = await stack.enter_async_context(postgres.connected(database_url))
        heart = await stack.enter_async_context(postgres.connected(database_url, most=1))
        bus = await stack.enter_async_context(redis.connected(redis_url))
        me = f"{socket.gethostname()[:40]}-{os.getpid()}-{secrets.token_hex(3)}"
        exchange, news, tracer = Exchange(me, bus, _unix), News(), Tracer("coordinator")
        stack.callback(tracer.close)
        meter = CoordinatorMeter(lambda: service.leading, lambda: exchange.attached)

        def observe(run: str, event: RunEvent) -> None:
            meter.observe(run, event)
            tracer.observe(run, event)

        runs, desk = PostgresRuns(database, heart), PostgresDesk(database)
        gateway = Gateway(
            exchange,
            lambda site, serial, issued: _admitted(service, site, issued),
            me,
            _SOFTWARE,
            _now,
            Limits(pause=Flow(*_FRAMES, time.monotonic)),
        )
        service = Service(
            me,
            places.fleet,
            runs,
            exchange,
            consortium.identity,
            time.monotonic,
            pace=Pace(),
            means=await asyncio.to_thread(machine.means),
            compiler=compiler,
            observe=observe,
            revoked=gateway.recheck,
            news=news.tell,
        )
        control = ConsortiumService(
            desk, lambda: service.sites, exchange.present, news, lambda what: _allowed(bus, what), _now, compiler
        )
        registrar = enrolment.registrar(consortium, PostgresEnrolments(database), bus.allow)
        await _listening(stack, consortium, places, gateway, control, MembershipService(registrar), registrar)
        stack.callback(gateway.stop)
        _show_health(stack, places.health, lambda: _coordinator_health(me, service, exchange), meter.text)
        await service.serve(stop)


async def _listening(
    stack: AsyncExitStack,
    consortium: Consortium,
    places: Places,
    gateway: Gateway,
    control: ConsortiumService,
    membership: MembershipService,
    registrar: Any,
) -> None:
    fresh = enrolment.server_certificate(consortium)
    fleet = server([gateway.handler()])
    pb_grpc.add_ConsortiumServicer_to_server(control, fleet)
    pb_grpc.add_MembershipServicer_to_server(membership, fleet)
    entrance = grpc.aio.server(options=[*ENTRANCE, ("grpc.so_reuseport", 0)])
    pb_grpc.add_EnrolmentServicer_to_server(EnrolmentService(registrar), entrance)
    for one, place, mutual in ((fleet, places.fleet, True), (entrance, places.enrolment, False)):
        try:
            one.add_secure_port(place, server_credentials(fresh, consortium.authority_pem, mutual=mutual))
        except RuntimeError:
            raise CohortiumError(f"nobody can listen at {place}: is another process there? name another") from None
        await one.start()
        stack.push_async_callback(one.stop, _GRACE)


def _admitted(service: Service, site: str, issued: datetime) -> str | None:
    row = service.sites.get(site)
    if row is None:
        return "the site is no member of this consortium"
    if row.revoked:
        return "the site's membership was revoked"
    # a site enrols anew after a theft: the thief's certificates end with the old membership
    return "the certificate is of an earlier membership" if issued + _SKEW < row.enrolled else None


async def _allowed(bus: Bus, what: str) -> bool:
    rate, burst = _RATES[what.partition(":")[0]]
    try:
        return await bus.allow(what, rate, burst)
    except Unavailable:
        # people are known by their certificates; without the bus they are served all the same
        return True


def _coordinator_health(me: str, service: Service, exchange: Exchange) -> tuple[bool, Mapping[str, Any]]:
    facts = {"ready": service.alive, "coordinator": me, "leading": len(service.leading)}
    return service.alive, facts | {"attached": sorted(exchange.attached)}


async def _serve(home: Path, config: site_config.SiteConfig, compiler: Compiler) -> None:
    stop, enrolled = _told_to_stop(), credentials.load_enrolled(home)
    identity = credentials.identity_of(home)
    pinned = Pinned(enrolment.pinned_identities(home))
    async with AsyncExitStack() as stack:
        own = stack.enter_context(open_home(home, identity))
        approved = stack.enter_context(open_approvals(home))
        agent = Agent(
            Membership(enrolled.site, identity, pinned, enrolled.coordinator),
            config.sources(),
            approved,
            Randomness(os.urandom(32)),  # noqa: TID251  chosen here
            compiler,
            machine.means(),
            own.ledger,
            own.policy,
            stack.enter_context(open_journal(home, enrolled.site, identity)),
        )
        link = Link(
            enrolled.fleet,
            lambda: _files(home, enrolled.authority),
            secrets.SystemRandom().random,
            _unix,
            _SOFTWARE,
        )
        tracer, meter = Tracer("agent"), AgentMeter(lambda: link.state.connected is not None)
        stack.callback(tracer.close)

        def answered(run: str, kind: str, seconds: float, refused: bool) -> None:
            meter.answered(kind, seconds, refused)
            tracer.took(run, kind, seconds)

        # one piece of work at a time: the agent's state is one
        pool, trainers = stack.enter_context(ThreadPoolExecutor(1, "agent")), Trainers(min(machine.cores(), _TRAINERS))
        prepare = partial(_prepare, home, approved, pinned, pool)
        attendant = Attendant(agent, link, pool, trainers, time.perf_counter, prepare, answered)
        address = None if config.health is None else f"{config.health[0]}:{config.health[1]}"
        _show_health(stack, address, lambda: _agent_health(enrolled.site, link), meter.text)
        await _until(stop, link, attendant, enrolment.keep_renewed(home, lambda credential: link.renewed()))


async def _until(stop: asyncio.Event, link: Link, attendant: Attendant, renewing: Any) -> None:
    """Serves until told to stop, or until the site is no longer a member."""
    link.start()
    tasks = [asyncio.ensure_future(one) for one in (stop.wait(), attendant.serve(), renewing)]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        await link.detach()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _files(home: Path, authority: bytes) -> tuple[bytes, bytes, bytes]:
    credential = credentials.load_credential(home)
    return authority, credential.chain, credential.key


async def _prepare(home: Path, approved: Approvals, pinned: Pinned, thread: Executor, data: Data) -> None:
    """Sees to it that a run's sites are known: what the steward confirmed meanwhile counts from the next run on.

    Files are read, and studies parsed, on the agent's `thread`, so that an older reading never replaces a newer one.
    """

    def look() -> None:
        pinned.now = enrolment.pinned_identities(home)

    def known() -> bool:
        sites = _sites_of(data, approved)
        if sites:
            look()
        return sites <= pinned.keys()

    loop = asyncio.get_running_loop()
    if not await loop.run_in_executor(thread, known):
        met = await enrolment.meet_peers(home)
        for name in met.changed:
            log.error("a site's identity changed; its old one stays until a person confirms", extra={"site": name})
        await loop.run_in_executor(thread, look)


def _sites_of(data: Data, approved: Approvals) -> frozenset[str]:
    """Returns the sites of the study that a message asks to run; none if it asks for something else.

    Parsing a study may take seconds, so one that the steward did not approve is not looked into.
    """
    with suppress(CohortiumError):
        message = decode_to_site(data)
        if isinstance(message, OpenRun) and approved.get(study_id_of(message.study), 0):
            return frozenset(from_canonical(message.study).sites.include)
    return frozenset()


def _agent_health(site: str, link: Link) -> tuple[bool, Mapping[str, Any]]:
    state = link.state
    attached = state.connected is not None
    return attached, {"ready": attached, "site": site, "coordinator": state.connected, "error": state.error}


def _show_health(stack: AsyncExitStack, address: str | None, ready: pages.Ready, metrics: Callable[[], bytes]) -> None:
    stack.enter_context(nullcontext() if address is None else pages.serving(address, ready, metrics))


def _told_to_stop() -> asyncio.Event:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for sign in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(sign, stop.set)
    return stop


def _person(folder: Path) -> Person:
    if (folder / person.SETTINGS).exists():
        return person.load(folder)
    consortium = enrolment.load_consortium(folder)
    certificate = person.read(folder / f"{OPERATOR}.pem")
    key = person.read(folder / f"{OPERATOR}.key", private=True)
    return Person(consortium.addresses, consortium.authority_pem, certificate, key)


def _run_name(study: str) -> str:
    return f"{study[:60]}-{secrets.token_hex(4)}"


def _unix() -> float:
    return _now().timestamp()


def _now() -> datetime:
    return datetime.now(UTC)  # noqa: TID251  the clock is chosen here
