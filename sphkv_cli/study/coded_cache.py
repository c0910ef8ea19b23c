"""What several studies share: frames made from the `fit` documents, codings in them, errors.

Frames are those of `calibration.mean_frames` (the mean key before RoPE where the model's
frequencies are known, else after it), or no centring at all.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sphkv_cli.artifacts.fit_tables import VectorKind
from sphkv_cli.blocks import counted
from sphkv_cli.evaluation.coding import KeyValueCoding, ModelCacheShape
from sphkv_cli.evaluation.frame_coding import FrameCoding
from sphkv_cli.evaluation.protocol import UniformProtocol
from sphkv_cli.fit.captured_vectors import token_chunks
from sphkv_cli.study.calibration import mean_frames
from sphkv_cli.study.coding_errors import CodingErrors, coding_errors
from sphkv_cli.study.inputs import StudyInputs
from sphkv_codebooks.frame import FrameSet
from sphkv_codebooks.rotation import Rotation
from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.tier import TierFormat

PROTOCOL = UniformProtocol()


def study_frames(inputs: StudyInputs, rotation: Rotation, *, is_centred: bool) -> FrameSet:
    """Frames with this rotation; centred ones take their means from the `fit` documents."""
    if not is_centred:
        return FrameSet(rotation)
    return mean_frames(inputs.require_capture(), inputs.documents("fit"), rotation)


def cache_shape(inputs: StudyInputs) -> ModelCacheShape:
    """Layers, heads and coordinates of the captured model."""
    capture = inputs.require_capture()
    return ModelCacheShape(capture.n_layers, capture.n_kv_heads, capture.head_dim)


def coding_of(
    inputs: StudyInputs, code: SphericalCode, frames: FrameSet, label: str
) -> FrameCoding:
    """Keys and values of every layer in one code."""
    return FrameCoding(TierFormat.spherical(code), frames, cache_shape(inputs), label)


def errors_of(inputs: StudyInputs, codings: Sequence[KeyValueCoding]) -> list[CodingErrors]:
    """Errors on the judge documents in the uniform protocol, in order."""
    return coding_errors(
        inputs.require_capture(),
        inputs.documents("judge"),
        inputs.layers(),
        codings,
        PROTOCOL,
        max_queries=inputs.options.max_queries,
        progress=inputs.progress,
    )


def framed_chunks(
    inputs: StudyInputs, frames: FrameSet, layer: int, kind: VectorKind
) -> Iterator[Tensor]:
    """Judge keys or values of one layer in their frame, (n_tokens, n_kv_heads, head_dim) each."""
    for document in inputs.documents("judge"):
        for chunk, positions in token_chunks(inputs.require_capture(), document, layer, kind):
            if kind == "keys":
                yield frames.keys_to_frame(layer, chunk, positions)
            else:
                yield frames.values_to_frame(chunk)


def framed_vectors(inputs: StudyInputs, frames: FrameSet, layer: int, kind: VectorKind) -> Tensor:
    """All of them at once."""
    return torch.cat(list(framed_chunks(inputs, frames, layer, kind)))


def judged_on(inputs: StudyInputs) -> str:
    """The condition that every study of a capture states."""
    documents = inputs.documents("judge")
    return (
        f"{inputs.require_capture().model}: {sum(d.n_tokens for d in documents):,} tokens of "
        f"{counted(len(documents), 'judge document')}, {len(inputs.layers())} layers; means from "
        "`fit` documents."
    )


def protocol_condition() -> str:
    """Window and first tokens, in words."""
    return f"Protocol {PROTOCOL.description}; both are outside the rates."
