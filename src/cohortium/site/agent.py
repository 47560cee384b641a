"""A site's agent: bytes in, bytes out. It performs what the session asks for, and turns failures into refusals."""

from dataclasses import dataclass, field

from cohortium.core import codec
from cohortium.core.document import MAX_DOCUMENT_BYTES, study_id_of
from cohortium.core.errors import CohortiumError, DataError, PolicyRefused, ProtocolError, SiteError
from cohortium.core.messages import CONTROL_BYTES, CloseRun, FromSite, OpenRun, Refusal, ToSite, decode_to_site
from cohortium.core.random import Randomness
from cohortium.learning.table import Table
from cohortium.plan import Compiler, Plan, compile_study
from cohortium.site.cohort import load
from cohortium.site.ports import DataSource
from cohortium.site.session import LoadCohort, Membership, Session, step

_UNSTATED = "the site's agent failed; its own staff see why"


@dataclass
class Agent:
    """Serves runs one after the other for one site.

    Attributes:
        membership: who the site is and whom it trusts.
        source: the dataset that the site offers.
        approved: ids of the studies that the site's steward approved; no other is answered, and no data are read
            for it. Without this, whoever opens runs could ask one question after the other.
        randomness: the root of the coming runs' keys, from the operating system outside simulations. Opening a run
            moves it on, so that a run's keys cannot be had from what is kept.
        compiler: turns a study into a plan.
        failure: the last failure in full, for the site's own staff; the coordinator gets its public half.
    """

    membership: Membership
    source: DataSource
    approved: frozenset[str]
    randomness: Randomness
    compiler: Compiler = compile_study
    failure: Exception | None = None
    _session: Session | None = None
    _served: set[str] = field(default_factory=set)
    _cached: tuple[str, str, Table] | None = field(default=None, repr=False)

    def receive(self, data: bytes) -> list[bytes]:
        """Returns the site's answers to a message of the coordinator.

        Raises:
            ProtocolError: the bytes are no message. Every later failure is answered with a refusal instead.
        """
        message = decode_to_site(data, self._limit())
        try:
            return [codec.encode(answer) for answer in self._answers(message)]
        except DataError as error:
            named = SiteError(f"{self.membership.site}: {error}", public=error.public)
            return [self._refuse(message.run, named, error.public)]
        except CohortiumError as error:
            return [self._refuse(message.run, error, str(error))]
        except Exception as error:  # noqa: BLE001  whatever went wrong, its text might hold a patient's value
            return [self._refuse(message.run, error, _UNSTATED)]

    def cohort(self, plan: Plan) -> Table:
        """Returns the plan's cohort at this site, the same throughout a run.

        Raises:
            DataError: the data break the study's contract, or have changed since the run was opened: the difference
                of two rounds' sums could be a single patient.
        """
        now = self.source.fingerprint()
        if self._cached is None or self._cached[0] != plan.study_id:
            self._cached = (plan.study_id, now, load(plan, self.source))
        elif self._cached[1] != now:
            reason = "the data changed during the run"
            raise DataError(f"{reason}. Nothing more was sent. Run the study again.", public=reason)
        return self._cached[2]

    @property
    def table(self) -> Table:
        """The cohort of the last run."""
        if self._cached is None:
            raise ProtocolError("no run has read this site's cohort yet")
        return self._cached[2]

    def _answers(self, message: ToSite) -> list[FromSite]:
        if isinstance(message, OpenRun):
            self._open(message)
        if self._session is None and isinstance(message, CloseRun):
            return []
        if self._session is None:
            raise ProtocolError("a message was refused: no run is open at this site")
        answers: list[FromSite] = []
        events: list[ToSite | Table] = [message]
        while events:
            self._session, effects = step(self._session, events.pop())
            for effect in effects:
                if isinstance(effect, LoadCohort):
                    events.append(self.cohort(effect.plan))
                else:
                    answers.append(effect.message)
        return answers

    def _open(self, message: OpenRun) -> None:
        if study_id_of(message.study) not in self.approved:
            raise PolicyRefused("the study was refused: this site's steward has not approved it")
        if message.run in self._served:
            raise ProtocolError("a run was refused: its name was used before")
        self._served.add(message.run)
        keys, self.randomness = self.randomness.child("run", message.run), self.randomness.child("next")
        self._session, self._cached = Session(self.membership, keys, self.compiler), None

    def _limit(self) -> int:
        """Returns more bytes than the message may have that is due now."""
        plan = self._session.plan if self._session else None
        if plan is None:
            return MAX_DOCUMENT_BYTES + CONTROL_BYTES
        assert self._session is not None
        agreeing = self._session.masker is None
        return CONTROL_BYTES + (512 * len(plan.sites) if agreeing else plan.broadcast_limit)

    def _refuse(self, run: str, failure: Exception, reason: str) -> bytes:
        self.failure, self._session, self._cached = failure, None, None
        return codec.encode(Refusal(run, self.membership.site, reason[:1000]))
