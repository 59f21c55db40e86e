"""How much of the router's weight the experts of each rank carry: what tells how many of them should run."""

from typing import Any

import numpy as np

from jaxmoe.solvers.distillation import Examples


def importance(examples: Examples, experts: int, main: int) -> dict[str, Any]:
    """Return the shares of a layer's router weights.

    Args:
        examples: what the layer's router chose, best first.
        experts: how many there are.
        main: how many of a token's experts run.

    Returns:
        `by_rank`: the share of the best expert of each token, of the second best, and so on, which sum to one; `main`
        and `auxiliary`: what each expert carries where it is one or the other, which together do.

    Example:
        >>> chosen, weights = np.array([[0, 1], [1, 0]]), np.array([[0.75, 0.25], [0.5, 0.5]])
        >>> importance(Examples(chosen, chosen, weights, chosen), 2, 1)
        {'by_rank': [0.625, 0.375], 'main': [0.375, 0.25], 'auxiliary': [0.25, 0.125]}
    """
    weights = np.asarray(examples.weights, np.float64)
    whole = weights.sum()

    def shares(part: slice) -> list[float]:
        chosen = np.asarray(examples.experts)[:, part].reshape(-1)
        return (np.bincount(chosen, weights[:, part].reshape(-1), minlength=experts) / whole).tolist()

    return {
        "by_rank": (weights.sum(0) / whole).tolist(),
        "main": shares(slice(main)),
        "auxiliary": shares(slice(main, None)),
    }
