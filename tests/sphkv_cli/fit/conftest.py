"""Small captures with known vectors, written with the format's own writer."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from sphkv_cli.artifacts.capture_info import CaptureInfo, DocumentInfo, LayerInfo
from sphkv_cli.artifacts.capture_writer import (
    create_document,
    document_path,
    layer_path,
    to_storage,
    write_capture_info,
    write_statistics,
)
from sphkv_cli.artifacts.store import create_artifact

Draw = Callable[[np.random.Generator, str, int, int, tuple[int, ...]], np.ndarray]


def gaussian(
    rng: np.random.Generator, kind: str, document: int, layer: int, shape: tuple[int, ...]
) -> np.ndarray:
    """Isotropic keys, values and queries."""
    return rng.standard_normal(shape)


@dataclass(frozen=True)
class CaptureCase:
    """A capture to write: one document per entry of `splits`."""

    draw: Draw = gaussian
    splits: tuple[str, ...] = ("fit", "fit", "select", "judge")
    n_tokens: int = 65
    n_layers: int = 2
    n_q_heads: int = 4
    n_kv_heads: int = 2
    head_dim: int = 32
    query_stride: int = 1
    window: int = 0
    stored_as: str = "float32"
    model_digest: str = "a" * 64
    seed: int = 7


def write(path: Path, case: CaptureCase) -> Path:
    info = CaptureInfo(
        model="tiny",
        architecture="synthetic",
        n_q_heads=case.n_q_heads,
        n_kv_heads=case.n_kv_heads,
        head_dim=case.head_dim,
        layers=(LayerInfo("full_attention", case.window, case.head_dim**-0.5, 0.0),)
        * case.n_layers,
        model_digest=case.model_digest,
        rope={"parameters": {}, "inv_freq": {}, "attention_scaling": {}},
        dtype="float32",
        stored_as=case.stored_as,
        has_keys_pre_rope=False,
    )
    rng = np.random.default_rng(case.seed)
    positions = np.arange(case.n_tokens)[:: case.query_stride]
    with create_artifact(path, "capture", inputs={}, provenance={}) as file:
        write_capture_info(file, info)
        for index, split in enumerate(case.splits):
            document = DocumentInfo(
                index=index,
                name=f"text#{index}",
                split=split,
                n_tokens=case.n_tokens,
                n_queries=len(positions),
                source="text",
                first_token=index * case.n_tokens,
                text_sha256="0" * 64,
            )
            tokens = np.zeros(case.n_tokens, np.int64)
            group = create_document(file, document_path(index), info, document, tokens, positions)
            for layer in range(case.n_layers):
                for kind, n_rows, n_heads in (
                    ("keys", case.n_tokens, case.n_kv_heads),
                    ("values", case.n_tokens, case.n_kv_heads),
                    ("queries", len(positions), case.n_q_heads),
                ):
                    shape = (n_rows, n_heads, case.head_dim)
                    drawn = case.draw(rng, kind, index, layer, shape).astype(np.float32)
                    group[f"{layer_path(layer)}/{kind}"][...] = to_storage(drawn, case.stored_as)
        d, heads = case.head_dim, (case.n_layers, case.n_q_heads)
        write_statistics(
            file,
            query_mean=np.zeros((*heads, d)),
            query_second_moment=np.zeros((*heads, d, d)),
            output_weight=np.ones(heads),
        )
    return path


@pytest.fixture
def make_capture(tmp_path: Path) -> Callable[..., Path]:
    """Writes captures: `make_capture("name.h5", draw=..., n_tokens=...)`."""

    def make(name: str = "capture.h5", **options: object) -> Path:
        return write(tmp_path / name, CaptureCase(**options))

    return make


@pytest.fixture(scope="session")
def tiny_capture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, two KV heads, head_dim 32, isotropic; read only."""
    return write(tmp_path_factory.mktemp("tiny") / "capture.h5", CaptureCase())
