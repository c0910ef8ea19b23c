"""Grouped spherical k-means: the tiers of the Spherical KV authors' public code.

    x = (x_1 .. x_G), G = d/g groups of consecutive coordinates;  r_j = ||x_j||
    code_j = argmax_i <x_j, c_ji>  over K unit directions fitted per (layer, KV head, group),
    xhat_j = rhat_j c_j[code_j],  rhat = s round(127 r / s) / 127,  s = max r over 128 tokens

    bits per key = G (8 + log2 K): (g, K) = (16, 64), (16, 16), (32, 8): 112, 96, 44 at d = 128

Keys alone; values stay dense. `rate` adds what its pages of 128 tokens store besides: 8 bytes of
header and one fp32 scale per group. The directions themselves are `table_bytes` (fp32).
Spherical k-means: Dhillon and Modha 2001 (assign by the largest cosine, c = the normalised sum),
here in full batches where the public code fits minibatches.
Source: Spherical KV, arXiv 2605.18856, appendix B.1, and its public code, for facts alone. The rule
for the scale s is not in it; the page's largest radius is the smallest scale that clips nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from sphkv_codebooks.comparators.interface import (
    Role,
    VectorQuantizer,
    check_sizes,
    check_vectors,
    divide_or_zero,
)
from sphkv_codebooks.comparators.token_groups import cut_axis
from sphkv_codebooks.errors import CodeError

SPHERICAL_KV_TIERS: tuple[tuple[int, int], ...] = ((16, 64), (16, 16), (32, 8))
"""(group_size, n_directions) of the tiers high, mid, low."""

RADIUS_BITS = 8
HEADER_BITS = 64
SCALE_BITS = 32
_LARGEST_CODE = 127


@dataclass(frozen=True, eq=False)
class GroupedSphericalKmeans(VectorQuantizer):
    """directions: (n_groups, n_directions, group_size), unit, float32, of one (layer, KV head)."""

    directions: npt.NDArray[np.float32]
    page_size: int = 128

    def __post_init__(self) -> None:
        directions = np.array(self.directions, dtype=np.float32)
        if directions.ndim != 3 or 0 in directions.shape or not np.isfinite(directions).all():
            raise CodeError(
                "directions are finite and (n_groups, n_directions, group_size), "
                f"got shape {directions.shape}"
            )
        if np.abs(np.linalg.norm(directions, axis=-1) - 1).max() > 1e-5:
            raise CodeError("directions must have unit length; normalise them")
        if self.page_size < 1:
            raise CodeError(f"a page holds 1 token or more, got {self.page_size}")
        directions.setflags(write=False)
        object.__setattr__(self, "directions", directions)

    @property
    def n_groups(self) -> int:
        return int(self.directions.shape[0])

    @property
    def n_directions(self) -> int:
        return int(self.directions.shape[1])

    @property
    def group_size(self) -> int:
        return int(self.directions.shape[2])

    @property
    def head_dim(self) -> int:
        return self.n_groups * self.group_size

    @property
    def name(self) -> str:
        return f"spherical k-means g{self.group_size} K{self.n_directions}"

    @property
    def source(self) -> str:
        return "Spherical KV, arXiv 2605.18856, appendix B.1 and public code"

    @property
    def roles(self) -> frozenset[Role]:
        return frozenset({"keys"})

    @property
    def token_group(self) -> int:
        return self.page_size

    @property
    def table_bytes(self) -> int:
        return self.directions.nbytes

    @property
    def bits_per_key(self) -> int:
        """Codes and radii of one key, without its share of the page's header and scales."""
        return self.n_groups * (RADIUS_BITS + math.ceil(math.log2(self.n_directions)))

    def rate(self, head_dim: int, n_tokens: int) -> float:
        check_sizes(head_dim, n_tokens, self.head_dim)
        n_pages = math.ceil(n_tokens / self.page_size)
        page_bits = HEADER_BITS + SCALE_BITS * self.n_groups
        return (self.bits_per_key * n_tokens + page_bits * n_pages) / (n_tokens * head_dim)

    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        check_vectors(x, self.head_dim)
        groups = cut_axis(x, -1, self.group_size)
        table = torch.tensor(self.directions, device=x.device, dtype=x.dtype)
        cosines = torch.einsum("...gi,gki->...gk", groups, table)
        codes = cosines.argmax(-1)
        chosen = table[torch.arange(self.n_groups, device=x.device), codes]
        radius = self._stored_radius(torch.linalg.vector_norm(groups, dim=-1))
        return (radius.unsqueeze(-1) * chosen).flatten(-2, -1)

    def _stored_radius(self, radius: torch.Tensor) -> torch.Tensor:
        """radius: (..., n_tokens, n_groups), as it comes back from int8 with its page's scale."""
        decoded = []
        for start in range(0, radius.shape[-2], self.page_size):
            page = radius[..., start : start + self.page_size, :]
            scale = page.amax(-2, keepdim=True)
            codes = divide_or_zero(page * _LARGEST_CODE, scale.expand_as(page)).round()
            decoded.append(scale * codes / _LARGEST_CODE)
        return torch.cat(decoded, dim=-2) if decoded else radius


def fit_spherical_kmeans(
    keys: torch.Tensor,
    group_size: int,
    n_directions: int,
    generator: torch.Generator,
    n_rounds: int = 30,
) -> GroupedSphericalKmeans:
    """Directions fitted on calibration keys (n_tokens, head_dim) of one (layer, KV head).

    Starts from distinct random keys; a direction that no key chooses takes the key served worst.
    Stops after n_rounds or when no key changes its direction.
    """
    check_vectors(keys)
    if keys.ndim != 2 or keys.shape[-1] % group_size:
        raise CodeError(
            f"calibration keys are (n_tokens, head_dim), groups of {group_size} dividing head_dim; "
            f"got shape {tuple(keys.shape)}"
        )
    if n_rounds < 1:
        raise CodeError(f"spherical k-means needs 1 round or more, got {n_rounds}")
    groups = cut_axis(keys, -1, group_size).unbind(-2)
    fitted = [_fit_group(group, n_directions, generator, n_rounds) for group in groups]
    directions = torch.stack(fitted).to("cpu", torch.float64).numpy()
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    return GroupedSphericalKmeans(directions.astype(np.float32))


def _fit_group(
    vectors: torch.Tensor, n_directions: int, generator: torch.Generator, n_rounds: int
) -> torch.Tensor:
    """(n_directions, group_size) unit directions of one group's vectors (n_tokens, group_size)."""
    norm = torch.linalg.vector_norm(vectors, dim=-1)
    unit = vectors[norm > 0] / norm[norm > 0].unsqueeze(-1)
    if unit.shape[0] < n_directions:
        raise CodeError(
            f"{n_directions} directions need as many non-zero calibration keys, got {unit.shape[0]}"
        )
    order = torch.randperm(unit.shape[0], generator=generator, device=generator.device)
    directions: torch.Tensor = unit[order[:n_directions].to(unit.device)].clone()
    chosen = torch.full((unit.shape[0],), -1, device=unit.device)
    for _ in range(n_rounds):
        best, following = _most_similar(unit, directions)
        if torch.equal(following, chosen):
            break
        chosen = following
        sums = torch.zeros_like(directions).index_add_(0, chosen, unit)
        length = torch.linalg.vector_norm(sums, dim=-1, keepdim=True)
        directions = torch.where(length > 0, sums / length.clamp_min(1e-30), directions)
        empty = (torch.bincount(chosen, minlength=n_directions) == 0).nonzero().flatten()
        if empty.numel():
            worst = best.topk(empty.numel(), largest=False).indices
            directions[empty] = unit[worst]
    return directions


def _most_similar(
    unit: torch.Tensor, directions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest cosine of each vector (n_vectors,) and which direction has it."""
    cosines = (unit @ directions.T).detach()
    if cosines.device.type == "cpu":
        # numpy's argmax of the last axis is three times as fast as torch's.
        chosen = torch.from_numpy(cosines.numpy().argmax(axis=-1))
    else:
        chosen = cosines.argmax(dim=-1)
    return cosines.gather(1, chosen[:, None])[:, 0], chosen
