"""Slices of a layer's experts: what remains when intermediate channels go.

Channel j of an expert is row j of its gate and of its up, and column j of its down.
"""

import numpy as np
from jaxtyping import Int, Num


def slice_channels(
    weight: Num[np.ndarray, "expert out in"], kept: Int[np.ndarray, "expert keep"], projection: str
) -> Num[np.ndarray, "expert kept_out kept_in"]:
    """Return the channels that stay of every expert: rows of gate and up, columns of down.

    Args:
        weight: of one projection, `[expert, out, in]`.
        kept: ascending indices of the channels that stay, `[expert, keep]`.
        projection: "gate", "up" or "down".

    Example:
        >>> slice_channels(np.eye(3)[None], np.array([[0, 2]]), "down").tolist()
        [[[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]]
    """
    if projection == "down":
        return np.take_along_axis(weight, kept[:, None, :], axis=2)
    return np.take_along_axis(weight, kept[:, :, None], axis=1)
