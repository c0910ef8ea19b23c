"""One tiny model with its capture, codebooks and allocation, for every test of what comes after."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.sphkv_cli.tiny_models import save_llama


@dataclass(frozen=True)
class TinyChain:
    """A random llama of 2 layers and the artifacts made from it."""

    model: Path
    capture: Path
    codebooks: Path
    allocation: Path


@pytest.fixture(scope="session")
def tiny_chain(tmp_path_factory: pytest.TempPathFactory) -> TinyChain:
    """Captured with every query kept; allocated at 4 bits with pages of 16 tokens."""
    from sphkv_cli.allocation.options import AllocateOptions
    from sphkv_cli.allocation.stage import allocate
    from sphkv_cli.capture.options import CaptureOptions, TextSource
    from sphkv_cli.capture.stage import capture
    from sphkv_cli.fit.options import FitOptions
    from sphkv_cli.fit.stage import fit_codebooks

    folder = tmp_path_factory.mktemp("tiny_chain")
    made = TinyChain(
        save_llama(folder / "tiny"),
        folder / "capture.h5",
        folder / "codebooks.h5",
        folder / "allocation.h5",
    )
    texts = []
    for split, word in (("fit", "alpha"), ("select", "beta"), ("judge", "gamma")):
        path = folder / f"{split}.txt"
        path.write_text(" ".join(f"{word} {i * i}" for i in range(60)))
        texts.append(TextSource.parse(f"{split}={path}"))
    capture(
        CaptureOptions(model=str(made.model), texts=tuple(texts), document_tokens=150),
        made.capture,
    )
    fit_codebooks(FitOptions(codes=("4/2/2/2:fp16", "5/3/3/3:r3")), made.capture, made.codebooks)
    allocate(
        AllocateOptions(budget="4b", page_size=16, horizon=40, window=32, utility="window"),
        made.capture,
        made.codebooks,
        made.allocation,
    )
    return made
