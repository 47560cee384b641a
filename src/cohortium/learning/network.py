"""A trained network as arrays, and its forward pass in numpy: scoring a patient needs no PyTorch."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from cohortium.core.layout import Floats

Activation = Literal["relu", "tanh"]


@dataclass(frozen=True)
class NetworkFit:
    """A trained network.

    Attributes:
        weights: one float32 array for each parameter tensor, in the module's order. Of a built-in network these are
            `(n_outputs, n_inputs)` weights and `(n_outputs,)` biases, layer by layer.
        loss: mean training loss over all sites' patients in the last round; None where nothing exact is released.
    """

    weights: tuple[np.ndarray, ...]
    loss: float | None


def forward(fit: NetworkFit, design: Floats, activation: Activation) -> Floats:
    """Returns a built-in network's outputs `(n_rows,)` for a design matrix `(n_rows, n_columns)`.

    A binary target's output is its log-odds, a number target's is on the target's unit scale. A network with several
    outputs gives `(n_rows, n_outputs)`.
    """
    values, last = design, len(fit.weights) // 2 - 1
    for layer, (weight, bias) in enumerate(zip(fit.weights[::2], fit.weights[1::2], strict=True)):
        values = values @ weight.T.astype(np.float64) + bias
        if layer < last:
            values = np.tanh(values) if activation == "tanh" else np.maximum(values, 0.0)
    return values[:, 0] if values.shape[1] == 1 else values
