"""A consortium over the bundled records whose coordinator is the test itself, and what a run should have given."""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cohortium.adapters.sources import FileSource
from cohortium.bootstrap import coordinator_key, example_sites, load_example, simulated_agents
from cohortium.coordinator.rounds import Broadcast, Failed, Finished, Send, lost, open_run, step
from cohortium.core import codec
from cohortium.core.document import canonical_bytes
from cohortium.core.layout import pack, unpack
from cohortium.core.messages import (
    Announcement,
    CloseRun,
    Endorsed,
    Endorsement,
    FromSite,
    KeySet,
    MaskedUpdate,
    OpenRound,
    OpenRun,
    Reveal,
    Survivors,
    ToSite,
    decode_from_site,
)
from cohortium.core.models import Penalty, Regression
from cohortium.core.protection import Aggregation
from cohortium.core.random import Randomness
from cohortium.core.signature import sign
from cohortium.core.study import Study
from cohortium.plan import Plan, compile_study
from cohortium.secagg.group import Group
from cohortium.secagg.keys import history, round_context, session_digest
from cohortium.secagg.protocol import NO_TOTAL, Tally
from cohortium.site.agent import Agent
from cohortium.site.cohort import load

NAMES = ("budapest", "cleveland", "long-beach", "zurich")
ROOT = Randomness.of_seed(1)
COORDINATOR = coordinator_key(ROOT)
STRANGER = Ed25519PrivateKey.from_private_bytes(Randomness.of_seed(98).bytes(32))
PURPOSE = "cohortium survivors v1"


@dataclass(frozen=True)
class Kept:
    """A bundled dataset that is read once."""

    name: str
    columns: Mapping[str, Any] = field(repr=False)

    def read(self, names: Sequence[str], as_text: Collection[str] = ()) -> Mapping[str, Any]:
        return {name: self.columns[name] for name in names}

    def fingerprint(self) -> str:
        return self.name


def _kept(name: str, path: Path) -> Kept:
    header = path.read_text(encoding="utf-8").splitlines()[0].split(",")
    return Kept(name, FileSource(path).read(header))


KEPT = {name: _kept(name, path) for name, path in example_sites().items()}


def heart(aggregation: Aggregation | None = None, **changes: Any) -> Study:
    """Returns the bundled study with one site to lose."""
    model = changes.pop("model", Regression(kind="logistic", penalty=Penalty(l2=1.0)))
    return replace(load_example(), model=model, aggregation=aggregation or Aggregation(dropouts=1), **changes)


def plain_vector(plan: Plan, data: bytes, site: str) -> np.ndarray:
    """Returns what a site encodes for a broadcast, by the pure functions alone."""
    algorithm = plan.algorithm
    broadcast = codec.decode(data, algorithm.broadcast_type)
    statistics, _ = algorithm.local(broadcast, load(plan, KEPT[site]).table, {}, Randomness.of_seed(0))
    layout = algorithm.layout(broadcast)
    vector: np.ndarray = plan.stages(layout).encode(pack(layout, statistics), Randomness.of_seed(0))
    return vector


def unprotected(plan: Plan, survivors: Callable[[int], Iterable[str]]) -> tuple[Any, int]:
    """Returns the outcome, and the number of rounds, of a run whose vectors are summed in the clear.

    Args:
        survivors: the sites in each round's sum.
    """
    algorithm = plan.algorithm
    state, number = algorithm.init(), 0
    while not algorithm.done(state):
        number += 1
        broadcast = algorithm.broadcast(state)
        layout = algorithm.layout(broadcast)
        vectors = [plain_vector(plan, codec.encode(broadcast), site) for site in survivors(number)]
        total = np.add.reduce(vectors, dtype=vectors[0].dtype)
        state = algorithm.update(state, unpack(layout, plan.stages(layout).decode(total)))
    return plan.outcome(state), number


@dataclass
class Consortium:
    """Agents of a study with one site to lose, and everything that a coordinator has of their run."""

    plan: Plan
    agents: dict[str, Agent]
    run: str = "run-1"
    announcements: dict[str, Announcement] = field(default_factory=dict)
    broadcasts: dict[int, bytes] = field(default_factory=dict)
    updates: dict[tuple[int, str], MaskedUpdate] = field(default_factory=dict)
    learned: Any = None

    @staticmethod
    def of(study: Study, run: str = "run-1", agents: dict[str, Agent] | None = None) -> "Consortium":
        plan = compile_study(study)
        return Consortium(
            plan, agents or simulated_agents(plan, KEPT, ROOT, runs=99), run, learned=plan.algorithm.init()
        )

    def heard(self, number: int) -> bytes:
        """What stands for all broadcasts up to a round."""
        digest = b""
        for at in range(1, number + 1):
            digest = history(digest, self.broadcasts[at])
        return digest

    def say(self, site: str, message: ToSite) -> list[FromSite]:
        return [decode_from_site(data) for data in self.agents[site].receive(codec.encode(message))]

    def opening(self) -> OpenRun:
        return OpenRun(self.run, canonical_bytes(self.plan.study))

    def announce(self) -> "Consortium":
        for site in NAMES:
            (said,) = self.say(site, self.opening())
            assert isinstance(said, Announcement)
            self.announcements[site] = said
        return self

    def key_set(self) -> KeySet:
        return KeySet(self.run, tuple(self.announcements[site] for site in NAMES))

    def agree(self) -> "Consortium":
        self.announce()
        for site in NAMES:
            assert self.say(site, self.key_set()) == []
        return self

    def round(self, number: int, missed: tuple[bytes, ...] = ()) -> OpenRound:
        self.broadcasts.setdefault(number, codec.encode(self.plan.algorithm.broadcast(self.learned)))
        return OpenRound(self.run, number, self.broadcasts[number], missed)

    def ask(self, number: int = 1, sites: Iterable[str] = NAMES) -> "Consortium":
        for site in sites:
            (said,) = self.say(site, self.round(number))
            assert isinstance(said, MaskedUpdate)
            self.updates[number, site] = said
        return self

    @property
    def group(self) -> Group:
        return Group(tuple(self.announcements), self.plan.tolerance.threshold)

    @property
    def session(self) -> bytes:
        entries = tuple(self.announcements.values())
        return session_digest(self.run, self.plan.study_id, self.group.threshold, entries)

    def context(self, number: int = 1) -> bytes:
        return round_context(self.session, number, self.heard(number))

    def layout(self, number: int = 1) -> Any:
        algorithm = self.plan.algorithm
        return algorithm.layout(codec.decode(self.broadcasts[number], algorithm.broadcast_type))

    def signed(
        self, chosen: Iterable[str], number: int = 1, signer: Any = COORDINATOR, purpose: str = PURPOSE
    ) -> bytes:
        return sign(signer, purpose, self.context(number), *(site.encode() for site in chosen))

    def survivors(
        self, to: str, chosen: Iterable[str] = NAMES, number: int = 1, signer: Any = COORDINATOR
    ) -> Survivors:
        """Returns what a coordinator may tell a site about any set of sites, in any order."""
        chosen = tuple(chosen)
        dealt = {site: self.updates[number, site].sealed for site in chosen if (number, site) in self.updates}
        # a site that was shown other keys, or that nobody may leave, has dealt nothing that is due here
        senders = [site for site in chosen if site != to and len(dealt.get(site, ())) == len(self.group.sites) - 1]
        sealed = tuple(dealt[site][self.group.peers(site).index(to)] for site in senders)
        return Survivors(self.run, number, chosen, self.signed(chosen, number, signer), sealed)

    def endorse(self, sites: Iterable[str] = NAMES, chosen: Iterable[str] = NAMES, number: int = 1) -> dict[str, Any]:
        """Returns the endorsements of a set by some of its sites."""
        chosen, said = tuple(chosen), {}
        for site in sites:
            (said[site],) = self.say(site, self.survivors(site, chosen, number))
            assert isinstance(said[site], Endorsement), said[site]
        return said

    def endorsed(self, to: str, said: Mapping[str, Endorsement], chosen: Iterable[str] = NAMES) -> Endorsed:
        chosen = tuple(chosen)
        others = tuple(site for site in sorted(said) if site != to)
        tags = tuple(said[site].tags[[name for name in chosen if name != site].index(to)] for site in others)
        return Endorsed(self.run, next(iter(said.values())).round, others, tags, NO_TOTAL)

    def serve(self, number: int = 1) -> "Consortium":
        """Plays a round honestly and to its end, and moves on to the next."""
        self.ask(number)
        tally = Tally(self.run, number, self.plan.scheme(self.group, self.layout(number)), self.context(number))
        for site in NAMES:
            tally = tally.contribute(self.updates[number, site])
        tally, messages = tally.close(COORDINATOR)
        for site, message in messages.items():
            assert message == self.survivors(site, NAMES, number)
            (said,) = self.say(site, message)
            tally = tally.endorse(said)  # type: ignore[arg-type]
        for site, told in tally.endorsed().items():
            (answer,) = self.say(site, told)
            assert isinstance(answer, Reveal)
            tally = tally.reveal(answer)
        total = self.plan.stages(self.layout(number)).decode(tally.opened())
        self.learned = self.plan.algorithm.update(self.learned, unpack(self.layout(number), total))
        return self


@dataclass
class Lane:
    """An honest coordinator's run that goes on one message at a time, so that several can take turns."""

    plan: Plan
    agents: Mapping[str, Agent]
    run: str
    state: Any = None
    queue: deque[Any] = field(default_factory=deque)
    ending: Any = None

    def __post_init__(self) -> None:
        self.state, effects = open_run(self.plan, self.run, COORDINATOR, self.agents[NAMES[0]].membership.pinned)
        self._take(effects)

    def advance(self, unheard: Callable[[str, ToSite], bool] = lambda site, message: False) -> None:
        """Carries one message to one site, and its answer back."""
        site, message = self.queue.popleft()
        answers = [] if unheard(site, message) else self.agents[site].receive(codec.encode(message))
        if self.state.phase == "over":
            return
        for data in answers:
            self.state, effects = step(self.state, site, decode_from_site(data))
            self._take(effects)
        if not answers and not isinstance(message, KeySet | CloseRun):
            self.state, effects = lost(self.state, site)
            self._take(effects)

    def _take(self, effects: Iterable[Any]) -> None:
        for effect in effects:
            if isinstance(effect, Broadcast):
                self.queue.extend((site, effect.message) for site in effect.sites)
            elif isinstance(effect, Send):
                self.queue.extend(effect.messages.items())
            elif isinstance(effect, Finished | Failed):
                self.ending = effect
