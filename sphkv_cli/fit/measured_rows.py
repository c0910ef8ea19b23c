"""From sums per layer to the rows that are printed and kept: one per code, one per level.

Predictions are the closed forms of `sphkv_codebooks.distortion` for isotropic vectors; beside each
stands what the `select` documents gave.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sphkv_cli.artifacts.fit_tables import CodeRow, EmpiricalRow, LevelRow
from sphkv_cli.fit.angle_survey import AngleSurvey
from sphkv_cli.fit.candidates import laid_out_rate
from sphkv_cli.fit.code_measurement import LayerMeasurement
from sphkv_codebooks.density import EmpiricalDensity, analytic_density
from sphkv_codebooks.distortion import distortion_shares, relative_logit_error
from sphkv_codebooks.spherical_code import SphericalCode
from sphkv_kernels.block_words import decoded_layout_of

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ModelMeasurement:
    """All layers stacked: (n_codes, n_layers, n_kv_heads), or (n_layers, n_kv_heads) for the sums
    that errors are relative to and for the energy. Names as in `LayerMeasurement`.
    """

    key_distortion: FloatArray
    raw_key_distortion: FloatArray
    value_distortion: FloatArray
    logit_error: FloatArray
    logit: FloatArray
    centred_logit: FloatArray
    isotropic_logit: FloatArray
    kept_key_energy: FloatArray

    @classmethod
    def of(cls, layers: Sequence[LayerMeasurement]) -> "ModelMeasurement":
        """Stack the layers."""
        per_code = ("key_distortion", "raw_key_distortion", "value_distortion", "logit_error")
        per_head = ("logit", "centred_logit", "isotropic_logit", "kept_key_energy")
        return cls(
            **{name: np.stack([getattr(x, name) for x in layers], axis=1) for name in per_code},
            **{name: np.stack([getattr(x, name) for x in layers]) for name in per_head},
        )

    def relative_error(self, index: int, relative_to: FloatArray) -> float:
        """rms of the logit error of one code over the rms of a logit, pooled over all pairs."""
        return float(np.sqrt(self.logit_error[index].sum() / relative_to.sum()))

    @property
    def centred_relative_logit_error(self) -> FloatArray:
        """Per code, layer and KV head."""
        return np.asarray(np.sqrt(self.logit_error / self.centred_logit))

    def per_head(self) -> Mapping[str, FloatArray]:
        """What codebooks.h5 keeps per layer and KV head."""
        return {
            "key_distortion": self.key_distortion,
            "value_distortion": self.value_distortion,
            "centred_relative_logit_error": self.centred_relative_logit_error,
            "kept_key_energy": self.kept_key_energy,
        }


def code_rows(
    codes: Sequence[SphericalCode], page_sizes: Sequence[int], measured: ModelMeasurement
) -> tuple[CodeRow, ...]:
    """One row per candidate, in the order of `codes`."""
    rows = []
    for index, code in enumerate(codes):
        predicted = code.distortion()
        head_errors = measured.centred_relative_logit_error[index]
        layer, head = np.unravel_index(int(head_errors.argmax()), head_errors.shape)
        values = measured.value_distortion[index]
        value_layer, value_head = np.unravel_index(int(values.argmax()), values.shape)
        rows.append(
            CodeRow(
                name=code.name,
                digest=code.digest,
                code_rate=code.code_rate,
                laid_out_rates=tuple(laid_out_rate(code, size) for size in page_sizes),
                has_kernel_layout=int(decoded_layout_of(code) is not None),
                predicted_distortion=predicted,
                gap_db=10.0 * math.log10(predicted * 4.0**code.code_rate),
                key_distortion=float(measured.key_distortion[index].mean()),
                raw_key_distortion=float(measured.raw_key_distortion[index].mean()),
                value_distortion=float(values.mean()),
                predicted_relative_logit_error=relative_logit_error(predicted),
                relative_logit_error=measured.relative_error(index, measured.logit),
                centred_relative_logit_error=measured.relative_error(index, measured.centred_logit),
                isotropic_relative_logit_error=measured.relative_error(
                    index, measured.isotropic_logit
                ),
                worst_relative_logit_error=float(head_errors.max()),
                worst_layer=int(layer),
                worst_head=int(head),
                worst_value_distortion=float(values.max()),
                worst_value_layer=int(value_layer),
                worst_value_head=int(value_head),
            )
        )
    return tuple(rows)


def level_rows(codes: Sequence[SphericalCode], survey: AngleSurvey) -> tuple[LevelRow, ...]:
    """The levels of every code, then its radii as level 0."""
    rows = []
    for code in codes:
        shares = distortion_shares(code)
        for book, share in zip(code.codebooks, shares.levels, strict=True):
            level = book.level
            key_mse, value_mse = (
                book.angle_mse_rad2(
                    EmpiricalDensity(
                        survey.select_counts(kind, code.pairing, level).astype(np.float64),
                        is_circle=level == 1,
                    )
                )
                for kind in ("keys", "values")
            )
            rows.append(
                LevelRow(
                    code=code.name,
                    level=level,
                    n_cells=book.n_cells,
                    bits=book.bits,
                    predicted_angle_mse_rad2=book.angle_mse_rad2(analytic_density(level)),
                    key_angle_mse_rad2=key_mse,
                    value_angle_mse_rad2=value_mse,
                    key_ks=survey.head_ks("keys", code.pairing, level),
                    value_ks=survey.head_ks("values", code.pairing, level),
                    share_of_distortion=share / shares.total,
                )
            )
        radius_bits = code.radius_coding.bits_per_radius
        rows.append(
            LevelRow(
                code=code.name,
                level=0,
                n_cells=2**radius_bits,
                bits=float(radius_bits),
                predicted_angle_mse_rad2=math.nan,
                key_angle_mse_rad2=math.nan,
                value_angle_mse_rad2=math.nan,
                key_ks=math.nan,
                value_ks=math.nan,
                share_of_distortion=shares.radius / shares.total,
            )
        )
    return tuple(rows)


def empirical_rows(
    codes: Sequence[SphericalCode], analytic: ModelMeasurement, empirical: ModelMeasurement
) -> tuple[EmpiricalRow, ...]:
    """Both kinds of books beside each other."""
    return tuple(
        EmpiricalRow(
            code=code.name,
            key_distortion=float(analytic.key_distortion[index].mean()),
            empirical_key_distortion=float(empirical.key_distortion[index].mean()),
            value_distortion=float(analytic.value_distortion[index].mean()),
            empirical_value_distortion=float(empirical.value_distortion[index].mean()),
            centred_relative_logit_error=analytic.relative_error(index, analytic.centred_logit),
            empirical_centred_relative_logit_error=empirical.relative_error(
                index, empirical.centred_logit
            ),
        )
        for index, code in enumerate(codes)
    )
