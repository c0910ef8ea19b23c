"""What `allocate` found, as plain rows."""

from dataclasses import dataclass

from sphkv_cli.allocation.agreement import LayerAgreement
from sphkv_cli.allocation.discovery import Discovery
from sphkv_cli.allocation.layout import LaidOutBytes


@dataclass(frozen=True)
class BaselineRow:
    """A plan beside the solver's, for one document.

    cost: predicted; times_plan: its cost over the plan's; measured: weighted squared output error
    with the horizon's queries, summed over layers and heads, None where they may not be used.
    """

    name: str
    tier: str
    cost: float
    times_plan: float
    laid_out_bytes: int
    measured: float | None = None


@dataclass(frozen=True)
class DocumentPlan:
    """One planned document.

    budget_bytes and its two other forms; laid_out: where the bytes went; laid_out_rate: bits per
    coordinate of all of it; cost: expected weighted squared output error of one future query,
    summed over layers and heads; dual_bound: no plan on these pages costs less; gap: relative.
    tier_mix: fraction of the pages in each option, drop first; baselines: what it is compared with;
    measured: as in `BaselineRow`.
    """

    name: str
    split: str
    n_context: int
    n_pages: int
    budget_bytes: int
    budget_bits_per_coordinate: float
    budget_fraction: float
    laid_out: LaidOutBytes
    laid_out_rate: float
    cost: float
    dual_bound: float
    gap: float
    multiplier: float
    uniform_won: bool
    tier_mix: tuple[float, ...]
    baselines: tuple[BaselineRow, ...]
    measured: float | None = None


@dataclass(frozen=True)
class HeadMix:
    """Mean over the planned documents for one (layer, KV head).

    fractions: pages in each option, drop first; quotas: the same of the policy;
    bits_per_coordinate: of the plan, page table included.
    """

    layer: int
    kv_head: int
    bits_per_coordinate: float
    fractions: tuple[float, ...]
    quotas: tuple[float, ...]


@dataclass(frozen=True)
class AllocationSummary:
    """What was decided and how far it can be believed.

    budget: as given; options: names, drop first; option_bytes: of one page of the first layer with
    its table entry; plans: of the documents asked for (judge); checks: documents of `check_split`
    with measured errors; drop_coefficient, code_coefficient: geometric means over heads, with
    their ranges; price_rates: bits per coordinate at which prices were found, for other
    budgets; pins: what is kept whatever it scores, in words; agreement: per layer, on the checks;
    discovery: of the plans; weights: where F comes from.
    """

    budget: str
    utility: str
    utility_is_ceiling: bool
    is_calibrated: bool
    drop_coefficient: float
    drop_coefficient_range: tuple[float, float]
    drop_coefficient_source: str
    code_coefficient: float
    code_coefficient_range: tuple[float, float]
    code_coefficient_source: str
    weights: str
    pins: str
    price_rates: tuple[float, ...]
    page_size: int
    horizon: int
    window: int
    options: tuple[str, ...]
    option_bytes: tuple[int, ...]
    plans: tuple[DocumentPlan, ...]
    checks: tuple[DocumentPlan, ...]
    check_split: str
    heads: tuple[HeadMix, ...]
    discovery: Discovery
    agreement: tuple[LayerAgreement, ...]
    reading: tuple[str, ...]


@dataclass(frozen=True)
class AllocationResult:
    """The artifact, and what `allocate` says about it."""

    path: str
    digest: str
    model: str
    n_fit_documents: int
    seconds: float
    summary: AllocationSummary
