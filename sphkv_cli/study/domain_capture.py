"""Captures of texts of every domain, made on the fly, and calibrations made from them.

Each holds `fit` documents to learn means and books from and `judge` documents to be measured on.
Source: ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sphkv_cli.artifacts.capture import CaptureReader, DocumentInfo
from sphkv_cli.errors import UsageError
from sphkv_cli.evaluation.coding import KeyValueCoding, ModelCacheShape
from sphkv_cli.evaluation.protocol import UniformProtocol
from sphkv_cli.study.calibration import block_code, calibrated_codes, mean_frames
from sphkv_cli.study.coding_errors import coding_errors
from sphkv_cli.study.domains import Domain, Tokenizer
from sphkv_cli.study.head_coding import AnalyticBooks, FittedBooks, HeadCoding
from sphkv_cli.study.inputs import StudyInputs
from sphkv_codebooks.frame import FrameSet
from sphkv_codebooks.rotation import Rotation
from sphkv_codebooks.spherical_code import SphericalCode

FloatArray = npt.NDArray[np.float64]

DOCUMENT_TOKENS = 512
BITS, RADIUS = (4, 2, 2, 2), "lloyd_max:2"
PROTOCOL = UniformProtocol()


@dataclass(frozen=True, eq=False)
class Captured:
    """One domain as the model saw it."""

    name: str
    inputs: StudyInputs
    _centred: dict[tuple[tuple[int, ...], int], FrameSet] = field(default_factory=dict, init=False)

    @property
    def capture(self) -> CaptureReader:
        """Its capture."""
        return self.inputs.require_capture()

    @property
    def fit(self) -> tuple[DocumentInfo, ...]:
        """Documents to learn from."""
        return self.capture.documents_of("fit")

    @property
    def judge(self) -> tuple[DocumentInfo, ...]:
        """Documents that are measured."""
        return self.inputs.documents("judge")

    @property
    def code(self) -> SphericalCode:
        """The code under study with its analytic books."""
        return block_code(self.capture.head_dim, BITS, RADIUS)

    def rotation(self, seed: int) -> Rotation:
        """The same for every domain."""
        return Rotation("hadamard", self.capture.head_dim, seed)

    @property
    def shape(self) -> ModelCacheShape:
        """Of the model."""
        capture = self.capture
        return ModelCacheShape(capture.n_layers, capture.n_kv_heads, capture.head_dim)

    def centred(self, documents: Sequence[DocumentInfo], max_tokens: int) -> FrameSet:
        """Frames with the means of these tokens and no rotation; made once."""
        key = tuple(document.index for document in documents), max_tokens
        if key not in self._centred:
            self._centred[key] = mean_frames(
                self.capture,
                documents,
                Rotation("none", self.capture.head_dim),
                max_tokens,
                self.inputs.layers(),
            )
        return self._centred[key]

    def calibrated(
        self,
        label: str,
        documents: Sequence[DocumentInfo],
        max_tokens: int,
        *,
        books: bool,
        seed: int,
    ) -> HeadCoding:
        """A coding with means, and books if asked, from the first max_tokens of `documents`.

        seed: of the rotation.
        """
        capture, code = self.capture, self.code
        frames = replace(self.centred(documents, max_tokens), rotation=self.rotation(seed))
        if not books:
            return HeadCoding(label, code, AnalyticBooks(code), frames, self.shape)
        # Layers that are not measured need no books of their own.
        measured = set(self.inputs.layers())
        analytic = ([code] * capture.n_kv_heads, [code] * capture.n_kv_heads)
        fitted = [
            calibrated_codes(capture, documents, frames, code, layer, max_tokens)
            if layer in measured
            else analytic
            for layer in range(capture.n_layers)
        ]
        return HeadCoding(label, code, FittedBooks(fitted), frames, self.shape)

    def output_errors(self, codings: Sequence[KeyValueCoding]) -> FloatArray:
        """Relative output error of every coding on its judge documents, (n_codings)."""
        found = coding_errors(
            self.capture,
            self.judge,
            self.inputs.layers(),
            codings,
            PROTOCOL,
            max_queries=self.inputs.options.max_queries,
        )
        return np.array([errors.output_error for errors in found])


def model_name(inputs: StudyInputs) -> str:
    """The named model, or the captured one; UsageError without either."""
    if inputs.model is not None:
        return inputs.model
    if inputs.capture is not None and inputs.capture.architecture != "synthetic":
        return inputs.capture.model
    raise UsageError("this study runs the model", "name it with --model")


def tokenizer_of(model: str) -> Tokenizer:
    """Of a model by name; raises as `resolve_model` and `load_tokenizer` do."""
    from sphkv_cli.models.load import load_tokenizer
    from sphkv_cli.models.source import resolve_model

    loaded = load_tokenizer(resolve_model(model))

    def encode(text: str) -> Sequence[int]:
        ids: Sequence[int] = loaded(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def decode(ids: Sequence[int]) -> str:
        text: str = loaded.decode(ids, skip_special_tokens=True)
        return text

    return Tokenizer(encode, decode, len(loaded))


def capture_domain(
    inputs: StudyInputs,
    model: str,
    domain: Domain,
    tokenizer: Tokenizer,
    folder: Path,
    n_fit: int,
) -> Path:
    """Capture one domain with n_fit tokens to learn from; the path of the capture."""
    from sphkv_cli.capture.options import CaptureOptions
    from sphkv_cli.capture.stage import capture

    n_judge = inputs.options.max_documents * DOCUMENT_TOKENS
    path = folder / f"{domain.name.replace(' ', '-')}.h5"
    options = CaptureOptions(
        model=model,
        texts=domain.written(folder, tokenizer, n_fit, n_judge),
        document_tokens=DOCUMENT_TOKENS,
    )
    capture(options, path, progress=inputs.progress)
    return path
