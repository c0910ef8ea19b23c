"""Does a key of large norm have a large error, and does that matter in attention?

For every key in its centred frame, inside its (layer, KV head):

    relative error ||e||^2 / ||k'||^2,  absolute error ||e||,  norm ||k'|| over the head's median
    weight         sum over queries of p_it, the attention that the key gets where it is read coded
    damage         sum over queries of p_it (softmax_scale q_i.e_t)^2

binned by the decile of the norm within the head, and Spearman's rank correlation per head.
A fixed relative error (D does not depend on the norm) means an absolute error that grows with it.
Source: ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy import stats

from sphkv_cli.blocks import Table
from sphkv_cli.comparison.judged_head import JudgedHead, judged_heads
from sphkv_cli.plots.figures import Figure, PlotPanel, Series
from sphkv_cli.study.coded_cache import PROTOCOL, judged_on, protocol_condition, study_frames
from sphkv_cli.study.inputs import StudyInputs
from sphkv_cli.study.result import StudyResult
from sphkv_codebooks.rotation import Rotation
from sphkv_codebooks.search import SearchSpace, best_code
from sphkv_codebooks.spherical_code import SphericalCode

FloatArray = npt.NDArray[np.float64]

RATE = 3.25
N_BINS = 10


@dataclass(frozen=True)
class HeadErrors:
    """Per key of one document and head, (n_tokens,)."""

    norm: FloatArray
    relative: FloatArray
    absolute: FloatArray
    weight: FloatArray
    damage: FloatArray


def head_errors(judged: JudgedHead, code: SphericalCode, rotation: Rotation) -> HeadErrors:
    """Code the keys of one document and head."""
    keys = rotation.apply(judged.framed_keys)
    error = keys - code.decode(code.encode(keys))
    norm2 = keys.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    error2 = error.square().sum(-1)
    weights = judged.weights * judged.coded
    moved = (rotation.apply(judged.framed_queries) @ error.T) * judged.softmax_scale
    return HeadErrors(
        norm=_array(norm2.sqrt()),
        relative=_array(error2 / norm2),
        absolute=_array(error2.sqrt()),
        weight=_array(weights.sum(dim=(0, 1))),
        damage=_array((weights * moved.square()).sum(dim=(0, 1))),
    )


@dataclass(frozen=True)
class NormBins:
    """By decile of the norm within the head, (N_BINS,) each, over all heads; shares sum to 1.

    correlation: Spearman of norm with relative error, absolute error and damage, per head
    (n_heads, 3).
    """

    norm: FloatArray
    relative: FloatArray
    absolute: FloatArray
    weight_share: FloatArray
    damage_share: FloatArray
    correlation: FloatArray


def bin_by_norm(heads: Sequence[HeadErrors]) -> NormBins:
    """Bins over heads; `norm` and `absolute` are over the head's median norm."""
    sums = np.zeros((5, N_BINS))
    counts = np.zeros(N_BINS)
    correlation = []
    for head in heads:
        rank = np.argsort(np.argsort(head.norm, kind="stable"), kind="stable")
        bins = rank * N_BINS // head.norm.size
        median = np.median(head.norm)
        columns = (head.norm / median, head.relative, head.absolute / median)
        shares = (
            head.weight / max(head.weight.sum(), 1e-300),
            head.damage / max(head.damage.sum(), 1e-300),
        )
        for row, values in enumerate((*columns, *shares)):
            sums[row] += np.bincount(bins, values, minlength=N_BINS)
        counts += np.bincount(bins, minlength=N_BINS)
        correlation.append(
            [
                stats.spearmanr(head.norm, x).statistic
                for x in (head.relative, head.absolute, head.damage)
            ]
        )
    return NormBins(
        norm=sums[0] / counts,
        relative=sums[1] / counts,
        absolute=sums[2] / counts,
        weight_share=sums[3] / len(heads),
        damage_share=sums[4] / len(heads),
        correlation=np.array(correlation),
    )


def run(inputs: StudyInputs) -> StudyResult:
    """The study."""
    capture = inputs.require_capture()
    design = best_code(SearchSpace(capture.head_dim, "powers_of_two"), RATE)
    code = design.build("code")
    rotation = Rotation("hadamard", capture.head_dim, inputs.seed)
    frame = study_frames(inputs, Rotation("none", capture.head_dim), is_centred=True)
    heads: list[HeadErrors] = []
    layers = inputs.layers()
    inputs.progress.start("Layers", len(layers), "layers")
    for layer in layers:
        for document in inputs.documents("judge"):
            judged = judged_heads(
                capture, document, layer, frame, PROTOCOL, inputs.options.max_queries
            )
            heads += [head_errors(head, code, rotation) for head in judged]
        inputs.progress.advance()
    bins = bin_by_norm(heads)
    return StudyResult(
        tables=(
            Table(
                f"Keys by norm within their head (centred, {design.rate:.3g} bits, D predicted "
                f"{design.distortion:.4f})",
                (
                    *("decile", "norm/median", "relative error", "absolute error/median norm"),
                    *("attention", "damage", "damage per attention"),
                ),
                [
                    (
                        i + 1,
                        bins.norm[i],
                        bins.relative[i],
                        bins.absolute[i],
                        f"{bins.weight_share[i]:.1%}",
                        f"{bins.damage_share[i]:.1%}",
                        bins.damage_share[i] / max(bins.weight_share[i], 1e-300),
                    )
                    for i in range(N_BINS)
                ],
                text_columns=0,
            ),
            _correlation_table(bins),
        ),
        figures=(_figure(bins),),
        reading=_reading(bins),
        conditions=(
            judged_on(inputs),
            protocol_condition(),
            "Damage is the softmax-weighted squared logit error; shares are means over heads.",
        ),
    )


def _correlation_table(bins: NormBins) -> Table:
    names = ("relative error", "absolute error", "damage")
    low, middle, high = np.nanquantile(bins.correlation, (0.1, 0.5, 0.9), axis=0)
    return Table(
        "Spearman's correlation with the norm, per document, layer and head",
        ("norm with", "10 %", "median", "90 %"),
        [(names[i], low[i], middle[i], high[i]) for i in range(3)],
    )


def _figure(bins: NormBins) -> Figure:
    deciles = list(range(1, N_BINS + 1))
    return Figure(
        "norms",
        "Errors of keys and their share in attention by the decile of the norm in its head.",
        (
            PlotPanel(
                "Relative error stays, absolute error grows",
                "norm over the head's median",
                "error",
                (
                    Series("||e||^2 / ||k||^2", bins.norm.tolist(), bins.relative.tolist(), "both"),
                    Series(
                        "||e|| / median norm", bins.norm.tolist(), bins.absolute.tolist(), "both"
                    ),
                ),
                y_scale="log",
            ),
            PlotPanel(
                "Where it matters",
                "decile of the norm",
                "share",
                (
                    Series("attention", deciles, bins.weight_share.tolist(), "both"),
                    Series("damage", deciles, bins.damage_share.tolist(), "both", emphasis=True),
                ),
            ),
        ),
    )


def _reading(bins: NormBins) -> tuple[str, str]:
    relative, absolute, damage = np.nanmedian(bins.correlation, axis=0)
    top = bins.relative[-1] / np.median(bins.relative)
    lowest = bins.relative[0] / np.median(bins.relative)
    most = int(bins.damage_share.argmax())
    where = (
        "smallest" if most == 0 else "largest" if most == N_BINS - 1 else f"{most + 1}th decile of"
    )
    large = (
        "yes in absolute terms, no in relative ones"
        if absolute > 0.5 and abs(relative) < 0.3
        else ("yes" if absolute > 0.5 else "hardly")
    )
    return (
        f"Does a large norm mean a large error: {large} (Spearman {absolute:.2f} with the absolute "
        f"error, {relative:.2f} with the relative one; the largest tenth has {top:.2f} times the "
        f"median relative error, the smallest {lowest:.2f} times).",
        f"In attention the {where} norms carry most of the damage ({bins.damage_share[most]:.0%}, "
        f"with {bins.weight_share[most]:.0%} of the attention; the largest tenth "
        f"{bins.damage_share[-1]:.0%} with {bins.weight_share[-1]:.0%}); damage and norm correlate "
        f"with {damage:.2f}.",
    )


def _array(x: torch.Tensor) -> FloatArray:
    return x.to(torch.float64).numpy()
