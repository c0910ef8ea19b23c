"""The studies there are. A study is a module with one public function `run(inputs)`.

To add one: write `sphkv_cli/study/<module>.py` with `def run(inputs: StudyInputs) -> StudyResult`
and a line below. Modules are imported only when their study runs.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sphkv_cli.errors import UsageError

if TYPE_CHECKING:
    from sphkv_cli.study.inputs import StudyInputs
    from sphkv_cli.study.result import StudyResult

Need = Literal["capture", "codebooks", "model"]


@dataclass(frozen=True)
class Study:
    """name: as typed; question: one line; needs: what must be given; module: with `run(inputs)`."""

    name: str
    question: str
    needs: tuple[Need, ...]
    module: str

    def run(self, inputs: "StudyInputs") -> "StudyResult":
        """Import the module and run it."""
        module = importlib.import_module(self.module)
        found: StudyResult = module.run(inputs)
        return found


STUDIES: tuple[Study, ...] = (
    Study(
        "preconditioning",
        "What is the random rotation worth?",
        ("capture",),
        "sphkv_cli.study.preconditioning",
    ),
    Study(
        "bits-per-level",
        "Where do bits belong, and what do too few do?",
        ("capture",),
        "sphkv_cli.study.bits_per_level",
    ),
    Study("depth", "How deep should the polar recursion go?", (), "sphkv_cli.study.depth"),
    Study(
        "gaussianity",
        "Are rotated keys and values what the books assume, layer by layer?",
        ("capture",),
        "sphkv_cli.study.gaussianity",
    ),
    Study(
        "error-by-norm",
        "Does a large norm mean a large error, and does it matter?",
        ("capture",),
        "sphkv_cli.study.error_by_norm",
    ),
    Study(
        "vector-search",
        "Is the code an index for inner-product search?",
        (),
        "sphkv_cli.study.vector_search",
    ),
    Study(
        "books",
        "Analytic, offline or online books: what do they give, what do they cost?",
        ("capture",),
        "sphkv_cli.study.books",
    ),
    Study(
        "generalisation",
        "Do means and books of one kind of text serve another, and how much text do they need?",
        ("model",),
        "sphkv_cli.study.generalisation",
    ),
    Study(
        "shared-rotation",
        "One rotation for the whole model, or one per layer and head?",
        ("capture",),
        "sphkv_cli.study.shared_rotation",
    ),
    Study(
        "utility",
        "Can a token's future use be told from its past, and from approximate logits?",
        ("capture",),
        "sphkv_cli.study.utility",
    ),
    Study(
        "page-sizes",
        "What do pages cost beside codes?",
        ("capture", "codebooks"),
        "sphkv_cli.study.page_sizes",
    ),
    Study(
        "growing",
        "What does it cost that precision never comes back while a cache grows?",
        ("capture", "codebooks"),
        "sphkv_cli.study.growing",
    ),
    Study(
        "retention",
        "What does a cache of so many bits lose, by method?",
        ("capture", "codebooks", "model"),
        "sphkv_cli.study.retention",
    ),
)


def studies_named(names: Sequence[str], *, every: bool) -> tuple[Study, ...]:
    """The studies to run, in the order of `STUDIES`.

    Raises:
        UsageError: an unknown name, names beside --all, or nothing asked for.
    """
    known = {study.name: study for study in STUDIES}
    if every:
        if names:
            raise UsageError("--all runs every study", "leave the names out")
        return STUDIES
    for name in names:
        if name not in known:
            raise UsageError(f"no study is called {name!r}", f"choose among {', '.join(known)}")
    if not names:
        raise UsageError(
            "no study was named", f"name one or more of {', '.join(known)}, or pass --all"
        )
    return tuple(study for study in STUDIES if study.name in names)
