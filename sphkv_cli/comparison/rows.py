"""Sums of layers and seeds to rows; squared errors are averaged, not errors."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sphkv_cli.comparison.candidates import Candidate, KmeansSetting
from sphkv_cli.comparison.measure import CandidateSums, Measured
from sphkv_cli.comparison.result import CompareRow, WorstHead
from sphkv_cli.profile.error_sums import MagnitudeSums

_MEAN_BYTES = 4
_TINY = torch.finfo(torch.float32).tiny


def rows_of(
    candidates: Sequence[Candidate],
    layers: Sequence[int],
    measured: Measured,
    head_dim: int,
    document_tokens: int,
) -> tuple[CompareRow, ...]:
    """One row per setting and centring, by key rate.

    Args:
        layers: their indices; measured: sums of those.
        document_tokens: length of the document whose laid-out rate is stated.
    """
    by_row: dict[tuple[str, str, bool], list[int]] = {}
    for index, candidate in enumerate(candidates):
        by_row.setdefault(candidate.row, []).append(index)
    rows = [
        _row(
            [candidates[i] for i in indices],
            layers,
            [[layer[i] for layer in measured.layers] for i in indices],
            _merged([measured.logits[i] for i in indices]),
            head_dim,
            document_tokens,
        )
        for indices in by_row.values()
    ]
    return tuple(sorted(rows, key=lambda row: (row.key_rate, row.family, row.is_centred)))


def _row(
    seeds: Sequence[Candidate],
    layers: Sequence[int],
    sums: Sequence[Sequence[CandidateSums]],
    logit: MagnitudeSums,
    head_dim: int,
    document_tokens: int,
) -> CompareRow:
    first = seeds[0]
    every = [layer for seed in sums for layer in seed]
    n_vectors = sum(layer.n_vectors for layer in every)
    # (n_seeds, n_layers, n_q_heads) squared relative errors.
    keys = torch.stack([_relative(seed, "key_output") for seed in sums])
    whole = torch.stack([_relative(seed, "whole_output") for seed in sums])
    per_seed = keys.mean(dim=(1, 2)).sqrt()
    per_head = (whole if first.values is not None else keys).mean(dim=0)
    layer, head = np.unravel_index(int(per_head.argmax()), per_head.shape)
    value_rate = (
        float("nan") if first.values is None else first.values.rate(head_dim, document_tokens)
    )
    return CompareRow(
        family=first.family,
        setting=first.setting,
        is_centred=first.is_centred,
        n_seeds=len(seeds),
        key_rate=first.key_rate,
        whole_rate=(first.key_rate + value_rate) / 2,
        laid_out_rate=_laid_out_rate(first, head_dim, document_tokens),
        distortion=sum(s.distortion for s in every) / n_vectors,
        centred_distortion=sum(s.centred_distortion for s in every) / n_vectors,
        value_distortion=sum(s.value_distortion for s in every) / n_vectors,
        logit_rms=float(logit.rms()),
        logit_p99=float(logit.percentile(0.99)),
        attention_kl=sum(s.kl for s in every) / sum(s.n_queries for s in every),
        key_output_error=float(keys.mean().sqrt()),
        whole_output_error=(float("nan") if first.values is None else float(whole.mean().sqrt())),
        worst_head=WorstHead(float(per_head.max().sqrt()), layers[int(layer)], int(head)),
        seed_spread=(float(per_seed.std() / per_seed.mean()) if len(seeds) > 1 else float("nan")),
    )


def _relative(layers: Sequence[CandidateSums], name: str) -> Tensor:
    return torch.stack([getattr(s, name) / s.exact_output.clamp_min(_TINY) for s in layers])


def _merged(parts: Sequence[MagnitudeSums]) -> MagnitudeSums:
    """All seeds together."""
    total = MagnitudeSums(1)
    for part in parts:
        total.count += part.count
        total.sum_sq += part.sum_sq
        total.largest = torch.maximum(total.largest, part.largest)
        total.histogram += part.histogram
    return total


def _laid_out_rate(candidate: Candidate, head_dim: int, n_tokens: int) -> float:
    """Keys of one document: per-token bytes with a dense tail, fitted tables, the mean key."""
    if isinstance(candidate.keys, KmeansSetting):
        rate, table = candidate.key_rate, 4 * candidate.keys.n_directions * head_dim
    else:
        rate, table = candidate.keys.rate(head_dim, n_tokens), candidate.keys.table_bytes
    mean = _MEAN_BYTES * head_dim if candidate.is_centred else 0
    return rate + 8 * (table + mean) / (n_tokens * head_dim)
