"""The tables that a fit measures and codebooks.h5 keeps: one row type per table.

Layers and heads count from 0; heads are KV heads. Keys are centred and rotated unless "raw".
"""

from dataclasses import dataclass
from typing import Literal

VectorKind = Literal["keys", "values"]


@dataclass(frozen=True)
class CodeRow:
    """One candidate code: rates in bits per coordinate, errors on the `select` documents.

    laid_out_rates: of a region of one page, padding included, per page size of the fit.
    has_kernel_layout: 1 where the CUDA kernel decodes it, 0 where only the reference does.
    predicted_distortion: closed form, isotropic vectors; gap_db: above the Gaussian limit 4^-rate.
    key_distortion, raw_key_distortion, value_distortion: means over tokens, layers and heads.
    relative logit errors: pooled over pairs (see `fit.code_measurement`).
    worst_layer, worst_head: of the largest centred relative logit error over one head's pairs;
    worst_value_layer, worst_value_head: of the largest value distortion.
    """

    name: str
    digest: str
    code_rate: float
    laid_out_rates: tuple[float, ...]
    has_kernel_layout: int
    predicted_distortion: float
    gap_db: float
    key_distortion: float
    raw_key_distortion: float
    value_distortion: float
    predicted_relative_logit_error: float
    relative_logit_error: float
    centred_relative_logit_error: float
    isotropic_relative_logit_error: float
    worst_relative_logit_error: float
    worst_layer: int
    worst_head: int
    worst_value_distortion: float
    worst_value_layer: int
    worst_value_head: int


@dataclass(frozen=True)
class LevelRow:
    """One level of one code; level 0 stands for its radii.

    bits: log2 of the number of cells; for the radii, bits per radius.
    predicted_angle_mse_rad2: under the analytic density; key_ and value_angle_mse_rad2: on the
    `select` documents; key_ks, value_ks: mean over heads, on the `fit` documents. NaN for radii.
    share_of_distortion: of the predicted distortion; the shares of a code add up to one.
    """

    code: str
    level: int
    n_cells: int
    bits: float
    predicted_angle_mse_rad2: float
    key_angle_mse_rad2: float
    value_angle_mse_rad2: float
    key_ks: float
    value_ks: float
    share_of_distortion: float


@dataclass(frozen=True)
class GoodnessRow:
    """Measured angles of one level against the analytic density, on the `fit` documents.

    pooled_ks: all layers and heads in one histogram; head_ks: mean over heads; sampling_ks: what
    as many independent draws of the density show on average per head; worst_*: largest of a head.
    """

    vectors: str
    pairing: str
    level: int
    pooled_ks: float
    head_ks: float
    sampling_ks: float
    worst_ks: float
    worst_layer: int
    worst_head: int


@dataclass(frozen=True)
class KurtosisRow:
    """Kurtosis of the coordinates of directions, mean over heads, and the head furthest from it."""

    vectors: str
    isotropic: float
    mean: float
    worst: float
    worst_layer: int
    worst_head: int


@dataclass(frozen=True)
class EmpiricalRow:
    """One code with analytic and with empirical books, on documents the books have not seen."""

    code: str
    key_distortion: float
    empirical_key_distortion: float
    value_distortion: float
    empirical_value_distortion: float
    centred_relative_logit_error: float
    empirical_centred_relative_logit_error: float


@dataclass(frozen=True)
class FrameRow:
    """One frame tried for one layer, on the `select` documents, with a reference code of 3 bits.

    rope_pairs: RoPE pairs that the mean keeps (pre_rope, else 0); balancing: none, diagonal or
    full; output_error: mean over query heads of the squared relative attention-output error;
    worst_output_error: its root in the worst query head; is_chosen: 1 for the layer's frame.
    """

    layer: int
    centring: str
    rope_pairs: int
    balancing: str
    output_error: float
    worst_output_error: float
    worst_head: int
    is_chosen: int


@dataclass(frozen=True)
class DesignRow:
    """One pair of codes at a rate that was asked for, measured on the `select` documents.

    code_rate, laid_out_rate (pages of 32), predicted_distortion, gap_db: means of keys and values.
    instructions: per coordinate decoded by the CUDA kernel, NaN where only the reference reads it.
    output_error: mean over layers and heads of the squared relative attention-output error;
    worst_output_error: relative, of the worst query head; logit_rms: of a scaled logit, nats.
    """

    target_rate: float
    key_code: str
    value_code: str
    code_rate: float
    laid_out_rate: float
    has_kernel_layout: int
    predicted_distortion: float
    gap_db: float
    instructions: float
    output_error: float
    logit_rms: float
    worst_output_error: float
    worst_layer: int
    worst_head: int
    is_vetoed: int
    is_chosen: int

    @property
    def name(self) -> str:
        """KEY/VALUE, or one name for both."""
        if self.key_code == self.value_code:
            return self.key_code
        return f"{self.key_code}/{self.value_code}"


@dataclass(frozen=True)
class FitTables:
    """Everything a fit measured; codes ordered by laid-out rate, then predicted distortion."""

    codes: tuple[CodeRow, ...]
    levels: tuple[LevelRow, ...]
    goodness: tuple[GoodnessRow, ...]
    kurtosis: tuple[KurtosisRow, ...]
    empirical: tuple[EmpiricalRow, ...] = ()
    frames: tuple[FrameRow, ...] = ()
    design: tuple[DesignRow, ...] = ()
