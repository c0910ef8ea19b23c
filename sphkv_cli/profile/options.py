"""What `profile` can be asked for."""

from dataclasses import dataclass, fields
from typing import Literal, get_args

from sphkv_cli.errors import UsageError
from sphkv_cli.option_checks import require_at_least, require_positive

Backend = Literal["auto", "reference", "cuda"]


@dataclass(frozen=True)
class Gates:
    """Limits that turn the report into a check; None is no limit.

    All but the speed-up hold for the worst (layer, query head) of the plan.  max_logit_rmse: in
    units of the softmax (scale included); max_kl: nats, mean over queries; max_output_error:
    relative; min_speedup: of the decode step over the best bf16 baseline, at every measured shape.
    """

    max_logit_rmse: float | None = None
    max_kl: float | None = None
    max_output_error: float | None = None
    min_speedup: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            require_positive("--" + field.name.replace("_", "-"), getattr(self, field.name))


@dataclass(frozen=True)
class ProfileOptions:
    """Options of one profile.

    backend: "auto" takes the GPU where there is one.  tiers: names of the tiers to measure
    uniformly; empty for all of the allocation.  max_queries: most queries of a document's horizon
    that are looked at, evenly spaced.  seed: recorded; nothing here is random.
    """

    backend: Backend = "auto"
    tiers: tuple[str, ...] = ()
    max_queries: int = 256
    gates: Gates = Gates()
    seed: int = 42

    def __post_init__(self) -> None:
        if self.backend not in get_args(Backend):
            raise UsageError(f"the backend is {self.backend!r}", "choose auto, reference or cuda")
        require_at_least("--max-queries", self.max_queries, 1)
        require_at_least("--seed", self.seed, 0)
        if self.gates.min_speedup is not None and self.backend == "reference":
            raise UsageError(
                "--min-speedup needs a time, and the reference backend has none",
                "drop it, or use --backend cuda",
            )
