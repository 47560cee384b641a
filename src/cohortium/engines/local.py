"""The local engine: coordinator and sites in one process, over the same messages as bytes that a network carries."""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cohortium.coordinator.result import Result, RoundRecord, Sample
from cohortium.coordinator.rounds import (
    Broadcast,
    Effect,
    Failed,
    Finished,
    RoundClosed,
    RunState,
    inbound_limit,
    open_run,
    step,
)
from cohortium.core import codec
from cohortium.core.errors import RunFailed
from cohortium.core.layout import entry_names, pack
from cohortium.core.messages import CloseRun, FromSite, MaskedUpdate, OpenRound, ToSite, decode_from_site
from cohortium.core.random import Randomness
from cohortium.learning.table import Table
from cohortium.plan import Plan
from cohortium.site.agent import Agent

Tap = Callable[[FromSite], None]
"""Sees what the coordinator sees: every message of a site."""
_SAMPLED = 4096
"""Entries of a vector that are kept to show what masking does."""
Progress = Callable[[RoundClosed], None]


@dataclass
class _Wire:
    """Carries messages between the run's two halves, and counts bytes and time since it was last read."""

    state: RunState
    agents: Mapping[str, Agent]
    clock: Callable[[], float]
    tap: Tap | None
    started: float
    up: int = 0
    down: int = 0

    def broadcast(self, message: ToSite) -> list[Effect]:
        """Brings a message to every site and the answers back; returns what the coordinator then wants done."""
        data = codec.encode(message)
        wanted: list[Effect] = []
        limit = inbound_limit(self.state)
        for site in self.state.plan.sites:
            if self.state.phase == "over" and not isinstance(message, CloseRun):
                break  # a site refused: nothing more is asked of the others
            self.down += len(data)
            for answer in self.agents[site].receive(data):
                self.up += len(answer)
                reply = decode_from_site(answer, limit)
                if self.tap:
                    self.tap(reply)
                self.state, effects = step(self.state, site, reply)
                wanted += effects
        return wanted

    def read(self) -> tuple[int, int, float]:
        """Returns bytes up, bytes down and seconds, and starts anew."""
        now = self.clock()
        reading = self.up, self.down, now - self.started
        self.up, self.down, self.started = 0, 0, now
        return reading


def run(
    plan: Plan,
    agents: Mapping[str, Agent],
    name: str,
    clock: Callable[[], float],
    tap: Tap | None = None,
    progress: Progress | None = None,
) -> Result:
    """Runs a compiled study over the sites' agents and returns its result.

    Args:
        name: the run's name, used once for these agents.
        clock: monotonic seconds.

    Raises:
        CohortiumError: the run failed; where a site refused, its own full reason, since all sites are in this process.
    """
    state, effects = open_run(plan, name)
    wire = _Wire(state, agents, clock, tap, clock())
    queue: deque[Effect] = deque(effects)
    records: list[RoundRecord] = []
    setup = 0
    while queue:
        match queue.popleft():
            case Broadcast(message):
                if isinstance(message, OpenRound) and not records:
                    setup = sum(wire.read()[:2])
                queue.extend(wire.broadcast(message))
            case RoundClosed() as closed:
                up, down, seconds = wire.read()
                records.append(
                    RoundRecord(closed.number, closed.survivors, closed.values, up, down, seconds, closed.objective)
                )
                if progress:
                    progress(closed)
            case Finished(outcome):
                setup += sum(wire.read()[:2])
                return Result(plan.study, plan.study_id, name, outcome, tuple(records), setup)
            case Failed(error):
                raise next((agent.failure for agent in agents.values() if agent.failure), None) or error
    raise RunFailed("the run ended without a result")


def sample(plan: Plan, update: MaskedUpdate, table: Table) -> Sample:
    """Returns a site's first update beside what it was before masking, worked out anew from the site's table.

    Every step before the mask is a pure function of study and table, so nothing needs to be taken from the run.
    """
    algorithm = plan.algorithm
    broadcast = algorithm.broadcast(algorithm.init())
    layout = algorithm.layout(broadcast)
    statistics, _ = algorithm.local(broadcast, table, {}, Randomness(bytes(32)))
    plain = plan.stages(layout).encode(pack(layout, statistics))
    return Sample(
        site=update.site,
        round=update.round,
        bits=plan.study.aggregation.bits,
        names=entry_names(layout)[:_SAMPLED],
        plain=tuple(plain[:_SAMPLED].tolist()),
        masked=tuple(update.values[:_SAMPLED].tolist()),
    )
