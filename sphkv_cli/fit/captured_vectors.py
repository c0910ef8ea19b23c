"""Reading a capture for the fit: chunks of tokens per (document, layer), checked to be finite."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sphkv_cli.artifacts.capture import CaptureReader, DocumentInfo, Split
from sphkv_cli.errors import SphkvError

Vectors = Literal["keys", "values", "queries"]

TOKENS_PER_CHUNK = 4096
"""Tokens in memory at once, so that memory does not grow with the length of a document."""

QUERIES_PER_DOCUMENT = 256
"""Most queries per document and layer that logits are measured for, evenly spaced."""


@dataclass(frozen=True)
class LayerChunk:
    """Consecutive tokens of one document in one layer, and the queries of the document.

    keys, values: (n_tokens, n_kv_heads, head_dim), token `first_token` of the document first;
    queries: (n_queries, n_q_heads, head_dim), at query_positions (n_queries,) of the document.
    """

    first_token: int
    keys: Tensor
    values: Tensor
    queries: Tensor
    query_positions: Tensor

    @property
    def positions(self) -> Tensor:
        """Of its tokens in the document, (n_tokens,) int64."""
        return torch.arange(self.first_token, self.first_token + self.keys.shape[0])


def documents_of(capture: CaptureReader, split: Split) -> tuple[DocumentInfo, ...]:
    """The documents of one split.

    Raises:
        SphkvError: there are none.
    """
    documents = capture.documents_of(split)
    if not documents:
        raise SphkvError(
            f"{capture.path} has no document of the split {split!r}",
            "capture three documents or more with `sphkv capture`, or longer text",
        )
    return documents


def read_vectors(
    capture: CaptureReader,
    document: DocumentInfo,
    layer: int,
    vectors: Vectors,
    rows: slice = slice(None),
) -> Tensor:
    """Keys, values or queries of one document in one layer, float32.

    Raises:
        SphkvError: NaN or Inf among them; names the document, the layer and the head.
    """
    read = {"keys": capture.keys, "values": capture.values, "queries": capture.queries}[vectors]
    array = torch.from_numpy(read(document, layer, rows))
    low, high = torch.aminmax(array)  # NaN passes through; one pass, no mask of the whole array
    if not bool(torch.isfinite(low) and torch.isfinite(high)):
        head = int(torch.nonzero(~torch.isfinite(array).all(dim=2).all(dim=0))[0, 0])
        what = "NaN" if bool(torch.isnan(array[:, head]).any()) else "Inf"
        raise SphkvError(
            f"{what} among the {vectors} of layer {layer}, head {head} "
            f"({capture.path}, document {document.name!r})",
            f"capture again with another --dtype, or leave this document out; {verify(capture)}",
        )
    return array


def verify(capture: CaptureReader) -> str:
    """What to try where numbers make no sense: damage can leave a capture readable."""
    return f"`sphkv inspect --verify {capture.path}` tells whether it is as it was written"


def token_chunks(
    capture: CaptureReader, document: DocumentInfo, layer: int, vectors: Vectors
) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys or values of one document in one layer, a chunk of tokens at a time, and positions."""
    for first in range(0, document.n_tokens, TOKENS_PER_CHUNK):
        rows = slice(first, first + TOKENS_PER_CHUNK)
        chunk = read_vectors(capture, document, layer, vectors, rows)
        yield chunk, torch.arange(first, first + chunk.shape[0])


def layer_chunks(
    capture: CaptureReader, document: DocumentInfo, layer: int
) -> Iterator[LayerChunk]:
    """Everything one document leaves in one layer; raises as `read_vectors` does."""
    positions = capture.query_positions(document)
    step = -(-positions.size // QUERIES_PER_DOCUMENT)
    queries = read_vectors(capture, document, layer, "queries")[::step].contiguous()
    query_positions = torch.from_numpy(np.ascontiguousarray(positions[::step]))
    for first in range(0, document.n_tokens, TOKENS_PER_CHUNK):
        rows = slice(first, first + TOKENS_PER_CHUNK)
        yield LayerChunk(
            first_token=first,
            keys=read_vectors(capture, document, layer, "keys", rows),
            values=read_vectors(capture, document, layer, "values", rows),
            queries=queries,
            query_positions=query_positions,
        )
