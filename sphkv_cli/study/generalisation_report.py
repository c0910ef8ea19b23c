"""What the study of generalisation says: excess errors, reading, tables and figures."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sphkv_cli.blocks import Table
from sphkv_cli.plots.figures import Figure, GridPanel, PlotPanel, Series

FloatArray = npt.NDArray[np.float64]

SETTLED = 1.02
"""A calibration this close to the largest is as good."""


@dataclass(frozen=True)
class Transfer:
    """names: of the n domains; uncentred: (n_seeds, n) output error without means; means, books:
    (n_seeds, n, n) output error with those of the row's domain, judged on the column's."""

    names: tuple[str, ...]
    uncentred: FloatArray
    means: FloatArray
    books: FloatArray

    @property
    def own(self) -> FloatArray:
        """(n): output error with a domain's own means, mean over seeds."""
        return np.diag(self.means.mean(axis=0))

    @property
    def uncentred_excess(self) -> FloatArray:
        """(n): without means, over own means."""
        return np.asarray(self.uncentred.mean(axis=0) / self.own)

    @property
    def spread(self) -> float:
        """What one more rotation seed changes an excess by: standard deviation, mean of all."""
        of_seeds = self.means / np.diagonal(self.means, axis1=1, axis2=2)[:, None]
        n = len(self.names)
        return float(of_seeds.std(axis=0, ddof=1)[~np.eye(n, dtype=bool)].mean())


def excess(errors: FloatArray) -> FloatArray:
    """(n_seeds, n, n) errors -> (n, n), over what the judged domain's own calibration has."""
    mean = errors.mean(axis=0)
    return np.asarray(mean / np.diag(mean))


@dataclass(frozen=True)
class LearningCurve:
    """Excess output error over calibration size, of means alone and of means and books.

    n_tokens: (n); means, books: judged domain -> (n), over the judged documents' own means (and
    books).
    """

    n_tokens: tuple[int, ...]
    means: dict[str, FloatArray]
    books: dict[str, FloatArray]


def read(transfer: Transfer, curve: LearningCurve) -> tuple[str, str]:
    """The worst transfers, what books add to means, and how soon calibration is settled."""
    found, names = excess(transfer.means), transfer.names
    learned, judged = np.unravel_index(int(found.argmax()), found.shape)
    books = (transfer.books.mean(axis=0) / transfer.means.mean(axis=0))[0]
    none = transfer.uncentred_excess
    first = (
        f"Means of {names[0]} cost other domains at most x{found[0].max():.2f} of the output error "
        f"of their own means (on {names[int(found[0].argmax())]}), no means at all up to "
        f"x{none.max():.2f} (on {names[int(none.argmax())]}); the worst pair is {names[learned]} "
        f"for {names[judged]} (x{found.max():.2f}), and books of {names[0]} beside its means "
        f"change the error of the domains by {100 * (books.min() - 1):+.1f} to "
        f"{100 * (books.max() - 1):+.1f} % (one rotation seed more changes an excess by "
        f"{100 * transfer.spread:.1f} %)."
    )
    name, values = next(iter(curve.means.items()))
    last = values[-1]
    settled = next(n for n, x in zip(curve.n_tokens, values, strict=True) if x <= SETTLED * last)
    with_books = curve.books[name]
    second = (
        f"On {name}, {settled} tokens of calibration come within {100 * (SETTLED - 1):.0f} % of "
        f"what {curve.n_tokens[-1]} give (x{last:.3f} of means from the judged documents "
        f"themselves); with fitted books the error goes from x{with_books[0]:.3f} at "
        f"{curve.n_tokens[0]} tokens to x{with_books[-1]:.3f}."
    )
    return first, second


def transfer_table(transfer: Transfer, kind: str, errors: FloatArray) -> Table:
    """Excess of every pair; kind: what was calibrated, in words."""
    rows: list[tuple[object, ...]] = [
        (name, *(f"{x:.3f}" for x in row))
        for name, row in zip(transfer.names, excess(errors), strict=True)
    ]
    if errors is transfer.means:
        rows.append(("no means", *(f"{x:.3f}" for x in transfer.uncentred_excess)))
    rows.append(("output error, own", *(f"{x:.4f}" for x in np.diag(errors.mean(axis=0)))))
    return Table(
        f"Excess output error: {kind} of the row's domain, judged on the column's",
        ("calibrated on", *transfer.names),
        rows,
    )


def curve_table(curve: LearningCurve) -> Table:
    """Every size, judged domain and kind."""
    kinds = [("means", curve.means), ("means and books", curve.books)]
    return Table(
        "Output error over that of a calibration on the judged documents themselves",
        ("tokens", *(f"{name}: {kind}" for kind, found in kinds for name in found)),
        [
            (str(n), *(f"{values[i]:.4f}" for _, found in kinds for values in found.values()))
            for i, n in enumerate(curve.n_tokens)
        ],
    )


def transfer_figure(transfer: Transfer) -> Figure:
    """Excess of every pair as colours."""
    panels = [
        GridPanel(
            title,
            "judged on",
            "calibrated on",
            excess(errors).tolist(),
            "output error over own calibration",
            row_names=transfer.names,
            column_names=transfer.names,
        )
        for title, errors in (("means", transfer.means), ("means and books", transfer.books))
    ]
    caption = "What a calibration on one domain costs another (1: nothing)."
    return Figure("domains", caption, panels)


def curve_figure(curve: LearningCurve) -> Figure:
    """One panel per judged domain."""
    doublings = [float(np.log2(n)) for n in curve.n_tokens]
    panels = [
        PlotPanel(
            f"judged on {name}",
            "calibration tokens, log2",
            "output error over own documents'",
            [
                Series("means", doublings, curve.means[name].tolist(), "both"),
                Series("means and books", doublings, curve.books[name].tolist(), "both"),
            ],
        )
        for name in curve.means
    ]
    return Figure("learning-curve", "Output error over the size of the calibration.", panels)
