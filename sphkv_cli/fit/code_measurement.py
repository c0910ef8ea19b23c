"""What coding does to real keys and values, and to the logits of real queries.

With k the key as attention reads it, k' = S (k - mu) the key in the frame, k'hat its code and
e = k' - k'hat:

    distortion          mean of ||e||^2 / ||k'||^2        what the closed form predicts
    raw distortion      mean of ||e||^2 / ||k||^2         against the key itself
    relative logit error            rms(q.e) / rms(q.k)
    centred relative logit error    rms(q.e) / rms(q.(k - mu))
    isotropic relative logit error  rms(q.e) / rms(||q|| ||k'|| / sqrt(d)),  sqrt(D) if isotropic

over the pairs (query, key) that attention sees: causal, and inside the window of the layer.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sphkv_cli.fit.captured_vectors import LayerChunk
from sphkv_codebooks.frame import FrameSet
from sphkv_codebooks.spherical_code import SphericalCode

FloatArray = npt.NDArray[np.float64]

CodeOfHead = Sequence[SphericalCode]
"""One candidate as each KV head codes it: the same object for all, or empirical books per head."""

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class LayerMeasurement:
    """Sums over tokens or pairs of one layer; per candidate code and KV head.

    key_distortion, raw_key_distortion, value_distortion: (n_codes, n_kv_heads), means over tokens.
    logit_error: (n_codes, n_kv_heads), sum over pairs of (softmax_scale q.e)^2.
    logit, centred_logit, isotropic_logit: (n_kv_heads,), the same sums of what it is relative to.
    kept_key_energy: (n_kv_heads,), the squared norms of keys in the frame over those of the keys.
    n_pairs: per KV head.
    """

    key_distortion: FloatArray
    raw_key_distortion: FloatArray
    value_distortion: FloatArray
    logit_error: FloatArray
    logit: FloatArray
    centred_logit: FloatArray
    isotropic_logit: FloatArray
    kept_key_energy: FloatArray
    n_pairs: int


def measure_layer(
    chunks: Iterable[LayerChunk],
    frames: FrameSet,
    layer: int,
    key_codes: Sequence[CodeOfHead],
    value_codes: Sequence[CodeOfHead],
    *,
    softmax_scale: float,
    window: int,
) -> LayerMeasurement:
    """Code the keys and values of one layer with every candidate.

    Args:
        chunks: the layer of every document, as captured.
        frames: where the codes live.
        layer: index of the layer in `frames`.
        key_codes, value_codes: candidates, each with one code per KV head.
        softmax_scale: of this layer.
        window: keys that a query sees, itself included; 0 for all.
    """
    n_heads = len(key_codes[0])
    n_codes = len(key_codes)
    key = torch.zeros(n_codes, n_heads, dtype=torch.float64)
    raw_key, value, logit_error = key.clone(), key.clone(), key.clone()
    logit, centred_logit, isotropic_logit = torch.zeros(3, n_heads, dtype=torch.float64)
    energy, raw_energy = torch.zeros(2, n_heads, dtype=torch.float64)
    n_tokens = n_pairs = 0
    for chunk in chunks:
        keys = frames.keys_to_frame(layer, chunk.keys, chunk.positions)
        values = frames.values_to_frame(chunk.values)
        key_norm2, raw_norm2, value_norm2 = (
            x.square().sum(dim=-1).clamp_min(_TINY) for x in (keys, chunk.keys, values)
        )
        energy += key_norm2.to(torch.float64).sum(dim=0)
        raw_energy += raw_norm2.to(torch.float64).sum(dim=0)
        errors = torch.stack([keys - _coded(keys, codes) for codes in key_codes])
        for index in range(n_codes):
            error2 = errors[index].square().sum(dim=-1)
            key[index] += (error2 / key_norm2).to(torch.float64).sum(dim=0)
            raw_key[index] += (error2 / raw_norm2).to(torch.float64).sum(dim=0)
            error2 = (values - _coded(values, value_codes[index])).square().sum(dim=-1)
            value[index] += (error2 / value_norm2).to(torch.float64).sum(dim=0)
        queries = _by_kv_head(chunk.queries, n_heads)
        frame_queries = _by_kv_head(frames.queries_to_frame(layer, chunk.queries), n_heads)
        sees = _visible(chunk.query_positions, chunk.first_token, keys.shape[0], window)
        # Rows of `_by_kv_head` run over (query, head of the group).
        sees = sees.repeat_interleave(queries.shape[1] // sees.shape[0], dim=0)
        logit += _pair_energy(queries, chunk.keys, sees)
        centred_logit += _pair_energy(frame_queries, keys, sees)
        isotropic_logit += _product_of_norms(frame_queries, keys, sees)
        for index in range(n_codes):
            logit_error[index] += _pair_energy(frame_queries, errors[index], sees)
        n_tokens += keys.shape[0]
        n_pairs += int(sees.sum())
    scale2 = softmax_scale**2
    return LayerMeasurement(
        key_distortion=(key / n_tokens).numpy(),
        raw_key_distortion=(raw_key / n_tokens).numpy(),
        value_distortion=(value / n_tokens).numpy(),
        logit_error=(scale2 * logit_error).numpy(),
        logit=(scale2 * logit).numpy(),
        centred_logit=(scale2 * centred_logit).numpy(),
        isotropic_logit=(scale2 * isotropic_logit).numpy(),
        kept_key_energy=(energy / raw_energy).numpy(),
        n_pairs=n_pairs,
    )


def _coded(vectors: Tensor, codes: CodeOfHead) -> Tensor:
    """Encode and decode (n_tokens, n_kv_heads, head_dim), each head with its own code."""
    if all(code is codes[0] for code in codes):
        return codes[0].decode(codes[0].encode(vectors)).to(vectors.dtype)
    heads = [
        code.decode(code.encode(vectors[:, head])).to(vectors.dtype)
        for head, code in enumerate(codes)
    ]
    return torch.stack(heads, dim=1)


def _by_kv_head(queries: Tensor, n_kv_heads: int) -> Tensor:
    """(n_queries, n_q_heads, head_dim) -> (n_kv_heads, n_queries * group_size, head_dim)."""
    n_queries, n_q_heads, head_dim = queries.shape
    grouped = queries.reshape(n_queries, n_kv_heads, n_q_heads // n_kv_heads, head_dim)
    return grouped.transpose(0, 1).reshape(n_kv_heads, -1, head_dim)


def _visible(query_positions: Tensor, first: int, n_keys: int, window: int) -> Tensor:
    """Whether a query sees a key; (n_queries, n_keys) float32 of 0 and 1, keys from `first` on."""
    distance = query_positions[:, None] - torch.arange(first, first + n_keys)[None, :]
    sees = distance >= 0
    if window:
        sees &= distance < window
    return sees.to(torch.float32)


def _pair_energy(queries: Tensor, vectors: Tensor, sees: Tensor) -> Tensor:
    """Sum of (q.x)^2 over the pairs seen, per KV head, float64.

    queries (n_kv_heads, n_rows, head_dim), vectors (n_tokens, n_kv_heads, head_dim).
    """
    dots = torch.bmm(queries, vectors.permute(1, 2, 0)).mul_(sees)
    # float32 sums along one axis, float64 over the rest.
    energy: Tensor = torch.linalg.vector_norm(dots, dim=2).to(torch.float64).square().sum(dim=1)
    return energy


def _product_of_norms(queries: Tensor, vectors: Tensor, sees: Tensor) -> Tensor:
    """Sum of ||q||^2 ||x||^2 / head_dim over the pairs seen, per KV head, float64."""
    query_norm2 = queries.square().sum(dim=-1)
    norm2 = vectors.square().sum(dim=-1)
    total = torch.einsum("hr,rt,th->h", query_norm2, sees, norm2)
    return total.to(torch.float64) / queries.shape[-1]
