"""A site's agent: bytes in, bytes out. It performs what the session asks for, and turns failures into refusals."""

from dataclasses import dataclass, field

from cohortium.core import codec
from cohortium.core.errors import CohortiumError, DataError, SiteError
from cohortium.core.messages import CloseRun, FromSite, OpenRun, Refusal, ToSite, decode_to_site
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
        randomness: the root of the agent's keys; from the operating system outside simulations.
        compiler: turns a study into a plan.
        failure: the last failure in full, for the site's own staff; the coordinator gets its public half.
    """

    membership: Membership
    source: DataSource
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
        message = decode_to_site(data)
        try:
            return [codec.encode(answer) for answer in self._answers(message)]
        except DataError as error:
            named = SiteError(f"{self.membership.site}: {error}", public=error.public)
            return [self._refuse(message.run, named, error.public)]
        except CohortiumError as error:
            return [self._refuse(message.run, error, str(error))]
        except Exception as error:  # noqa: BLE001  whatever went wrong, its text might hold a patient's value
            return [self._refuse(message.run, error, _UNSTATED)]

    def _answers(self, message: ToSite) -> list[FromSite]:
        if isinstance(message, OpenRun):
            self._open(message)
        if self._session is None and isinstance(message, CloseRun):
            return []
        if self._session is None:
            raise CohortiumError("a message was refused: no run is open at this site")
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
        if message.run in self._served:
            raise CohortiumError("a run was refused: its name was used before")
        self._served.add(message.run)
        self._session = Session(self.membership, self.randomness.child("run", message.run), self.compiler)

    def cohort(self, plan: Plan) -> Table:
        """Returns the plan's cohort at this site; it is read again when the data have changed."""
        key = (plan.study_id, self.source.fingerprint())
        if self._cached is None or self._cached[:2] != key:
            self._cached = (*key, load(plan, self.source))
        return self._cached[2]

    def _refuse(self, run: str, failure: Exception, reason: str) -> bytes:
        self.failure, self._session, self._cached = failure, None, None
        return codec.encode(Refusal(run, self.membership.site, reason))
