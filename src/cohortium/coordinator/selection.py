"""Which sites a round asks, where a study lets each round ask some of them: pure, and from public facts alone.

    random:    the sites whose digest of study, round and name is smallest: anybody can say whose turn it is
    adaptive:  those with the largest score
               min(1, T / t)^ALPHA  +  rounds waited / PATIENCE  -  share of rounds taken part in
               with t a site's usual seconds to answer and T those of the site in the middle

A site that has waited for PATIENCE = 2 ceil(n / k) rounds comes first, whatever its score, so that each of n sites is
asked at least every 3 ceil(n / k) rounds where k are asked and all can be: a slow hospital's patients count, too.

Source: the score's first factor and its term for who has waited follow Lai et al., "Oort: Efficient Federated Learning
via Guided Participant Selection", OSDI 2021, section 4 (there T is a developer's choice and alpha 2). Oort also weighs
sites by their training loss. That is left out: a site's own loss is not for the coordinator to see.

Trust: a coordinator that lies chooses as it likes, and this module binds only an honest one. What then holds is what
the secure sum over the fewest sites that a study allows withstands (`Plan.tolerance`): no selection is smaller, each
of its sites knows who else was asked, and sites that were told different selections have nothing that adds up. That
sums over different selections differ by few sites' vectors is not prevented; a study with noise accounts for it.
"""

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from statistics import median
from typing import Literal

import msgspec
from msgspec.structs import replace

from cohortium.core.signature import framed

Way = Literal["random", "adaptive"]
ALPHA = 2.0
_FRESH = 0.3
"""Weight of the latest answer's seconds in a site's usual ones."""


class Career(msgspec.Struct, frozen=True):
    """What is known of a site's part in a run.

    Attributes:
        seconds: its usual time to answer, an exponentially weighted mean; None before its first answer.
        asked: the last round that asked for its contribution, 0 for none.
        times: the rounds to which it contributed.
    """

    seconds: float | None = None
    asked: int = 0
    times: int = 0

    def answered(self, seconds: float) -> "Career":
        """Returns the career after an answer that took so long."""
        usual = seconds if self.seconds is None else (1 - _FRESH) * self.seconds + _FRESH * seconds
        return replace(self, seconds=usual)


_NEW = Career()


def choose(
    way: Way, sites: Sequence[str], careers: Mapping[str, Career], count: int, study_id: str, number: int
) -> tuple[str, ...]:
    """Returns who is asked in a round, `count` of the sites in the order of their names, or all if there are fewer.

    The same arguments give the same sites.

    Args:
        sites: those that can be asked.
        careers: what is known of them; nothing, for those that are not listed.
        number: the round.
    """

    def lot(site: str) -> bytes:
        return blake2b(framed(study_id.encode(), site.encode()) + number.to_bytes(8, "big"), digest_size=16).digest()

    drawn = sorted(sites, key=lot)
    if way == "adaptive":
        known = {site: careers.get(site, _NEW) for site in sites}
        times = [career.seconds for career in known.values() if career.seconds is not None]
        usual, patience = median(times) if times else 1.0, 2 * -(-len(sites) // count)
        drawn.sort(key=lambda site: _rank(known[site], usual, patience, number))
    return tuple(sorted(drawn[:count]))


def _rank(career: Career, usual: float, patience: int, number: int) -> tuple[int, float]:
    """Returns what sorts a site before others: those that waited too long by how long, then the larger score."""
    waited = number - career.asked
    if waited > patience:
        return -waited, 0.0
    fast = min(1.0, usual / career.seconds) ** ALPHA if career.seconds else 1.0
    return 0, -(fast + waited / patience - career.times / max(1, number))
