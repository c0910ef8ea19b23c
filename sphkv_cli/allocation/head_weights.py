"""F: how much the model minds a squared error in the output of a query head."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sphkv_cli.allocation.options import HeadWeights
from sphkv_cli.artifacts.capture import CaptureReader
from sphkv_cli.errors import SphkvError


@dataclass(frozen=True)
class HeadWeighting:
    """values: (n_layers, n_q_heads) float64; source: where they come from, for people."""

    values: NDArray[np.float64]
    source: str

    @staticmethod
    def of(capture: CaptureReader, kind: HeadWeights) -> "HeadWeighting":
        """The weights of a capture.

        Raises:
            SphkvError: Fisher weights are asked for and were not captured.
        """
        fisher = capture.fisher if kind in ("auto", "fisher") else None
        if kind == "fisher" and fisher is None:
            raise SphkvError(
                f"{capture.path} holds no Fisher weights",
                "capture with --fisher, or pass --head-weights output",
            )
        if fisher is not None:
            error = float(np.median(capture.fisher_standard_error / np.maximum(fisher, 1e-300)))
            return HeadWeighting(
                fisher,
                "Fisher: squared gradient of log p(sampled label) per coordinate of the head's "
                f"output, median standard error {100 * error:.0f} %",
            )
        if kind == "none":
            shape = (capture.n_layers, capture.n_q_heads)
            return HeadWeighting(np.ones(shape), "1 for every query head")
        source = "squared Frobenius norm of each query head's output projection over head_dim"
        if kind == "auto":
            source += " (no Fisher weights: capture with --fisher)"
        return HeadWeighting(capture.output_weight.astype(np.float64), source)
