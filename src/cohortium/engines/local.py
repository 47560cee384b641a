"""The local engine: coordinator and sites in one process, over the same messages as bytes that a network carries.

Where rounds are buffers, sites answer in an order that is drawn for each round from the run's public seed, those first
whose last contribution came too late: their work is done. So a run can be repeated, and each site is late as often.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cohortium.coordinator.result import Result, RoundRecord, Sample
from cohortium.coordinator.rounds import (
    Broadcast,
    Effect,
    Failed,
    Finished,
    RoundClosed,
    RunState,
    Send,
    inbound_limit,
    lost,
    open_run,
    step,
)
from cohortium.core import codec
from cohortium.core.errors import ProtocolError, RunFailed
from cohortium.core.layout import entry_names, pack, size
from cohortium.core.messages import CloseRun, FromSite, KeySet, MaskedUpdate, ToSite, decode_from_site
from cohortium.core.random import Randomness
from cohortium.guarantees import promise
from cohortium.learning.table import Table
from cohortium.plan import Plan
from cohortium.secagg.stream import PLAIN, Means
from cohortium.site.agent import Agent

Tap = Callable[[FromSite], None]
"""Sees what the coordinator sees: every message of a site."""
Faults = Callable[[str, ToSite | FromSite], bool]
"""Whether a message to or from a site is lost on its way; a simulation's own choice."""
_LONG = 50_000
"""Numbers from which several sites work at a time; for fewer, handing out work costs more than the work."""
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
    faults: Faults | None
    pool: Executor | None
    started: float
    up: int = 0
    down: int = 0
    late: frozenset[str] = frozenset()

    def carry(self, messages: Mapping[str, ToSite]) -> list[Effect]:
        """Brings sites their messages and the answers back; returns what the coordinator then wants done."""
        wanted: list[Effect] = []
        limit = inbound_limit(self.state)
        number = self.state.number
        buffering = self.state.phase == "collect" and self.state.plan.buffers(number)
        if buffering:
            messages = {site: messages[site] for site in self._arriving(messages, number)}
        for site, answers in self._answers(messages):
            heard = self.state.phase == "over"
            for answer in answers if not heard else []:
                effects, accepted = self._hear(site, answer, limit)
                wanted, heard = wanted + effects, heard or accepted
            # whoever has not answered at once, or not as it should, never will
            if not heard and not isinstance(messages[site], KeySet | CloseRun):
                self.state, effects = lost(self.state, site)
                wanted += effects
        if buffering and self.state.tally is not None and self.state.number == number:
            self.late = frozenset(messages.keys() - self.state.tally.sealed.keys())
        return wanted

    def _arriving(self, messages: Mapping[str, ToSite], number: int) -> list[str]:
        """Returns the sites in the order in which they answer in a round that is a buffer."""
        drawn = Randomness.of_seed(self.state.seed or 0).child("arriving", number)
        return sorted(messages, key=lambda site: (site not in self.late, drawn.child(site).bytes(8)))

    def _hear(self, site: str, answer: bytes, limit: int) -> tuple[list[Effect], bool]:
        """Returns what the coordinator makes of an answer, and whether it accepts it."""
        try:
            reply = decode_from_site(answer, limit)
            if self._lost(site, reply):
                return [], False
            if self.tap:
                self.tap(reply)
            self.state, effects = step(self.state, site, reply)
        except ProtocolError:
            return [], False
        return effects, True

    def _answers(self, messages: Mapping[str, ToSite]) -> Iterator[tuple[str, list[bytes]]]:
        """Yields each site's answers, in order; several sites work at a time where vectors are long."""
        encoded: dict[int, bytes] = {}
        for message in messages.values():
            if id(message) not in encoded:
                encoded[id(message)] = codec.encode(message)
        arrives = {site: not self._lost(site, message) for site, message in messages.items()}

        def ask(site: str) -> list[bytes]:
            return self.agents[site].receive(encoded[id(messages[site])]) if arrives[site] else []

        together = self.pool is not None and size(self.state.layout) >= _LONG
        answered = self.pool.map(ask, messages) if self.pool is not None and together else map(ask, messages)
        for site, answers in zip(messages, answered, strict=True):
            self.down += len(encoded[id(messages[site])])
            self.up += sum(map(len, answers))
            yield site, answers

    def _lost(self, site: str, message: ToSite | FromSite) -> bool:
        return self.faults is not None and self.faults(site, message)

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
    identity: Ed25519PrivateKey,
    means: Means = PLAIN,
    tap: Tap | None = None,
    progress: Progress | None = None,
    faults: Faults | None = None,
    pool: Executor | None = None,
    seed: int | None = None,
) -> Result:
    """Runs a compiled study over the sites' agents and returns its result.

    Args:
        name: the run's name, used once for these agents.
        clock: monotonic seconds.
        identity: the coordinator's signing key, whose public half the agents pinned.
        means: how this machine removes masks.
        faults: which messages are lost, to see what dropouts do.
        pool: threads on which several sites work at a time; the result is the same without.
        seed: a public seed of all training; for studies without noise only.

    Raises:
        CohortiumError: the run failed; where a site refused, its own full reason, since all sites are in this process.
    """
    pinned = agents[plan.sites[0]].membership.pinned
    state, effects = open_run(plan, name, identity, pinned, means, seed)
    wire = _Wire(state, agents, clock, tap, faults, pool, clock())
    queue: deque[Effect] = deque(effects)
    records: list[RoundRecord] = []
    setup = 0
    while queue:
        match queue.popleft():
            case Broadcast(message, sites):
                queue.extend(wire.carry(dict.fromkeys(sites, message)))
                if isinstance(message, KeySet):
                    setup = sum(wire.read()[:2])
            case Send(messages):
                queue.extend(wire.carry(messages))
            case RoundClosed() as closed:
                up, down, seconds = wire.read()
                counted = closed.survivors, closed.values, up, down, seconds
                records.append(RoundRecord(closed.number, *counted, closed.objective, closed.selected))
                if progress:
                    progress(closed)
            case Finished(outcome):
                setup += sum(wire.read()[:2])
                return Result(plan.study, plan.study_id, name, outcome, tuple(records), setup, promise(plan))
            case Failed(error):
                # the site that left last ended the run, or else one that saw the round spoiled
                told = [*list(wire.state.gone)[::-1], *plan.sites]
                raise next((agents[site].failure for site in told if agents[site].failure), None) or error
    raise RunFailed("the run ended without a result")


def sample(plan: Plan, update: MaskedUpdate, table: Table) -> Sample | None:
    """Returns a site's first update beside what it was before masking, worked out anew from the site's table.

    Every step before the mask is a pure function of study and table, so nothing needs to be taken from the run. There
    is nothing to show where numbers do not travel one by one.
    """
    algorithm = plan.algorithm
    broadcast = algorithm.broadcast(algorithm.init())
    layout = algorithm.layout(broadcast)
    quantiser = plan.quantiser(layout)
    if update.values.shape != (quantiser.length,) or quantiser.length != size(layout):
        return None
    unused = Randomness(bytes(32))
    statistics, _ = algorithm.local(broadcast, table, {}, unused)
    plain = quantiser.encode(pack(layout, statistics), unused)
    return Sample(
        site=update.site,
        round=update.round,
        bits=quantiser.bits,
        names=entry_names(layout)[:_SAMPLED],
        plain=tuple(plain[:_SAMPLED].tolist()),
        masked=tuple(update.values[:_SAMPLED].tolist()),
    )
