"""What the tables of a fit say, in sentences; a negative result is a result."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sphkv_cli.artifacts.fit_tables import CodeRow, EmpiricalRow, FitTables, GoodnessRow
from sphkv_codebooks.frame import FrameSet

FloatArray = npt.NDArray[np.float64]

HELPS_BEYOND = 0.02
"""Relative gain of distortion up to which books are called equal: another seed of the rotation
moves it as much."""


def read_tables(
    tables: FitTables, frames: FrameSet, kept_key_energy: FloatArray, page_sizes: Sequence[int]
) -> tuple[str, ...]:
    """Sentences a user needs beside the tables.

    kept_key_energy: (n_layers, n_kv_heads), what centring leaves of it.
    """
    sentences = [*_goodness(tables.goodness), _prediction(tables.codes)]
    if frames.key_mean is not None:
        sentences.append(_centring(kept_key_energy))
    sentences.extend(_beaten(tables.codes, page_sizes[0]))
    if tables.empirical:
        sentences.append(_empirical(tables.empirical))
    return tuple(sentences)


def read_tiers(
    code_names: Sequence[str], tier_names: Sequence[str], *, are_named: bool
) -> tuple[str, ...]:
    """A sentence where some codes are measured and are in no tier ("KEY/VALUE" or one name).

    are_named: the user named the tiers, else they are the codes that the CUDA kernel reads.
    """
    used = {name for tier in tier_names for name in tier.split("/")}
    unused = [name for name in code_names if name not in used]
    if not unused:
        return ()
    because = "no --tier names" if are_named else "the CUDA kernel does not read"
    them = "it" if len(unused) == 1 else "them"
    return (
        f"{', '.join(unused)}: measured for comparison and in no tier, as {because} {them}; name "
        f"{them} with --tier to allocate {them} all the same.",
    )


def _goodness(rows: Sequence[GoodnessRow]) -> list[str]:
    sentences = []
    for vectors in dict.fromkeys(row.vectors for row in rows):
        of_kind = [row for row in rows if row.vectors == vectors]
        mean = max(of_kind, key=lambda row: row.head_ks)
        worst = max(of_kind, key=lambda row: row.worst_ks)
        sentences.append(
            f"The angles of {vectors} are within a KS distance of {mean.head_ks:.3f} of the "
            f"analytic density (mean over heads, level {mean.level}, {mean.sampling_ks:.3f} would "
            f"be sampling alone); furthest is layer {worst.worst_layer}, head {worst.worst_head}, "
            f"level {worst.level}: {worst.worst_ks:.3f}."
        )
    return sentences


def _prediction(rows: Sequence[CodeRow]) -> str:
    keys, values = (
        max((getattr(row, name) / row.predicted_distortion - 1.0 for row in rows), key=abs)
        for name in ("key_distortion", "value_distortion")
    )
    return (
        "Measured distortion differs from the closed form by at most "
        f"{keys:+.1%} for keys in the frame and {values:+.1%} for values."
    )


def _centring(kept: FloatArray) -> str:
    layer, head = np.unravel_index(int(kept.argmin()), kept.shape)
    return (
        f"Without its head's mean a key keeps {kept.mean():.0%} of its energy (mean over heads; "
        f"least in layer {layer}, head {head}: {kept.min():.1%}); only that is coded, and what is "
        "taken off comes back exactly in the logits."
    )


def _beaten(rows: Sequence[CodeRow], page_size: int) -> list[str]:
    sentences = []
    for row in rows:
        better = [
            other
            for other in rows
            if other.laid_out_rates[0] <= row.laid_out_rates[0]
            and other.has_kernel_layout >= row.has_kernel_layout
            and other.key_distortion < row.key_distortion
            and other.value_distortion < row.value_distortion
        ]
        if better:
            best = min(better, key=lambda other: (other.laid_out_rates[0], other.key_distortion))
            sentences.append(
                f"{row.name} is beaten by {best.name}: {best.laid_out_rates[0]:.3f} against "
                f"{row.laid_out_rates[0]:.3f} bits laid out on pages of {page_size}, distortion of "
                f"keys {best.key_distortion:.4f} against {row.key_distortion:.4f}."
            )
    return sentences


def _empirical(rows: Sequence[EmpiricalRow]) -> str:
    gains = [
        1.0 - after / before
        for row in rows
        for before, after in (
            (row.key_distortion, row.empirical_key_distortion),
            (row.value_distortion, row.empirical_value_distortion),
        )
    ]
    low, high = min(gains), max(gains)
    span = f"distortion on unseen documents changes by {-high:+.1%} to {-low:+.1%}"
    if low > HELPS_BEYOND:
        return f"Empirical books help: {span}. They are stored beside the analytic ones."
    if high > HELPS_BEYOND:
        return f"Empirical books help some codes and not others: {span}."
    return f"Empirical books do not help here: {span}. Keep the analytic ones."
