"""What a frame costs a cache, in the unit in which its error is measured.

    price = 4^(bytes in bits + time in bits);  the frame with the least error * price is chosen

A code's squared error falls by 6.02 dB, a factor 4, per bit.  So bytes that a frame needs are worth
the bits that they would give the key code, and a share s of the time of a decode step, which reads
R bits per coordinate, is worth the s R bits that it would read in that time.  In decibels the
choice minimises

    10 log10(error) + 6.02 * (bits of its bytes + TIME_WEIGHT * share of the step * R)

With a weight of 1 that is the error at equal decode time, for somebody who would rather pay bytes
than time.  A cache is coded because bytes are short: time counts less than they do.  Shares are
those of the fastest code on a long context (`position_term_cost`), where they are greatest; values,
whose error no frame changes, are left out.  Ours.
"""

from sphkv_codebooks.balancing import balancing_bytes
from sphkv_codebooks.frame import FrameSet
from sphkv_kernels.decode_cost import position_term_cost

TIME_WEIGHT = 0.25
"""Of 1, 1/2, 1/4 and 1/10, tried on two models, 1/4 keeps nearly all of the gain of every pair
(output error .0061 against .0054 on SmolLM2) for a quarter of its time (12 % against 53 %)."""
TABLE_CONTEXT = 4096
"""Tokens over which the bytes of a balancing matrix are shared out when it is weighed."""
POSITION_BITS = 16.0
"""Of a token and KV head of a pre_rope layer."""


def frame_price(frame: FrameSet, rate: float) -> float:
    """Factor on the squared error of a frame of one layer (its layer 0).

    rate: bits per coordinate of the keys and values that the step reads.
    """
    bits_per_token = POSITION_BITS if frame.needs_positions(0) else 0.0
    if frame.balancing is not None:
        n_heads = frame.balancing.shape[1]
        bits_per_token += 8 * balancing_bytes(frame.balancing[0]) / n_heads / TABLE_CONTEXT
    time_bits = TIME_WEIGHT * position_term_cost(frame.rope_pairs(0)) * rate
    return float(4.0 ** (bits_per_token / frame.head_dim + time_bits))
