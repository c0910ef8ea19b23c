"""What is measured: the plan, its frozen policy, and each tier for every token.

Plans go through real pages: tokens are encoded and packed as the plan says, and read back from the
bytes.  A uniform tier needs pages only where a decoder runs on it.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sphkv_cli.artifacts.allocation import AllocationReader, PlanInfo
from sphkv_cli.errors import ArtifactError, SphkvError, UsageError
from sphkv_cli.profile.layer_inputs import LayerInputs
from sphkv_codebooks.errors import CodeError
from sphkv_kernels.cache import PagedCache
from sphkv_kernels.cache_builder import build_cache
from sphkv_kernels.page_slots import SequenceTokens
from sphkv_kernels.tier import PageError, TierFormat

Kind = Literal["plan", "policy", "uniform"]


@dataclass(frozen=True)
class Candidate:
    """One way to store a context; tier: index into the allocation's tiers, for a uniform one."""

    name: str
    kind: Kind
    tier: int | None = None


@dataclass(frozen=True)
class DocumentPlans:
    """The placements of one document, ``(n_layers, n_kv_heads, n_context)`` each; tiers -1 =
    dropped."""

    info: PlanInfo
    tiers: dict[Kind, NDArray[np.int8]]
    pages: NDArray[np.int32]


def list_candidates(tiers: tuple[TierFormat, ...], names: tuple[str, ...]) -> tuple[Candidate, ...]:
    """The plan first, then the policy, then the named tiers (all if none is named).

    Raises:
        UsageError: a name that the allocation does not have.
    """
    known = [tier.name for tier in tiers]
    for name in names:
        if name not in known:
            raise UsageError(
                f"the allocation has no tier {name!r}", f"choose among {', '.join(known)}"
            )
    uniform = tuple(
        Candidate(name, "uniform", index)
        for index, name in enumerate(known)
        if not names or name in names
    )
    return (Candidate("plan", "plan"), Candidate("policy", "policy"), *uniform)


def read_plans(allocation: AllocationReader) -> tuple[DocumentPlans, ...]:
    """The plans of the judge documents.

    Raises:
        ArtifactError: there are none, or a plan names a tier that the allocation does not have.
    """
    infos = allocation.documents_of("judge")
    if not infos:
        raise ArtifactError(
            f"{allocation.path} plans no judge document", "make it again with `sphkv allocate`"
        )
    found = []
    for info in infos:
        tiers: dict[Kind, NDArray[np.int8]] = {
            "plan": allocation.tier_of_token(info),
            "policy": allocation.policy_tier_of_token(info),
        }
        for tier_of_token in tiers.values():
            if tier_of_token.min() < -1 or tier_of_token.max() >= len(allocation.tiers):
                raise ArtifactError(
                    f"{allocation.path} is damaged (a tier of document {info.name!r} is not one "
                    f"of its {len(allocation.tiers)})",
                    "make it again with `sphkv allocate`",
                )
        found.append(DocumentPlans(info, tiers, allocation.page_of_token(info)))
    return tuple(found)


def placement(
    candidate: Candidate, plans: DocumentPlans, layer: int, page_size: int
) -> tuple[Tensor, Tensor]:
    """Tier and page of every token of one layer, ``(n_context, n_kv_heads)`` each."""
    pages = torch.from_numpy(plans.pages[layer].T.astype(np.int32))
    if candidate.tier is None:
        return torch.from_numpy(plans.tiers[candidate.kind][layer].T.astype(np.int8)), pages
    tiers = torch.full(pages.shape, candidate.tier, dtype=torch.int8)
    in_order = torch.arange(pages.shape[0], dtype=torch.int32) // page_size
    return tiers, in_order[:, None].expand_as(pages)


def lay_out(
    tiers: tuple[TierFormat, ...], page_size: int, inputs: LayerInputs, tier: Tensor, page: Tensor
) -> PagedCache:
    """Encode and pack one layer's context; with positions, so that it can be read back.

    Raises:
        SphkvError: a page that cannot be, or a vector that a tier cannot encode.
    """
    tokens = SequenceTokens(
        inputs.code_keys,
        inputs.code_values,
        tier,
        page,
        torch.arange(inputs.n_context, dtype=torch.int32),
    )
    try:
        return build_cache(
            tiers,
            page_size,
            [tokens],
            position_dtype=torch.uint16 if inputs.n_context <= 1 << 16 else torch.int32,
        )
    except (PageError, CodeError) as error:
        raise SphkvError(
            f"layer {inputs.layer} cannot be laid out: {error}",
            "make the allocation again with `sphkv allocate`",
        ) from error
