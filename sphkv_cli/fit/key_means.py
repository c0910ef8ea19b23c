"""What frames need to know of keys: mean after and before RoPE, median norm, second moments.

    mu = (1/n) sum_t k_t,   mu' = (1/n) sum_t R_t^-1 k_t,   Sigma_k = (1/n) sum_t (k - c)(k - c)^T

over the tokens of the `fit` documents, a chunk at a time, summed in float64.  Ours.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sphkv_cli.artifacts.capture import CaptureReader
from sphkv_cli.fit.captured_vectors import documents_of, token_chunks
from sphkv_codebooks.frame import FrameSet
from sphkv_codebooks.rotary import rotate

FloatArray = npt.NDArray[np.float64]
Float32Array = npt.NDArray[np.float32]

_MOMENT_TOKENS = 8192
"""Of all fit documents: a second moment of head_dim 128 is settled long before."""
_SINK_FACTOR = 0.7
"""Keys shorter than this share of the median would bend a second moment, and are few."""


@dataclass(frozen=True, eq=False)
class LayerKeys:
    """post_rope, pre_rope: (n_kv_heads, head_dim) means, pre_rope None without frequencies;
    median_norm: (n_kv_heads)."""

    post_rope: Float32Array
    pre_rope: Float32Array | None
    median_norm: Float32Array


def layer_keys(capture: CaptureReader, layer: int, inv_freq: Float32Array | None) -> LayerKeys:
    """Means and median norm of one layer; inv_freq: (head_dim / 2) of the layer, or None.

    Raises:
        SphkvError: no `fit` document, or NaN or Inf among its keys.
    """
    shape = (capture.n_kv_heads, capture.head_dim)
    after, before = torch.zeros(2, *shape, dtype=torch.float64)
    frequencies = None if inv_freq is None else torch.from_numpy(np.array(inv_freq))
    norms: list[Tensor] = []
    for document in documents_of(capture, "fit"):
        for keys, positions in token_chunks(capture, document, layer, "keys"):
            after += keys.sum(dim=0, dtype=torch.float64)
            if frequencies is not None:
                before += rotate(keys, -positions, frequencies).sum(dim=0, dtype=torch.float64)
            norms.append(keys.norm(dim=-1))
    lengths = torch.cat(norms)
    n_tokens = lengths.shape[0]
    return LayerKeys(
        post_rope=(after / n_tokens).numpy().astype(np.float32),
        pre_rope=None if inv_freq is None else (before / n_tokens).numpy().astype(np.float32),
        median_norm=lengths.median(dim=0).values.numpy(),
    )


def residual_mean(capture: CaptureReader, layer: int, frame: FrameSet) -> Float32Array:
    """Mean after RoPE of what a frame's centring leaves of keys, (n_kv_heads, head_dim).

    frame: of this layer alone (its layer 0), without rotation and balancing.
    """
    total = torch.zeros(capture.n_kv_heads, capture.head_dim, dtype=torch.float64)
    n_tokens = 0
    for document in documents_of(capture, "fit"):
        for keys, positions in token_chunks(capture, document, layer, "keys"):
            total += frame.keys_to_frame(0, keys, positions).sum(dim=0, dtype=torch.float64)
            n_tokens += keys.shape[0]
    mean: Float32Array = (total / n_tokens).numpy().astype(np.float32)
    return mean


def centred_key_moment(
    capture: CaptureReader, layer: int, frame: FrameSet, median_norm: Float32Array
) -> FloatArray:
    """E[(k - c_t)(k - c_t)^T] per KV head, (n_kv_heads, head_dim, head_dim), sinks left out.

    frame: of this layer alone (its layer 0), without rotation and balancing; it centres.
    """
    n_kv_heads, head_dim = capture.n_kv_heads, capture.head_dim
    total = torch.zeros(n_kv_heads, head_dim, head_dim, dtype=torch.float64)
    count = torch.zeros(n_kv_heads, dtype=torch.float64)
    threshold = _SINK_FACTOR * torch.from_numpy(median_norm)
    n_seen = 0
    for document in documents_of(capture, "fit"):
        for keys, positions in token_chunks(capture, document, layer, "keys"):
            if n_seen >= _MOMENT_TOKENS:
                break
            n_seen += keys.shape[0]
            kept = keys.norm(dim=-1) >= threshold
            centred = frame.keys_to_frame(0, keys, positions) * kept[..., None]
            by_head = centred.transpose(0, 1)
            total += (by_head.transpose(1, 2) @ by_head).to(torch.float64)
            count += kept.sum(dim=0)
    moment: FloatArray = (total / count.clamp(min=1)[:, None, None]).numpy()
    return moment


def pooled_query_moment(capture: CaptureReader, layer: int) -> FloatArray:
    """E[q q^T], mean over the query heads of each KV head: (n_kv_heads, head_dim, head_dim)."""
    moments = capture.query_second_moment(layer).astype(np.float64)
    shape = (capture.n_kv_heads, capture.group_size, *moments.shape[1:])
    pooled: FloatArray = moments.reshape(shape).mean(axis=1)
    return pooled
