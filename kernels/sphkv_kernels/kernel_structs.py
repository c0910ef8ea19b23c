"""Parameter structs that the host fills and device code reads.

A struct is written twice, here and in C++: a kernel does not compile where the two differ in size,
and a test compares their fields. Source: ours.
"""

from __future__ import annotations

import ctypes

_POINTERS = (
    "pool", "records", "entries", "first_positions", "position_offsets", "heads", "segments",
    "tables", "query", "offset", "tail_keys", "tail_values", "tail_tokens", "positions",
    "tail_positions", "query_positions", "position_coefficients", "position_frequencies",
    "output", "log_sum_exp", "logits", "tail_logits", "partial_output", "partial_state", "arrivals",
)  # fmt: skip
_FLOATS = ("scale_log2", "softcap_log2", "softcap_inverse")
_INTS = (
    "n_kv_heads", "group_size", "page_units_log2", "tail_capacity", "query_type", "window",
    "n_position_pairs",
)  # fmt: skip


class KernelParams(ctypes.Structure):
    """`Params` of params.cuh."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in _POINTERS]
        + [(name, ctypes.c_float) for name in _FLOATS]
        + [(name, ctypes.c_int) for name in _INTS]
    )


def agreement(name: str, struct: type[ctypes.Structure]) -> str:
    """C++ text that compiles only where the struct `name` there has the size of this one."""
    size = ctypes.sizeof(struct)
    return f'static_assert(sizeof({name}) == {size}, "the host fills another struct");'
