"""Centring: the mean key of each (layer, KV head), over the tokens of the `fit` documents.

``mu = (1 / n) sum_t k_t`` after RoPE. Softmax does not see a shift of all its logits, so removing
mu from every key is exact and free at decode time; what is left to code is smaller. Ours.
"""

import numpy as np
import numpy.typing as npt
import torch

from sphkv_cli.artifacts.capture import CaptureReader
from sphkv_cli.fit.captured_vectors import documents_of, token_chunks
from sphkv_cli.progress import Progress


def post_rope_key_means(capture: CaptureReader, progress: Progress) -> npt.NDArray[np.float32]:
    """Mean keys (n_layers, n_kv_heads, head_dim), summed in float64.

    Raises:
        SphkvError: no `fit` document, or NaN or Inf among its keys.
    """
    documents = documents_of(capture, "fit")
    shape = (capture.n_layers, capture.n_kv_heads, capture.head_dim)
    total = torch.zeros(shape, dtype=torch.float64)
    progress.start("Averaging keys", capture.n_layers, "layers")
    for layer in range(capture.n_layers):
        for document in documents:
            for keys, _ in token_chunks(capture, document, layer, "keys"):
                total[layer] += keys.sum(dim=0, dtype=torch.float64)
        progress.advance()
    progress.finish()
    n_tokens = sum(document.n_tokens for document in documents)
    return (total / n_tokens).numpy().astype(np.float32)
