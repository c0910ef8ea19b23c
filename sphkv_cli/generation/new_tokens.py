"""Which columns of a forward pass are tokens, and where they stand: from mask and position_ids.

A token sees itself, padding sees nothing: the mask's diagonal tells them apart.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sphkv_cli.errors import SphkvError
from sphkv_cli.generation.store_state import NewTokens


def read_tokens(
    n_sequences: int,
    n_columns: int,
    mask: Tensor | None,
    positions: Tensor | None,
    known: Sequence[int] | None,
) -> NewTokens:
    """The tokens of a step.

    Args:
        mask: (n_sequences or 1, 1, n_queries, n_keys) bool, or None: no padding.
        positions: (n_sequences or 1, n_columns) int64.
        known: the next position of each sequence; None at the prompt.

    Raises:
        SphkvError: another kind of mask, no positions, or positions that leave a gap.
    """
    columns = [list(range(n_columns)) for _ in range(n_sequences)]
    if mask is not None:
        if mask.dtype != torch.bool or mask.ndim != 4:
            raise SphkvError(
                f"an attention mask of {mask.dtype}, {mask.ndim} axes",
                "pass a mask (n_sequences, n_tokens) of 0 and 1, or none",
            )
        own = mask[:, 0, :, -n_columns:].diagonal(dim1=-2, dim2=-1)
        is_token = own.expand(n_sequences, n_columns).tolist()
        columns = [[c for c in range(n_columns) if row[c]] for row in is_token]
    if positions is None:
        raise SphkvError(
            "the model does not tell its attention the positions of tokens",
            "its architecture is not supported",
        )
    where = positions.expand(n_sequences, n_columns).tolist()
    first = []
    for s, chosen in enumerate(columns):
        found = [where[s][c] for c in chosen]
        start = known[s] if known is not None else (found[0] if found else 0)
        if found != list(range(start, start + len(found))):
            raise SphkvError(
                f"sequence {s}: the new tokens have positions {found[0]}..{found[-1]}, "
                f"expected {start} and on",
                "pass position_ids that go on from the cached tokens",
            )
        first.append(start)
    return NewTokens(n_columns, tuple(tuple(chosen) for chosen in columns), tuple(first))
