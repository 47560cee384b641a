"""Training a network with differential privacy: distributed DP-FedSGD, or DP-FedAvg where a hospital is protected.

Unit patient or record, DP-FedSGD:

    site:         each unit is drawn with probability q;  g_u = sum of the gradients of the unit's records
    on the wire:  sum over the units drawn of g_u / max(1, |g_u| / clip)
    coordinator:  parameters <- server(parameters, -rate * (noisy sum) / (q * units))

Unit site, DP-FedAvg:

    site:         delta = (parameters after `local.steps` batches) - (parameters received)
    on the wire:  delta / max(1, |delta| / clip)
    coordinator:  parameters <- server(parameters, (noisy sum) / sites)

Nothing else leaves a site: no weight, no loss. A unit that comes or goes moves the sum by at most `clip`, and does not
move the divisor, which is fixed before training; where a site is lost, the mean grows a little shorter. The noise is
added where sums are protected, never here. Draws follow from the site's own randomness: privacy grows by them only
because nobody else learns who took part in a round. A run without noise counts the units drawn and divides by that.

The result is the mean of the parameters after the last half of the rounds. Averaging costs no privacy, and takes away
most of the noise that the last steps left (on FLCHAIN with local noise, epsilon 0.5: an AUC of .821 instead of .799).

Nothing that depends on data stops a run: a gradient or an update that is not finite counts as zero.

Source: Abadi et al. 2016, "Deep Learning with Differential Privacy", algorithm 1; McMahan et al. 2018, "Learning
Differentially Private Recurrent Language Models", algorithm 1 and section 2 (a person's records bounded together, fixed
divisor); Polyak and Juditsky 1992, "Acceleration of Stochastic Approximation by Averaging" (the mean of the iterates).
Opacus computes each record's gradient (Yousefpour et al. 2021).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from cohortium.core import codec
from cohortium.core.errors import ProtocolError, StudyError
from cohortium.core.layout import Block, Floats, Layout, Noise, Statistics
from cohortium.core.random import Randomness
from cohortium.core.training import Averaging
from cohortium.learning import server
from cohortium.learning.algorithm import Memory
from cohortium.learning.network import NetworkFit
from cohortium.learning.table import Owners, Table, Unit, sampled
from cohortium.learning.torch_training import LARGEST, Factory, Loss, Trainer, seeded
from cohortium.learning.unit_gradients import Units, per_record, sum_of_clipped
from cohortium.privacy.clip import clipped


@dataclass(frozen=True)
class PrivateState:
    """The coordinator's state: parameters, and their mean over the last half of the rounds, `(n_parameters,)` each."""

    round: int
    parameters: Floats
    mean: Floats
    moments: server.Moments


@dataclass(frozen=True)
class PrivateBroadcast:
    """What sites receive: the round's number from 0, and the parameters in float32."""

    round: int
    parameters: np.ndarray


@dataclass(frozen=True)
class PrivateFedAvg:
    """Trains a module's parameters under differential privacy for patients, records or sites.

    Attributes:
        module: builds the module. Its initial weights come from `initial`, whatever PyTorch's own generator holds.
        loss: mean loss of a batch; a record's loss must not depend on the other records.
        features: a table's design matrix `(n_rows, n_columns)`.
        averaging: the study's rounds, local training, server optimiser and clip. For patients and records only
            `local.learning_rate` is used of local training. `update_bound` limits a parameter's change in one round: at
            each site for sites, at the coordinator else.
        maximum: most records that a site may bring; public.
        initial: randomness of the initial weights; derived from public study data, so that all halves share it.
        unit: whose data the noise hides.
        multiplier: the least deviation of the noise in a sum, relative to its sensitivity; None for none.
        rate: the probability with which a site draws each of its units for a round.
        patients: how many units all sites bring together, as noise left the count; at least 1. Used neither for sites
            nor without noise.
        sites: how many sites the study names. Used for sites alone.
        microbatch: most records whose gradients are held at once; it changes no result but by rounding, and by what
            layers such as dropout draw.
    """

    module: Factory
    loss: Loss
    features: Callable[[Table], Floats]
    averaging: Averaging
    maximum: int
    initial: Randomness
    unit: Unit
    multiplier: float | None
    rate: float = 1.0
    patients: float = 1.0
    sites: int = 1
    microbatch: int = 256

    def __post_init__(self) -> None:
        local = self.averaging.local
        if self.averaging.clip is None:
            raise StudyError("training.clip is missing: it bounds what a privacy unit adds, and noise follows from it")
        if local.scaffold:
            raise StudyError(
                "training.local.scaffold: a private run would have to release the control variates too, at the cost "
                "of twice the noise: set it to false"
            )
        if self.unit == "site":
            if self.rate != 1:
                raise StudyError("privacy.sampling: sites are not drawn: set it to 1")
        elif local.steps != 1:
            raise StudyError(
                f"training.local.steps is {local.steps}: only the gradient of one step tells what each {self.unit} "
                "adds to it: set it to 1"
            )
        else:
            per_record(self._trainer.build().train())

    @property
    def broadcast_type(self) -> type[PrivateBroadcast]:
        return PrivateBroadcast

    def init(self) -> PrivateState:
        parameters = self._trainer.start()
        return PrivateState(0, parameters, parameters, server.start(self.averaging.server, parameters.size))

    def broadcast(self, state: PrivateState) -> PrivateBroadcast:
        return PrivateBroadcast(state.round, state.parameters.astype(np.float32))

    def admit(self, broadcast: PrivateBroadcast, before: PrivateBroadcast | None) -> None:
        if broadcast.round != (0 if before is None else before.round + 1) or broadcast.round >= self.averaging.rounds:
            raise ProtocolError("a broadcast was refused: its round is out of order")
        part = broadcast.parameters
        start = (self.broadcast(self.init()) if before is None else before).parameters
        if part.shape != start.shape or part.dtype != np.float32 or not (np.abs(part) <= LARGEST).all():
            raise ProtocolError("a broadcast was refused: its parameters have another shape or are out of bounds")
        if before is None and (part != start).any():
            raise ProtocolError("a broadcast was refused: training starts with the study's own initial weights")

    def layout(self, broadcast: PrivateBroadcast) -> Layout:
        clip = self._clip
        bound = min(clip, self.averaging.update_bound) if self.unit == "site" else self.maximum * clip
        noise = None if self.multiplier is None else Noise(clip, self.multiplier, self.rate)
        update = Block("update", broadcast.parameters.shape, bound, noise=noise)
        return (update, Block("units", (), float(self.maximum))) if self._counts else (update,)

    def local(
        self, broadcast: PrivateBroadcast, table: Table, memory: Memory, randomness: Randomness
    ) -> tuple[Statistics, Memory]:
        if self.unit == "site":
            return {"update": self._site_update(broadcast, table, randomness)}, memory
        module = self._trainer.received(broadcast.parameters).double()
        secret = randomness.child("sample", broadcast.round)
        rows, owners = drawn(table.owners(self.unit), table.rows, self.rate, secret)
        design, target = self.features(table)[rows], table.target
        assert target is not None
        units = Units(design, target[rows], owners)
        with seeded(randomness.child("round", broadcast.round)):
            total = sum_of_clipped(per_record(module), self.loss, units, self._clip, self.microbatch)
        count = {"units": np.array(float(len(np.unique(owners))))} if self._counts else {}
        return {"update": total, **count}, memory

    def update(self, state: PrivateState, total: Statistics) -> PrivateState:
        bound = self.averaging.update_bound
        if self.unit == "site":
            change = total["update"] / self.sites
        else:
            gradient = total["update"] / self._divisor(total)
            change = np.clip(-self.averaging.local.learning_rate * gradient, -bound, bound)
        parameters, moments = server.apply(self.averaging.server, state.parameters, state.moments, change)
        # whatever the noise did, an honest broadcast is one that sites admit
        parameters = np.clip(parameters, -LARGEST, LARGEST)
        number = state.round + 1
        averaged = number - self.averaging.rounds // 2
        mean = parameters if averaged <= 1 else state.mean + (parameters - state.mean) / averaged
        return PrivateState(number, parameters, mean, moments)

    def done(self, state: PrivateState) -> bool:
        return state.round >= self.averaging.rounds

    def finish(self, state: PrivateState) -> NetworkFit:
        return NetworkFit(self._trainer.shaped(state.mean), None)

    def progress(self, state: PrivateState) -> tuple[int, float | None]:
        return self.averaging.rounds - state.round, None

    def freeze(self, state: PrivateState) -> bytes:
        # for the first half of the rounds they are one
        mean = np.zeros(0) if state.mean is state.parameters else state.mean
        return codec.encode(replace(state, mean=mean))

    def thaw(self, data: bytes) -> PrivateState:
        state = codec.decode(data, PrivateState)
        return state if state.mean.size else replace(state, mean=state.parameters)

    @property
    def _trainer(self) -> Trainer:
        return Trainer(self.module, self.loss, self.features, self.averaging.local, self.initial)

    @property
    def _counts(self) -> bool:
        """Whether the units drawn are counted, as only a run without noise may."""
        return self.multiplier is None and self.unit != "site"

    @property
    def _clip(self) -> float:
        assert self.averaging.clip is not None
        return self.averaging.clip

    def _divisor(self, total: Statistics) -> float:
        if self._counts:
            return max(1.0, float(np.rint(total["units"])))
        return self.rate * max(1.0, self.patients)

    def _site_update(self, broadcast: PrivateBroadcast, table: Table, randomness: Randomness) -> Floats:
        """Returns a site's change of the parameters after all of local training, clipped as a whole."""
        delta, _ = self._trainer.train(broadcast.parameters, np.zeros(0), broadcast.round, table, randomness)
        # by entries first: that makes it no longer, and clipping the whole first would leave less of the other entries
        bound = self.averaging.update_bound
        whole = clipped(np.clip(delta, -bound, bound)[None, :], self._clip)[0]
        # its grid may have led an entry a little beyond
        bounded: Floats = np.clip(whole, -bound, bound)
        return bounded


def drawn(owners: Owners | None, rows: int, rate: float, randomness: Randomness) -> tuple[Owners, Owners]:
    """Returns the rows of the units that a round draws, each unit's together, and whose they are.

    The arguments are those of `cohortium.learning.table.sampled`.
    """
    units = np.arange(rows) if owners is None else owners
    order = np.argsort(units, kind="stable")
    order = order[sampled(owners, rows, rate, randomness)[order]]
    return order, units[order]
