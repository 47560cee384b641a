"""What a study's `privacy` section comes to: the noise that each phase needs, and the proof that the promise is kept.

A share of delta, `SLACK`, is set aside for what else may go wrong: a dithered rounding that adds more to a vector's
norm than its bound says, and the sampler's precision. The rest is calibrated to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cohortium.core.errors import StudyError
from cohortium.core.events import Events
from cohortium.core.layout import Block, Layout
from cohortium.core.models import Descriptive
from cohortium.core.study import Study
from cohortium.core.training import Averaging, Descent
from cohortium.secagg.group import tolerance

if TYPE_CHECKING:
    from cohortium.privacy.calibrate import Budget, Schedule
    from cohortium.privacy.noise import NoiseShares

SLACK = 0.01
"""Share of delta that is kept for rounding and for the sampler's precision."""


@dataclass(frozen=True)
class NoiseRule:
    """How much noise each site adds, so that the sum carries enough whoever is lost or colludes.

    Attributes:
        honest: the fewest shares in a sum that no attacker knows: the sites of the smallest round less tolerated
            dropouts less colluding ones.
        factor: by how much a change of one unit may exceed a unit's norm: 2 where one is replaced by another.
        copies: the most sites at which one patient may be.
        beta: the probability, for each block of a round, that rounding adds more than is accounted for.
    """

    honest: int
    factor: int
    copies: int
    beta: float

    def __call__(self, block: Block, exponent: int) -> int:
        """Returns the most that one site's noise adds to an entry, in steps of a scale of the given exponent."""
        from cohortium.privacy.noise import margin

        return margin(block, exponent, self.honest, self.factor, self.copies, self.beta)

    def shares(self, layout: Layout, exponents: tuple[int, ...], bits: int) -> NoiseShares:
        """Returns the stage that adds a site's noise."""
        from cohortium.privacy.noise import noise_shares

        return noise_shares(layout, exponents, bits, self.honest, self.factor, self.copies, self.beta)


def budget_of(study: Study) -> Budget | None:
    """Returns the epsilon and delta that a study promises, or None where it promises none."""
    privacy = study.privacy
    if privacy.epsilon is None or privacy.delta is None:
        return None
    from cohortium.privacy.calibrate import Budget

    return Budget(privacy.epsilon, privacy.delta)


def schedule_of(study: Study) -> Schedule | None:
    """Returns how much noise each phase of a study needs, or None without differential privacy."""
    budget = budget_of(study)
    if budget is None:
        return None
    from cohortium.privacy.calibrate import schedule

    share = None if isinstance(study.model, Descriptive) else study.privacy.preprocessing
    return schedule(budget, _rounds(study), study.privacy.sampling, share, SLACK * budget.delta)


def noise_rule(study: Study) -> NoiseRule | None:
    """Returns how much noise each site adds, or None without differential privacy."""
    privacy, budget = study.privacy, budget_of(study)
    if budget is None:
        return None
    least = tolerance(study.sites.fewest, study.aggregation.dropouts).threshold
    # half for rounding, half for the sampler; over all rounds, all blocks and all sites of a patient
    blocks = 3 * len(study.cohort.features) + 4
    beta = SLACK * budget.delta / (2 * (_rounds(study) + 1) * blocks * privacy.sites_per_patient)
    factor = 2 if privacy.neighbouring == "replace" else 1
    return NoiseRule(least - privacy.colluding, factor, privacy.sites_per_patient, beta)


def spread(study: Study) -> float:
    """Returns the most deviation that a sum's noise has, in units of its multiplier times a unit's norm.

    More shares than those that count are in it, and a change may be larger than what one unit adds at one site.
    """
    rule = noise_rule(study)
    return rule.factor * rule.copies * math.sqrt(len(study.sites.include) / rule.honest) if rule else 1.0


def keeps_promise(study: Study, releases: Events) -> None:
    """Checks what a compiled study would release against what it promises, by the accountant.

    Raises:
        StudyError: it would spend more.
    """
    from cohortium.privacy.accountant import epsilon

    budget = budget_of(study)
    assert budget is not None
    spent = epsilon(releases, budget.delta)
    if not spent <= budget.epsilon:
        raise StudyError(
            f"the study promises epsilon {budget.epsilon:g} and would spend {spent:.6g}: this is a fault of this "
            "version, not of the study; nothing was run"
        )


def _rounds(study: Study) -> int:
    """Returns how often training releases a sum."""
    return study.training.rounds if isinstance(study.training, Descent | Averaging) else 1
