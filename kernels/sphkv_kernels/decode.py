"""Angle-Domain Attention (ADA) over a paged cache on the GPU: the checked launcher.

    s_t = softcap(softmax_scale (q . khat_t + offset + position term_t))
    output = sum_t softmax(s)_t vhat_t

Same signature and results as `sphkv_kernels.reference` (float64); the device code is in `cuda/`.
One launch serves all tiers of the cache, every sequence and KV head, and merges its own parts.
Dense keys and values exist in registers only, 16 coordinates at a time: shared memory holds tables
and sums of outputs, global memory codes and partial outputs (LAYOUT.md, NOTES.md). Source: ours;
ADA after Spherical KV (arXiv 2605.18856).
"""

from __future__ import annotations

import itertools
import math
import weakref
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sphkv_kernels.cache import PagedCache
from sphkv_kernels.decode_arguments import (
    check_position_term,
    check_scale,
    check_window,
    group_size_of,
)
from sphkv_kernels.kernel_structs import KernelParams
from sphkv_kernels.launch import LoadedKernel, capability_of, load_kernel, tables_fit
from sphkv_kernels.launch_arguments import FLOAT_TYPES, require
from sphkv_kernels.page_positions import PagePositions
from sphkv_kernels.plan import DecodePlan, make_plan
from sphkv_kernels.position_term import PositionTerm
from sphkv_kernels.reference import DecodeResult, LogitResult
from sphkv_kernels.score_form import ScoreForm, table_heads
from sphkv_kernels.tier import PageError, TierFormat
from sphkv_kernels.tier_dispatch import require_readable
from sphkv_kernels.variant import Variant, output_fragments

MAX_GROUP = 16
_LOG2_E = math.log2(math.e)


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """What decode steps over one cache share: the cut of the work, kernels and scratch memory.

    Made by `plan`. It stays valid while the page table, the tiers and the positions stay as they
    are: contents of the pool and the tail (tail_tokens included) may change between steps, and so
    may, in place, a record's live tokens (0 to page_size) and its page's first position, which is
    how a growing cache brings slots to life. Steps that share a plan must not run at the same time
    (they share scratch memory). A CUDA graph that holds a step reads plan and cache at every
    replay: both must outlive it. table_heads: heads of the query tables that score the keys, 0
    where fragments do (`score_form`; so does a mode whose position term leaves no room for tables,
    with "auto").
    """

    cache: PagedCache
    group_size: int
    work: DecodePlan
    n_warps: int
    score_form: ScoreForm
    table_heads: int
    partial_output: Tensor
    partial_state: Tensor
    arrivals: Tensor
    handle: int
    kernels: dict[tuple[bool, bool, bool, int, int, bool], LoadedKernel] = field(
        default_factory=dict
    )

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What the plan holds beside its cache."""
        work = self.work
        positions = () if work.positions is None else work.positions.tensors
        return (
            work.records, work.entries, work.heads, work.segments, *positions,
            self.partial_output, self.partial_state, self.arrivals,
        )  # fmt: skip

    @property
    def position_bytes(self) -> int:
        """Bytes that tell a position term where the tokens are."""
        return 0 if self.work.positions is None else self.work.positions.n_bytes

    def for_twin(self, cache: PagedCache) -> AttentionPlan:
        """The plan of another cache with the very same page table (another layer, laid out alike;
        its tokens may have other positions).

        Both share the cut of the work, the kernels and scratch memory, so their steps must not
        overlap.

        Raises:
            PageError: another format of pages, for which other kernels are built, or other places
                of pages.
        """
        mine, other = _format(self.cache), _format(cache)
        if mine != other:
            raise PageError(f"a twin's pages are {other}, the plan is for {mine}")
        if not self.cache.page_table.equals(cache.page_table):
            raise PageError("a twin's pages lie in other places than those that the plan is for")
        cache.require_aligned()
        work = replace(self.work, positions=PagePositions.of(cache, self.work.entries))
        twin = replace(self, cache=cache, work=work, handle=next(_handles))
        _plans[twin.handle] = twin
        return twin

    def kernel(
        self, *, logits: bool, window: bool, softcap: bool, n_position_pairs: int = 0
    ) -> LoadedKernel:
        """The kernel of one mode, compiled at its first use.

        Raises:
            PageError: its tables do not fit into the device's shared memory.
            KernelBuildError, KernelLaunchError: as `ada_decode`.
        """
        groups = -(-n_position_pairs // 4)
        # Few distinct kernels: groups rounded up to a power of two (a group of zeros adds zero).
        groups = 1 << (groups - 1).bit_length() if groups else 0
        positions = self.work.positions if groups else None
        offset_bytes = positions.offset_bytes if positions else 0
        near = positions.near if positions else True
        mode = (logits, window, softcap, groups, offset_bytes, near)
        if mode not in self.kernels:
            plain = _plain_variant(
                self.cache, self.work, self.group_size, self.n_warps, self.table_heads
            )
            variant = replace(
                plain,
                logits=logits,
                window=window,
                softcap=softcap,
                position_groups=groups,
                position_bytes=_position_bytes(self.cache) if window else 4,
                offset_bytes=offset_bytes,
                near_offsets=near,
            )
            if self.score_form == "auto" and not tables_fit(variant, self.cache.device):
                variant = replace(variant, table_heads=0)
            self.kernels[mode] = load_kernel(variant, self.cache.device)
        return self.kernels[mode]


_plans: weakref.WeakValueDictionary[int, AttentionPlan] = weakref.WeakValueDictionary()
_handles = itertools.count()


def plan(
    cache: PagedCache,
    group_size: int,
    *,
    n_blocks: int | None = None,
    n_warps: int | None = None,
    score_form: ScoreForm = "auto",
    check: bool = True,
) -> AttentionPlan:
    """Prepare decode steps over `cache` with `group_size` query heads per KV head.

    n_blocks: blocks of the grid, by default one per multiprocessor; n_warps: warps per block.
    score_form: how keys meet the query: "fragment" in matrix products, "table" by lookups into
    tables made from it (groups of 1 and 2), "auto" whichever measured faster (`score_form`).
    check: read the page table back and refuse entries that cannot be right (offsets outside the
    pool, unknown tiers, too many tokens, negative positions).

    Raises:
        PageError: the cache is not on a CUDA device, or on one that the kernel is not built for, or
            holds a code, head_dim or group that it does not have; an entry that cannot be right; a
            score_form "table" whose tables the codes do not have or shared memory does not hold.
    """
    if cache.device.type != "cuda":
        raise PageError(
            f"the cache lies on {cache.device}: the CUDA kernel needs it on a GPU; move it with "
            ".to('cuda'), or use sphkv_kernels.reference"
        )
    if not 1 <= group_size <= MAX_GROUP:
        raise PageError(f"group_size {group_size}: the CUDA kernel serves 1 to {MAX_GROUP}")
    if n_warps is not None and not 2 <= n_warps <= 16:
        raise PageError(f"n_warps {n_warps}: a block has 2 to 16")
    capability_of(cache.device)  # raises
    if n_blocks is None:
        n_blocks = torch.cuda.get_device_properties(cache.device).multi_processor_count
    work = make_plan(cache, n_blocks, check=check)
    tiles = _group_tiles(group_size)
    n_warps = _default_warps(cache.head_dim, tiles) if n_warps is None else n_warps
    fragments = output_fragments(cache.head_dim, tiles)
    used = tuple(cache.tiers[index] for index in work.used_tiers)
    require_readable(used)
    heads = table_heads(
        score_form, used, work.tier_costs, work.n_starts, group_size, cache.head_dim
    )
    device = cache.device
    if heads and not tables_fit(_plain_variant(cache, work, group_size, n_warps, heads), device):
        if score_form == "table":
            raise PageError(
                "score_form 'table': the query tables beside those of this cache's tiers do not "
                "fit into the device's shared memory; use 'auto'"
            )
        heads = 0
    result = AttentionPlan(
        cache=cache,
        group_size=group_size,
        work=work,
        n_warps=n_warps,
        score_form=score_form,
        table_heads=heads,
        partial_output=torch.empty((max(work.n_parts, 1), fragments, 4), device=device),
        partial_state=torch.empty((max(work.n_parts, 1), 8 * tiles, 2), device=device),
        arrivals=torch.zeros(work.n_rows, dtype=torch.int32, device=device),
        handle=next(_handles),
    )
    _plans[result.handle] = result
    return result


def ada_decode(
    query: Tensor,
    cache: PagedCache,
    softmax_scale: float,
    *,
    logit_offset: Tensor | None = None,
    logit_softcap: float = 0.0,
    window: int = 0,
    query_positions: Tensor | None = None,
    position_term: PositionTerm | None = None,
    plan: AttentionPlan | None = None,
) -> DecodeResult:
    """One decode step; arguments and result as `ada_decode_reference`, on the GPU and in float32.

    query: ``(n_sequences, n_q_heads, head_dim)`` float32, bfloat16 or float16, contiguous, in the
    frame, on the cache's device. plan: from `plan(cache, group_size)`; without one a plan is made
    for this call alone (a copy of the page table to the host, a millisecond or more), which a CUDA
    graph cannot capture. query_positions: int32. position_term: float32, on the cache's device;
    sqrt(a^2 + b^2) of a pair's coefficients, times softmax_scale log2 e where there is no soft-cap,
    within fp16's range (65504; beyond it results are not finite); it errs by up to 4 x 10^-6 of its
    coefficients at any position below 2^31. Vectors become fp16 in registers: elements of the
    query, of the tail and of dense pages must lie within +-65504, and those below 3 x 10^-8 are
    zero.

    Raises:
        PageError: an argument that does not fit, before the launch.
        KernelBuildError: the first step of a mode, where NVRTC is missing.
        KernelLaunchError: the driver refuses, or the first step of a mode in a CUDA graph: run it
            once before the capture.
    """
    plan = _checked_plan(query, cache, plan)
    output, log_sum_exp = torch.ops.sphkv.ada_decode(
        query, plan.handle, softmax_scale, logit_offset, logit_softcap, window, query_positions,
        *_term_tensors(position_term),
    )  # fmt: skip
    return DecodeResult(output, log_sum_exp)


def ada_logits(
    query: Tensor,
    cache: PagedCache,
    *,
    logit_offset: Tensor | None = None,
    window: int = 0,
    query_positions: Tensor | None = None,
    position_term: PositionTerm | None = None,
    plan: AttentionPlan | None = None,
) -> LogitResult:
    """The logits that `ada_decode` works with, by the same decode path, in float32.

    Arguments as `ada_decode`, where sqrt(a^2 + b^2) of a position term's coefficients lies within
    fp16's range; result as `ada_logits_reference`.

    Raises:
        PageError, KernelBuildError, KernelLaunchError: as `ada_decode`.
    """
    plan = _checked_plan(query, cache, plan)
    pages, tail = torch.ops.sphkv.ada_logits(
        query, plan.handle, logit_offset, window, query_positions, *_term_tensors(position_term)
    )
    return LogitResult(pages, tail if cache.tail_keys is not None else None)


def _checked_plan(query: Tensor, cache: PagedCache, given: AttentionPlan | None) -> AttentionPlan:
    group_size = group_size_of(query, cache)
    if query.device != cache.device:
        raise PageError(f"query lies on {query.device}, the cache on {cache.device}")
    if given is None:
        return plan(cache, group_size)
    if given.cache is not cache:
        raise PageError("the plan belongs to another cache; make one with plan(cache, group_size)")
    if given.group_size != group_size:
        raise PageError(f"the plan is for groups of {given.group_size}, the query has {group_size}")
    return given


def _plain_variant(
    cache: PagedCache, work: DecodePlan, group_size: int, n_warps: int, heads: int
) -> Variant:
    """The kernel of a plan without window, soft-cap and position term; heads: `table_heads`."""
    tiers = tuple(cache.tiers[index] for index in work.used_tiers)
    return Variant(
        tiers or (TierFormat.dense(),),
        cache.head_dim,
        _group_tiles(group_size),
        n_warps=n_warps,
        small_pages=cache.page_size == 16,
        table_heads=heads,
    )


def _group_tiles(group_size: int) -> int:
    return 1 if group_size <= 8 else 2


def _default_warps(head_dim: int, group_tiles: int) -> int:
    """Warps whose registers suffice: 12 of 168, or 8 of 255 where outputs or queries take more."""
    return 12 if head_dim <= 128 and group_tiles == 1 else 8


def _format(cache: PagedCache) -> tuple[object, ...]:
    """What decides which kernels read a cache, comparable."""
    tiers = tuple(tier.content for tier in cache.tiers)
    positions = None if cache.positions is None else cache.positions.dtype
    sizes = (cache.page_size, cache.head_dim, cache.n_sequences, cache.n_kv_heads)
    return (tiers, *sizes, positions, cache.pool.numel(), cache.device)


def _position_bytes(cache: PagedCache) -> int:
    return 4 if cache.positions is None else cache.positions.element_size()


def _term_tensors(term: PositionTerm | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if term is None else (term.coefficients, term.frequencies)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def launch_params(
    query: Tensor,
    plan: AttentionPlan,
    logit_offset: Tensor | None,
    window: int,
    query_positions: Tensor | None,
    coefficients: Tensor | None = None,
    frequencies: Tensor | None = None,
) -> KernelParams:
    """The struct of a launch, checked; the caller fills in the results, the scale and the soft-cap.

    Raises:
        PageError: an argument that does not fit.
    """
    cache, work = plan.cache, plan.work
    if query.dtype not in FLOAT_TYPES:
        raise PageError(f"query is {query.dtype}; use float32, bfloat16 or float16")
    of_query = (cache.n_sequences, cache.n_kv_heads * plan.group_size, cache.head_dim)
    require("query", query, of_query, query.dtype, cache.device, aligned=True)
    _check_optional("logit_offset", logit_offset, query.shape[:2], torch.float32, query.device)
    check_window(cache, window, query_positions)
    if window:
        shape = (cache.n_sequences,)
        _check_optional("query_positions", query_positions, shape, torch.int32, query.device)
    if (coefficients is None) != (frequencies is None):
        raise PageError("coefficients and frequencies of a position term come together")
    if coefficients is not None and frequencies is not None:
        _check_position_term(query, cache, coefficients, frequencies)
    params = KernelParams()
    params.pool = _address(cache.pool)
    params.records = _address(work.records)
    params.entries = _address(work.entries)
    if work.positions is not None:
        params.first_positions = _address(work.positions.first)
        params.position_offsets = _address(work.positions.offsets)
    params.heads = _address(work.heads)
    params.segments = _address(work.segments)
    params.query = _address(query)
    params.offset = _address(logit_offset)
    params.tail_keys = _address(cache.tail_keys)
    params.tail_values = _address(cache.tail_values)
    params.tail_tokens = _address(cache.tail_tokens)
    params.positions = _address(cache.positions)
    params.tail_positions = _address(cache.tail_positions)
    params.query_positions = _address(query_positions)
    params.position_coefficients = _address(coefficients)
    params.position_frequencies = _address(frequencies)
    params.n_position_pairs = _n_pairs(frequencies)
    params.partial_output = _address(plan.partial_output)
    params.partial_state = _address(plan.partial_state)
    params.arrivals = _address(plan.arrivals)
    params.n_kv_heads = cache.n_kv_heads
    params.group_size = plan.group_size
    params.page_units_log2 = (cache.page_size // 16).bit_length() - 1
    params.tail_capacity = 0 if cache.tail_keys is None else cache.tail_keys.shape[2]
    params.query_type = FLOAT_TYPES[query.dtype]
    params.window = window
    return params


def _n_pairs(frequencies: Tensor | None) -> int:
    return 0 if frequencies is None else frequencies.shape[-1]


def _check_position_term(
    query: Tensor, cache: PagedCache, coefficients: Tensor, frequencies: Tensor
) -> None:
    n_pairs = _n_pairs(frequencies)
    shape = (*query.shape[:2], 2, n_pairs)
    of_heads = (cache.n_kv_heads, n_pairs)
    _check_optional("position_term.coefficients", coefficients, shape, torch.float32, query.device)
    _check_optional("position_term.frequencies", frequencies, of_heads, torch.float32, query.device)
    check_position_term(cache)


def _check_optional(
    name: str,
    tensor: Tensor | None,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    if tensor is not None:
        require(name, tensor, shape, dtype, device)


def _plan_of(handle: int) -> AttentionPlan:
    found = _plans.get(handle)
    if found is None:
        raise PageError("the plan of this step is gone; keep it alive as long as it is used")
    return found


@torch.library.custom_op("sphkv::ada_decode", mutates_args=())
def _ada_decode_op(
    query: Tensor,
    handle: int,
    softmax_scale: float,
    logit_offset: Tensor | None,
    logit_softcap: float,
    window: int,
    query_positions: Tensor | None,
    position_coefficients: Tensor | None,
    position_frequencies: Tensor | None,
) -> tuple[Tensor, Tensor]:
    plan = _plan_of(handle)
    check_scale(softmax_scale, logit_softcap)
    offset = None if logit_offset is None else logit_offset.to(torch.float32).contiguous()
    params = launch_params(
        query, plan, offset, window, query_positions, position_coefficients, position_frequencies
    )
    kernel = plan.kernel(
        logits=False,
        window=window > 0,
        softcap=logit_softcap > 0.0,
        n_position_pairs=_n_pairs(position_frequencies),
    )
    output = torch.empty(query.shape, dtype=torch.float32, device=query.device)
    log_sum_exp = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
    params.output = _address(output)
    params.log_sum_exp = _address(log_sum_exp)
    params.scale_log2 = softmax_scale * _LOG2_E
    if logit_softcap > 0.0:
        params.softcap_log2 = logit_softcap * _LOG2_E
        params.softcap_inverse = 2.0 / logit_softcap
    kernel.launch(plan.work.n_blocks, params)
    return output, log_sum_exp


@_ada_decode_op.register_fake
def _(
    query: Tensor,
    handle: int,
    softmax_scale: float,
    logit_offset: Tensor | None,
    logit_softcap: float,
    window: int,
    query_positions: Tensor | None,
    position_coefficients: Tensor | None,
    position_frequencies: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape, dtype=torch.float32), query.new_empty(
        query.shape[:2], dtype=torch.float32
    )


@torch.library.custom_op("sphkv::ada_logits", mutates_args=())
def _ada_logits_op(
    query: Tensor,
    handle: int,
    logit_offset: Tensor | None,
    window: int,
    query_positions: Tensor | None,
    position_coefficients: Tensor | None,
    position_frequencies: Tensor | None,
) -> tuple[Tensor, Tensor]:
    plan = _plan_of(handle)
    cache = plan.cache
    offset = None if logit_offset is None else logit_offset.to(torch.float32).contiguous()
    params = launch_params(
        query, plan, offset, window, query_positions, position_coefficients, position_frequencies
    )
    kernel = plan.kernel(
        logits=True,
        window=window > 0,
        softcap=False,
        n_position_pairs=_n_pairs(position_frequencies),
    )
    # Pages that were dead when the plan was made are not in it: what no thread writes is -inf.
    pages = query.new_full(
        (cache.page_table.n_entries, plan.group_size, cache.page_size),
        -math.inf,
        dtype=torch.float32,
    )
    capacity = params.tail_capacity
    tail = query.new_full((*query.shape[:2], capacity), -math.inf, dtype=torch.float32)
    params.logits = _address(pages)
    params.tail_logits = _address(tail)
    params.scale_log2 = 1.0
    kernel.launch(plan.work.n_blocks, params)
    return pages, tail


@_ada_logits_op.register_fake
def _(
    query: Tensor,
    handle: int,
    logit_offset: Tensor | None,
    window: int,
    query_positions: Tensor | None,
    position_coefficients: Tensor | None,
    position_frequencies: Tensor | None,
) -> tuple[Tensor, Tensor]:
    plan = _plan_of(handle)
    cache = plan.cache
    capacity = 0 if cache.tail_keys is None else cache.tail_keys.shape[2]
    shape = (cache.page_table.n_entries, plan.group_size, cache.page_size)
    return query.new_empty(shape, dtype=torch.float32), query.new_empty(
        (*query.shape[:2], capacity), dtype=torch.float32
    )
