"""What a site needs of the world outside."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cohortium.core.events import Events
from cohortium.core.filter import Column


class DataSource(Protocol):
    """A dataset that the site decided to offer."""

    def read(self, names: Sequence[str], *, as_text: Collection[str] = ()) -> Mapping[str, Column]:
        """Returns the named columns, all of one length: numbers as floats (NaN missing), others as text (None missing).

        Columns in `as_text` come as text whatever they hold: identifiers have more digits than a float keeps.

        Raises:
            DataError: the data cannot be read, or a column is missing.
        """

    def fingerprint(self) -> str:
        """Returns a text that changes when the data do; cheap enough to ask for in every round.

        Raises:
            DataError: the data are gone.
        """


class Ledger(Protocol):
    """What each unit's data have cost in privacy, over all studies: kept by the site, and reset by nobody.

    A unit is a patient, or the site itself (`cohortium.site.budget.SITE`), by an identifier that is written alike in
    all of the site's datasets. None is named twice in one call.
    """

    def affordable(self, units: Column, events: Events) -> NDArray[np.bool_]:
        """Returns which units could pay for events now; writes nothing, and promises nothing for later.

        Raises:
            SiteError: the ledger cannot be read, or is not as it was written.
        """

    def holds(self, run: str, round: int) -> bool:
        """Returns whether a round of a run was charged.

        Raises:
            SiteError: the ledger cannot be read.
        """

    def charge(
        self, run: str, study: str, round: int, units: Column, events: Events, *, again: bool = False
    ) -> NDArray[np.bool_]:
        """Charges each unit that can pay for all of the events, and returns which ones did.

        The others must be left out of what is released. When this returns, the charge outlasts the process and the
        machine; when it raises, nothing may be released, and the charge may stand or not.

        Args:
            again: whether it is known that nothing of this round was ever released. If it was charged before, for the
                same study and events and to some of these units, then those have paid, and nobody pays twice.

        Raises:
            ProtocolError: this round of the run was charged before: it is not answered twice.
            SiteError: the ledger cannot be written, or is not as it was written.
        """


class Approvals(Protocol):
    """What the site's steward approved; a dictionary is one."""

    def get(self, study: str, default: int, /) -> int:
        """Returns how many runs of a study are approved in all, those that it had included; else `default`."""


@dataclass(frozen=True)
class Frozen:
    """A session as bytes (`cohortium.site.snapshot`).

    Attributes:
        core: all of it but the large parts; empty if it was lost.
        parts: the large parts by name, empty where there is none. A part that did not change is left out.
    """

    core: bytes = field(repr=False)
    parts: Mapping[str, bytes] = field(repr=False)


@dataclass(frozen=True)
class Request:
    """What a message asks for, whatever it says: of a run, by its kind, in a round (0 outside of rounds)."""

    run: str
    kind: str
    round: int = 0


@dataclass(frozen=True)
class KeptRun:
    """A run as a journal has it; `frozen` is whole, or None once the run is over."""

    run: str
    study: str
    frozen: Frozen | None


class Journal(Protocol):
    """What an agent must not forget: what it answered, where its runs stand, and which runs it ever served.

    It belongs to one site, and one agent at a time has it. An older copy must never take its place: what was answered
    since could be answered anew, and otherwise. A lost one does no harm beyond the runs that were open.
    """

    def runs(self, but: Collection[str] = ()) -> Sequence[KeptRun]:
        """Returns all runs that were ever served but those named, in the order in which they were opened.

        Raises:
            SiteError: the journal cannot be read, or is not this site's.
        """

    def answers(self, request: Request) -> Sequence[bytes] | None:
        """Returns what was answered to a request, or None if nothing was.

        A run that was ended by a refusal has this one answer to everything. Of older rounds than the last two nothing
        is known.

        Raises:
            RoundRefused: the answer was lost, and is not to be made anew.
            SiteError: the journal cannot be read.
        """

    def intend(self, request: Request, digest: bytes, *, charged: bool) -> bool:
        """Keeps that a round is about to be charged for what `digest` stands for; returns whether that was kept before.

        Args:
            charged: whether the ledger has a charge for the round. Then nothing is kept that was not before.

        Raises:
            ProtocolError: something else was: what a charge is for is not exchanged.
            SiteError: the journal cannot be written, or another agent has it now.
        """

    def keep(self, study: str, request: Request, answers: Sequence[bytes], after: Frozen | None) -> None:
        """Keeps answers and the session after them, both or neither. Only then may the answers be sent.

        Answers are kept once. Only a `Noted` is replaced, by what the site then contributes to the round.

        Args:
            after: what is not among its parts stays as it was kept last. None: the run is over. All of it is erased
                but its name and study, and the answer that ended it.

        Raises:
            SiteError: the journal cannot be written, or another agent has it now; nothing may be sent.
        """
