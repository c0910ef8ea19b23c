"""What the queries of a model look like, whatever they will be asked: from the fit documents.

Captured queries are turned back to position 0 (q = R_t q_0, R_t the model's RoPE), so that they can
be asked again from any later position: a sample of them, and per query head the Gaussian of their
mean and covariance.  Where RoPE cannot be undone (fit/rope_frequencies.py says when) they are asked
from where they stood.

Sources: calibration queries, ours; Gaussian queries, Expected Attention (arXiv 2510.00636), which
averages the rotation itself where we average over positions of the horizon.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sphkv_cli.artifacts.capture import CaptureReader
from sphkv_cli.errors import SphkvError
from sphkv_cli.fit.captured_vectors import read_vectors
from sphkv_cli.fit.rope_frequencies import rope_frequencies
from sphkv_codebooks.rotary import rotate

Float32 = NDArray[np.float32]

N_SAMPLES = 64
"""Queries per head that an allocation carries along."""
_FIRST_POSITION = 64
"""Queries of a text's very beginning look back on nothing and are left out."""


@dataclass(frozen=True)
class FutureQueries:
    """Queries at position 0 (or, without frequencies, where they stood).

    sample: (n_layers, n_samples, n_q_heads, head_dim); mean: (n_layers, n_q_heads, head_dim);
    covariance: (n_layers, n_q_heads, head_dim, head_dim); inv_freq: (n_layers, head_dim / 2)
    radians per token, or None; all float32.
    """

    sample: Float32
    mean: Float32
    covariance: Float32
    inv_freq: Float32 | None

    def __post_init__(self) -> None:
        n_layers, _, n_q_heads, head_dim = self.sample.shape
        if self.mean.shape != (n_layers, n_q_heads, head_dim):
            raise ValueError(f"mean queries: shape {self.mean.shape}")
        if self.covariance.shape != (n_layers, n_q_heads, head_dim, head_dim):
            raise ValueError(f"covariance of queries: shape {self.covariance.shape}")
        if self.inv_freq is not None and self.inv_freq.shape != (n_layers, head_dim // 2):
            raise ValueError(f"frequencies: shape {self.inv_freq.shape}")

    def asked_from(self, layer: int, positions: Tensor) -> Tensor:
        """The sample, its i-th query turned to positions[i]: (n_samples, n_q_heads, head_dim)."""
        sample = torch.from_numpy(self.sample[layer]).to(positions.device)
        return self.turned(layer, sample, positions)

    def turned(self, layer: int, vectors: Tensor, positions: Tensor) -> Tensor:
        """R_t x for x of shape (n, n_heads, head_dim) and t of shape (n)."""
        if self.inv_freq is None:
            return vectors
        return rotate(vectors, positions, torch.from_numpy(self.inv_freq[layer]))

    def arrays(self) -> dict[str, Float32]:
        """What is stored; `from_arrays` is the inverse."""
        found = {"sample": self.sample, "mean": self.mean, "covariance": self.covariance}
        return found if self.inv_freq is None else found | {"inv_freq": self.inv_freq}

    @staticmethod
    def from_arrays(arrays: Mapping[str, Float32]) -> "FutureQueries":
        """Of the arrays that `arrays` gave."""
        return FutureQueries(
            arrays["sample"], arrays["mean"], arrays["covariance"], arrays.get("inv_freq")
        )

    @staticmethod
    def of_capture(capture: CaptureReader) -> "FutureQueries":
        """Of the captured queries of the fit documents.

        Raises:
            SphkvError: NaN or Inf in the capture.
        """
        try:
            inv_freq: Float32 | None = rope_frequencies(capture)
        except SphkvError:
            inv_freq = None
        documents = capture.documents_of("fit")
        positions = [capture.query_positions(document) for document in documents]
        late = [np.flatnonzero(p >= min(_FIRST_POSITION, p[-1])) for p in positions]
        samples, means, covariances = [], [], []
        for layer in range(capture.n_layers):
            rows = []
            for document, where, chosen in zip(documents, positions, late, strict=True):
                vectors = read_vectors(capture, document, layer, "queries")[chosen]
                if inv_freq is not None:
                    back = torch.from_numpy(-where[chosen])
                    vectors = rotate(vectors, back, torch.from_numpy(inv_freq[layer]))
                rows.append(vectors)
            queries = torch.cat(rows).double()
            spread = np.linspace(0, len(queries) - 1, min(N_SAMPLES, len(queries)))
            samples.append(queries[torch.from_numpy(spread.round().astype(np.int64))])
            mean = queries.mean(0)
            away = (queries - mean).transpose(0, 1)
            means.append(mean)
            covariances.append(away.transpose(1, 2) @ away / len(queries))
        return FutureQueries(_stack(samples), _stack(means), _stack(covariances), inv_freq)


def _stack(layers: list[Tensor]) -> Float32:
    return np.stack([layer.to(torch.float32).numpy() for layer in layers])
