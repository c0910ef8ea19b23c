"""Little-endian bit fields: rows of small unsigned integers to bytes and back.

A row is the concatenation, least significant bit first, of its fields in a fixed order:
``row = sum_i value_i << offset_i`` with ``offset_i = sum_{j<i} width_j``.  Byte ``b`` holds the
bits ``8 b .. 8 b + 7``.  Nothing is padded between fields; the row is padded at its end.
Source: ours.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

MAX_FIELD_BITS = 16
_WORD_BITS = 32
_WORD_MASK = (1 << _WORD_BITS) - 1


def pack_fields(groups: Sequence[tuple[Tensor, int]], row_bytes: int) -> Tensor:
    """Pack groups of equally wide fields into rows of bytes.

    groups: each ``(values (..., n_fields) integer, width in bits)``, in row order; width 0 writes
    nothing.  Returns ``(..., row_bytes) uint8``.  Raises ValueError when a field is wider than 16
    bits, when a value does not fit its width, or when the fields do not fit the row.
    """
    total_bits = sum(values.shape[-1] * width for values, width in groups)
    if total_bits > 8 * row_bytes:
        raise ValueError(f"{total_bits} bits of fields do not fit a row of {row_bytes} bytes")
    lead = groups[0][0].shape[:-1]
    device = groups[0][0].device
    n_words = -(-row_bytes * 8 // _WORD_BITS)
    # One word more than needed, so that the last field may always spill into "the next word".
    words = torch.zeros((*lead, n_words + 1), dtype=torch.int64, device=device)
    first_bit = 0
    for values, width in groups:
        if not 0 <= width <= MAX_FIELD_BITS:
            raise ValueError(f"a field of {width} bits: 0..{MAX_FIELD_BITS} are supported")
        if width == 0:
            continue
        n_fields = values.shape[-1]
        fields = values.to(torch.int64)
        if fields.numel() and (int(fields.min()) < 0 or int(fields.max()) >> width):
            raise ValueError(f"a field value does not fit {width} bits")
        offsets = first_bit + width * torch.arange(n_fields, device=device)
        word, shift = offsets // _WORD_BITS, offsets % _WORD_BITS
        shifted = fields << shift  # at most 16 + 31 bits: no overflow of int64
        words.index_add_(-1, word, shifted & _WORD_MASK)
        words.index_add_(-1, word + 1, shifted >> _WORD_BITS)
        first_bit += width * n_fields
    # Words are little-endian: byte b of word w is byte 4 w + b of the row.
    shifts = torch.arange(0, _WORD_BITS, 8, device=device)
    as_bytes = ((words[..., :n_words, None] >> shifts) & 0xFF).to(torch.uint8)
    return as_bytes.reshape(*lead, n_words * 4)[..., :row_bytes].contiguous()


def unpack_fields(rows: Tensor, layout: Sequence[tuple[int, int]]) -> list[Tensor]:
    """The inverse of `pack_fields`.

    rows: ``(..., row_bytes) uint8``; layout: ``(n_fields, width in bits)`` per group.  Returns one
    ``(..., n_fields) int64`` tensor per group; a group of width 0 is all zeros.
    """
    lead, row_bytes = rows.shape[:-1], rows.shape[-1]
    total_bits = sum(n_fields * width for n_fields, width in layout)
    if total_bits > 8 * row_bytes:
        raise ValueError(f"{total_bits} bits of fields do not fit a row of {row_bytes} bytes")
    device = rows.device
    n_words = -(-row_bytes * 8 // _WORD_BITS)
    padded = torch.zeros((*lead, (n_words + 1) * 4), dtype=torch.int64, device=device)
    padded[..., :row_bytes] = rows.to(torch.int64)
    shifts = torch.arange(0, _WORD_BITS, 8, device=device)
    words = (padded.reshape(*lead, n_words + 1, 4) << shifts).sum(-1)
    groups: list[Tensor] = []
    first_bit = 0
    for n_fields, width in layout:
        if width == 0:
            groups.append(torch.zeros((*lead, n_fields), dtype=torch.int64, device=device))
            continue
        offsets = first_bit + width * torch.arange(n_fields, device=device)
        word, shift = offsets // _WORD_BITS, offsets % _WORD_BITS
        # The high word may set the sign bit; the mask drops what an arithmetic shift brings in.
        pair = words[..., word] | (words[..., word + 1] << _WORD_BITS)
        groups.append((pair >> shift) & ((1 << width) - 1))
        first_bit += width * n_fields
    return groups


def float16_bits(x: Tensor) -> Tensor:
    """The 16 bits of a float16 tensor as int64 0..65535, NaN payloads included."""
    return x.contiguous().view(torch.int16).to(torch.int64) & 0xFFFF


def float16_from_bits(bits: Tensor) -> Tensor:
    """The inverse of `float16_bits`."""
    signed = torch.where(bits >= 1 << 15, bits - (1 << 16), bits)
    return signed.to(torch.int16).contiguous().view(torch.float16)
