"""Who decodes: the float64 reference anywhere, or the CUDA kernel where there is a GPU.

Both have one signature and read the same pages.  Either is compared with the float64 decode of
the same codes (`ComputationErrors`), never with dense keys: that is the codes' error, not theirs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from sphkv_cli.errors import EnvironmentUnable, SphkvError
from sphkv_cli.profile.layer_inputs import LayerInputs
from sphkv_cli.profile.options import Backend
from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.block_words import decoded_layout_of
from sphkv_kernels.cache import PagedCache
from sphkv_kernels.cache_reader import logits_by_token
from sphkv_kernels.reference import DecodeResult, ada_logits_reference, decode_from_logits
from sphkv_kernels.tier import PageError, TierFormat

RECURSION_QUERIES = 8
"""Queries per document and layer on which the reference's recursion is run: it is slow, and every
query goes through the same codes."""


@dataclass(frozen=True)
class Decoded:
    """What a decoder made of some queries.  logits ``(n_queries, n_kv_heads, group_size,
    n_context)`` (NaN where dropped), log_sum_exp ``(n_queries, n_q_heads)``, output ``(n_queries,
    n_q_heads, head_dim)``; `rows`: which queries of the inputs."""

    rows: Tensor
    logits: Tensor
    log_sum_exp: Tensor
    output: Tensor


class Decoder(Protocol):
    """Runs decode steps over a cache of one sequence, one step per query."""

    name: Literal["reference", "cuda"]

    @property
    def device(self) -> str:
        """What it ran on, for people."""

    def decode(self, cache: PagedCache, inputs: LayerInputs) -> Decoded:
        """Decode the inputs' queries (all, or a sample of them) over the cache."""


class ReferenceDecoder:
    """Float64 angle-domain recursion on a sample of the queries."""

    name: Literal["reference", "cuda"] = "reference"
    device = "none"

    def decode(self, cache: PagedCache, inputs: LayerInputs) -> Decoded:
        """Decode at most RECURSION_QUERIES queries, evenly spaced."""
        n_queries = inputs.queries.shape[0]
        rows = torch.arange(0, n_queries, -(-n_queries // RECURSION_QUERIES))
        shared = cache.select_sequences([0] * rows.numel())
        query, offset = inputs.queries[rows], inputs.logit_offset[rows]
        positions = inputs.positions[rows]
        term = inputs.position_term
        logits = ada_logits_reference(
            query,
            shared,
            logit_offset=offset,
            window=inputs.window,
            query_positions=positions,
            position_term=None if term is None else term.select(rows),
        )
        result = decode_from_logits(
            logits, shared, inputs.softmax_scale, logit_softcap=inputs.logit_softcap
        )
        return _decoded(rows, logits.pages, result, shared, inputs)


class CudaDecoder:
    """The CUDA kernel, on every query."""

    name: Literal["reference", "cuda"] = "cuda"

    @property
    def device(self) -> str:
        """Name of the GPU."""
        return torch.cuda.get_device_name()

    def decode(self, cache: PagedCache, inputs: LayerInputs) -> Decoded:
        """Decode every query of the inputs.

        Raises:
            SphkvError: the kernel refuses the cache.
        """
        from sphkv_kernels.decode import ada_decode, ada_logits, plan

        rows = torch.arange(inputs.queries.shape[0])
        shared = cache.select_sequences([0] * rows.numel())
        on_gpu = shared.to("cuda")
        query = inputs.queries.to("cuda", torch.float32).contiguous()
        offset = inputs.logit_offset.to("cuda", torch.float32).contiguous()
        positions = inputs.positions.to("cuda", torch.int32).contiguous()
        term = None if inputs.position_term is None else inputs.position_term.to("cuda")
        try:
            steps = plan(on_gpu, inputs.group_size)
            logits = ada_logits(
                query,
                on_gpu,
                logit_offset=offset,
                window=inputs.window,
                query_positions=positions,
                position_term=term,
                plan=steps,
            )
            result = ada_decode(
                query,
                on_gpu,
                inputs.softmax_scale,
                logit_offset=offset,
                logit_softcap=inputs.logit_softcap,
                window=inputs.window,
                query_positions=positions,
                position_term=term,
                plan=steps,
            )
        except PageError as error:
            raise SphkvError(
                f"the CUDA kernel refuses layer {inputs.layer}: {error}",
                "use --backend reference",
            ) from error
        moved = DecodeResult(result.output.cpu(), result.log_sum_exp.cpu())
        return _decoded(rows, logits.pages.cpu(), moved, shared, inputs)


def choose_decoder(backend: Backend, tiers: Sequence[TierFormat]) -> tuple[Decoder, str]:
    """The decoder of a backend, and a sentence where "auto" had a reason not to take the GPU.

    Raises:
        EnvironmentUnable: "cuda" without a GPU.
        SphkvError: "cuda" with a code that the kernel does not read.
    """
    if backend == "reference":
        return ReferenceDecoder(), ""
    if not torch.cuda.is_available():
        if backend == "cuda":
            raise EnvironmentUnable(
                "--backend cuda needs a CUDA GPU and torch sees none",
                "run it where there is one, or use --backend reference for accuracy alone",
            )
        return ReferenceDecoder(), "No GPU here: accuracy only, no speed."
    foreign = _foreign_codes(tiers)
    if not foreign:
        return CudaDecoder(), ""
    names = ", ".join(foreign)
    if backend == "cuda":
        raise SphkvError(
            f"the CUDA kernel does not read the codes {names}",
            "allocate without them (--tier), or use --backend reference",
        )
    return ReferenceDecoder(), f"The CUDA kernel does not read {names}: accuracy only, no speed."


def _foreign_codes(tiers: Sequence[TierFormat]) -> list[str]:
    """Names of the spherical codes without a layout that the kernel reads."""
    formats = [kind for tier in tiers for kind in (tier.key_format, tier.value_format)]
    codes = {kind.name: kind for kind in formats if isinstance(kind, SphericalCode)}
    return [name for name, code in codes.items() if decoded_layout_of(code) is None]


def _decoded(
    rows: Tensor, pages: Tensor, result: DecodeResult, cache: PagedCache, inputs: LayerInputs
) -> Decoded:
    logits = logits_by_token(pages.to(torch.float64), cache, inputs.n_context)
    return Decoded(
        rows, logits, result.log_sum_exp.to(torch.float64), result.output.to(torch.float64)
    )
