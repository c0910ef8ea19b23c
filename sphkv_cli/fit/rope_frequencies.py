"""The frequencies that a captured model's RoPE turns keys by, or why there are none to use.

Centring before RoPE turns a mean key to each position as the model turns keys: pairs (j, j + d/2)
by t inv_freq_j.  Models that turn only a part of a head, pair neighbouring coordinates, or change
their frequencies with the length of the text, are refused by name.
"""

import numpy as np
import numpy.typing as npt

from sphkv_cli.artifacts.capture import CaptureReader
from sphkv_cli.errors import SphkvError

INTERLEAVED = frozenset(
    {"chatglm", "codegen", "cohere", "cohere2", "ernie4_5", "glm", "glm4", "gptj", "helium"}
    | {"llama4", "llama4_text"}
)
"""Architectures whose RoPE pairs coordinates (2j, 2j + 1)."""

_LENGTH_DEPENDENT = ("dynamic", "longrope")


def rope_frequencies(capture: CaptureReader) -> npt.NDArray[np.float32]:
    """Inverse frequencies of each layer, (n_layers, head_dim / 2), radians per token.

    Raises:
        SphkvError: keys of this model are not turned as a whole, by pairs (j, j + head_dim / 2) and
            fixed frequencies; or the capture does not say.
    """
    known = capture.rope.get("inv_freq", {})
    why = _obstacle(capture)
    rows = []
    for layer in capture.layers:
        row = known.get(layer.layer_type, known.get("default"))
        if why is None and row is None:
            why = "its capture holds no rotary frequencies"
        elif why is None and len(row) != capture.head_dim // 2:
            why = (
                f"its RoPE turns {len(row)} pairs of a head, not all {capture.head_dim // 2} "
                "(partial rotary)"
            )
        if why is not None:
            raise SphkvError(
                f"keys of {capture.model} cannot be centred before RoPE: {why}",
                "use --centring post_rope or none",
            )
        rows.append(row)
    return np.array(rows, dtype=np.float32)


def _obstacle(capture: CaptureReader) -> str | None:
    if capture.architecture in INTERLEAVED:
        return f"{capture.architecture} pairs neighbouring coordinates in its RoPE"
    parameters = capture.rope.get("parameters", {})
    for part in (parameters, *(p for p in parameters.values() if isinstance(p, dict))):
        kind = part.get("rope_type")
        if kind in _LENGTH_DEPENDENT:
            return f"the frequencies of its RoPE ({kind}) change with the length of the text"
    return None
