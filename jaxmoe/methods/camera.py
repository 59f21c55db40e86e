"""CAMERA (arXiv 2508.02322): drop the intermediate channels that add the least to the layer's output.

    score_ej = |down_e[:, j]|^2 ((1 - rho) sum_t a^2 + rho max_t a^2),     a = w_te h_tej

The paper cuts the lowest channels of a whole layer, which leaves experts of unequal sizes; here every expert keeps as
many, since stock architectures know one size.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from jaxmoe.errors import JaxmoeError
from jaxmoe.methods.method import Evidence
from jaxmoe.methods.pruning import ChannelSettings, Pruned, PruningMethod, needs, statistic
from jaxmoe.scores import channel_energy
from jaxmoe.solvers.channels import keep_best


@dataclass(frozen=True, kw_only=True)
class CameraSettings(ChannelSettings):
    """Settings of CAMERA.

    Args:
        rho: weight of a channel's strongest token against the sum over all tokens, in [0, 1].
    """

    rho: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.rho <= 1:
            raise JaxmoeError(f"rho={self.rho}: give a number from 0 to 1")


def fit(evidence: Evidence, keep: int, settings: CameraSettings, *, groups: int = 1) -> Pruned:
    """Return every expert's channels of the largest weighted energy."""
    energies, peaks = (jnp.asarray(statistic(evidence, name)) for name in ("channel_energies", "channel_peaks"))
    score = channel_energy(evidence.weight("down"), energies, peaks, settings.rho)
    return Pruned(keep_best(np.asarray(score), keep))


CAMERA = PruningMethod(
    "camera",
    "drop the intermediate channels that add the least",
    CameraSettings,
    "channels",
    fit,
    needs("channel_energies", "channel_peaks"),
)
