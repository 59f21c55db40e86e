"""What a checkpoint itself says of how it can be compressed: how its experts are used, and how fast their spectra fall.

share of an expert in a layer's choices      z_e / sum z                 1 / E where all are used alike
spectrum of a projection                     s_i / s_1, mean over experts
effective rank of an expert's matrix         see `scores.effective_rank`
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.calibration.folder import Statistics
from jaxmoe.checkpoint import Checkpoint
from jaxmoe.report.comparison_records import Routing, Spectrum
from jaxmoe.scores import effective_rank
from jaxmoe.solvers.weighted_svd import weighted_energies

POINTS = 64
"""Singular values that are kept of a spectrum."""


def routing(statistics: Statistics) -> Routing:
    """Return how many of each domain's tokens chose each expert."""
    return Routing(
        layers=list(statistics.layers),
        counts={
            domain: [statistics.read(index, "counts", [domain]).tolist() for index in statistics.layers]
            for domain in statistics.domains
        },
    )


@jax.jit
def _spectra(weight):
    energies = weighted_energies(weight)
    return energies, effective_rank(energies)


def spectra(checkpoint: Checkpoint) -> list[Spectrum]:
    """Return the singular values and effective ranks of every projection of every layer, one layer at a time."""
    found = []
    for layer in checkpoint.layers:
        for projection in layer.shape.projections:
            energies, ranks = map(
                np.asarray, _spectra(jnp.asarray(checkpoint.projection(layer, projection), jnp.float32))
            )
            values = np.sqrt(energies, dtype=np.float64)
            # A matrix of zeros has no spectrum to speak of.
            values = (values / np.maximum(values[:, :1], np.finfo(np.float32).tiny)).mean(0)
            size = len(values)
            at = np.unique(np.linspace(0, size - 1, min(size, POINTS)).round().astype(int))
            found.append(
                Spectrum(
                    layer=layer.index,
                    projection=projection,
                    size=size,
                    positions=(at + 1).tolist(),
                    values=values[at].tolist(),
                    effective_ranks=ranks.astype(float).tolist(),
                )
            )
    return found
