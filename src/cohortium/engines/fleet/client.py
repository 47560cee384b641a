"""The consortium as a researcher or an operator sees it: submit a study, watch its run, fetch its result.

Calls go to the first coordinator that answers; where one is gone, the next is asked.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar, cast

import grpc

from cohortium.coordinator.keepsake import unpack
from cohortium.coordinator.ports import ENDED, RunEvent, RunRow, Status, Terms, Wish
from cohortium.coordinator.result import Result
from cohortium.core.document import canonical_bytes
from cohortium.core.errors import CohortiumError, PolicyRefused, ProtocolError, RunFailed, StudyError
from cohortium.core.study import Study
from cohortium.engines.fleet.v1 import fleet_pb2 as pb
from cohortium.engines.fleet.v1 import fleet_pb2_grpc as pb_grpc

T = TypeVar("T")
_PATIENCE = 10.0
"""Seconds that one call may take at one coordinator."""
_MOST_RESULT = 1 << 31
_OPTIONS = [
    # a coordinator that was away is asked again as soon as it is back, not minutes later
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
]


@dataclass(frozen=True)
class Credentials:
    """Who calls: PEM bytes of the consortium's authority, the caller's certificate and its key."""

    authority: bytes
    certificate: bytes
    key: bytes

    def __repr__(self) -> str:
        return "Credentials()"


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How a site stands in a run.

    Attributes:
        word: its last one: 'waiting' before the first, then 'contributed', or 'refused'.
        round: the last round in which its contribution was summed, 0 if none.
        at: when that was.
    """

    word: str
    round: int
    at: datetime


@dataclass(frozen=True, kw_only=True)
class SiteState:
    """A site as the consortium sees it now; `standing` is there where a run was asked for."""

    name: str
    attached: bool
    coordinator: str | None
    software: str | None
    enrolled: datetime
    revoked: datetime | None
    standing: Standing | None = None


@dataclass(frozen=True, kw_only=True)
class CoordinatorState:
    """A coordinator, and its last sign of life."""

    name: str
    address: str
    seen: datetime


@dataclass(frozen=True)
class ConsortiumState:
    """How the consortium is: its sites, its coordinators, and the runs that have not ended.

    Where a run was asked for, it is the only one, ended or not, and the sites are those of its study.
    """

    sites: tuple[SiteState, ...]
    coordinators: tuple[CoordinatorState, ...]
    runs: tuple[RunRow, ...]


class Consortium:
    """A connection to a consortium; close it, or use it in a `with` statement.

    Args:
        addresses: coordinators, each `host:port`.
        name: returns a fresh name for a run of a study of this name.
        wait: waits some seconds between attempts.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        credentials: Credentials,
        name: Callable[[str], str],
        wait: Callable[[float], None],
    ) -> None:
        if not addresses:
            raise StudyError("no coordinator's address is known: give one, as in host:7400")
        secured = grpc.ssl_channel_credentials(credentials.authority, credentials.key, credentials.certificate)
        self._channels = [grpc.secure_channel(address, secured, _OPTIONS) for address in addresses]
        self._stubs = [pb_grpc.ConsortiumStub(channel) for channel in self._channels]
        self._name, self._wait, self._current = name, wait, 0

    def __enter__(self) -> "Consortium":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection; runs go on."""
        for channel in self._channels:
            channel.close()

    def submit(
        self, study: Study, *, run: str | None = None, seed: int | None = None, terms: Terms | None = None
    ) -> "RunHandle":
        """Submits a study to its hospitals.

        Args:
            run: a name that no run has had; without it, one is made.
            seed: decides the sites' training where the study has no noise, as in a simulation; public.
            terms: how long to wait for sites.

        Raises:
            StudyError: the study cannot be run here.
        """
        terms, name = terms or Terms(), run or self._name(study.name)
        asked = pb.Terms(deadline=terms.deadline, patience=terms.patience, priority=terms.priority)
        request = pb.SubmitRequest(run=name, study=canonical_bytes(study), terms=asked, seed=seed)
        return RunHandle(self, from_run(self._call(lambda stub: stub.Submit(request, timeout=_PATIENCE))).run)

    def run(self, run: str) -> "RunHandle":
        """Returns a run by its name.

        Raises:
            StudyError: there is none among those that you may see.
        """
        handle = RunHandle(self, run)
        handle.state()
        return handle

    def runs(self, most: int = 100) -> tuple[RunRow, ...]:
        """Returns the latest runs, newest first."""
        reply = self._call(lambda stub: stub.ListRuns(pb.ListRunsRequest(most=most), timeout=_PATIENCE))
        return tuple(map(from_run, reply.runs))

    def state(self, run: str | None = None) -> ConsortiumState:
        """Returns how the consortium is, or how a run's sites stand.

        Raises:
            StudyError: there is no such run among those that you may see.
        """
        reply = self._call(lambda stub: stub.Status(pb.StatusRequest(run=run), timeout=_PATIENCE))
        sites = tuple(
            SiteState(
                name=site.site,
                attached=site.attached,
                coordinator=site.coordinator or None,
                software=site.software or None,
                enrolled=_time(site.enrolled),
                revoked=_time(site.revoked) if site.HasField("revoked") else None,
                standing=_standing(site.standing) if site.HasField("standing") else None,
            )
            for site in reply.sites
        )
        coordinators = tuple(
            CoordinatorState(name=one.coordinator, address=one.address, seen=_time(one.seen))
            for one in reply.coordinators
        )
        return ConsortiumState(sites, coordinators, tuple(map(from_run, reply.runs)))

    def get(self, run: str) -> RunRow:
        """Returns a run's state."""
        return from_run(self._call(lambda stub: stub.GetRun(pb.GetRunRequest(run=run), timeout=_PATIENCE)))

    def wish(self, run: str, wish: Wish) -> RunRow:
        """Says what you want of a run."""
        request = pb.SetWishRequest(run=run, wish=pb.Wish.Value(f"WISH_{wish.upper()}"))
        return from_run(self._call(lambda stub: stub.SetWish(request, timeout=_PATIENCE)))

    def events(self, run: str, after: int = 0) -> Iterator[RunEvent]:
        """Yields what happened to a run and what happens, until it ends; goes on where a connection breaks."""
        while True:
            try:
                request = pb.EventsRequest(run=run, after=after)
                for told in self._stubs[self._current].Events(request):
                    after = told.seq
                    yield RunEvent(kind=told.kind, facts=json.loads(told.facts), seq=told.seq, at=_time(told.at))
                return
            except grpc.RpcError as error:
                self._next(error)

    def result(self, run: str) -> bytes:
        """Returns the bytes of a finished run's result."""
        data = bytearray()

        def fetched(stub: Any) -> bytes:
            for part in stub.Result(pb.ResultRequest(run=run, offset=len(data))):
                if part.offset != len(data) or not len(data) + len(part.data) <= part.total <= _MOST_RESULT:
                    raise ProtocolError("a result was refused: its parts do not follow each other")
                data.extend(part.data)
            return bytes(data)

        return self._call(fetched)

    def _call(self, ask: Callable[[Any], T]) -> T:
        """Returns what the first coordinator that is there answers; asks each of them a few times."""
        attempts = 3 * len(self._stubs)
        for attempt in range(attempts):
            try:
                return ask(self._stubs[self._current])
            except grpc.RpcError as error:
                if attempt + 1 == attempts:
                    raise _error(error) from None
                self._next(error)
        raise AssertionError("the last attempt returns or raises")

    def _next(self, error: grpc.RpcError) -> None:
        """Turns to the next coordinator, or raises what asking another would not mend."""
        if _code(error) not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            raise _error(error) from None
        self._current = (self._current + 1) % len(self._stubs)
        if self._current == 0:
            self._wait(0.5)


@dataclass(frozen=True)
class RunHandle:
    """A run in the consortium."""

    consortium: Consortium
    name: str

    def state(self) -> RunRow:
        """Returns where the run stands."""
        return self.consortium.get(self.name)

    def events(self, after: int = 0) -> Iterator[RunEvent]:
        """Yields what happens to the run, until it ends."""
        return self.consortium.events(self.name, after)

    def watch(self, progress: Callable[[RunEvent], None] = lambda event: None) -> RunRow:
        """Waits until the run ends, and tells `progress` of each event."""
        for event in self.events():
            progress(event)
        return self.state()

    def result(self) -> Result:
        """Waits for the run's end and returns its result.

        Raises:
            RunFailed: it failed or was cancelled; the message says why.
        """
        row = self.state()
        if row.status not in ENDED:
            row = self.watch()
        if row.status != "finished":
            raise RunFailed(f"run '{self.name}' {row.status}: {row.reason}")
        return unpack(self.consortium.result(self.name))

    def pause(self) -> RunRow:
        """Stops the run until it is resumed."""
        return self.consortium.wish(self.name, "pause")

    def resume(self) -> RunRow:
        """Lets a paused run go on."""
        return self.consortium.wish(self.name, "run")

    def cancel(self) -> RunRow:
        """Ends the run without a result."""
        return self.consortium.wish(self.name, "cancel")


def from_run(told: pb.Run) -> RunRow:
    """Returns a run from what travelled."""
    return RunRow(
        run=told.run,
        study=told.study,
        owner=told.owner,
        terms=Terms(deadline=told.terms.deadline, patience=told.terms.patience, priority=told.terms.priority),
        seed=told.seed if told.HasField("seed") else None,
        status=cast(Status, pb.RunStatus.Name(told.status).removeprefix("RUN_STATUS_").lower()),
        wish=cast(Wish, pb.Wish.Name(told.wish).removeprefix("WISH_").lower()),
        leader=told.leader or None,
        epoch=0,
        round=told.round,
        reason=told.reason or None,
        submitted=_time(told.submitted),
        started=_time(told.started) if told.HasField("started") else None,
        ended=_time(told.ended) if told.HasField("ended") else None,
    )


def _standing(told: pb.Standing) -> Standing:
    return Standing(word=told.word, round=told.round, at=_time(told.at))


_ERRORS: Mapping[grpc.StatusCode, type[CohortiumError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: StudyError,
    grpc.StatusCode.NOT_FOUND: StudyError,
    grpc.StatusCode.FAILED_PRECONDITION: StudyError,
    grpc.StatusCode.PERMISSION_DENIED: PolicyRefused,
    grpc.StatusCode.UNAUTHENTICATED: PolicyRefused,
    grpc.StatusCode.RESOURCE_EXHAUSTED: PolicyRefused,
}


def _code(error: grpc.RpcError) -> grpc.StatusCode:
    return cast(grpc.StatusCode, cast(Any, error).code())


def _error(error: grpc.RpcError) -> CohortiumError:
    kind = _ERRORS.get(_code(error))
    if kind is not None:
        return kind(str(cast(Any, error).details()))
    return RunFailed("no coordinator of the consortium can be reached: is one running, and is its address right?")


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
