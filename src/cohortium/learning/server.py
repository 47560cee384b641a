"""Server optimisers: how the coordinator applies the sites' mean update.

Source: Reddi et al. 2021, "Adaptive Federated Optimization", algorithm 2 (adam, yogi, adagrad); McMahan et al. 2017
(sgd with rate 1 is FedAvg); Hsu et al. 2019, "Measuring the Effects of Non-Identical Data Distribution for Federated
Visual Classification", section 4.3 (momentum is FedAvgM).
"""

from dataclasses import dataclass

import numpy as np

from cohortium.core.layout import Floats
from cohortium.core.training import Server


@dataclass(frozen=True)
class Moments:
    """An optimiser's first and second moment, each `(n_parameters,)` or empty where it has none.

    They never leave the coordinator.
    """

    first: Floats
    second: Floats


def start(server: Server, size: int) -> Moments:
    """Returns the moments before the first round: m = 0 and v = tau squared, the least that algorithm 2 allows."""
    first = 0 if server.optimiser == "sgd" else size
    second = 0 if server.optimiser in ("sgd", "momentum") else size
    return Moments(np.zeros(first), np.full(second, server.tau**2))


def apply(server: Server, parameters: Floats, moments: Moments, update: Floats) -> tuple[Floats, Moments]:
    """Returns parameters and moments after one round; `update` is the sites' mean change Delta, `(n_parameters,)`.

    As in the paper, the adaptive methods (x + rate m / (sqrt(v) + tau), line 14) have no bias correction.
    """
    if server.optimiser == "sgd":
        return parameters + server.learning_rate * update, moments
    if server.optimiser == "momentum":
        first = server.beta1 * moments.first + update
        return parameters + server.learning_rate * first, Moments(first, moments.second)
    first = server.beta1 * moments.first + (1 - server.beta1) * update
    second = _second_moment(server, moments.second, update * update)
    step = server.learning_rate * first / (np.sqrt(second) + server.tau)
    return parameters + step, Moments(first, second)


def _second_moment(server: Server, second: Floats, square: Floats) -> Floats:
    """Returns v of algorithm 2 (lines 11 to 13) given its previous value and Delta squared."""
    if server.optimiser == "adagrad":
        return second + square
    if server.optimiser == "yogi":
        return second - (1 - server.beta2) * square * np.sign(second - square)
    return server.beta2 * second + (1 - server.beta2) * square
