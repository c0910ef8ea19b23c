"""Measure every candidate in one layer over all judge documents."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sphkv_cli.artifacts.allocation import AllocationReader
from sphkv_cli.artifacts.capture import CaptureReader
from sphkv_cli.profile.candidate_errors import CandidateErrors, ExactHead
from sphkv_cli.profile.candidates import Candidate, DocumentPlans, lay_out, placement
from sphkv_cli.profile.computation import ComputationSums
from sphkv_cli.profile.decoders import Decoded, Decoder
from sphkv_cli.profile.format_errors import CodedTier, code_tiers
from sphkv_cli.profile.laid_out import LaidOutTerms, cache_terms, uniform_terms
from sphkv_cli.profile.layer_inputs import LayerInputs, read_layer
from sphkv_kernels.cache_reader import read_tokens


@dataclass(frozen=True)
class LayerMeasurement:
    """errors, computations: per candidate; computations None where no decoder ran.  terms:
    per candidate and document."""

    errors: tuple[CandidateErrors, ...]
    computations: tuple[ComputationSums | None, ...]
    terms: tuple[tuple[LaidOutTerms, ...], ...]


@dataclass(frozen=True)
class _Coded:
    """A candidate's context: keys, values ``(n_context, n_kv_heads, head_dim)``, kept
    ``(n_context, n_kv_heads)``, and of every key predicted and made ||e||^2 and the bound."""

    keys: Tensor
    values: Tensor
    kept: Tensor
    predicted_sq: Tensor
    made_sq: Tensor
    bound: Tensor
    decoded: Decoded | None
    terms: LaidOutTerms


def measure_layer(
    capture: CaptureReader,
    allocation: AllocationReader,
    candidates: tuple[Candidate, ...],
    documents: tuple[DocumentPlans, ...],
    rows: tuple[Tensor, ...],
    layer: int,
    decoder: Decoder,
) -> LayerMeasurement:
    """Every candidate on every document; `rows`: captured queries to use, per document.

    Raises:
        SphkvError: NaN or Inf in the capture, or a vector that a tier cannot encode.
    """
    errors = tuple(CandidateErrors(capture.n_q_heads) for _ in candidates)
    runs_decoder = [decoder.name == "cuda" or c.kind == "plan" for c in candidates]
    computations = tuple(ComputationSums(capture.n_q_heads) if r else None for r in runs_decoder)
    terms: list[list[LaidOutTerms]] = [[] for _ in candidates]
    for document, document_rows in zip(documents, rows, strict=True):
        inputs = read_layer(capture, document.info, layer, document_rows, allocation.frames)
        tiers = code_tiers(allocation.tiers, inputs.code_keys, inputs.code_values, layer)
        coded = [
            _code(candidate, document, inputs, tiers, allocation, decoder if runs else None)
            for candidate, runs in zip(candidates, runs_decoder, strict=True)
        ]
        for index, context in enumerate(coded):
            terms[index].append(context.terms)
        for kv_head in range(inputs.n_kv_heads):
            exact = ExactHead.of(inputs, kv_head)
            for context, sums, computation in zip(coded, errors, computations, strict=True):
                attention = sums.add(
                    inputs,
                    kv_head,
                    exact,
                    context.keys[:, kv_head],
                    context.values[:, kv_head],
                    context.kept[:, kv_head],
                    (
                        context.predicted_sq[:, kv_head],
                        context.made_sq[:, kv_head],
                        context.bound[:, kv_head],
                    ),
                )
                if computation is not None and context.decoded is not None:
                    computation.add(inputs, kv_head, context.decoded, attention)
    return LayerMeasurement(errors, computations, tuple(tuple(row) for row in terms))


def _code(
    candidate: Candidate,
    document: DocumentPlans,
    inputs: LayerInputs,
    tiers: tuple[CodedTier, ...],
    allocation: AllocationReader,
    decoder: Decoder | None,
) -> _Coded:
    stores_positions = inputs.window > 0 or inputs.position_term is not None
    if candidate.tier is not None and decoder is None:
        return _uniform(
            tiers[candidate.tier],
            None,
            uniform_terms(
                allocation.tiers,
                candidate.tier,
                head_dim=inputs.keys.shape[-1],
                page_size=allocation.page_size,
                n_kv_heads=inputs.n_kv_heads,
                n_context=inputs.n_context,
                stores_positions=stores_positions,
            ),
        )
    tier, page = placement(candidate, document, inputs.layer, allocation.page_size)
    cache = lay_out(allocation.tiers, allocation.page_size, inputs, tier, page)
    terms = cache_terms(cache, stores_positions=stores_positions)
    decoded = None if decoder is None else decoder.decode(cache, inputs)
    if candidate.tier is not None:
        return _uniform(tiers[candidate.tier], decoded, terms)
    tokens = read_tokens(cache, 0, inputs.n_context)
    index = tier.to(torch.int64).clamp(min=0)

    def chosen(name: str) -> Tensor:
        every = torch.stack([getattr(coded.keys, name) for coded in tiers])
        return every.gather(0, index[None])[0]

    return _Coded(
        tokens.keys,
        tokens.values,
        tokens.kept,
        chosen("predicted_sq"),
        chosen("made_sq"),
        chosen("bound"),
        decoded,
        terms,
    )


def _uniform(tier: CodedTier, decoded: Decoded | None, terms: LaidOutTerms) -> _Coded:
    keys = tier.keys
    kept = torch.ones_like(keys.made_sq, dtype=torch.bool)
    return _Coded(
        keys.decoded,
        tier.values.decoded,
        kept,
        keys.predicted_sq,
        keys.made_sq,
        keys.bound,
        decoded,
        terms,
    )
