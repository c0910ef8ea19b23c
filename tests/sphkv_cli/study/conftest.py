"""A tiny synthetic capture for studies."""

from collections.abc import Iterator

import pytest

from sphkv_cli.artifacts.capture import CaptureReader
from sphkv_cli.capture.options import SyntheticOptions
from sphkv_cli.capture.synthetic import capture_synthetic


@pytest.fixture(scope="session")
def tiny_capture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CaptureReader]:
    """Two layers, two KV heads of 32, five documents of 160 tokens, stored as float32."""
    path = tmp_path_factory.mktemp("study") / "capture.h5"
    options = SyntheticOptions(
        n_layers=2,
        n_q_heads=4,
        n_kv_heads=2,
        head_dim=32,
        n_documents=5,
        document_tokens=160,
        store_dtype="float32",
    )
    capture_synthetic(options, path)
    with CaptureReader(path) as reader:
        yield reader
