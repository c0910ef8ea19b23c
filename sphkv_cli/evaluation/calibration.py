"""Statistics of calibration keys that codings need: means after and before RoPE, median norms.

All are taken from the `fit` documents of a capture, never from those that are judged.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sphkv_cli.artifacts.capture import CaptureReader
from sphkv_cli.errors import SphkvError
from sphkv_cli.evaluation.centring import PreRopeCentring, pre_rope_mean


@dataclass(frozen=True, eq=False)
class KeyStatistics:
    """post_rope_mean: (n_layers, n_kv_heads, head_dim); median_norm: (n_layers, n_kv_heads).

    pre_rope: the mean before RoPE with the model's frequencies.
    """

    post_rope_mean: Tensor
    median_norm: Tensor
    pre_rope: PreRopeCentring


def key_statistics(capture: CaptureReader) -> KeyStatistics:
    """Read the fit documents' keys once.

    Raises:
        SphkvError: no fit document, or rotary parameters that do not turn the whole head.
    """
    documents = capture.documents_of("fit")
    if not documents:
        raise SphkvError("the capture has no fit document", "capture one with --text-file fit=PATH")
    inv_freq = _inv_freq(capture)
    means, medians, before = [], [], []
    for layer in range(capture.n_layers):
        keys = [torch.from_numpy(capture.keys(document, layer)) for document in documents]
        together = torch.cat(keys)
        means.append(together.double().mean(dim=0).float())
        medians.append(together.norm(dim=-1).median(dim=0).values)
        before.append(pre_rope_mean(keys, inv_freq[layer]).float())
    return KeyStatistics(
        torch.stack(means), torch.stack(medians), PreRopeCentring(torch.stack(before), inv_freq)
    )


def _inv_freq(capture: CaptureReader) -> Tensor:
    """(n_layers, head_dim / 2) inverse frequencies of each layer's type."""
    known = capture.rope["inv_freq"]
    rows = []
    for layer in capture.layers:
        row = known.get(layer.layer_type, known.get("default"))
        if row is None or len(row) != capture.head_dim // 2:
            raise SphkvError(
                f"the rotary frequencies of {capture.model} do not turn the whole head",
                "centring before RoPE is not available for it",
            )
        rows.append(torch.tensor(row, dtype=torch.float64))
    return torch.stack(rows)
