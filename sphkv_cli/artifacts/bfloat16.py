"""bfloat16 in HDF5, which has no such type: the upper half of a float32, stored as uint16.

A float32 x is rounded to the nearest bfloat16, ties to even, exactly as torch does it. numpy only:
readers of a capture need no torch.
"""

import numpy as np
import numpy.typing as npt

STORED_AS = "stored_as"
BFLOAT16 = "bfloat16"


def bfloat16_bits(x: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Round float32 values to bfloat16 and return their bits; any shape, NaN stays NaN."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + (((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF))) >> np.uint32(
        16
    )
    quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x0040)
    return np.where(np.isnan(x), quiet_nan, rounded).astype(np.uint16)


def from_bfloat16_bits(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """The float32 values of bfloat16 bits; exact, any shape."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
