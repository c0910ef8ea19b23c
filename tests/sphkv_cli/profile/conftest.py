"""A tiny model-free run of the stages before profile, once per test session."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from sphkv_cli.allocation.options import AllocateOptions
from sphkv_cli.allocation.stage import allocate
from sphkv_cli.capture.options import SyntheticOptions
from sphkv_cli.capture.synthetic import capture_synthetic
from sphkv_cli.fit.options import FitOptions
from sphkv_cli.fit.stage import fit_codebooks
from sphkv_cli.profile.options import ProfileOptions
from sphkv_cli.profile.result import ProfileReport
from sphkv_cli.profile.stage import profile

CODES = ("3/2/2/2:r2", "4/2/2/2:fp16")


@dataclass(frozen=True)
class Run:
    """Paths of one chain."""

    capture: Path
    codebooks: Path
    allocation: Path


def make_run(folder: Path, seed: int) -> Run:
    run = Run(folder / "capture.h5", folder / "codebooks.h5", folder / "allocation.h5")
    options = SyntheticOptions(n_documents=6, document_tokens=130, query_tail=66, seed=seed)
    capture_synthetic(options, run.capture)
    fit_codebooks(FitOptions(codes=CODES, page_sizes=(16,)), run.capture, run.codebooks)
    # 97 tokens of context: the last page of every head is partial.
    allocation = AllocateOptions(budget="4b", page_size=16, horizon=33, window=32)
    allocate(allocation, run.capture, run.codebooks, run.allocation)
    return run


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(tmp_path_factory.mktemp("run"), seed=1)


@pytest.fixture(scope="session")
def other_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Another capture of the same shape, and its own chain."""
    return make_run(tmp_path_factory.mktemp("other"), seed=2)


@pytest.fixture(scope="session")
def report(run: Run, tmp_path_factory: pytest.TempPathFactory) -> ProfileReport:
    output = tmp_path_factory.mktemp("report") / "report.json"
    return profile(ProfileOptions(backend="reference"), run.capture, run.allocation, output)
