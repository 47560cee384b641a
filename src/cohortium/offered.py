"""What this version does not give: a study that asks for it is refused before any record is read, with the reason."""

from collections.abc import Iterator
from itertools import pairwise

from cohortium.core.errors import StudyError
from cohortium.core.features import Number
from cohortium.core.models import Descriptive, Network, Regression
from cohortium.core.study import Study
from cohortium.core.training import Averaging, Descent, Newton
from cohortium.secagg.group import MOST_ENCRYPTING, tolerance

MAX_VALUES = 50_000_000
"""Most numbers that a site sends in a round; a hostile study shall not exhaust a site's memory."""


def refuse_what_is_not_offered(study: Study) -> None:
    """Raises a `StudyError` with the first thing that a study asks for and cannot have."""
    for rule in (_size, _sums, _selection, _buffers, _training, _privacy):
        for reason in rule(study):
            raise StudyError(reason)


def _size(study: Study) -> Iterator[str]:
    if _values(study) > MAX_VALUES:
        yield (
            f"a site would have to send about {_values(study):.2g} numbers a round, and {MAX_VALUES:.2g} is the most: "
            "use fewer features, levels, bins or units"
        )


def _sums(study: Study) -> Iterator[str]:
    aggregation, scaffold = study.aggregation, _scaffold(study)
    if aggregation.protocol == "gather":
        yield (
            "aggregation.protocol 'gather' would show the coordinator each hospital's own update, which no noise share "
            "protects; only sums cross the wire here: set protocol: masking, or rlwe"
        )
    if aggregation.compression is not None and not isinstance(study.model, Network):
        yield (
            f"aggregation.compression rounds model updates, and model '{study.model.kind}' needs every digit of its "
            "sums: remove it"
        )
    if aggregation.compression is not None and scaffold:
        yield (
            "aggregation.compression has one scale, and SCAFFOLD's control variates have another than its updates: set "
            "training.local.scaffold: false, or remove compression"
        )
    if aggregation.dropouts and scaffold:
        yield (
            "aggregation.dropouts with SCAFFOLD would tell a site's control variate from the sums of two rounds, since "
            "sites keep theirs whoever survives: set dropouts: 0, or training.local.scaffold: false"
        )
    if aggregation.protocol == "rlwe" and len(study.sites.include) > MOST_ENCRYPTING:
        yield (
            f"protocol 'rlwe' adds up the encryptions of at most {MOST_ENCRYPTING} sites, and the study names "
            f"{len(study.sites.include)}: set aggregation.protocol: masking"
        )
    tolerance(study.sites.fewest, aggregation.dropouts)


def _selection(study: Study) -> Iterator[str]:
    if study.sites.per_round is None:
        return
    if not isinstance(study.training, Averaging):
        yield (
            f"sites.per_round asks some of the sites in a round, and model '{study.model.kind}' needs all of them in "
            "each: leave it out"
        )
    if _scaffold(study):
        yield (
            "sites.per_round with SCAFFOLD would tell a site's control variate from the sums of two rounds: set "
            "training.local.scaffold: false, or leave per_round out"
        )


def _buffers(study: Study) -> Iterator[str]:
    training, sites, aggregation = study.training, len(study.sites.include), study.aggregation
    if not isinstance(training, Averaging) or training.asynchronous is None:
        return
    buffer, threshold = training.asynchronous.buffer, sites - aggregation.dropouts
    if not threshold <= buffer <= sites:
        yield (
            f"training.asynchronous.buffer is {buffer}: a sum over fewer than {threshold} of {sites} sites stays "
            f"closed with aggregation.dropouts: {aggregation.dropouts}; set a buffer from {threshold} to {sites}, or "
            "more dropouts"
        )
    if study.privacy.epsilon is not None or training.clip is not None:
        yield (
            "training.asynchronous protects a site's late work more than once and sums it in rounds that it was not "
            "computed for, which neither the ledger nor the fixed divisor of training.clip counts: remove it, or "
            "privacy.epsilon and training.clip"
        )
    if study.sites.per_round is not None:
        yield (
            "training.asynchronous takes the sites that are first, and sites.per_round those that are chosen: remove "
            "one of them"
        )
    if _scaffold(study):
        yield (
            "training.asynchronous with SCAFFOLD would mix control variates of different rounds: set "
            "training.local.scaffold: false, or remove it"
        )
    if aggregation.protocol != "masking":
        yield (
            f"training.asynchronous is offered with masks, and not with protocol '{aggregation.protocol}': set "
            "aggregation.protocol: masking"
        )


def _training(study: Study) -> Iterator[str]:
    if study.training is not None and study.training.algorithm == "adassp" and study.model.kind == "poisson":
        yield "algorithm 'adassp' solves least squares, and a count's mean is no linear function: use 'descent'"
    if study.cohort.records == "several" and isinstance(study.model, Descriptive) and study.privacy.epsilon is None:
        yield (
            "cohort.records is 'several', and small cells are withheld by the number of records, of which one patient "
            "may have many: give privacy.epsilon and delta, or set records: one"
        )


def _privacy(study: Study) -> Iterator[str]:
    if study.privacy.epsilon is not None:
        yield from _noisy_training(study)
        yield from _noisy_sums(study)
    elif study.privacy.sampling < 1:
        yield "privacy.sampling without privacy.epsilon only loses data: remove it, or give epsilon and delta"


def _noisy_training(study: Study) -> Iterator[str]:
    privacy, training = study.privacy, study.training
    if isinstance(training, Newton):
        yield (
            "algorithm 'newton' needs exact sums, and privacy.epsilon asks for noise in them: set training.algorithm: "
            "descent, or adassp"
        )
    if isinstance(training, Descent | Averaging) and training.clip is None:
        yield (
            f"training.clip is missing: with privacy.epsilon it bounds what one {privacy.unit} adds to a sum; give "
            "one, such as 1.0"
        )
    if privacy.sampling < 1 and not isinstance(training, Descent | Averaging):
        yield "privacy.sampling draws anew in each round of training, and this study has one round: leave it out"
    if _scaffold(study):
        yield "SCAFFOLD's control variates are exact, and privacy.epsilon asks for noise: set scaffold: false"
    if isinstance(study.model, Descriptive) and study.model.refinements:
        yield (
            "model.refinements would cost privacy budget in each of its rounds: set refinements: 0, and more bins for "
            "finer quantiles"
        )


def _noisy_sums(study: Study) -> Iterator[str]:
    aggregation, colluding = study.aggregation, study.privacy.colluding
    if aggregation.compression is not None:
        yield "aggregation.compression and privacy.epsilon are not offered together: remove one of them"
    if aggregation.protocol == "ckks-single-key":
        yield (
            "protocol 'ckks-single-key' lets any hospital read another's update, whose own noise share is too small to "
            "protect it: set aggregation.protocol: masking, or rlwe"
        )
    withstands = tolerance(study.sites.fewest, aggregation.dropouts)
    if colluding >= withstands.threshold:
        yield (
            f"privacy.colluding is {colluding}, and only {withstands.threshold} hospitals are sure to be in a sum: "
            "none might be left whose noise protects the rest; lower privacy.colluding or aggregation.dropouts"
        )
    if colluding > withstands.malicious:
        yield (
            f"privacy.colluding is {colluding}, and with {aggregation.dropouts} dropouts a coordinator that lies and "
            f"{withstands.malicious + 1} hospitals open one hospital's vector, whose own noise share is too small to "
            f"protect it: set privacy.colluding to {withstands.malicious}, or lower aggregation.dropouts"
        )


def _scaffold(study: Study) -> bool:
    return isinstance(study.training, Averaging) and study.training.local.scaffold


def _values(study: Study) -> int:
    """Returns how many numbers the study's largest vector holds, worked out before anything is allocated."""
    cohort, model = study.cohort, study.model
    columns = sum(1 if isinstance(feature, Number) else len(feature.levels) - 1 for feature in cohort.features.values())
    if isinstance(model, Regression):
        return (columns + 2) * (columns + 3) // 2
    if isinstance(model, Network):
        widths = (columns, *model.hidden, 1)
        return sum((inner + 1) * outer for inner, outer in pairwise(widths))
    return (columns + 2 * len(cohort.features)) * max(1, len(model.quantiles)) * model.bins
