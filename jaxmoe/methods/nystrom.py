"""Nyström channel pruning: drop intermediate channels and refit down to the others.

    paper      C = sum_t h h',  S = channels of the largest ridge leverage diag((C + r I)^-1 C)
    improved   C = sum_t w^2 h h' shrunk towards all experts' and floored,  S chosen one after another, each time the
               channel that most lowers the error
    both       down <- down C[:, S] C[S, S]^-1

Source: the MLP part of MoDeGPT (arXiv 2408.09632), for every expert alone.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.errors import JaxmoeError
from jaxmoe.methods.method import Evidence
from jaxmoe.methods.pruning import ChannelSettings, Pruned, PruningMethod, needs, statistic
from jaxmoe.solvers.channels import damped, greedy_channels, keep_best, nystrom_down, ridge_leverage


@dataclass(frozen=True, kw_only=True)
class NystromSettings(ChannelSettings):
    """Settings of Nyström pruning.

    Args:
        ridge: r of the setting "paper", as a fraction of the mean of C's diagonal.
    """

    ridge: float = 0.01

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.ridge < 1:
            raise JaxmoeError(f"ridge={self.ridge}: give a number between 0 and 1")


def fit(evidence: Evidence, keep: int, settings: NystromSettings, *, groups: int = 1) -> Pruned:
    """Return the channels that stay and the new down projection, computed in float64."""
    with jax.enable_x64(True):
        down = jnp.asarray(evidence.weight("down"), jnp.float64)
        if settings.setting == "paper":
            sums = jnp.asarray(statistic(evidence, "intermediate_moments"), jnp.float64)
            kept = jnp.asarray(keep_best(np.asarray(ridge_leverage(sums, settings.ridge)), keep))
            moment = damped(sums, settings.ridge)
        else:
            # Where no token came by, all channels are taken for equally strong.
            moment = jnp.eye(down.shape[2]) if evidence.moment is None else jnp.asarray(evidence.moment, jnp.float64)
            moment = jnp.broadcast_to(moment, (len(down), *moment.shape[-2:]))
            kept = greedy_channels(down, moment, keep=keep)
        found = nystrom_down(down, moment, kept)
        return Pruned(np.asarray(kept), {"down": np.asarray(found, np.float32)})


NYSTROM = PruningMethod(
    "nystrom",
    "drop intermediate channels and refit down to the others",
    NystromSettings,
    "channels",
    fit,
    needs("intermediate_moments"),
)
