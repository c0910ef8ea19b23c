"""Quality of published methods and of our codes at true rates, in the uniform protocol.

Every query of a held-out document reads the coded past; the last 32 tokens before it and the first
4 stay dense.  Rotated codes are run with several rotation seeds.  Run, after `make model`:

    sphkv capture --model smollm2 --document-tokens 1024 --max-tokens 8192 --output capture.h5 \
        --text-file fit=examples/text/pride_and_prejudice.txt \
        --text-file select=examples/text/persuasion.txt \
        --text-file judge=examples/text/emma.txt \
        --text-file judge=examples/text/other_kind/us_constitution.txt
    python examples/quality_uniform.py capture.h5

It prints next-token KL(dense || coded) per document, mean over seeds, perplexity ratio and top-1
agreement.  Means and norms come from the capture's fit documents, "chosen frames" (centring and
balancing per layer, sinks) are what `sphkv fit-codebooks` measures on its select documents, scores
come from its judge documents.
"""

import argparse
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from sphkv_cli.artifacts.capture import CaptureReader
from sphkv_cli.errors import SphkvError
from sphkv_cli.evaluation.coding import DenseCoding, KeyValueCoding, ModelCacheShape
from sphkv_cli.evaluation.comparator_coding import ComparatorCoding
from sphkv_cli.evaluation.frame_coding import FrameCoding
from sphkv_cli.evaluation.judged_model import JudgedModel
from sphkv_cli.evaluation.judging import JudgedDocument, judge_document
from sphkv_cli.evaluation.protocol import UniformProtocol
from sphkv_cli.evaluation.result import DocumentScore
from sphkv_cli.evaluation.sinks import SinksKeptDense
from sphkv_cli.fit.frames import FittedFrames, fit_frames
from sphkv_cli.fit.options import FitOptions
from sphkv_cli.models.load import LoadOptions, load_model
from sphkv_cli.models.source import resolve_model
from sphkv_cli.progress import NullProgress
from sphkv_codebooks.comparators.eden import Eden
from sphkv_codebooks.comparators.float8 import Float8
from sphkv_codebooks.comparators.integer import IntegerPerToken
from sphkv_codebooks.comparators.interface import VectorQuantizer
from sphkv_codebooks.comparators.kivi import KiviKeys, KiviValues
from sphkv_codebooks.comparators.turboquant_mse import TurboQuantMse
from sphkv_codebooks.rotation import Rotation
from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.tier import TierFormat

LABELS = {
    "none": "uncentred",
    "post_rope": "post-RoPE mean removed",
    "pre_rope": "pre-RoPE mean removed",
    "auto": "chosen frames",
}
BASELINE = "TurboQuant-MSE 3 bit, Haar, uncentred"


@dataclass(frozen=True)
class Rows:
    """Makes the codings of the table for one model."""

    shape: ModelCacheShape
    frames: dict[str, FittedFrames]
    seeds: Sequence[int]
    everything: bool

    def published(self) -> Iterator[tuple[str, KeyValueCoding]]:
        """Without rotation: one run each."""
        for bits in (2, 4):
            yield f"KIVI-{bits}, groups of 32", self._pair(KiviKeys(bits), KiviValues(bits))
        yield "fp8 e4m3, no scale", self._pair(Float8(False), Float8(False))
        for bits in (4, 8) if self.everything else ():
            yield f"int{bits} per token", self._pair(IntegerPerToken(bits), IntegerPerToken(bits))
        yield "dense (control)", DenseCoding(self.shape)

    def rotated(self) -> Iterator[tuple[str, KeyValueCoding]]:
        """Rotated codes, one run per seed under the same name."""
        for seed in self.seeds:
            haar = Rotation("haar", self.shape.head_dim, seed)
            turbo3 = TurboQuantMse(3, self.shape.head_dim, haar)
            turbo4 = TurboQuantMse(4, self.shape.head_dim, haar)
            eden3 = Eden(3, self.shape.head_dim, "unbiased", haar)
            yield BASELINE, self._pair(turbo3, turbo3)
            yield "TurboQuant-MSE 3 bit, Haar, centred", self._pair(turbo3, turbo3, centred=True)
            if self.everything:
                yield "TurboQuant-MSE 4 bit, Haar, uncentred", self._pair(turbo4, turbo4)
                yield "EDEN unbiased 3 bit, Haar, centred", self._pair(eden3, eden3, centred=True)
            yield from self._codes(seed)

    def _codes(self, seed: int) -> Iterator[tuple[str, KeyValueCoding]]:
        paper = self._code("paper 4/2/2/2, fp16 radii", (4, 2, 2, 2), "fp16")
        block = self._code("4/2/2/2, 2-bit radii", (4, 2, 2, 2), "lloyd_max:2")
        depth = self.shape.head_dim.bit_length() - 1
        full_bits = (4, *(2,) * (depth - 2), 3)
        full = self._code(f"full depth {'/'.join(map(str, full_bits))}", full_bits, "norm")
        rows = [(paper, "none"), (paper, "post_rope"), (block, "post_rope"), (full, "none")]
        rows += [(full, "post_rope"), (full, "pre_rope"), (full, "auto"), (block, "auto")]
        for tier, choice in rows:
            if choice in self.frames:
                yield f"{tier.name}, {LABELS[choice]}", self._coding(tier, choice, seed)
        protected = [(full, "post_rope"), (full, "pre_rope"), (full, "auto"), (block, "auto")]
        for tier, choice in protected:
            if choice not in self.frames:
                continue
            sinks = self.frames[choice].sinks
            if sinks.factor > 0 and (self.everything or choice != "post_rope"):
                label = f"{tier.name}, {LABELS[choice]}, sinks < {sinks.factor:g} dense"
                yield label, SinksKeptDense(self._coding(tier, choice, seed), sinks)

    def _code(self, name: str, bits: tuple[int, ...], radius: str) -> TierFormat:
        return TierFormat.spherical(SphericalCode.analytic(name, self.shape.head_dim, bits, radius))

    def _coding(self, tier: TierFormat, choice: str, seed: int) -> FrameCoding:
        rotation = Rotation("hadamard", self.shape.head_dim, seed)
        return FrameCoding(tier, replace(self.frames[choice].frames, rotation=rotation), self.shape)

    def _pair(
        self, keys: VectorQuantizer, values: VectorQuantizer, *, centred: bool = False
    ) -> KeyValueCoding:
        frames = None
        if centred:
            plain = Rotation("none", self.shape.head_dim)
            frames = replace(self.frames["auto"].frames, rotation=plain, balancing=None)
            frames = None if frames.key_mean is None else frames
        return ComparatorCoding("", keys, values, self.shape, frames)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("capture", type=Path)
    parser.add_argument("--model", help="where the captured model is, if its name does not say")
    parser.add_argument("--documents", type=int, default=4, help="judge documents, spread evenly")
    parser.add_argument("--tokens", type=int, help="only so many first tokens of each document")
    parser.add_argument("--everything", action="store_true", help="more rows")
    parser.add_argument("--seeds", type=int, default=3, help="rotation seeds, from 42 on")
    parser.add_argument("--only", default="", help="only rows whose name contains this")
    arguments = parser.parse_args()
    with CaptureReader(arguments.capture) as capture:
        model = JudgedModel.of(
            load_model(resolve_model(arguments.model or capture.model), LoadOptions())
        )
        model.require_captured(capture.info, str(arguments.capture))
        judged = capture.documents_of("judge")
        step = max(len(judged) / arguments.documents, 1.0)
        chosen = [judged[int(i * step)] for i in range(min(arguments.documents, len(judged)))]
        documents = [
            JudgedDocument(info.name, torch.from_numpy(capture.token_ids(info)[: arguments.tokens]))
            for info in chosen
        ]
        frames = choices(capture)
    rows = Rows(model.shape, frames, range(42, 42 + arguments.seeds), arguments.everything)
    codings = [
        (name, coding)
        for name, coding in (*rows.published(), *rows.rotated())
        if arguments.only in name
    ]
    scores: dict[str, dict[str, list[DocumentScore]]] = defaultdict(lambda: defaultdict(list))
    protocol = UniformProtocol()
    print(f"{model.geometry.architecture}, {protocol.description}", flush=True)
    for document in documents:
        found = judge_document(model, document, [coding for _, coding in codings], protocol)
        for (name, _), (score, _) in zip(codings, found, strict=True):
            scores[name][document.name].append(score)
        print(f"\nafter {document.name} ({document.n_tokens} tokens)")
        print(table(scores), flush=True)


def choices(capture: CaptureReader) -> dict[str, FittedFrames]:
    """Every centring for all layers, where the model's RoPE allows it, and the measured choice."""
    found = {}
    for centring in ("none", "post_rope", "pre_rope", "auto"):
        balancing = "auto" if centring == "auto" else "none"
        options = FitOptions(centring=centring, balancing=balancing)
        try:
            found[centring] = fit_frames(options, capture, NullProgress())
        except SphkvError as error:
            print(error)
    return found


def table(scores: dict[str, dict[str, list[DocumentScore]]]) -> str:
    """Rows by name; KL per document, arithmetic mean over seeds, with the spread of seeds."""
    names = list(next(iter(scores.values())))
    lines = [
        f"{'K and V code':58} {'code':>5} {'laid':>6}  "
        + " ".join(f"{'KL ' + name[:16]:>20}" for name in names)
        + f" {'geo. KL':>8} {'x base':>7} {'ppl':>6} {'top1':>6} {'dense keys':>10}"
    ]
    baseline = _geometric(scores[BASELINE]) if BASELINE in scores else math.nan
    for row, documents in scores.items():
        everything = [score for document in documents.values() for score in document]
        cells = []
        for document in documents.values():
            kl = np.array([score.kl for score in document])
            spread = f" ±{kl.std(ddof=1):.4f}" if len(kl) > 1 else ""
            cells.append(f"{kl.mean():.4f}{spread}")
        geometric = _geometric(documents)
        ratios = [math.log(s.perplexity_coded / s.perplexity_dense) for s in everything]
        lines.append(
            f"{row:58} {everything[0].code_rate:5.2f} "
            f"{np.mean([s.laid_out_rate for s in everything]):6.2f}  "
            + " ".join(f"{cell:>20}" for cell in cells)
            + f" {geometric:8.4f} {geometric / baseline:7.2f} {math.exp(np.mean(ratios)):6.3f}"
            + f" {np.mean([s.top1 for s in everything]):6.3f}"
            + f" {np.mean([s.dense_key_fraction for s in everything]):10.2%}"
        )
    return "\n".join(lines)


def _geometric(documents: dict[str, list[DocumentScore]]) -> float:
    means = [float(np.mean([s.kl for s in document])) for document in documents.values()]
    return math.exp(float(np.mean(np.log(np.maximum(means, 1e-12)))))


if __name__ == "__main__":
    main()
