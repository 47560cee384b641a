"""What a site needs of the world outside."""

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

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
