"""What researchers and operators ask of the consortium, as a gRPC service on the port of mutual TLS.

Who asks is read from the certificate alone: `cohortium:operator:NAME` or `cohortium:researcher:NAME`. A researcher sees
and steers the runs that they submitted, an operator all of them.
"""

import asyncio
import json
import logging
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Any, TypeVar, cast

import grpc

from cohortium.coordinator.authority import principal_of
from cohortium.coordinator.exchange import Presence
from cohortium.coordinator.keepsake import Keepsake, pack
from cohortium.coordinator.ports import ENDED, Desk, RunEvent, RunRow, SiteRow, SiteState, Terms, Unavailable, Wish
from cohortium.core.document import MAX_DOCUMENT_BYTES, from_canonical, study_id_of
from cohortium.core.errors import CohortiumError, PolicyRefused, StudyError
from cohortium.core.messages import MOST_SEED
from cohortium.engines.fleet.v1 import fleet_pb2 as pb
from cohortium.engines.fleet.v1 import fleet_pb2_grpc as pb_grpc
from cohortium.plan import Compiler, compile_study

log = logging.getLogger("cohortium.fleet")
_PART = 1 << 20
_LOOK = 0.5
"""Seconds after which a watcher looks at the store, whether or not it heard of news."""
_TOGETHER = 0.1
"""Seconds between two looks of a watcher at the least."""
_LONGEST_NAME = 80
_MOST_RUNS = 1000
_LONGEST_WAIT = 30 * 86400.0
_MOST_STREAMS = {"events": 64, "results": 8}
"""Streams that one person may have open at one coordinator; a result is in memory until it was read."""

T = TypeVar("T")
Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True)
class Caller:
    """A person, as their certificate names them."""

    role: str
    name: str


@dataclass
class News:
    """Wakes whoever waits for a channel of the store's news."""

    _waiting: dict[str, set[asyncio.Event]] = field(default_factory=dict)

    def tell(self, channel: str) -> None:
        """Wakes those that wait for the channel."""
        for event in self._waiting.get(channel, ()):
            event.set()

    @contextmanager
    def of(self, channel: str) -> Iterator[asyncio.Event]:
        """Yields what is set whenever there is news of the channel; whoever waits clears it before looking."""
        event = asyncio.Event()
        self._waiting.setdefault(channel, set()).add(event)
        try:
            yield event
        finally:
            self._waiting[channel].discard(event)
            if not self._waiting[channel]:
                del self._waiting[channel]


class ConsortiumService(pb_grpc.ConsortiumServicer):
    """Serves people.

    Args:
        desk: the store's runs.
        sites: the sites as they were seen last.
        present: tells which sites are attached, and where.
        news: tells of changes in the store.
        allow: whether a caller may ask for something now, by name; a rate limit.
        clock: the time, with its zone.
        compiler: turns a study into a plan.
    """

    def __init__(
        self,
        desk: Desk,
        sites: Callable[[], Mapping[str, SiteRow]],
        present: Callable[[Sequence[str]], Awaitable[Mapping[str, Presence]]],
        news: News,
        allow: Callable[[str], Awaitable[bool]],
        clock: Callable[[], datetime],
        compiler: Compiler = compile_study,
    ) -> None:
        self._compiler, self._clock = compiler, clock
        self._streams = Counter[tuple[Caller, str]]()
        self._desk, self._sites, self._present, self._news, self._allow = desk, sites, present, news, allow

    async def Submit(self, request: pb.SubmitRequest, context: Context) -> pb.Run:  # noqa: N802  gRPC's own name
        async def submitted(caller: Caller) -> RunRow:
            if len(request.study) > MAX_DOCUMENT_BYTES or not 0 < len(request.run) <= _LONGEST_NAME:
                raise StudyError("a run was refused: its name or its study is missing or too long")
            if not request.run.isprintable() or "/" in request.run:
                raise StudyError("a run was refused: its name holds characters that no name needs")
            # on a thread: privacy takes a while to account for, and the sites' streams go on meanwhile
            plan = await asyncio.to_thread(lambda: self._compiler(from_canonical(request.study)))
            if plan.study.aggregation.protocol == "ckks-single-key":
                raise StudyError(
                    "a run was refused: the protocol 'ckks-single-key' needs one secret key at all hospitals, which is "
                    "given to none over a network; simulate it, or take masking or rlwe"
                )
            seed = request.seed if request.HasField("seed") else None
            if seed is not None and seed > MOST_SEED:
                raise StudyError(f"a seed was refused: {MOST_SEED} is the largest")
            if seed is not None and plan.noise is not None:
                raise StudyError(
                    "a seed was refused: the study asks for differential privacy, whose randomness nobody may know; "
                    "submit it without a seed"
                )
            unknown = [site for site in plan.sites if site not in self._sites() or self._sites()[site].revoked]
            if unknown:
                raise StudyError(f"the study includes {', '.join(unknown)}, not enrolled in this consortium")
            study = study_id_of(request.study)
            terms = _terms(request.terms) if request.HasField("terms") else Terms()
            if terms.priority > 0 and caller.role != "operator":
                raise PolicyRefused("a priority above 0 was refused: only an operator puts a run before others' runs")
            return await self._desk.submit(
                request.run, study, request.study, f"{caller.role}:{caller.name}", plan.sites, terms, seed
            )

        return to_run(await self._answer(context, "submit", submitted))

    async def GetRun(self, request: pb.GetRunRequest, context: Context) -> pb.Run:  # noqa: N802
        return to_run(await self._answer(context, "read", lambda caller: self._visible(caller, request.run)))

    async def ListRuns(self, request: pb.ListRunsRequest, context: Context) -> pb.ListRunsReply:  # noqa: N802
        async def listed(caller: Caller) -> Sequence[RunRow]:
            return await self._desk.runs(min(request.most or 100, _MOST_RUNS), _sees(caller))

        return pb.ListRunsReply(runs=map(to_run, await self._answer(context, "read", listed)))

    async def SetWish(self, request: pb.SetWishRequest, context: Context) -> pb.Run:  # noqa: N802
        async def wished(caller: Caller) -> RunRow:
            if request.wish not in (pb.WISH_RUN, pb.WISH_PAUSE, pb.WISH_CANCEL):
                raise StudyError("a wish was refused: say run, pause or cancel")
            await self._visible(caller, request.run)
            wish = cast(Wish, pb.Wish.Name(request.wish).removeprefix("WISH_").lower())
            return await self._desk.wish(request.run, wish, f"{caller.role}:{caller.name}")

        return to_run(await self._answer(context, "steer", wished))

    async def Events(self, request: pb.EventsRequest, context: Context) -> AsyncIterator[pb.Event]:  # noqa: N802
        async with self._stream(context, "events"):
            after = request.after
            row = await self._answer(context, "read", lambda caller: self._visible(caller, request.run))
            with self._news.of(f"run:{request.run}") as told:
                while True:
                    ended = row.status in ENDED
                    for event in await self._answer(context, "", partial(self._since, request.run, after)):
                        after = event.seq
                        facts = json.dumps(dict(event.facts)).encode()
                        yield pb.Event(seq=event.seq, at=_seconds(event.at), kind=event.kind, facts=facts)
                    if ended:
                        return
                    with suppress(TimeoutError):
                        async with asyncio.timeout(_LOOK):
                            await told.wait()
                    # rounds that take milliseconds are told together
                    await asyncio.sleep(_TOGETHER)
                    told.clear()
                    row = await self._answer(context, "", lambda caller: self._visible(caller, request.run))

    async def Result(self, request: pb.ResultRequest, context: Context) -> AsyncIterator[pb.ResultPart]:  # noqa: N802
        async with self._stream(context, "results"):
            data = await self._answer(context, "read", lambda caller: self._result(caller, request.run))
            for offset in range(min(request.offset, len(data)), len(data), _PART):
                yield pb.ResultPart(total=len(data), offset=offset, data=data[offset : offset + _PART])

    async def Status(self, request: pb.StatusRequest, context: Context) -> pb.StatusReply:  # noqa: N802
        async def status(caller: Caller) -> pb.StatusReply:
            rows, standings = self._sites(), dict[str, SiteState]()
            if request.HasField("run"):
                runs: Sequence[RunRow] = [await self._visible(caller, request.run)]
                standings = {one.site: one for one in await self._desk.site_states(request.run)}
                rows = {name: row for name, row in rows.items() if name in standings}
            else:
                runs = await self._desk.runs(_MOST_RUNS, _sees(caller), under_way=True)
            present = await self._present(list(rows))
            living = await self._desk.coordinators()
            return pb.StatusReply(
                sites=[_site(row, present.get(name), standings.get(name)) for name, row in sorted(rows.items())],
                coordinators=[
                    pb.CoordinatorStatus(coordinator=name, address=address, seen=_seconds(seen))
                    for name, address, seen in living
                ],
                runs=map(to_run, runs),
            )

        return await self._answer(context, "read", status)

    async def _result(self, caller: Caller, run: str) -> bytes:
        row = await self._visible(caller, run)
        outcome, document = await self._desk.outcome(run), await self._desk.document(row.study)
        if outcome is None or document is None:
            raise StudyError(f"run '{run}' is {row.status} and has no result")
        applied = await self._desk.applied(run)
        ended = [event for event in await self._desk.events(run, 0, 1_000_000) if event.kind == "finished"]
        rounds = tuple((one.number, one.survivors, dict(one.facts)) for one in applied)
        setup = int(ended[-1].facts.get("bytes_setup", 0)) if ended else 0
        return pack(Keepsake(run, document, outcome, rounds, setup))

    async def _since(self, run: str, after: int, _: Caller) -> Sequence[RunEvent]:
        return await self._desk.events(run, after)

    @asynccontextmanager
    async def _stream(self, context: Context, kind: str) -> AsyncGenerator[None]:
        """Counts a stream of the caller's; ends the call where there are too many, since each one is kept going."""
        mine, most = (await _caller(context, self._clock()), kind), _MOST_STREAMS[kind]
        if self._streams[mine] >= most:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{most} streams of {kind} are the most: end one")
        self._streams[mine] += 1
        try:
            yield
        finally:
            self._streams[mine] -= 1
            if not self._streams[mine]:
                del self._streams[mine]

    async def _visible(self, caller: Caller, run: str) -> RunRow:
        row = await self._desk.run(run) if run.isprintable() and len(run) <= _LONGEST_NAME else None
        if row is None or _sees(caller) not in (None, row.owner):
            raise StudyError(f"there is no run '{run}' among those that you may see")
        return row

    async def _answer(self, context: Context, what: str, work: Callable[[Caller], Awaitable[T]]) -> T:
        """Returns what `work` gives for the caller; ends the call with a status where it fails."""
        caller = await _caller(context, self._clock())
        try:
            if what and not await self._allow(f"{what}:{caller.role}:{caller.name}"):
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many requests: wait a little")
            return await work(caller)
        except Unavailable:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the consortium's database is away just now")
        except PolicyRefused as error:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error))
        except CohortiumError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        raise AssertionError("abort does not return")


async def _caller(context: Context, now: datetime) -> Caller:
    """Returns who calls; ends the call of whoever is no person of this consortium."""
    certificates = context.auth_context().get("x509_pem_cert", [])
    try:
        principal = principal_of(next(iter(certificates), b""))
    except (CohortiumError, ValueError):
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "show a certificate of this consortium")
        raise
    # TLS looks at the beginning of a connection, which may last for months
    if principal.not_after <= now:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the certificate has expired: ask for a new one")
    if principal.role not in ("operator", "researcher"):
        log.warning("a call was refused: no person's certificate", extra={"principal": principal.name})
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, "this is for operators and researchers")
    return Caller(principal.role, principal.name)


def _sees(caller: Caller) -> str | None:
    """Returns the owner whose runs alone the caller sees; None: they see all runs."""
    return None if caller.role == "operator" else f"{caller.role}:{caller.name}"


def _terms(told: pb.Terms) -> Terms:
    for name, seconds in (("deadline", told.deadline), ("patience", told.patience)):
        if not 0 < seconds <= _LONGEST_WAIT:
            raise StudyError(f"a {name} of {seconds} s was refused: give more than 0 and at most 30 days")
    return Terms(deadline=told.deadline, patience=told.patience, priority=told.priority)


def to_run(row: RunRow) -> pb.Run:
    """Returns a run as it travels."""
    return pb.Run(
        run=row.run,
        study=row.study,
        owner=row.owner,
        terms=pb.Terms(deadline=row.terms.deadline, patience=row.terms.patience, priority=row.terms.priority),
        seed=row.seed,
        status=pb.RunStatus.Value(f"RUN_STATUS_{row.status.upper()}"),
        wish=pb.Wish.Value(f"WISH_{row.wish.upper()}"),
        leader=row.leader,
        round=row.round,
        reason=row.reason,
        submitted=_seconds(row.submitted),
        started=_seconds(row.started) if row.started else None,
        ended=_seconds(row.ended) if row.ended else None,
    )


def _site(row: SiteRow, presence: Presence | None, standing: SiteState | None) -> pb.SiteStatus:
    return pb.SiteStatus(
        site=row.name,
        attached=presence is not None,
        coordinator=presence.coordinator if presence else None,
        software=presence.version if presence else None,
        enrolled=_seconds(row.enrolled),
        revoked=_seconds(row.revoked) if row.revoked else None,
        standing=pb.Standing(word=standing.state, round=standing.round, at=_seconds(standing.at)) if standing else None,
    )


def _seconds(time: datetime | None) -> float:
    return time.timestamp() if time else 0.0
