"""Scores: how much an expert, a channel or a matrix matters, from what calibration counted or from the weights alone.

    of experts    routing_frequency, fused_importance, fisher_mass, output_norm, router_weighted_output_norm
    of channels   channel_energy
    of matrices   effective_rank, kurtosis, outlier_score

Statistics are the sums that `LayerStatistics` holds. All functions take leading axes beyond those they name, return
floating-point arrays (float64 inside `jax.enable_x64(True)`) and give no NaN for what calibration may find: an expert
that no token chose, counts that are all zero and columns of zeros have a defined score, stated where it occurs. None of
them spends a budget: see `jaxmoe.allocation`.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from jaxmoe.arrays import AnyArray

_Numbers = Num[Array, "..."]


def normalized(score: Num[AnyArray, "*batch unit"]) -> Float[Array, "*batch unit"]:
    """Return a score as fractions that sum to 1: s_u / sum s; equal fractions where all are zero.

    Args:
        score: at least 0, `[..., unit]`.

    Example:
        >>> normalized(jnp.array([[3.0, 1.0], [0.0, 0.0]])).tolist()
        [[0.75, 0.25], [0.5, 0.5]]
    """
    score = _floating(score)
    # Divided by the largest first, sums neither overflow nor underflow.
    score = _ratio(score, score.max(-1, keepdims=True), otherwise=1.0)
    return score / score.sum(-1, keepdims=True)


def routing_frequency(counts: Num[AnyArray, "*layer expert"]) -> Float[Array, "*layer expert"]:
    """Return the share of each expert in the choices of the router: f_e = z_e / sum z; uniform if nothing was counted.

    Args:
        counts: z_e, tokens that chose an expert, `[..., expert]`.

    Returns:
        Fractions in [0, 1] that sum to 1, unlike `LayerStatistics.frequency`, which sums to top-k.

    Source:
        RFID-MoE, arXiv 2602.09316, section 3.2.

    Example:
        >>> routing_frequency(jnp.array([6, 2, 0])).tolist()
        [0.75, 0.25, 0.0]
    """
    return normalized(counts)


def effective_rank(energies: Num[AnyArray, "*unit k"]) -> Float[Array, "*unit"]:
    """Return the effective rank of spectra: the exponential of the entropy of their energies.

        q_i = s_i^2 / sum s^2        effective rank = exp(- sum_i q_i ln q_i),   from 1 (rank one) to k (equal values)

    Args:
        energies: s_i^2, squared singular values, in any order, `[..., k]`; those below 0 count as 0.

    Returns:
        `[...]`, in ranks; 1 for a matrix of zeros.

    Source:
        Information density of RFID-MoE, arXiv 2602.09316, section 3.2. The effective rank of Roy and Vetterli 2007 has
        the singular values themselves in place of their squares.

    Example:
        >>> effective_rank(jnp.array([[4.0, 4.0], [9.0, 0.0], [0.0, 0.0]])).round(3).tolist()
        [2.0, 1.0, 1.0]
    """
    energies = jnp.maximum(_floating(energies), 0)
    shares = _ratio(energies, energies.max(-1, keepdims=True), otherwise=0.0)
    shares = _ratio(shares, shares.sum(-1, keepdims=True), otherwise=0.0)
    logs = jnp.log(jnp.where(shares > 0, shares, 1.0))
    return jnp.exp(-(shares * logs).sum(-1))


def fused_importance(
    information: Num[AnyArray, "*layer unit"], frequency: Num[AnyArray, "*layer unit"], xi: float
) -> Float[Array, "*layer unit"]:
    """Return the mixture of information density and routing frequency: C = xi R / sum R + (1 - xi) f / sum f.

    Args:
        information: effective rank of each unit (an expert, or a group of them), `[..., unit]`.
        frequency: routing counts or frequency of each unit, `[..., unit]`.
        xi: weight of the information, in [0, 1].

    Returns:
        `[..., unit]`, fractions that sum to 1.

    Source:
        RFID-MoE, arXiv 2602.09316, section 3.2; 0.7 to 0.8 was best there.

    Example:
        >>> fused_importance(jnp.array([30.0, 10.0]), jnp.array([1, 3]), xi=0.5).tolist()
        [0.5, 0.5]
    """
    return xi * normalized(information) + (1 - xi) * normalized(frequency)


def fisher_mass(fisher: Num[AnyArray, "*layer expert out in"]) -> Float[Array, "*layer expert"]:
    """Return the Fisher information of all weights of an expert's matrix: the sum of their squared gradients.

    Args:
        fisher: diagonal of the Fisher information, `[..., expert, out, in]`.

    Returns:
        `[..., expert]`; 0 for an expert that no token chose. Masses of gate, up and down add up to the expert's.

    Example:
        >>> fisher_mass(jnp.ones((2, 3, 4))).tolist()
        [12.0, 12.0]
    """
    fisher = _floating(fisher)
    return fisher.sum((-2, -1))


def output_norm(
    sums: Num[AnyArray, "*layer expert"], counts: Num[AnyArray, "*layer expert"]
) -> Float[Array, "*layer expert"]:
    """Return the mean norm of what an expert adds for a token that chose it, before the router's weight.

        sum_t |f_e(x_t)| / z_e        over the z_e tokens that chose e

    Args:
        sums: `LayerStatistics.output_norms`, `[..., expert]`.
        counts: z_e, tokens that chose an expert, `[..., expert]`.

    Returns:
        `[..., expert]`; 0 for an expert that no token chose.

    Example:
        >>> output_norm(jnp.array([6.0, 0.0]), jnp.array([4, 0])).tolist()
        [1.5, 0.0]
    """
    return _ratio(_floating(sums), _floating(counts), otherwise=0.0)


def router_weighted_output_norm(
    sums: Num[AnyArray, "*layer expert"], counts: Num[AnyArray, "*layer expert"]
) -> Float[Array, "*layer expert"]:
    """Return the mean norm of what an expert adds for a token that chose it, times the router's weight.

        sum_t w_te |f_e(x_t)| / z_e        over the z_e tokens that chose e

    Args:
        sums: `LayerStatistics.weighted_output_norms`, `[..., expert]`.
        counts: z_e, tokens that chose an expert, `[..., expert]`.

    Returns:
        `[..., expert]`; 0 for an expert that no token chose, so that it is the first to be dropped.

    Source:
        REAP, arXiv 2510.13999; w is the router's weight as the model uses it.

    Example:
        >>> router_weighted_output_norm(jnp.array([3.0, 0.0]), jnp.array([4, 0])).tolist()
        [0.75, 0.0]
    """
    return output_norm(sums, counts)


def channel_energy(
    down: Num[AnyArray, "*layer expert out channel"],
    energies: Num[AnyArray, "*layer expert channel"],
    peaks: Num[AnyArray, "*layer expert channel"],
    rho: float,
) -> Float[Array, "*layer expert channel"]:
    """Return what the intermediate channels of every expert add to the output of the layer.

        |down_e[:, j]|^2 ((1 - rho) sum_t a_tj^2 + rho max_t a_tj^2),        a_tj = w_te h_tej

    Args:
        down: down projections, `[..., expert, out, channel]`.
        energies: sum_t a^2, `LayerStatistics.channel_energies`, `[..., expert, channel]`.
        peaks: max_t a^2, `LayerStatistics.channel_peaks`, `[..., expert, channel]`.
        rho: weight of the peak, in [0, 1].

    Returns:
        `[..., expert, channel]`, comparable across the experts of a layer; 0 where no token chose the expert.

    Source:
        CAMERA, arXiv 2508.02322, as in its released code: squares of both norms.

    Example:
        >>> down = jnp.array([[[3.0, 0.0], [4.0, 2.0]]])
        >>> channel_energy(down, jnp.array([[2.0, 8.0]]), jnp.array([[1.0, 4.0]]), rho=0.5).tolist()
        [[37.5, 24.0]]
    """
    down, energies, peaks = _floating(down), _floating(energies), _floating(peaks)
    return (down**2).sum(-2) * ((1 - rho) * energies + rho * peaks)


def kurtosis(weight: Num[AnyArray, "*unit out in"]) -> Float[Array, "*unit"]:
    """Return the excess kurtosis of the weights of each matrix: m4 / m2^2 - 3, with central moments over all entries.

    Args:
        weight: `[..., out, in]`.

    Returns:
        `[...]`: 0 for Gaussian weights, above it for heavy tails, at least -2; 0 where all entries are equal.

    Source:
        Rank rule of MiLo, arXiv 2504.02658. Its code divides by the sample variance (n - 1), here by that of n.

    Example:
        >>> kurtosis(jnp.array([[[1.0, -1.0], [1.0, -1.0]], [[7.0, 7.0], [7.0, 7.0]]])).tolist()
        [-2.0, 0.0]
    """
    weight = _floating(weight)
    deviations = weight - weight.mean((-2, -1), keepdims=True)
    # The mean of equal entries may round to another number.
    even = weight.max((-2, -1), keepdims=True) == weight.min((-2, -1), keepdims=True)
    deviations = jnp.where(even, 0.0, deviations)
    # In units of the largest, fourth powers do not underflow.
    deviations = _ratio(deviations, abs(deviations).max((-2, -1), keepdims=True), otherwise=0.0)
    variance, fourth = (deviations**2).mean((-2, -1)), (deviations**4).mean((-2, -1))
    return _ratio(fourth, variance**2, otherwise=3.0) - 3


def outlier_score(weight: Num[AnyArray, "*unit out in"]) -> Float[Array, "*unit"]:
    """Return how far the largest weight of an input channel stands out from the channel's mean.

        max_j  max_i |W_ij| / mean_i |W_ij|

    Args:
        weight: `[..., out, in]`: maximum and mean run over the outputs of one input channel j.

    Returns:
        `[...]`, from 1 to out; channels of zeros are left out, 1 where there are no others.

    Source:
        QuantMoE-Bench, arXiv 2406.08155, as in its released code.

    Example:
        >>> outlier_score(jnp.array([[[1.0, 0.0], [3.0, 0.0]]])).tolist()
        [1.5]
    """
    sizes = abs(_floating(weight))
    largest = sizes.max(-2, keepdims=True)
    means = _ratio(sizes, largest, otherwise=1.0).mean(-2)
    return (1 / means).max(-1)


def _floating(values: Num[AnyArray, "..."]) -> _Numbers:
    """Return an array of at least float32; counts of the host beyond int32 are rounded, not wrapped."""
    if jnp.issubdtype(jnp.result_type(values), jnp.integer):
        return jnp.asarray(values, float)
    values = jnp.asarray(values)
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


def _ratio(numerator: _Numbers, denominator: _Numbers, *, otherwise: float) -> _Numbers:
    """Return numerator / denominator, `otherwise` where the denominator is not positive."""
    positive = denominator > 0
    return jnp.where(positive, numerator / jnp.where(positive, denominator, 1.0), otherwise)
