"""What goes on beside the faults: runs, a user who asks how the consortium is, and a clock for takeovers."""

import threading
import time
from collections import Counter
from contextlib import suppress

import grpc
import psycopg

from chaos_faults import World
from cohortium.coordinator.ports import Terms
from cohortium.core.errors import CohortiumError
from cohortium.core.study import Study
from cohortium.engines.fleet.v1 import fleet_pb2 as pb

SEED = 7
TERMS = Terms(deadline=5.0, patience=90.0)
AT_ONCE = 4
TAKEN = ("began", "taken over", "finished", "failed", "cancelled")
ROTA = ("newton-1", "describe-1", "newton-0", "descent-1", "newton-1", "rlwe-1", "descent-0")


class Repeated(threading.Thread):
    """Something that is done over and over beside the faults, until it is stopped."""

    def __init__(self, seconds: float) -> None:
        super().__init__(daemon=True)
        self._seconds, self._stopped = seconds, threading.Event()
        self.surprises: Counter[str] = Counter()

    def once(self) -> None:
        raise NotImplementedError

    def run(self) -> None:
        while not self._stopped.is_set():
            began = time.monotonic()
            try:
                self.once()
            except (psycopg.Error, CohortiumError, grpc.RpcError) as error:
                self.surprises[f"{type(error).__name__}: {str(error)[:200]}"] += 1
            self._stopped.wait(max(0.0, began + self._seconds - time.monotonic()))

    def stop(self) -> None:
        self._stopped.set()
        self.join(30)


class Load(Repeated):
    """Keeps some runs going, one kind after the other."""

    def __init__(self, made: World, asked: dict[str, Study]) -> None:
        super().__init__(0.1)
        self._made, self._studies, self._connection = made, asked, made.fleet.connect()
        self._next: tuple[str, str] | None = None
        self.submitted = 0

    def once(self) -> None:
        ((open_runs,),) = self._made.asked("SELECT count(*) FROM cohortium.runs WHERE ended IS NULL")
        if int(str(open_runs)) >= AT_ONCE:
            return
        if self._next is None:
            kind = ROTA[self.submitted % len(ROTA)]
            self._next = kind, f"{kind}-{self.submitted:04d}"
        kind, name = self._next
        # the same name again after a lost answer: it is the same run
        self._connection.submit(self._studies[kind], run=name, seed=SEED, terms=TERMS)
        self._next, self.submitted = None, self.submitted + 1


class Prober(Repeated):
    """Asks the consortium how it is ten times a second, as a user who turns to the next coordinator would."""

    def __init__(self, made: World) -> None:
        super().__init__(0.1)
        self._stubs = made.fleet.connect()._stubs
        self._current, self.during = 0, "nothing"
        self.answers: list[tuple[str, bool]] = []

    def once(self) -> None:
        during, ends = self.during, time.monotonic() + 1.0
        done = False
        for _ in self._stubs:
            left = ends - time.monotonic()
            if left <= 0:
                break
            try:
                self._stubs[self._current].Status(pb.StatusRequest(), timeout=min(left, 0.5))
                done = True
                break
            except grpc.RpcError:
                self._current = (self._current + 1) % len(self._stubs)
        self.answers.append((during, done))


class Watcher(Repeated):
    """Takes the time from each leader's death to its runs' next leader."""

    def __init__(self, made: World) -> None:
        super().__init__(0.03)
        self._made, self._connection = made, made.database()
        self.taken: list[tuple[float, str, str]] = []
        self._seen: set[tuple[float, str]] = set()

    def once(self) -> None:
        waiting = [
            (at, kind, run, last)
            for at, kind, runs in list(self._made.deaths)
            for run, last in runs.items()
            if (at, run) not in self._seen
        ]
        if not waiting:
            return
        try:
            for at, kind, run, last in waiting:
                query = "SELECT 1 FROM cohortium.events WHERE run = %s AND seq > %s AND kind = ANY(%s) LIMIT 1"
                if self._connection.execute(query, (run, last, list(TAKEN))).fetchone():
                    self.taken.append((time.monotonic() - at, kind, run))
                    self._seen.add((at, run))
        except psycopg.OperationalError:
            self._connection.close()
            with suppress(psycopg.OperationalError):
                self._connection = self._made.database()
