"""A site's agent: bytes in, bytes out. It performs what the session asks for, and turns failures into refusals.

With a journal it may be killed at any moment and goes on afterwards. It answers a request once: the answer, and the
session after it, are in the journal before the answer leaves, and whoever asks again, in whatever words, gets the very
same bytes. What was computed and not kept has not left, and is computed anew, from the same randomness.

Training may take long. `receive` does it at once; `take` hands it out, and `finish` takes in what came of it, so that
other runs are answered meanwhile. Threads may call any of them: one at a time is let in, and training needs none of
the agent's state.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from threading import RLock

from cohortium.core import codec
from cohortium.core.codec import Data
from cohortium.core.document import MAX_DOCUMENT_BYTES, study_id_of
from cohortium.core.errors import (
    BudgetExceeded,
    CohortiumError,
    DataError,
    PolicyRefused,
    ProtocolError,
    Repeated,
    RoundRefused,
    SiteError,
)
from cohortium.core.events import Events
from cohortium.core.messages import (
    CONTROL_BYTES,
    CloseRun,
    Endorsed,
    FromSite,
    MaskedUpdate,
    OpenRound,
    OpenRun,
    Refusal,
    Survivors,
    ToSite,
    decode_to_site,
)
from cohortium.core.random import Randomness
from cohortium.core.study import Study
from cohortium.learning.table import Table
from cohortium.plan import Compiler, Plan, compile_study
from cohortium.secagg.stream import PLAIN, Means
from cohortium.site.cohort import Roster, load, recorded, recovered
from cohortium.site.policy import PrivacyPolicy
from cohortium.site.ports import Approvals, DataSource, Frozen, Journal, KeptRun, Ledger, Request
from cohortium.site.session import (
    Charge,
    Effect,
    Event,
    LoadCohort,
    Membership,
    Send,
    Session,
    Train,
    Trained,
    again,
    step,
)
from cohortium.site.snapshot import freeze, thaw
from cohortium.site.spending import UNSTATED, eligible, price, remaining, units

NO_POLICY = PrivacyPolicy()
_MOST_RUNS = 16
"""Runs at a time; one that is opened beyond them ends the oldest."""
_UNSTATED = "the site's agent failed; its own staff see why"
_NO_MEMORY = "the site's agent ran out of the memory that it may use"
_COHORT = "cohort"
"""The part of a kept session that tells who is in its cohort."""


@dataclass(frozen=True)
class Work:
    """Training that is to be done outside of the agent: call `done`, and have the agent `finish` with what it returns.

    Attributes:
        apart: messages of the run may be dealt with meanwhile; else they must wait.
    """

    run: str
    train: Train = field(repr=False)

    @property
    def apart(self) -> bool:
        return self.train.apart

    def done(self) -> Trained | Exception:
        """Returns what came of the training; it uses nothing of the agent."""
        try:
            return self.train.done()
        except Exception as error:  # noqa: BLE001  the agent makes a refusal of it
            return error


@dataclass(frozen=True)
class Taken:
    """What the agent makes of a message: answers, and work of which more answers come."""

    answers: list[bytes]
    work: Work | None = None


NOTHING = Taken([])


@dataclass
class Agent:
    """Serves a site's runs, several at a time.

    Attributes:
        membership: who the site is and whom it trusts.
        source: the dataset that the site offers, or all of them by the names that studies call them by.
        approved: ids of the studies that the site's steward approved, and how many runs of each. No other is answered,
            and no data are read for it. Without this, whoever opens runs could ask one question after the other, or
            the same one over other survivors. It is asked whenever a run is opened.
        randomness: the root of the coming runs' keys, from the operating system outside simulations. Opening a run
            moves it on, so that a run's keys cannot be had from what is kept.
        ledger: what each patient's data have cost in privacy so far, over all studies. Without one, no study that
            spends a budget is answered.
        policy: what the site's steward allows a study to ask in privacy.
        compiler: turns a study into a plan.
        means: how this machine masks.
        journal: what outlasts this process. Without one, whatever is open ends with it.
        failure: the last failure in full, for the site's own staff; the coordinator gets its public half.
    """

    membership: Membership
    source: DataSource | Mapping[str, DataSource]
    approved: Approvals
    randomness: Randomness
    compiler: Compiler = compile_study
    means: Means = PLAIN
    ledger: Ledger | None = None
    policy: PrivacyPolicy = NO_POLICY
    journal: Journal | None = None
    failure: Exception | None = None
    _sessions: dict[str, Session] = field(default_factory=dict)
    _cohorts: dict[str, Roster] = field(default_factory=dict, repr=False)
    _served: dict[str, str] = field(default_factory=dict)
    _latest: Roster | None = field(default=None, repr=False)
    _remembered: dict[str, tuple[str, bytes]] = field(default_factory=dict, repr=False)
    _kept: dict[str, Session] = field(default_factory=dict, repr=False)
    _restored: bool = False
    _lock: RLock = field(default_factory=RLock, repr=False, compare=False)

    def receive(self, data: Data) -> list[bytes]:
        """Returns the site's answers to a message of the coordinator; none if the site's journal cannot be used.

        Raises:
            ProtocolError: the bytes are no message. Every later failure is answered with a refusal instead.
        """
        return self._received(data, at_once=True).answers

    def take(self, data: Data) -> Taken:
        """Returns the answers to a message that need no training, and the training that it asks for.

        Raises:
            ProtocolError: the bytes are no message.
        """
        return self._received(data, at_once=False)

    def finish(self, work: Work, result: Trained | Exception) -> Taken:
        """Returns the answers that follow from what came of work; none if it is wanted no longer."""
        with self._lock:
            session = self._sessions.get(work.run)
            # what was in memory may have been let go meanwhile: then the work is asked for anew
            if session is None or session.asked is not work.train.asked:
                return NOTHING

            def effects() -> list[Effect]:
                if isinstance(result, Exception):
                    raise result
                return self._stepped(work.run, result)

            # it answers the newest round that was opened
            return self._kept_first(work.run, Request(work.run, OpenRound.__name__, session.heard), None, effects)

    def _received(self, data: Data, *, at_once: bool) -> Taken:
        with self._lock:
            if self.journal is not None:
                try:
                    self._restore(self.journal)
                except CohortiumError as error:
                    return self._unkept(error)
            message = decode_to_site(data, self._limit())
            request = Request(message.run, type(message).__name__, getattr(message, "round", 0))
            if self.journal is not None and not isinstance(message, CloseRun):
                try:
                    said = self.journal.answers(request)
                except RoundRefused as error:
                    return Taken([self._refuse_round(message, error)])
                except CohortiumError as error:
                    return self._unkept(error)
                if said is not None:
                    return self._again(request, list(said), at_once=at_once)
            return self._kept_first(message.run, request, message, lambda: self._begun(message), at_once=at_once)

    def _again(self, request: Request, said: list[bytes], *, at_once: bool) -> Taken:
        """Returns what was said to a request before, and the work for it if a crash ended that."""
        session = self._sessions.get(request.run)
        if session is None or request != Request(request.run, OpenRound.__name__, session.heard):
            return Taken(said)
        later, effects = again(session)
        if not effects:
            return Taken(said)
        self._sessions[request.run] = later
        more = self._kept_first(request.run, request, None, lambda: effects, at_once=at_once)
        return Taken(more.answers or said, more.work)

    def _kept_first(
        self,
        run: str,
        request: Request,
        message: ToSite | None,
        begin: Callable[[], list[Effect]],
        *,
        at_once: bool = False,
    ) -> Taken:
        """Returns what follows from effects; the answers, and the session after them, are in the journal by then."""
        before, known = self._sessions.get(run), run in self._served
        try:
            taken = self._performed(run, message, begin, at_once=at_once)
            after = self._sessions.get(run)
            if self.journal is None:
                return taken
            waits = taken.work is not None and not taken.answers
            if after is not None and not waits and (after is not before or taken.answers):
                self.journal.keep(self._served[run], request, taken.answers, self._frozen(run, after))
                self._kept[run] = after
            elif after is None and (before is not None or known != (run in self._served)):
                self.journal.keep(self._served[run], request, taken.answers, None)
            return taken
        except CohortiumError as error:
            self._let_go(run)
            return self._unkept(error)
        except BaseException:
            if self.journal is not None:
                self._let_go(run)
            raise

    def _performed(
        self, run: str, message: ToSite | None, begin: Callable[[], list[Effect]], *, at_once: bool
    ) -> Taken:
        try:
            answers, work = self._followed(run, begin(), at_once=at_once)
            return Taken([codec.encode(answer) for answer in answers], work)
        except Repeated:
            return NOTHING
        except RoundRefused as error:
            return Taken([self._refuse_round(message, error)])
        except DataError as error:
            reason = UNSTATED if self._private(run) else error.public
            named = SiteError(f"{self.membership.site}: {error}", public=reason)
            return Taken([self._refuse(run, named, reason)])
        except BudgetExceeded as error:
            return Taken([self._refuse(run, error, error.public)])
        except CohortiumError as error:
            return Taken([self._refuse(run, error, str(error))])
        except Exception as error:  # noqa: BLE001  whatever went wrong, its text might hold a patient's value
            short = _lacks_memory(error) and not self._private(run)
            return Taken([self._refuse(run, error, _NO_MEMORY if short else _UNSTATED)])

    @property
    def table(self) -> Table:
        """The cohort of the run that was opened last."""
        if self._latest is None:
            raise ProtocolError("no run has read this site's cohort yet")
        return self._latest.table

    def _cohort(self, run: str, effect: LoadCohort) -> Table:
        """Returns the plan's cohort at this site, the same throughout a run.

        Raises:
            DataError: the data break the study's contract, or have changed since the run was opened: the difference
                of two rounds' sums could be a single patient.
            PolicyRefused: too few patients have enough of their privacy budget left.
        """
        study = effect.plan.study
        source = self._source(study)
        now = source.fingerprint()
        if run in self._remembered and self._remembered[run][0] != now:
            reason = "the data changed during the run"
            raise DataError(f"{reason}. Nothing more was sent. Run the study again.", public=reason)
        if run not in self._cohorts:
            self.policy.admit(study)
            whole = eligible(study, load(effect.plan, source))
            if run in self._remembered:
                roster = recovered(whole, self._remembered[run][1])
            else:
                roster = self._affordable(effect.plan, whole, effect.cost)
                self._remembered[run] = now, recorded(whole, roster)
            self._cohorts[run] = self._latest = roster
        return self._cohorts[run].table

    def _source(self, study: Study) -> DataSource:
        if not isinstance(self.source, Mapping):
            return self.source
        name = study.cohort.dataset
        if name not in self.source:
            raise PolicyRefused(f"the study was refused: this site offers no dataset '{name}' (site.yaml)")
        return self.source[name]

    def _affordable(self, plan: Plan, roster: Roster, cost: Events) -> Roster:
        """Returns those of a cohort's patients who can pay for a whole run."""
        if not cost:
            return roster
        study = plan.study
        return remaining(study, roster, self._accounts().affordable(units(study, roster), price(study, roster, cost)))

    def _charged(self, run: str, effect: Charge) -> Table:
        """Charges a round to the cohort's patients and returns the table of those who could pay."""
        self._cohort(run, LoadCohort(effect.plan, ()))
        study, roster = effect.plan.study, self._cohorts[run]
        cost, ledger, again = price(study, roster, effect.cost), self._accounts(), False
        asked = self._sessions[run].asked
        if self.journal is not None and asked is not None:
            # A crash may have come between a charge and its answer: then this very round was paid for, and never sent.
            # Only an intent that is older than the charge tells so. A charge that comes first was made for another
            # journal, which was lost, and may have been sent; no intent follows it, so that none is ever taken for it.
            charged = ledger.holds(run, effect.round)
            again = self.journal.intend(Request(run, OpenRound.__name__, effect.round), asked.history, charged=charged)
        paid = ledger.charge(run, effect.plan.study_id, effect.round, units(study, roster), cost, again=again)
        return remaining(study, roster, paid).table

    def _private(self, run: str) -> bool:
        session = self._sessions.get(run)
        return session is not None and session.plan is not None and session.plan.noise is not None

    def _accounts(self) -> Ledger:
        if self.ledger is None:
            raise PolicyRefused(
                "the study was refused: it spends its patients' privacy budget, and this site keeps no ledger of it"
            )
        return self.ledger

    def _begun(self, message: ToSite) -> list[Effect]:
        if isinstance(message, OpenRun):
            self._open(message)
        session = self._sessions.get(message.run)
        if session is None and isinstance(message, CloseRun):
            return []
        if session is None:
            raise ProtocolError("a message was refused: no such run is open at this site")
        effects = self._stepped(message.run, message)
        if self._sessions[message.run].over:
            self._forget(message.run)
        return effects

    def _stepped(self, run: str, event: Event) -> list[Effect]:
        self._sessions[run], effects = step(self._sessions[run], event)
        return effects

    def _followed(self, run: str, effects: list[Effect], *, at_once: bool) -> tuple[list[FromSite], Work | None]:
        """Does what effects ask for and what follows from it; returns what to say, and work that is handed out."""
        answers: list[FromSite] = []
        while effects:
            effect, *effects = effects
            match effect:
                case LoadCohort():
                    effects += self._stepped(run, self._cohort(run, effect))
                case Charge():
                    effects += self._stepped(run, self._charged(run, effect))
                case Train() if at_once:
                    effects += self._stepped(run, effect.done())
                case Train():
                    return answers, Work(run, effect)
                case Send():
                    answers.append(effect.message)
        # whoever contributes need not say first that it will
        given: list[FromSite] = [answer for answer in answers if isinstance(answer, MaskedUpdate)]
        return given or answers, None

    def _open(self, message: OpenRun) -> None:
        study = study_id_of(message.study)
        approved = self.approved.get(study, 0)
        if not approved:
            raise PolicyRefused("the study was refused: this site's steward has not approved it")
        if message.run in self._sessions:
            raise Repeated("a run is open already")
        if message.run in self._served:
            raise ProtocolError("a run was refused: its name was used before")
        if list(self._served.values()).count(study) >= approved:
            raise PolicyRefused("the study was refused: it has had all the runs that this site's steward approved")
        self._served[message.run] = study
        keys, self.randomness = self.randomness.child("run", message.run), self.randomness.child("next")
        while len(self._sessions) >= _MOST_RUNS:
            self._end(next(iter(self._sessions)))
        self._sessions[message.run] = Session(self.membership, keys, self.compiler, self.means)

    def _limit(self) -> int:
        """Returns more bytes than any message may have that is due now."""
        return CONTROL_BYTES + max([MAX_DOCUMENT_BYTES, *map(_due, self._sessions.values())])

    def _restore(self, journal: Journal) -> None:
        """Takes up what the journal has and memory has not: all of it once, and later what was let go."""
        if self._restored:
            return
        for kept in journal.runs(but=self._sessions):
            self._served[kept.run] = kept.study
            if kept.frozen is not None:
                self._take_up(kept, journal)
        self._restored = True

    def _take_up(self, kept: KeptRun, journal: Journal) -> None:
        assert kept.frozen is not None
        try:
            session = thaw(kept.frozen, self.membership, self.compiler, self.means)
            self._remembered[kept.run] = codec.decode(kept.frozen.parts[_COHORT], tuple[str, bytes])
        except (CohortiumError, KeyError) as error:
            refusal = self._refuse(kept.run, error, "the site's agent was started anew and cannot go on with the run")
            journal.keep(kept.study, Request(kept.run, Refusal.__name__), [refusal], None)
        else:
            self._sessions[kept.run] = self._kept[kept.run] = session

    def _frozen(self, run: str, session: Session) -> Frozen:
        since = self._kept.get(run)
        frozen = freeze(session, since)
        if since is not None:
            return frozen
        # who is in the cohort is settled when the run is opened
        return replace(frozen, parts={**frozen.parts, _COHORT: codec.encode(self._remembered[run])})

    def _unkept(self, error: Exception) -> Taken:
        """Says nothing, because what is said could not be kept. The coordinator asks again."""
        self.failure = error
        return NOTHING

    def _let_go(self, run: str) -> None:
        """Forgets what is in memory of a run, which may be ahead of the journal, so that it is taken up from there."""
        self._forget(run)
        self._served.pop(run, None)
        self._restored = False

    def _end(self, run: str) -> None:
        self._forget(run)
        if self.journal is not None:
            # it is taken up again if its end is not kept
            self._restored = False
            self.journal.keep(self._served[run], Request(run, CloseRun.__name__), [], None)

    def _forget(self, run: str) -> None:
        for kept in (self._sessions, self._cohorts, self._remembered, self._kept):
            kept.pop(run, None)

    def _refuse_round(self, message: ToSite | None, error: RoundRefused) -> bytes:
        self.failure = error
        assert isinstance(message, OpenRound | Survivors | Endorsed)
        return codec.encode(Refusal(message.run, self.membership.site, str(error), message.round))

    def _refuse(self, run: str, failure: Exception, reason: str) -> bytes:
        self.failure = failure
        self._forget(run)
        return codec.encode(Refusal(run, self.membership.site, reason[:1000]))


def _due(session: Session) -> int:
    if session.plan is None:
        return 0
    return session.plan.outbound_limit if session.member is not None else 512 * len(session.plan.sites)


def _lacks_memory(error: Exception) -> bool:
    # PyTorch says so in words alone
    return isinstance(error, MemoryError) or "allocate memory" in str(error)
