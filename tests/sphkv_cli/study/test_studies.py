"""The studies of captures on a small one: what must hold whatever the numbers are."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sphkv_cli.artifacts.capture import CaptureReader
from sphkv_cli.capture.options import SyntheticOptions
from sphkv_cli.capture.synthetic import capture_synthetic
from sphkv_cli.study import error_by_norm, gaussianity, preconditioning
from sphkv_cli.study.inputs import StudyInputs, StudyOptions
from sphkv_cli.study.result import StudyResult
from sphkv_cli.study.vector_search import Source, fit_centres, product_quantizer, recall
from sphkv_codebooks.distortion import direction_bound
from sphkv_codebooks.rotation import Rotation
from sphkv_codebooks.spherical_code import SphericalCode


@pytest.fixture(scope="module")
def capture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("studies") / "capture.h5"
    options = SyntheticOptions(n_layers=2, n_q_heads=2, n_kv_heads=1, head_dim=32, n_documents=3)
    capture_synthetic(options, path)
    return path


def run(study: object, capture: Path) -> StudyResult:
    with CaptureReader(capture) as reader:
        inputs = StudyInputs(StudyOptions(max_queries=32), reader)
        found: StudyResult = study.run(inputs)  # type: ignore[attr-defined]
    return found


def column(result: StudyResult, table: int, name: str) -> list[object]:
    found = result.tables[table]
    return [row[list(found.columns).index(name)] for row in found.rows]


def test_preconditioning_tells_centred_from_not(capture: Path) -> None:
    result = run(preconditioning, capture)
    errors = np.array(column(result, 1, "output error"), dtype=float)
    uncentred, centred = errors[0::2], errors[1::2]
    assert (centred < uncentred).all()  # the capture's keys are biased
    assert [figure.name for figure in result.figures] == ["angles", "stress"]


def test_gaussianity_of_gaussian_values_is_that_of_sampling(capture: Path) -> None:
    result = run(gaussianity, capture)
    ks = dict(
        zip(column(result, 0, "vectors"), column(result, 0, "KS, mean of layers"), strict=True)
    )
    # The values are drawn from an isotropic normal; 8,192 coordinates show 0.0096 on average.
    assert float(ks["values, rotated"]) < 0.03  # type: ignore[arg-type]
    assert float(ks["keys, rotated"]) > float(ks["keys, centred, rotated"])  # type: ignore[arg-type]


def test_relative_error_does_not_know_the_norm(capture: Path) -> None:
    result = run(error_by_norm, capture)
    relative = np.array(column(result, 0, "relative error"), dtype=float)
    absolute = np.array(column(result, 0, "absolute error/median norm"), dtype=float)
    assert relative.max() / relative.min() < 1.5  # 50 keys a bin
    assert absolute[-1] > absolute[0]


def test_rotations_bound_the_damage_of_an_outlier_and_none_exceeds_the_bound() -> None:
    code = SphericalCode.analytic("c", 32, (4, 2, 2, 2, 3), "norm")
    found = {
        kind: preconditioning.stress(code, Rotation(kind, 32, 1), torch.Generator().manual_seed(0))
        for kind in ("none", "hadamard", "haar")
    }
    bound = direction_bound(code.codebooks) ** 2
    for stress in found.values():
        # The norm is fp16: a relative 2^-11 on top of the bound of the direction.
        assert max(*stress.by_scale, stress.axis_worst) <= bound * 1.01
    assert found["none"].by_scale[-1] > 3 * found["haar"].by_scale[-1]
    assert found["haar"].by_scale[-1] == pytest.approx(code.distortion(), rel=0.5)


def test_recall_of_the_vectors_themselves_is_one_and_of_noise_is_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(500, 16, generator=generator)
    source = Source("s", base, base, torch.randn(40, 16, generator=generator))
    assert recall(source, base.clone()) == 1.0
    assert recall(source, torch.randn(500, 16, generator=generator)) < 0.1  # chance: 0.02


def test_product_quantisation_is_lloyds_fixed_point_and_near_scipys() -> None:
    from scipy.cluster.vq import kmeans2

    generator = torch.Generator().manual_seed(1)
    parts = torch.randn(1, 600, 4, generator=generator)
    (centres,) = fit_centres(parts, 32, generator)
    points = parts[0].double().numpy()
    theirs, _ = kmeans2(points, 32, iter=30, minit="++", rng=1)

    def cost(table: np.ndarray) -> float:
        return float(((points[:, None] - table[None]) ** 2).sum(-1).min(1).mean())

    assert cost(centres.double().numpy()) < 1.15 * cost(theirs)
    coder = product_quantizer(torch.randn(600, 8, generator=generator), 4, seed=0)
    x = torch.randn(5, 8, generator=generator)
    assert torch.equal(coder(coder(x)), coder(x))  # centres code to themselves
