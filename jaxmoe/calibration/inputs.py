"""What the linear maps beside the routed experts read on real tokens: sums of x xᵀ over all tokens, by activation.

    attention.input          the normalised hidden states: queries, keys, values, and the way down to latents
    attention.query_latent   normalised, of MLA        attention.kv_latent   alike
    attention.mixed          the heads' values as mixed, gated where the architecture does, side by side
    block.input              of the feed-forward block; in a layer with routed experts that is their `input_moment`
    shared.intermediate, feed_forward.intermediate      what the down projections read

Each is counted once, however many maps read it. They lie in the files of the layers, beside what the experts did.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from jaxmoe.model.roles import BLOCK_INPUT, ROLES

STORED = "float32"
"""The dtype of these sums in files; in memory they are float64."""


class InputMoment(NamedTuple):
    """Second moment of one activation.

    Args:
        sums: of x xᵀ over the tokens, `[in, in]`, float64.
        tokens: behind the sums.
    """

    sums: np.ndarray
    tokens: int


def kept_inputs(sizes: Mapping[str, tuple[int, int]], targets: Iterable[str], *, experts: bool) -> dict[str, int]:
    """Return the activations of a layer that statistics with some targets keep, and their sizes.

    Args:
        sizes: `(out, in)` of the layer's linear maps, by role.
        targets: from `LINEAR_TARGETS`.
        experts: whether the layer has routed experts, whose statistics hold what the feed-forward block reads.

    Example:
        >>> kept_inputs({"shared.up": (6, 4), "shared.down": (4, 6)}, ["shared"], experts=True)
        {'shared.intermediate': 6}
    """
    read = {ROLES[role].reads: in_ for role, (_, in_) in sizes.items() if ROLES[role].target in targets}
    return {name: size for name, size in read.items() if not (experts and name == BLOCK_INPUT)}
