"""What a site needs of the world outside."""

from collections.abc import Collection, Mapping, Sequence
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

    def charge(self, run: str, study: str, round: int, units: Column, events: Events) -> NDArray[np.bool_]:
        """Charges each unit that can pay for all of the events, and returns which ones did.

        The others must be left out of what is released. When this returns, the charge outlasts the process and the
        machine; when it raises, nothing may be released, and the charge may stand or not.

        Raises:
            ProtocolError: this round of the run was charged before: it is not answered twice.
            SiteError: the ledger cannot be written, or is not as it was written.
        """
