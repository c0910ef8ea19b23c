"""What `evaluate` can be asked for."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from sphkv_cli.allocation.budget import Budget
from sphkv_cli.errors import UsageError
from sphkv_cli.evaluation.published import METHOD_NAMES
from sphkv_cli.models.load import LoadOptions
from sphkv_cli.models.source import local_path
from sphkv_cli.option_checks import require_fraction, require_positive

Protocol = Literal["auto", "uniform", "retention"]
Split = Literal["select", "judge"]
Rows = Literal["own", "published", "controls", "all"]

UNIFORM_WINDOW, UNIFORM_FIRST_TOKENS = 32, 4
"""Dense in the uniform protocol, unless asked otherwise."""


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of one evaluation.

    protocol: "auto" is retention where an allocation is given, else uniform.
    codes: names of the codebooks' tiers to evaluate; empty for all.
    methods: published methods beside them, see `published.METHOD_NAMES`; None: the usual ones
        (retention: where codebooks are given or published rows are asked for).
    tiers: tiers of the allocation that are also run for every page, with and without a dense sink
        page (retention); "best" is the largest that fits the plan's bytes.
    window, first_tokens: last tokens before a query and first ones that stay dense (uniform; None:
        32 and 4); in retention, codes and methods stand a second time with so many last and first
        tokens of the context dense (None: not).  first_scored: first compared position (uniform).
    sinks: keys shorter than this share of their head's median norm stay dense (our codes);
        "auto" is what the codebooks chose, 0 none.
    seeds: how many rotation seeds rotated codes are run with; a row is their mean. Those
        of codebooks count from their own seed on, those of published methods from `seed` on.
    budgets, rows, context: plans made anew from the allocation instead of those it holds
        (retention): budgets as `Budget` reads them, empty for its own; rows "own", "published",
        "controls" or "all" methods; context: tokens of it, None for all but the horizon. A capture
        that was not allocated always gets new plans.
    split: whose documents are scored; max_documents: at most so many, spread evenly; None for all.
    stepwise: also run the policy's drop-in cache, one token per forward pass (retention).
    logit_chunk: positions whose logits over the vocabulary are held at a time.
    gate_kl: the largest geometric-mean KL, gate_top1 the least top-1 agreement, gate_perplexity the
        largest perplexity ratio of every row of ours (codes asked for, plan, policy).
    model: where the captured model is; None for the name that the capture has.
    """

    protocol: Protocol = "auto"
    codes: tuple[str, ...] = ()
    methods: tuple[str, ...] | None = None
    tiers: tuple[str, ...] = ("best",)
    window: int | None = None
    first_tokens: int | None = None
    first_scored: int = 64
    sinks: float | Literal["auto"] = "auto"
    seeds: int = 1
    budgets: tuple[str, ...] = ()
    rows: Rows | None = None
    context: int | None = None
    split: Split = "judge"
    max_documents: int | None = None
    stepwise: bool = False
    logit_chunk: int = 128
    gate_kl: float | None = None
    gate_top1: float | None = None
    gate_perplexity: float | None = None
    model: str | None = None
    load: LoadOptions = field(default_factory=LoadOptions)
    revision: str | None = None
    trust_remote_code: bool = False
    gguf_file: str | None = None
    cache_dir: Path | None = None
    seed: int = 42

    @property
    def wants_new_plans(self) -> bool:
        """Whether plans that an allocation holds are not enough."""
        return bool(self.budgets) or self.rows is not None or self.context is not None

    def files_read(
        self, capture: Path, codebooks: Path | None, allocation: Path | None
    ) -> dict[str, Path | None]:
        """Every input by argument or option, as `check_outputs` takes them."""
        return {
            "CAPTURE": capture,
            "--codebooks": codebooks,
            "--allocation": allocation,
            "--model": local_path(self.model, self.gguf_file),
        }

    def __post_init__(self) -> None:
        for budget in self.budgets:
            Budget.parse(budget)
        if self.rows is not None and self.rows not in get_args(Rows):
            raise UsageError(
                f"--rows {self.rows} are unknown", "choose own, published, controls or all"
            )
        if self.protocol not in get_args(Protocol):
            raise UsageError(
                f"--protocol {self.protocol} is unknown", "choose auto, uniform or retention"
            )
        if self.split not in get_args(Split):
            raise UsageError(
                f"--split {self.split} cannot be scored", "choose judge, or select while developing"
            )
        if self.sinks != "auto" and not 0 <= self.sinks < 1:
            raise UsageError(f"--sinks is {self.sinks}", "give 0 or more and less than 1, or auto")
        for name in self.methods or ():
            if name not in METHOD_NAMES:
                raise UsageError(f"--method {name} is unknown", f"one of {', '.join(METHOD_NAMES)}")
        for name, least in (
            ("window", 0),
            ("first_tokens", 0),
            ("first_scored", 0),
            ("seeds", 1),
            ("context", 1),
            ("max_documents", 1),
            ("logit_chunk", 1),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                flag = "--" + name.replace("_", "-")
                raise UsageError(f"{flag} is {value}", f"give {least} or more")
        require_positive("--gate-kl", self.gate_kl)
        require_fraction("--gate-top1", self.gate_top1)
        require_positive("--gate-perplexity", self.gate_perplexity)


def parse_sinks(text: str) -> float | Literal["auto"]:
    """A factor, or "auto"; raises UsageError on anything else."""
    if text == "auto":
        return "auto"
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"--sinks is {text!r}", "give a factor such as 0.6, or auto") from None
