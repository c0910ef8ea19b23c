"""Writes one document's shard while its forward pass runs, layer by layer.

Each layer's chunk is checked, rounded and written before the next layer computes, so at most one
layer's chunk of one document is held. Query sums for the summaries of fit documents are added up in
float64:  sum_t q_t  and  sum_t q_t q_t^T,  over every position, stored or not.
"""

from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import torch

from sphkv_cli.artifacts.bfloat16 import BFLOAT16
from sphkv_cli.artifacts.capture_info import CaptureInfo
from sphkv_cli.artifacts.capture_writer import create_document, layer_path
from sphkv_cli.capture.documents import PlannedDocument
from sphkv_cli.capture.recorder import LayerChunk
from sphkv_cli.capture.work_folder import DOCUMENT
from sphkv_cli.errors import SphkvError
from sphkv_cli.models.geometry import ModelGeometry
from sphkv_cli.progress import Progress

QUERY_SUM = "query_sum"
QUERY_OUTER_SUM = "query_outer_sum"
FISHER_PASSES = "fisher_passes"


class ShardWriter:
    """The sink of an `AttentionRecorder` for one document."""

    def __init__(
        self,
        file: h5py.File,
        info: CaptureInfo,
        geometry: ModelGeometry,
        document: PlannedDocument,
        progress: Progress,
    ) -> None:
        self._group = create_document(
            file,
            DOCUMENT,
            info,
            document.info,
            token_ids=document.token_ids,
            query_positions=document.query_positions,
        )
        self._info = info
        self._geometry = geometry
        self._document = document
        self._progress = progress
        self._sums: tuple[h5py.Dataset, h5py.Dataset] | None = None
        if document.info.split == "fit":
            shape = (info.n_layers, info.n_q_heads, info.head_dim)
            self._sums = (
                file.create_dataset(QUERY_SUM, shape, "<f8"),
                file.create_dataset(QUERY_OUTER_SUM, (*shape, info.head_dim), "<f8"),
            )

    def write(self, chunk: LayerChunk) -> None:
        """Write what one layer received for the newest tokens.

        Raises:
            SphkvError: a NaN or an infinity; layer, tensor and head are named.
        """
        n_tokens = chunk.keys.shape[0]
        place = self._group[layer_path(chunk.layer)]
        tensors = [("keys", chunk.keys), ("values", chunk.values)]
        if chunk.keys_pre_rope is not None:
            tensors.append(("keys_pre_rope", chunk.keys_pre_rope))
        for name, tensor in tensors:
            self._check_finite(name, chunk, tensor)
            rows = slice(chunk.first, chunk.first + n_tokens)
            place[name][rows] = stored(tensor, self._info.stored_as)
        self._check_finite("queries", chunk, chunk.queries)
        positions = self._document.query_positions
        start, stop = np.searchsorted(positions, (chunk.first, chunk.first + n_tokens))
        if stop > start:
            picked = chunk.queries
            if stop - start < n_tokens:
                rows_here = torch.from_numpy(positions[start:stop].astype(np.int64) - chunk.first)
                picked = picked[rows_here.to(picked.device)]
            place["queries"][start:stop] = stored(picked, self._info.stored_as)
        if self._sums is not None:
            self._add_to_sums(self._sums, chunk)
        self._progress.advance(n_tokens / self._info.n_layers)

    @staticmethod
    def _add_to_sums(sums: tuple[h5py.Dataset, h5py.Dataset], chunk: LayerChunk) -> None:
        queries = chunk.queries.transpose(0, 1).double()
        for dataset, new in (
            (sums[0], queries.sum(dim=1)),
            (sums[1], queries.transpose(1, 2) @ queries),
        ):
            added = new.cpu().numpy()
            dataset[chunk.layer] = added if chunk.first == 0 else dataset[chunk.layer] + added

    def _check_finite(self, name: str, chunk: LayerChunk, tensor: torch.Tensor) -> None:
        # A NaN or an infinity never leaves a sum; a sum that overflowed is looked into.
        if bool(torch.isfinite(tensor.sum(dtype=torch.float32))):
            return
        bad = ~torch.isfinite(tensor)
        if not bool(bad.any()):
            return
        token, head = (int(i) for i in bad.any(dim=2).nonzero()[0])
        kind = "NaN" if bool(torch.isnan(tensor[token, head]).any()) else "infinity"
        raise SphkvError(
            f"{kind} in the {name} of layer {self._geometry.layers[chunk.layer].name}, head "
            f"{head}, token {chunk.first + token} of document {self._document.info.name}",
            "run the model in another --dtype (float16 overflows), or check its weights",
        )


def stored(x: torch.Tensor, stored_as: str) -> npt.NDArray[Any]:
    """A tensor rounded to the stored type, as the array that HDF5 gets; any shape."""
    rounded = x.detach().to(getattr(torch, stored_as)).contiguous().cpu()
    if stored_as == BFLOAT16:
        array: npt.NDArray[Any] = rounded.view(torch.int16).numpy().view(np.uint16)
        return array
    return rounded.numpy()
