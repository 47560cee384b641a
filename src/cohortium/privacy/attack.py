"""What guesses about membership prove: lower bounds on epsilon from one run, and how well a model tells its patients.

A promise of epsilon bounds from above what anybody can find out; an attack bounds from below what somebody did. A lower
bound above the promise shows that code, parameters or proof are wrong. One below it proves nothing: a better guesser
might have found more.

Trust: whoever runs these attacks knows who was a member. The results name nobody.

Source:
    Steinke, Nasr and Jagielski 2023, "Privacy Auditing with One (1) Training Run", algorithm 1, corollary 5.4 and
    appendix D (`one_run`); Carlini et al. 2022, "Membership Inference Attacks From First Principles", algorithm 1 and
    section VI (`lira`).
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit, ndtri

from cohortium.core.layout import Floats

Members = NDArray[np.bool_]
"""Who took part: `(n,)`, or a row for each model, `(n_models, n)`."""

_GUESSED = 0.25
"""Share of the canaries that are guessed about. It is stated beforehand, because the best of several bounds is no bound
at the same confidence. A quarter of 1,000 finds nearly what other shares do up to epsilon 1, and at most 4.4."""
_STEPS = 40
_OWN_VARIANCE = 64
"""Shadow models from which each example has variances of its own (Carlini et al. 2022, section VI)."""
_DEVIATIONS_95 = float(ndtri(0.975))


@dataclass(frozen=True)
class OneRun:
    """What guesses about canaries say about a mechanism.

    Attributes:
        epsilon: the lower bound; 0 where the guesses show nothing.
        canaries: how many could have taken part.
        guesses: about how many of them the guesser committed himself.
        right: how many guesses were right.
        confidence: the probability with which the bound is no larger than the true epsilon.
    """

    epsilon: float
    canaries: int
    guesses: int
    right: int
    confidence: float


@dataclass(frozen=True)
class Auc:
    """How well scores tell members from others: the area under the ROC curve, with its 95% interval."""

    auc: float
    low: float
    high: float


def one_run(scores: Floats, included: Members, delta: float, confidence: float = 0.95) -> OneRun:
    """Returns a lower bound on epsilon from one run in which each canary took part or not by a fair coin of its own.

    The eighth of the canaries with the highest scores are guessed to have taken part, the eighth with the lowest not to
    have, and nothing is said about the others. Equal scores are guessed in the order in which they are listed, which
    must tell nothing of who took part.

    Args:
        scores: how sure the guesser is of each canary's part, `(n,)`; any scale, higher is surer.
        included: which canaries took part, `(n,)`.
        delta: the delta at which epsilon is bounded.
        confidence: the probability with which the bound holds.

    Raises:
        ValueError: shapes differ, a score is no number, or delta or confidence is out of range.
    """
    _require(scores, included)
    count = len(scores)
    each = min(count // 2, max(1, round(count * _GUESSED / 2)))
    rising = np.argsort(scores, kind="stable")
    right = int(included[rising[count - each :]].sum() + (~included[rising[:each]]).sum())
    return OneRun(lower_bound(2 * each, right, count, delta, confidence), count, 2 * each, right, confidence)


def lower_bound(guesses: int, right: int, canaries: int, delta: float, confidence: float = 0.95) -> float:
    """Returns the largest epsilon at which so many right guesses are too unlikely, 0 where they never are.

    Args:
        guesses: about how many canaries something was said.
        right: how many of these guesses were right.
        canaries: all that were included or left out by coins.
        delta: of the (epsilon, delta)-privacy that is tested.
        confidence: one less the probability at which "too unlikely" begins.

    Raises:
        ValueError: the numbers are no audit's.
    """
    if not (0 <= right <= guesses <= canaries and 0 <= delta <= 1 and 0 < confidence < 1):
        raise ValueError(
            f"{right} right guesses of {guesses} about {canaries} canaries, delta {delta}, confidence {confidence}"
        )
    unlikely, low, high = 1 - confidence, 0.0, 1.0
    if at_least(right, guesses, canaries, 0.0, delta) >= unlikely:
        return 0.0
    while at_least(right, guesses, canaries, high, delta) < unlikely:
        low, high = high, 2 * high
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if at_least(right, guesses, canaries, middle, delta) < unlikely:
            low = middle
        else:
            high = middle
    return low


def at_least(right: int, guesses: int, canaries: int, epsilon: float, delta: float) -> float:
    """Returns a bound on the probability of so many right guesses or more under (epsilon, delta)-privacy.

    With delta = 0 each guess is right with probability at most e^epsilon / (1 + e^epsilon), whatever came of those
    before. Delta adds 2 n delta times the largest mean, over i from 1, of the i probabilities just below.

    Source: Steinke, Nasr and Jagielski 2023, corollary 5.4, in the form of `p_value_DP_audit` in appendix D.
    """
    chance = float(expit(epsilon))
    # a second to import, and every command would pay for it
    from scipy.stats import binom

    enough = float(binom.sf(right - 1, guesses, chance))
    if right == 0 or delta == 0:
        return min(1.0, enough)
    below = np.cumsum(binom.pmf(np.arange(right - 1, -1, -1), guesses, chance))
    return min(1.0, enough + 2 * canaries * delta * float((below / np.arange(1, right + 1)).max()))


def lira(scores: Floats, shadows: Floats, members: Members) -> Floats:
    """Returns the logarithm of each example's likelihood ratio of membership in a model, `(n,)`.

    Shadow models, each trained on a random half, show how an example's score is distributed if it is a member and if
    not: two normal distributions for each example. With fewer than 64 models their variances are common to all
    examples, one for members and one for others, about each example's own means.

    Args:
        scores: the attacked model's, `(n,)`; best on a scale on which they are about normal, such as log odds.
        shadows: each shadow model's scores, `(n_models, n)`.
        members: which examples each shadow model was trained on, `(n_models, n)`.

    Raises:
        ValueError: shapes differ, a score is no number, or an example is a member of all shadow models or of none.
    """
    _require(shadows, members)
    if scores.shape != shadows.shape[1:] or not np.isfinite(scores).all():
        raise ValueError(f"scores of shape {scores.shape} and shadows of shape {shadows.shape} do not match")
    if not (members.any(axis=0) & ~members.all(axis=0)).all():
        raise ValueError("an example is a member of all shadow models or of none: train more of them")
    spread = float(shadows.var())
    inside, outside = _normal(shadows, members, spread), _normal(shadows, ~members, spread)
    return _likelihood(scores, *inside) - _likelihood(scores, *outside)


def attack_auc(scores: Floats, members: Members) -> Auc:
    """Returns how well scores `(n,)` tell members from others, with a 95% interval.

    The interval is DeLong's, on the logit scale; where it does not exist, because scores separate the two perfectly or
    are all equal, it is Hoeffding's, which needs no variance.

    Raises:
        ValueError: shapes differ, a score is no number, or there are only members or none.

    Source:
        DeLong, DeLong and Clarke-Pearson 1988, Biometrics 44(3), equations 3 to 5; Hoeffding 1963, "Probability
        Inequalities for Sums of Bounded Random Variables", equation 5.7.
    """
    inside, outside = _split(scores, members)
    from scipy.stats import rankdata

    ranks = rankdata(scores)
    of_members = (ranks[members] - rankdata(inside)) / len(outside)
    of_others = 1 - (ranks[~members] - rankdata(outside)) / len(inside)
    auc, fewer = float(of_members.mean()), min(len(inside), len(outside))
    variance = of_members.var(ddof=1) / len(inside) + of_others.var(ddof=1) / len(outside) if fewer > 1 else 0.0
    if variance == 0 or auc in (0.0, 1.0):
        reach = math.sqrt(math.log(2 / 0.05) / 2 / fewer)
        return Auc(auc, max(0.0, auc - reach), min(1.0, auc + reach))
    reach = _DEVIATIONS_95 * math.sqrt(variance) / (auc * (1 - auc))
    return Auc(auc, float(expit(logit(auc) - reach)), float(expit(logit(auc) + reach)))


def found_at(scores: Floats, members: Members, rate: float) -> float:
    """Returns the share of members that scores find while at most a share `rate` of the others is taken for members.

    With fewer others than 1 / rate, none of them may be taken for one.

    Raises:
        ValueError: shapes differ, a score is no number, or there are only members or none.
    """
    inside, outside = _split(scores, members)
    allowed = min(math.floor(rate * len(outside)), len(outside) - 1)
    threshold = np.sort(outside)[len(outside) - 1 - allowed]
    return float((inside > threshold).mean())


def _normal(shadows: Floats, which: Members, spread: float) -> tuple[Floats, Floats]:
    """Returns each example's mean and deviation over the shadow models in `which`."""
    count = which.sum(axis=0)
    mean = np.where(which, shadows, 0.0).sum(axis=0) / count
    squares: Floats = np.where(which, (shadows - mean) ** 2, 0.0).sum(axis=0)
    if len(shadows) >= _OWN_VARIANCE and count.min() > 1:
        variance = squares / (count - 1)
    else:
        variance = np.full(len(mean), squares.sum() / max(1, (count - 1).sum()))
    # scores that never vary would make certain what a few models merely did not show
    return mean, np.sqrt(np.maximum(variance, 1e-12 * spread if spread > 0 else 1.0))


def _likelihood(scores: Floats, mean: Floats, deviation: Floats) -> Floats:
    """Returns logarithms of normal densities, up to a constant."""
    return -np.log(deviation) - ((scores - mean) / deviation) ** 2 / 2


def _split(scores: Floats, members: Members) -> tuple[Floats, Floats]:
    _require(scores, members)
    if members.all() or not members.any():
        raise ValueError("an attack needs members and others")
    return scores[members], scores[~members]


def _require(scores: Floats, members: Members) -> None:
    if scores.shape != members.shape or members.dtype != np.bool_:
        raise ValueError(f"scores of shape {scores.shape} and members of shape {members.shape} do not match")
    if not np.isfinite(scores).all():
        raise ValueError("a score is missing or infinite")
