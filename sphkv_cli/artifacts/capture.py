"""capture.h5: what attention received, document by document and layer by layer.

The reader is lazy: opening reads attributes, arrays are read when asked for. Neither torch nor
transformers is needed. FORMAT.md specifies the file, `capture_writer.py` writes it.
"""

import json
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from sphkv_cli.artifacts.bfloat16 import BFLOAT16, STORED_AS, from_bfloat16_bits
from sphkv_cli.artifacts.capture_info import SPLITS, CaptureInfo, DocumentInfo, LayerInfo, Split
from sphkv_cli.artifacts.capture_writer import document_path, layer_path
from sphkv_cli.artifacts.reader import ArtifactReader, reads
from sphkv_cli.errors import ArtifactError, SphkvError

__all__ = ["SPLITS", "CaptureInfo", "CaptureReader", "DocumentInfo", "LayerInfo", "Split"]

Float32 = npt.NDArray[np.float32]


class CaptureReader(ArtifactReader):
    """Reads a capture; a context manager, arrays as float32 when asked for.

    A document is meant by its index or its `DocumentInfo`. `tokens` and `rows` are slices of the
    first axis, so that a part can be read without the whole.

    Raises:
        ArtifactError: on entering, when the file is not a whole capture.
    """

    @property
    def kind(self) -> str:
        return "capture"

    def _check(self) -> None:
        _ = self.info, self.documents

    @cached_property
    def info(self) -> CaptureInfo:
        """Model, shapes and layers."""
        attrs = self._file.attrs
        layers = tuple(
            LayerInfo(
                layer_type=row["layer_type"].decode(),
                window=int(row["window"]),
                softmax_scale=float(row["softmax_scale"]),
                logit_softcap=float(row["logit_softcap"]),
            )
            for row in self._file["layers"][()]
        )
        if len(layers) != int(attrs["n_layers"]):
            raise ValueError(f"{len(layers)} layers in its table, n_layers {attrs['n_layers']}")
        return CaptureInfo(
            model=str(attrs["model"]),
            architecture=str(attrs["architecture"]),
            n_q_heads=int(attrs["n_q_heads"]),
            n_kv_heads=int(attrs["n_kv_heads"]),
            head_dim=int(attrs["head_dim"]),
            layers=layers,
            model_digest=str(attrs["model_digest"]),
            rope=json.loads(attrs["rope"]),
            dtype=str(attrs["dtype"]),
            stored_as=str(attrs["stored_as"]),
            has_keys_pre_rope=bool(attrs["has_keys_pre_rope"]),
        )

    @property
    def model(self) -> str:
        """Hub id, packaged name, or the last part of the path it was loaded from."""
        return self.info.model

    @property
    def architecture(self) -> str:
        """transformers' model_type, or "synthetic"."""
        return self.info.architecture

    def require_model(self) -> None:
        """Refuse a synthetic capture where its model is to run; raises SphkvError."""
        if self.architecture == "synthetic":
            raise SphkvError(
                f"{self.path} is synthetic, there is no model to run",
                "pass the capture of a model",
            )

    @property
    def model_digest(self) -> str:
        """Tells models apart; see FORMAT.md."""
        return self.info.model_digest

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return self.info.n_layers

    @property
    def n_q_heads(self) -> int:
        """Query heads per layer."""
        return self.info.n_q_heads

    @property
    def n_kv_heads(self) -> int:
        """Key-value heads per layer."""
        return self.info.n_kv_heads

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.info.group_size

    @property
    def head_dim(self) -> int:
        """Coordinates of one key."""
        return self.info.head_dim

    @property
    def layers(self) -> tuple[LayerInfo, ...]:
        """Window, softmax scale and soft cap of every layer."""
        return self.info.layers

    @property
    def rope(self) -> Mapping[str, Any]:
        """Rotary parameters, as FORMAT.md says."""
        return self.info.rope

    @cached_property
    def documents(self) -> tuple[DocumentInfo, ...]:
        """Every document, in order."""
        groups = self._file["documents"]
        return tuple(
            DocumentInfo(
                index=index,
                name=str(group.attrs["name"]),
                split=str(group.attrs["split"]),  # type: ignore[arg-type]  # validated there
                n_tokens=int(group.attrs["n_tokens"]),
                n_queries=int(group["query_positions"].shape[0]),
                source=str(group.attrs["source"]),
                first_token=int(group.attrs["first_token"]),
                text_sha256=str(group.attrs["text_sha256"]),
            )
            for index, group in enumerate(groups[name] for name in sorted(groups, key=int))
        )

    def documents_of(self, split: Split) -> tuple[DocumentInfo, ...]:
        """The documents of one split, in order."""
        return tuple(document for document in self.documents if document.split == split)

    def keys(
        self, document: int | DocumentInfo, layer: int, tokens: slice = slice(None)
    ) -> Float32:
        """Keys after RoPE and qk-norm: (n_tokens, n_kv_heads, head_dim), float32."""
        return self._activations(document, layer, "keys", tokens)

    def keys_pre_rope(
        self, document: int | DocumentInfo, layer: int, tokens: slice = slice(None)
    ) -> Float32:
        """Keys before RoPE, after qk-norm: (n_tokens, n_kv_heads, head_dim), float32."""
        if not self.info.has_keys_pre_rope:
            raise ArtifactError(
                f"{self.path} has no keys before RoPE", "capture again with --pre-rope"
            )
        return self._activations(document, layer, "keys_pre_rope", tokens)

    def values(
        self, document: int | DocumentInfo, layer: int, tokens: slice = slice(None)
    ) -> Float32:
        """Values: (n_tokens, n_kv_heads, head_dim), float32."""
        return self._activations(document, layer, "values", tokens)

    def queries(
        self, document: int | DocumentInfo, layer: int, rows: slice = slice(None)
    ) -> Float32:
        """Queries as attention got them, at `query_positions`: (n_queries, n_q_heads, head_dim)."""
        return self._activations(document, layer, "queries", rows)

    @reads
    def query_positions(self, document: int | DocumentInfo) -> npt.NDArray[np.int64]:
        """The token positions of the captured queries, ascending: (n_queries,)."""
        return np.asarray(self._file[f"{self._place(document)}/query_positions"], np.int64)

    @reads
    def token_ids(self, document: int | DocumentInfo) -> npt.NDArray[np.int64]:
        """The tokens of a document: (n_tokens,)."""
        return np.asarray(self._file[f"{self._place(document)}/token_ids"], np.int64)

    @property
    def query_mean(self) -> Float32:
        """Mean query over all positions of the fit documents: (n_layers, n_q_heads, head_dim)."""
        return self._finite("query_mean", slice(None))

    def query_second_moment(self, layer: int) -> Float32:
        """E[q q^T] over all positions of the fit documents: (n_q_heads, head_dim, head_dim)."""
        moments: Float32 = self._finite("query_second_moment", slice(layer, layer + 1))[0]
        return moments

    @property
    def output_weight(self) -> Float32:
        """||W_o of the head||_F^2 / head_dim: (n_layers, n_q_heads)."""
        weight = self._float32("output_weight", slice(None))
        if not (np.isfinite(weight).all() and (weight >= 0).all()):
            raise self._damaged("output_weight is not finite and non-negative")
        return weight

    @property
    @reads
    def fisher(self) -> npt.NDArray[np.float64] | None:
        """F, squared gradient of log p(sampled label) per coordinate of a head's output:
        (n_layers, n_q_heads), None where it was not captured."""
        if "fisher" not in self._file:
            return None
        weight = np.asarray(self._file["fisher"][()], dtype=np.float64)
        if weight.shape != (self.n_layers, self.n_q_heads):
            raise self._damaged(f"fisher has shape {weight.shape}")
        if not (np.isfinite(weight).all() and (weight >= 0).all()):
            raise self._damaged("fisher is not finite and non-negative")
        return weight

    @property
    @reads
    def fisher_standard_error(self) -> npt.NDArray[np.float64]:
        """Standard error of `fisher` over its passes, NaN where there was one pass."""
        return np.asarray(self._file["fisher_standard_error"][()], dtype=np.float64)

    def _place(self, document: int | DocumentInfo) -> str:
        index = document if isinstance(document, int) else document.index
        if not 0 <= index < len(self.documents):
            raise IndexError(f"document {index} of {len(self.documents)}")
        return document_path(index)

    def _activations(
        self, document: int | DocumentInfo, layer: int, name: str, rows: slice
    ) -> Float32:
        if not 0 <= layer < self.n_layers:
            raise IndexError(f"layer {layer} of {self.n_layers}")
        return self._float32(f"{self._place(document)}/{layer_path(layer)}/{name}", rows)

    @reads
    def _float32(self, name: str, rows: slice) -> Float32:
        dataset = self._file[name]
        raw = dataset[rows]
        if dataset.attrs.get(STORED_AS) == BFLOAT16:
            return from_bfloat16_bits(raw)
        return np.ascontiguousarray(raw, dtype=np.float32)

    def _finite(self, name: str, rows: slice) -> Float32:
        values = self._float32(name, rows)
        if not np.isfinite(values).all():
            raise self._damaged(f"{name} holds NaN or Inf")
        return values
