"""Frames and books made from a chosen number of calibration tokens, for studies that vary them.

    mu = (1/n) sum_{t < n} k_t,  or before RoPE (1/n) sum_{t < n} R_t^-1 k_t

The first n tokens of the documents, in order.  Means are taken before RoPE where the frequencies
are known (they serve every model), else after it.  Source: ours; `sphkv_cli.fit` does the same for
all `fit` documents.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sphkv_cli.artifacts.capture import CaptureReader, DocumentInfo
from sphkv_cli.artifacts.empirical_books import book_keys
from sphkv_cli.artifacts.fit_tables import VectorKind
from sphkv_cli.errors import SphkvError
from sphkv_cli.fit.angle_statistics import count_angles
from sphkv_cli.fit.captured_vectors import token_chunks
from sphkv_cli.fit.empirical_fit import LayerBooks, codes_of_heads, fit_layer_books
from sphkv_cli.fit.rope_frequencies import rope_frequencies
from sphkv_codebooks.frame import FrameSet
from sphkv_codebooks.rotary import Float32Array, rotate
from sphkv_codebooks.rotation import Rotation
from sphkv_codebooks.spherical_code import SphericalCode

ONLINE_TOKENS = 2048
"""Tokens of a prompt that online books are fitted to: 32 angles each settle a histogram."""

HeadCodes = tuple[Sequence[SphericalCode], Sequence[SphericalCode]]
"""Codes of the keys and of the values of one layer, one per KV head."""


def block_code(head_dim: int, bits: Sequence[int], radius: str) -> SphericalCode:
    """The analytic code of these bits per level; one norm where the blocks span a whole head."""
    max_depth = head_dim.bit_length() - 1
    levels = tuple(bits[:max_depth])
    spec = radius if len(levels) < max_depth else "norm"
    name = f"polar-{''.join(map(str, levels))}"
    return SphericalCode.analytic(
        f"{name}-{spec.replace('lloyd_max:', 'r')}", head_dim, levels, spec
    )


def frequencies_or_none(capture: CaptureReader) -> Float32Array | None:
    """The model's rotary frequencies, None where it has none that a mean can follow."""
    try:
        return rope_frequencies(capture)
    except SphkvError:
        return None


def mean_frames(
    capture: CaptureReader,
    documents: Sequence[DocumentInfo],
    rotation: Rotation,
    max_tokens: int | None = None,
    layers: Sequence[int] | None = None,
) -> FrameSet:
    """Frames whose means come from the first `max_tokens` tokens of `documents`, None for all.

    layers: those that will be used, None for all; the means of others stay 0.

    Raises:
        SphkvError: NaN or Inf among the keys.
    """
    inv_freq = frequencies_or_none(capture)
    means = torch.zeros(capture.n_layers, capture.n_kv_heads, capture.head_dim, dtype=torch.float64)
    for layer in range(capture.n_layers) if layers is None else layers:
        n_tokens = 0
        for keys, positions in first_tokens(capture, documents, layer, "keys", max_tokens):
            if inv_freq is not None:
                keys = rotate(keys, -positions, torch.from_numpy(inv_freq[layer].copy()))
            means[layer] += keys.sum(dim=0, dtype=torch.float64)
            n_tokens += keys.shape[0]
        means[layer] /= n_tokens
    return FrameSet(
        rotation=rotation,
        centring="post_rope" if inv_freq is None else "pre_rope",
        key_mean=means.numpy().astype(np.float32),
        inv_freq=inv_freq,
    )


def calibrated_codes(
    capture: CaptureReader,
    documents: Sequence[DocumentInfo],
    frames: FrameSet,
    code: SphericalCode,
    layer: int,
    max_tokens: int | None = None,
) -> HeadCodes:
    """`code` with books fitted to the angles of one layer in these frames, per KV head."""

    def framed(kind: VectorKind) -> Iterator[Tensor]:
        for vectors, positions in first_tokens(capture, documents, layer, kind, max_tokens):
            if kind == "keys":
                yield frames.keys_to_frame(layer, vectors, positions)
            else:
                yield frames.values_to_frame(vectors)

    return fitted_codes(code, framed("keys"), framed("values"))


def fitted_codes(
    code: SphericalCode, keys: Iterator[Tensor], values: Iterator[Tensor]
) -> HeadCodes:
    """`code` with books fitted to framed batches (n_tokens, n_kv_heads, head_dim), per head.

    One histogram per level and head, then Lloyd-Max from the analytic book on.
    """
    histograms = {
        ("keys", code.pairing): count_angles(keys, code.pairing),
        ("values", code.pairing): count_angles(values, code.pairing),
    }
    books: LayerBooks = fit_layer_books(book_keys((code,)), histograms)  # type: ignore[arg-type]
    n_heads = len(next(iter(books.values())))
    return codes_of_heads(code, "keys", books, n_heads), codes_of_heads(
        code, "values", books, n_heads
    )


def online_codes(code: SphericalCode, keys: Tensor, values: Tensor) -> HeadCodes:
    """`code` fitted to a framed prompt, to `ONLINE_TOKENS` of its tokens, evenly spaced."""
    step = max(-(-keys.shape[0] // ONLINE_TOKENS), 1)
    return fitted_codes(code, iter((keys[::step],)), iter((values[::step],)))


def first_tokens(
    capture: CaptureReader,
    documents: Sequence[DocumentInfo],
    layer: int,
    vectors: Literal["keys", "values"],
    max_tokens: int | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunks and positions of the first `max_tokens` tokens of the documents, in order."""
    left = max_tokens
    for document in documents:
        for chunk, positions in token_chunks(capture, document, layer, vectors):
            if left is None:
                yield chunk, positions
                continue
            if left <= 0:
                return
            yield chunk[:left], positions[:left]
            left -= chunk.shape[0]
