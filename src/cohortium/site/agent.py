"""A site's agent: bytes in, bytes out. It performs what the session asks for, and turns failures into refusals."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from cohortium.core import codec
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
    OpenRun,
    Refusal,
    Survivors,
    ToSite,
    decode_to_site,
)
from cohortium.core.random import Randomness
from cohortium.learning.table import Table
from cohortium.plan import Compiler, Plan, compile_study
from cohortium.secagg.stream import PLAIN, Means
from cohortium.site.cohort import Roster, load
from cohortium.site.policy import PrivacyPolicy
from cohortium.site.ports import DataSource, Ledger
from cohortium.site.session import Charge, LoadCohort, Membership, Send, Session, step
from cohortium.site.spending import UNSTATED, eligible, price, remaining, units

NO_POLICY = PrivacyPolicy()
_MOST_RUNS = 16
"""Runs at a time; one that is opened beyond them ends the oldest."""
_UNSTATED = "the site's agent failed; its own staff see why"


@dataclass
class Agent:
    """Serves a site's runs, several at a time.

    Attributes:
        membership: who the site is and whom it trusts.
        source: the dataset that the site offers.
        approved: ids of the studies that the site's steward approved, and how many runs of each. No other is answered,
            and no data are read for it. Without this, whoever opens runs could ask one question after the other, or
            the same one over other survivors.
        randomness: the root of the coming runs' keys, from the operating system outside simulations. Opening a run
            moves it on, so that a run's keys cannot be had from what is kept.
        ledger: what each patient's data have cost in privacy so far, over all studies. Without one, no study that
            spends a budget is answered.
        policy: what the site's steward allows a study to ask in privacy.
        compiler: turns a study into a plan.
        means: how this machine masks.
        failure: the last failure in full, for the site's own staff; the coordinator gets its public half.
    """

    membership: Membership
    source: DataSource
    approved: Mapping[str, int]
    randomness: Randomness
    compiler: Compiler = compile_study
    means: Means = PLAIN
    ledger: Ledger | None = None
    policy: PrivacyPolicy = NO_POLICY
    failure: Exception | None = None
    _sessions: dict[str, Session] = field(default_factory=dict)
    _cohorts: dict[str, tuple[str, Roster]] = field(default_factory=dict, repr=False)
    _served: dict[str, str] = field(default_factory=dict)
    _latest: Table | None = field(default=None, repr=False)

    def receive(self, data: bytes) -> list[bytes]:
        """Returns the site's answers to a message of the coordinator.

        Raises:
            ProtocolError: the bytes are no message. Every later failure is answered with a refusal instead.
        """
        message = decode_to_site(data, self._limit())
        try:
            return [codec.encode(answer) for answer in self._answers(message)]
        except Repeated:
            return []
        except RoundRefused as error:
            self.failure = error
            assert isinstance(message, Survivors | Endorsed)
            return [codec.encode(Refusal(message.run, self.membership.site, str(error), message.round))]
        except DataError as error:
            reason = UNSTATED if self._private(message.run) else error.public
            named = SiteError(f"{self.membership.site}: {error}", public=reason)
            return [self._refuse(message.run, named, reason)]
        except BudgetExceeded as error:
            return [self._refuse(message.run, error, error.public)]
        except CohortiumError as error:
            return [self._refuse(message.run, error, str(error))]
        except Exception as error:  # noqa: BLE001  whatever went wrong, its text might hold a patient's value
            return [self._refuse(message.run, error, _UNSTATED)]

    @property
    def table(self) -> Table:
        """The cohort of the run that was opened last."""
        if self._latest is None:
            raise ProtocolError("no run has read this site's cohort yet")
        return self._latest

    def _cohort(self, run: str, effect: LoadCohort) -> Table:
        """Returns the plan's cohort at this site, the same throughout a run.

        Raises:
            DataError: the data break the study's contract, or have changed since the run was opened: the difference
                of two rounds' sums could be a single patient.
            PolicyRefused: too few patients have enough of their privacy budget left.
        """
        now = self.source.fingerprint()
        if run not in self._cohorts:
            self.policy.admit(effect.plan.study)
            whole = eligible(effect.plan.study, load(effect.plan, self.source))
            roster = self._affordable(effect.plan, whole, effect.cost)
            self._cohorts[run] = now, roster
            self._latest = roster.table
        elif self._cohorts[run][0] != now:
            reason = "the data changed during the run"
            raise DataError(f"{reason}. Nothing more was sent. Run the study again.", public=reason)
        return self._cohorts[run][1].table

    def _affordable(self, plan: Plan, roster: Roster, cost: Events) -> Roster:
        """Returns those of a cohort's patients who can pay for a whole run."""
        if not cost:
            return roster
        study = plan.study
        return remaining(study, roster, self._kept().affordable(units(study, roster), price(study, roster, cost)))

    def _charged(self, run: str, effect: Charge) -> Table:
        """Charges a round to the cohort's patients and returns the table of those who could pay."""
        self._cohort(run, LoadCohort(effect.plan, ()))
        study, roster = effect.plan.study, self._cohorts[run][1]
        cost = price(study, roster, effect.cost)
        paid = self._kept().charge(run, effect.plan.study_id, effect.round, units(study, roster), cost)
        return remaining(study, roster, paid).table

    def _private(self, run: str) -> bool:
        session = self._sessions.get(run)
        return session is not None and session.plan is not None and session.plan.noise is not None

    def _kept(self) -> Ledger:
        if self.ledger is None:
            raise PolicyRefused(
                "the study was refused: it spends its patients' privacy budget, and this site keeps no ledger of it"
            )
        return self.ledger

    def _answers(self, message: ToSite) -> list[FromSite]:
        if isinstance(message, OpenRun):
            self._open(message)
        session = self._sessions.get(message.run)
        if session is None and isinstance(message, CloseRun):
            return []
        if session is None:
            raise ProtocolError("a message was refused: no such run is open at this site")
        answers: list[FromSite] = []
        events: list[ToSite | Table] = [message]
        while events:
            session, effects = step(session, events.pop())
            self._sessions[message.run] = session
            for effect in effects:
                match effect:
                    case LoadCohort():
                        events.append(self._cohort(message.run, effect))
                    case Charge():
                        events.append(self._charged(message.run, effect))
                    case Send():
                        answers.append(effect.message)
        if session.over:
            self._forget(message.run)
        return answers

    def _open(self, message: OpenRun) -> None:
        study = study_id_of(message.study)
        if study not in self.approved:
            raise PolicyRefused("the study was refused: this site's steward has not approved it")
        if message.run in self._sessions:
            raise Repeated("a run is open already")
        if message.run in self._served:
            raise ProtocolError("a run was refused: its name was used before")
        if list(self._served.values()).count(study) >= self.approved[study]:
            raise PolicyRefused("the study was refused: it has had all the runs that this site's steward approved")
        self._served[message.run] = study
        keys, self.randomness = self.randomness.child("run", message.run), self.randomness.child("next")
        while len(self._sessions) >= _MOST_RUNS:
            self._forget(next(iter(self._sessions)))
        self._sessions[message.run] = Session(self.membership, keys, self.compiler, self.means)

    def _limit(self) -> int:
        """Returns more bytes than any message may have that is due now."""
        return CONTROL_BYTES + max([MAX_DOCUMENT_BYTES, *map(_due, self._sessions.values())])

    def _forget(self, run: str) -> None:
        self._sessions.pop(run, None)
        self._cohorts.pop(run, None)

    def _refuse(self, run: str, failure: Exception, reason: str) -> bytes:
        self.failure = failure
        self._forget(run)
        return codec.encode(Refusal(run, self.membership.site, reason[:1000]))


def _due(session: Session) -> int:
    if session.plan is None:
        return 0
    return session.plan.outbound_limit if session.member is not None else 512 * len(session.plan.sites)
