"""What a growing allocation could have cost at best: under its own past, and without one.

    under its past   options above a page's ceiling do not exist
    free             every page may be in any option, as if the whole cache were coded now

Both are certified by the solver's dual bound; costs and bytes are those of the same pages.
"""

import numpy as np
from numpy.typing import NDArray

from sphkv_cli.allocation.solver import Solution, solve


def solve_under(
    costs: NDArray[np.floating],
    option_bytes: NDArray[np.integer],
    ceilings: NDArray[np.integer],
    budget_bytes: int,
) -> Solution:
    """The best plan in which no page is above its ceiling.

    Args:
        costs: (n_pages, n_options); option_bytes: (n_pages, n_options).
        ceilings: (n_pages) largest option that each page may have.

    Raises:
        InfeasibleBudgetError, ValueError: as `solve`.
    """
    # Above the ceiling the solver finds the ceiling's own cost and bytes again, and takes the
    # first of equals.
    capped = np.minimum(np.arange(costs.shape[1]), np.asarray(ceilings)[:, None])
    return solve(
        np.take_along_axis(costs, capped, axis=1),
        np.take_along_axis(option_bytes, capped, axis=1),
        budget_bytes,
        n_threads=1,
    )
