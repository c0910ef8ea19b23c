"""A small synthetic capture with codebooks, and one allocation of it; all read only."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

from sphkv_cli.allocation.options import AllocateOptions
from sphkv_cli.allocation.result import AllocationResult
from sphkv_cli.allocation.stage import allocate
from sphkv_cli.capture.options import SyntheticOptions
from sphkv_cli.capture.synthetic import capture_synthetic
from sphkv_cli.fit.options import FitOptions
from sphkv_cli.fit.stage import fit_codebooks

OPTIONS = AllocateOptions(budget="5b", page_size=16, horizon=48, window=32)
CAPTURED = SyntheticOptions(
    n_layers=2, n_q_heads=4, n_kv_heads=2, head_dim=32, n_documents=4, document_tokens=193
)


class Chain(NamedTuple):
    """Paths of one chain of artifacts."""

    capture: Path
    codebooks: Path


def make_chain(folder: Path, captured: SyntheticOptions = CAPTURED) -> Chain:
    """Capture and fit into a folder."""
    chain = Chain(folder / "capture.h5", folder / "codebooks.h5")
    capture_synthetic(captured, chain.capture)
    fit_codebooks(FitOptions(codes=("3/1/1/1:r1", "4/2/2/2:r2")), chain.capture, chain.codebooks)
    return chain


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return make_chain(tmp_path_factory.mktemp("chain"))


@pytest.fixture(scope="session")
def other_chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """The same shape of another seed."""
    return make_chain(tmp_path_factory.mktemp("other"), replace(CAPTURED, seed=7))


@pytest.fixture(scope="session")
def allocation(
    chain: Chain, tmp_path_factory: pytest.TempPathFactory
) -> tuple[AllocationResult, Path]:
    """The default allocation of `chain` at 5 bits, and where it lies."""
    path = tmp_path_factory.mktemp("allocation") / "allocation.h5"
    return allocate(OPTIONS, chain.capture, chain.codebooks, path), path
