"""SVD: every expert's matrices as a thin pair of factors, the closest of that rank.

    W_e = L_e R_e          minimising || (W_e - L_e R_e) C^(1/2) ||, C = E[x xᵀ] where second moments are given

setting="paper": gate, up and down apart. setting="improved": gate and up stacked along their outputs, so that they
share R_e; at equal size that halves neither's error but costs one row space less, and is the strongest plain form
known. Source: Eckart and Young 1936; with moments SVD-LLM (arXiv 2403.07378) without its inverse.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import LayerShape, LowRank
from jaxmoe.methods.method import DOWN_WEIGHT, Fit, Method, Slot
from jaxmoe.solvers.weighted_svd import weighted_svd


@dataclass(frozen=True, kw_only=True)
class SVDSettings:
    """Settings of the method: `setting` is "paper" or "improved".

    Example:
        >>> SVDSettings(setting="best")
        Traceback (most recent call last):
        ...
        jaxmoe.errors.JaxmoeError: setting 'best': give paper or improved
    """

    setting: str = "improved"

    def __post_init__(self):
        if self.setting not in ("paper", "improved"):
            raise JaxmoeError(f"setting {self.setting!r}: give paper or improved")


def break_even(shape: tuple[int, int, int]) -> int:
    """Return the highest rank at which a pair of factors stores fewer numbers than the matrix `[_, out, in]`.

    Example:
        >>> break_even((1, 64, 128))
        42
    """
    _, out, in_ = shape
    return (out * in_ - 1) // (out + in_)


def slots(shape: LayerShape, dtype, settings: SVDSettings, kept: float, *, weighted: bool = False) -> tuple[Slot, ...]:
    """Return a ladder of ranks for every target."""
    joined = settings.setting == "improved" and shape.gated
    targets = ("gate_up", "down") if joined else shape.projections

    def slot(target):
        sizes = shape.of(target)
        weight = DOWN_WEIGHT if target == "down" and settings.setting == "improved" else 1.0
        return Slot(target, lambda rank: LowRank.abstract(sizes, dtype, rank=rank), 1, break_even(sizes), weight)

    return tuple(slot(target) for target in targets)


@functools.partial(jax.jit, static_argnames="rank")
def _factors(weight, moment, rank):
    fit = weighted_svd(weight, rank=rank, column_moment=moment)
    return fit.left, fit.right


def fit(weight, template: LowRank, settings: SVDSettings, *, moment=None, key=None) -> Fit:
    """Return the factors of one target, computed in float64 where a second moment weights them."""
    dtype = template.left.dtype
    if moment is None:
        left, right = _factors(jnp.asarray(weight, jnp.float32), None, template.rank)
    else:
        # The moment squares the condition number of the inputs, the Gram matrix that of the weights.
        with jax.enable_x64(True):
            left, right = _factors(jnp.asarray(weight, jnp.float64), jnp.asarray(moment, jnp.float64), template.rank)
            left, right = jnp.asarray(left, jnp.float32), jnp.asarray(right, jnp.float32)
    return Fit(LowRank(left=left.astype(dtype), right=right.astype(dtype)), np.zeros(0, np.float32))


def working_bytes(template: LowRank) -> int:
    """Return the bytes of Gram matrices, eigenvectors and float32 factors."""
    experts, out, in_ = template.shape
    return 4 * experts * (3 * min(out, in_) ** 2 + template.rank * (out + in_))


SVD = Method("svd", "truncated SVD of every expert", SVDSettings, slots, fit, working_bytes)
