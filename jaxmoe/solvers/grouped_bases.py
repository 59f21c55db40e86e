"""Groups of experts with a basis each, whose ranks may be unequal: the groups, their spectra, and the best fit.

    W_e ~ A_e B_g     e in group g, B_g [r_g, column] the leading right singular vectors of the stacked group

The experts are put into a given order and cut into consecutive groups of equal size; the last may have fewer. Without
mixing over groups the best bases are Eckart and Young's, and the coefficients the least-squares ones under each
expert's own moment. Source: RFID-MoE, arXiv 2602.09316, for groups and unequal ranks; the closed form is ours.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmoe.arrays import AnyArray
from jaxmoe.solvers.group_spectra import group_energies, group_spectra
from jaxmoe.solvers.mixture import Ragged, owners, solve_coefficients


class Grouping(NamedTuple):
    """The experts' matrices in the orientation and order of a fit by groups.

    matrices: in float32, in the order of `order`; moment: along the columns, row_moment: along the rows, `[1|expert,
    ...]` in the same order; order: expert numbers; owner: the group of each place; size: experts in a group; energies:
    squared singular values of the stacked groups, weighted where a moment is known; bases: the groups' own of every
    rank, where they were asked for.
    """

    matrices: Float[Array, "expert row column"]
    moment: Float[Array, "experts column column"] | None
    row_moment: Float[Array, "experts row row"] | None
    order: Int[np.ndarray, " expert"]
    owner: Int[np.ndarray, " expert"]
    size: int
    energies: Float[np.ndarray, "group spectrum"]
    bases: Float[Array, "group spectrum column"] | None

    @property
    def groups(self) -> int:
        """Number of groups."""
        return len(self.energies)

    @property
    def members(self) -> Int[np.ndarray, " group"]:
        """Experts in each group."""
        return np.bincount(self.owner, minlength=self.groups)

    def ragged(self, ranks: Int[np.ndarray, " group"]) -> Ragged | None:
        """Return the ranks as the fit of a mixture takes them, None where it needs no masks."""
        even = np.array_equal(self.owner, owners(len(self.owner), self.groups))
        if len(set(ranks)) == 1 and ranks[0] <= self.matrices.shape[1] and even:
            return None
        return Ragged(jnp.asarray(ranks, jnp.int32), jnp.asarray(self.owner, jnp.int32))


def group(
    weight: Float[AnyArray, "expert out in"],
    order: Int[np.ndarray, " expert"],
    *,
    size: int,
    moment: Float[AnyArray, "experts in in"] | None = None,
    transposed: bool = False,
    with_bases: bool = False,
) -> Grouping:
    """Put experts into groups and measure the groups' spectra.

    Args:
        weight: the experts' matrices, by expert number.
        order: expert numbers in the order in which they are cut into groups.
        size: experts in a group.
        moment: second moment of the inputs, `[1|expert, in, in]`; None for the identity.
        transposed: whether rows and columns of the fit are those of the transposed matrices.
        with_bases: whether the groups' own bases are wanted, too.

    Example:
        >>> found = group(jnp.ones((3, 1, 4)), np.array([2, 0, 1]), size=2)
        >>> found.groups, found.members.tolist(), found.energies[:, 0].round().tolist()
        (2, [2, 1], [8.0, 4.0])
    """
    matrices = jnp.swapaxes(weight, 1, 2) if transposed else weight
    matrices = jnp.asarray(matrices, jnp.float32)[order]
    own = None if moment is None else jnp.asarray(moment, jnp.float32)
    own = own if own is None or len(own) == 1 else own[order]
    along: dict[str, Any] = {"moment": None if transposed else own, "row_moment": own if transposed else None}
    owner = np.arange(len(order)) // size
    bases = None
    if with_bases:
        energies, bases = group_spectra(matrices, size=size, **along)
    else:
        energies = group_energies(matrices, size=size, **along)
    return Grouping(
        matrices, order=order, owner=owner, size=size, energies=np.asarray(energies, np.float64), bases=bases, **along
    )


compiled_solve = jax.jit(solve_coefficients, static_argnames=("activation", "refinements"))
"""`solve_coefficients` in one program."""


def closed_form(
    grouping: Grouping, ranks: Int[np.ndarray, " group"], *, dtype: Any
) -> tuple[Float[Array, "expert row rank"], Float[Array, "group rank column"]]:
    """Return the best coefficients and bases where every group has a basis of its own.

    Args:
        grouping: with its bases.
        ranks: of the groups; rows of bases and columns of coefficients beyond them mean nothing.
        dtype: that the bases are stored in; the coefficients are solved for the bases as they are stored.

    Returns:
        Coefficients in the grouping's order, in float32, and bases in their storage dtype.

    Example:
        >>> weight = jnp.array([[[3.0, 0.0], [0.0, 1.0]]])
        >>> found = group(weight, np.array([0]), size=1, with_bases=True)
        >>> coefficients, bases = closed_form(found, np.array([1]), dtype="float32")
        >>> (coefficients @ bases).round().tolist()
        [[[3.0, 0.0], [0.0, 0.0]]]
    """
    if grouping.bases is None:
        raise ValueError("the grouping was made without its bases")
    bases = grouping.bases[:, : int(ranks.max())].astype(dtype)
    matrices, owner, groups = grouping.matrices, grouping.owner, grouping.groups
    moment, refinements = grouping.moment, 2
    if moment is None or len(moment) == 1:
        # All experts of a group have the same problem: their rows are solved for together.
        filled = jnp.pad(matrices, ((0, groups * grouping.size - len(matrices)), (0, 0), (0, 0)))
        matrices, owner = filled.reshape(groups, -1, matrices.shape[2]), np.arange(groups)
    if moment is None and grouping.row_moment is None:
        # Orthonormal but for their rounding: there is nothing to refine.
        refinements = 0
    coefficients = compiled_solve(
        matrices,
        bases,
        jax.nn.one_hot(owner, groups),
        activation="identity",
        moment=moment,
        ragged=Ragged(jnp.asarray(ranks, jnp.int32), jnp.asarray(owner, jnp.int32)),
        refinements=refinements,
    )
    return coefficients.reshape(-1, grouping.matrices.shape[1], bases.shape[1])[: len(grouping.matrices)], bases
