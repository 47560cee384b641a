"""One error root; each subclass says whose fault it is. Messages say what happened, why, and what to do."""

import difflib
from collections.abc import Iterable


class CohortiumError(Exception):
    """The root of every error that Cohortium raises on purpose.

    `exit_code` is what the command line returns: 1 the work failed, 2 the request was wrong, 3 refused.
    """

    exit_code = 1


class StudyError(CohortiumError):
    """The study document asks for something malformed, impossible or not offered."""

    exit_code = 2


class DataError(CohortiumError):
    """Data do not keep the study's data contract.

    The message may hold counts and is meant for those who may read the data. `public` is what others may read: it
    names the column and the rule, never a count or a value.
    """

    exit_code = 2

    def __init__(self, message: str, *, public: str) -> None:
        super().__init__(message)
        self.public = public


class SiteError(DataError):
    """A site's data or configuration does not fit the study; the message begins with the site's name."""


class CohortError(CohortiumError):
    """The sites' data taken together cannot support the study (one class only, a constant feature ...)."""

    exit_code = 2


class PolicyRefused(CohortiumError):
    """A policy, an approval or a consent refuses the request."""

    exit_code = 3


class BudgetExceeded(PolicyRefused):
    """The privacy budget of a site's patients does not suffice.

    The message may hold counts and is meant for the site's own staff; `public` is what others may read and holds none.
    """

    def __init__(self, message: str, *, public: str) -> None:
        super().__init__(message)
        self.public = public


class ProtocolError(CohortiumError):
    """A message is malformed, forged, repeated or out of order; nothing was done with it."""


class Repeated(ProtocolError):
    """A message came again after it was answered; it is not answered twice, and nothing is lost by it."""


class RoundRefused(ProtocolError):
    """A site takes no further part in one round, for what another site may have done; it goes on with the next."""


class ConvergenceError(CohortiumError):
    """Training ended without reaching the study's tolerance."""


class RunFailed(CohortiumError):
    """A run ended without a result, for the reason stated."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Returns "; did you mean 'x'?" for the known word closest to `word`, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""
