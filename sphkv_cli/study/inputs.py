"""What a study is given: the capture, codebooks and model where there are, seed and limits."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sphkv_cli.allocation.budget import Budget
from sphkv_cli.artifacts.capture import CaptureReader, DocumentInfo, Split
from sphkv_cli.artifacts.codebooks import CodebooksReader
from sphkv_cli.errors import UsageError
from sphkv_cli.fit.captured_vectors import documents_of
from sphkv_cli.option_checks import require_at_least
from sphkv_cli.progress import NullProgress, Progress

if TYPE_CHECKING:
    from sphkv_cli.evaluation.judged_model import JudgedModel


@dataclass(frozen=True)
class StudyOptions:
    """Options of every study.

    max_documents: documents of a split that are read, the first ones; max_queries: per document
    and layer, evenly spaced; max_layers: layers looked at, evenly spaced, None for all.
    budgets, rows, recall_prompts: of `retention`: as `Budget` reads them; which methods
    (own, published, controls, all); copy-back prompts per method, 0 for none.
    horizon, window: of studies that allocate, as `allocate` has them.
    """

    seed: int = 42
    max_documents: int = 4
    max_queries: int = 128
    max_layers: int | None = None
    budgets: tuple[str, ...] = ("1b", "2b", "3b", "4b")
    rows: Literal["own", "published", "controls", "all"] = "all"
    recall_prompts: int = 4
    horizon: int = 128
    window: int = 64

    def __post_init__(self) -> None:
        for name in ("max_documents", "max_queries", "max_layers"):
            require_at_least(f"--{name.replace('_', '-')}", getattr(self, name), 1)
        require_at_least("--seed", self.seed, 0)
        require_at_least("--recall-prompts", self.recall_prompts, 0)
        require_at_least("--horizon", self.horizon, 1)
        require_at_least("--window", self.window, 1)
        for budget in self.budgets:
            Budget.parse(budget)

    @property
    def middle_budget(self) -> str:
        """The budget at which a study that fits once does so."""
        return self.budgets[len(self.budgets) // 2]


@dataclass(frozen=True, eq=False)
class StudyInputs:
    """The opened capture and codebooks, the name of the model; None where they were not given."""

    options: StudyOptions
    capture: CaptureReader | None = None
    codebooks: CodebooksReader | None = None
    model: str | None = None
    progress: Progress = NullProgress()  # noqa: RUF009  (it holds nothing)

    @property
    def seed(self) -> int:
        """Seed of everything random."""
        return self.options.seed

    def require_capture(self) -> CaptureReader:
        """The capture.

        Raises:
            UsageError: none was given.
        """
        if self.capture is None:
            raise UsageError("this study reads a capture", "give it with --capture capture.h5")
        return self.capture

    def require_codebooks(self) -> CodebooksReader:
        """The codebooks.

        Raises:
            UsageError: none were given.
        """
        if self.codebooks is None:
            raise UsageError(
                "this study needs tiers", "give codebooks with --codebooks codebooks.h5"
            )
        return self.codebooks

    def documents(self, split: Split) -> tuple[DocumentInfo, ...]:
        """The first `max_documents` of a split; SphkvError where there are none."""
        return documents_of(self.require_capture(), split)[: self.options.max_documents]

    def layers(self) -> Sequence[int]:
        """The layers to look at: all, or `max_layers` evenly spaced, first and last included."""
        n_layers = self.require_capture().n_layers
        wanted = min(self.options.max_layers or n_layers, n_layers)
        if wanted == 1:
            return [n_layers // 2]
        return [round(i * (n_layers - 1) / (wanted - 1)) for i in range(wanted)]

    @cached_property
    def judged_model(self) -> "JudgedModel":
        """The model, loaded once for all studies and checked against the capture.

        Raises:
            UsageError: neither --model nor a capture names one.
            SphkvError: the capture is synthetic.
            EnvironmentUnable, ArtifactError: it cannot be loaded, or is not the captured one.
        """
        from sphkv_cli.evaluation.judged_model import JudgedModel
        from sphkv_cli.models.load import LoadOptions, load_model
        from sphkv_cli.models.source import resolve_model

        if self.capture is not None:
            self.capture.require_model()
        name = self.model or (None if self.capture is None else self.capture.model)
        if name is None:
            raise UsageError("this study runs the model", "name it with --model")
        judged = JudgedModel.of(load_model(resolve_model(name), LoadOptions()))
        if self.capture is not None:
            judged.require_captured(self.capture.info, str(self.capture.path))
        return judged


def open_codebooks(path: Path | None, capture: CaptureReader | None) -> CodebooksReader | None:
    """Codebooks of the capture's model, or None without a path; raises ArtifactError."""
    if path is None:
        return None
    books = CodebooksReader.open(path)
    if capture is not None:
        books.require_model(capture)
    return books
