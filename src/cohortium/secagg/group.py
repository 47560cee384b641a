"""Who sums together, how many must stay, and what that protects against.

The coordinator together with c sites learns only the sum over the remaining survivors, of which at least two must be
honest:

    it follows the protocol:   c <= t - 1       fewer than t shares of a secret tell nothing
    it lies:                   c <= 2t - n - 1  two survivor sets would each need t - c honest endorsers, of n - c

for n sites and the threshold t = n - dropouts, and c <= n - 2, since two must be honest. The second line rests on
pinned identity keys and signed survivor sets; `cohortium.secagg.protocol` has the argument.
"""

from dataclasses import dataclass

from cohortium.core.errors import StudyError

LEAST_SITES = 3
"""Fewest sites in any sum. With two, each learns the other's vector from it."""
MOST_ENCRYPTING = 50
"""Most sites whose encryptions add up before their noise could reach the message (`cohortium.secagg.rlwe`)."""


@dataclass(frozen=True)
class Tolerance:
    """What a study's secure sums withstand.

    Attributes:
        sites: how many take part, n.
        threshold: how many of them must stay to the end of a round, t.
        curious: the most sites that may collude with a coordinator that follows the protocol.
        malicious: the most that may collude with one that does not.
    """

    sites: int
    threshold: int
    curious: int
    malicious: int


def tolerance(sites: int, dropouts: int) -> Tolerance:
    """Returns what a sum over `sites` sites withstands if it may lose `dropouts` of them.

    Raises:
        StudyError: too few sites, or more dropouts than leave any protection.
    """
    if sites < LEAST_SITES:
        raise StudyError(
            f"a secure sum over {sites} sites was refused: with fewer than {LEAST_SITES}, each learns the other's "
            "vector from the sum; include more sites"
        )
    most = min(sites - LEAST_SITES, (sites - 1) // 2)
    if not 0 <= dropouts <= most:
        raise StudyError(
            f"aggregation.dropouts is {dropouts}: of {sites} sites at most {most} may be lost, because {LEAST_SITES} "
            "must stay and more than half must agree on who did; lower it or include more sites"
        )
    threshold = sites - dropouts
    both_honest = sites - 2
    return Tolerance(sites, threshold, min(threshold - 1, both_honest), min(2 * threshold - sites - 1, both_honest))


@dataclass(frozen=True)
class Group:
    """The sites that agreed on keys for a run, in the order of their names, and the threshold.

    Raises:
        ValueError: names out of order or twice, or a threshold that no study can have.
    """

    sites: tuple[str, ...]
    threshold: int

    def __post_init__(self) -> None:
        if list(self.sites) != sorted(set(self.sites)):
            raise ValueError("a group lists its sites once each, in order")
        size = len(self.sites)
        if not max(LEAST_SITES, size // 2 + 1) <= self.threshold <= size:
            raise ValueError(f"a threshold of {self.threshold} does not protect {size} sites")

    def peers(self, site: str) -> tuple[str, ...]:
        """Returns all but one of them."""
        return tuple(name for name in self.sites if name != site)
