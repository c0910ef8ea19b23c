"""The synthetic capture has the statistics it claims, and needs neither model nor transformers."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sphkv_cli.artifacts.capture import CaptureReader
from sphkv_cli.capture.options import SyntheticOptions
from sphkv_cli.capture.plan import CapturePlan
from sphkv_cli.capture.result import CaptureResult
from sphkv_cli.capture.synthetic import capture_synthetic, head_statistics
from sphkv_cli.errors import ArtifactError


def make(path: Path, **changes: int | str) -> CaptureReader:
    capture_synthetic(SyntheticOptions(**changes), path)  # type: ignore[arg-type]
    return CaptureReader(path)


def test_keys_have_the_mean_and_covariance_of_their_head(tmp_path: Path) -> None:
    options = SyntheticOptions(head_dim=16, n_documents=6, document_tokens=2000)
    capture_synthetic(options, tmp_path / "s.h5")
    with CaptureReader(tmp_path / "s.h5") as reader:
        for layer in range(2):
            for head in range(2):
                truth = head_statistics(options, layer, head)
                keys = np.concatenate(
                    [reader.keys(d, layer, slice(1, None))[:, head] for d in range(6)]
                ).astype(np.float64)
                # 12 000 vectors: standard errors 0.009 s of a mean, 0.013 s^2 of a covariance, with
                # s^2 < 2 and a part of bfloat16's rounding; five of them are allowed.
                assert np.abs(keys.mean(0) - truth.key_mean).max() < 5 * 0.009 * 1.42
                assert np.abs(np.cov(keys.T) - truth.key_covariance).max() < 5 * 0.013 * 2


def test_attention_is_peaked_and_finds_the_sink(tmp_path: Path) -> None:
    with make(tmp_path / "s.h5", head_dim=64, document_tokens=256) as reader:
        info = reader.layers[0]
        keys, queries = reader.keys(0, 0), reader.queries(0, 0)
        positions = reader.query_positions(0)
        for head in range(reader.n_q_heads):
            logits = queries[:, head] @ keys[:, head // reader.group_size].T * info.softmax_scale
            logits[np.arange(256)[None] > positions[:, None]] = -np.inf
            weights = np.exp(logits - logits.max(1, keepdims=True))
            weights /= weights.sum(1, keepdims=True)
            late = weights[positions > 128]
            # Even attention would give 1/200 to each.
            assert np.median(late.max(1)) > 0.15
            assert np.median(late[:, 0]) > 4 / 200
        norms = np.linalg.norm(keys, axis=-1)
        assert (norms[0] < 0.3 * np.median(norms, axis=0)).all()


def test_the_seed_decides_the_content_and_nothing_else_does(tmp_path: Path) -> None:
    with (
        make(tmp_path / "a.h5") as a,
        make(tmp_path / "b.h5") as b,
        make(tmp_path / "c.h5", seed=43) as c,
    ):
        assert a.digest == b.digest != c.digest
        assert a.model_digest != c.model_digest


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_any_shape_is_made(head_dim: int, tmp_path: Path) -> None:
    shape = {"n_layers": 1, "n_q_heads": 6, "n_kv_heads": 3, "document_tokens": 63}
    with make(tmp_path / "s.h5", head_dim=head_dim, **shape) as reader:
        assert reader.keys(3, 0).shape == (63, 3, head_dim)
        assert reader.queries(0, 0).shape == (63, 6, head_dim)
        assert [d.split for d in reader.documents] == ["fit", "fit", "select", "judge"]
        assert reader.query_second_moment(0).shape == (6, head_dim, head_dim)


def test_query_summaries_are_those_of_the_queries(tmp_path: Path) -> None:
    with make(tmp_path / "s.h5", query_stride=1, store_dtype="float32") as reader:
        for layer in range(reader.n_layers):
            queries = np.concatenate(
                [reader.queries(d, layer) for d in reader.documents_of("fit")]
            ).astype(np.float64)
            moment = np.einsum("thi,thj->hij", queries, queries) / len(queries)
            np.testing.assert_allclose(reader.query_mean[layer], queries.mean(0), atol=1e-5)
            np.testing.assert_allclose(reader.query_second_moment(layer), moment, atol=1e-4)


def test_dry_run_counts_at_least_the_bytes(tmp_path: Path) -> None:
    plan = capture_synthetic(SyntheticOptions(), tmp_path / "s.h5", dry_run=True)
    assert isinstance(plan, CapturePlan)
    assert not (tmp_path / "s.h5").exists()
    result = capture_synthetic(SyntheticOptions(), tmp_path / "s.h5")
    assert isinstance(result, CaptureResult)
    assert plan.tensor_bytes == result.tensor_bytes < result.file_bytes <= plan.file_bytes
    with pytest.raises(ArtifactError, match="exists"):
        capture_synthetic(SyntheticOptions(), tmp_path / "s.h5")


def test_neither_making_nor_reading_imports_transformers(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path;"
        "from sphkv_cli.capture.options import SyntheticOptions;"
        "from sphkv_cli.capture.synthetic import capture_synthetic;"
        "from sphkv_cli.artifacts.capture import CaptureReader;"
        f"capture_synthetic(SyntheticOptions(), Path({str(tmp_path / 's.h5')!r}));"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    code = (
        "import sys; from pathlib import Path;"
        "from sphkv_cli.artifacts.capture import CaptureReader\n"
        f"with CaptureReader(Path({str(tmp_path / 's.h5')!r})) as c: c.keys(0, 0)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
