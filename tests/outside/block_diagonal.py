"""A term and a method of another package: blocks on the diagonal of the experts' matrices, and factors beside them."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from jaxmoe import methods
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import LowRank, Term, Work, register
from jaxmoe.factors.leaves import EVERY, Abstract, pytree
from jaxmoe.factors.spec import Size, TermSpec
from jaxmoe.factors.term import per_expert
from jaxmoe.methods.method import Fit, Slot
from jaxmoe.methods.svd import SVD, SVDSettings, break_even


@register
@pytree(static=("count_blocks",))
@dataclass(frozen=True, kw_only=True)
class BlockDiagonal(Term):
    """W_e = diag(B_e1, ..., B_en), zero elsewhere; `blocks` is `[expert, out, in / n]`, one block below the other."""

    class Spec(TermSpec, tag="block_diagonal"):
        blocks: Size

    kind: ClassVar[str] = "block_diagonal"
    twin: ClassVar[str] = "outside.block_diagonal_twin"
    blocks: object
    count_blocks: int

    @classmethod
    def abstract(cls, shape, dtype, *, blocks):
        experts, out, in_ = shape
        if out % blocks or in_ % blocks:
            raise JaxmoeError(f"{blocks} blocks in matrices of {out} x {in_}: give a divisor of both")
        return cls(blocks=Abstract((experts, out, in_ // blocks), dtype), count_blocks=blocks)

    @property
    def shape(self):
        experts, out, width = self.blocks.shape
        return experts, out, width * self.count_blocks

    def materialize(self, experts=EVERY):
        blocks = jnp.asarray(self.blocks, jnp.float32)[experts]
        return place(blocks, self.count_blocks)

    def apply(self, rows, product=per_expert):
        return product(rows, place(jnp.asarray(self.blocks), self.count_blocks))

    def work(self, chosen):
        experts = self.shape[0]
        used = self.count().numbers * chosen / experts
        return Work(used, 2.0 * used)

    def described(self):
        return self.Spec(blocks=self.count_blocks)

    @classmethod
    def planned(cls, spec, shape):
        return cls.abstract(shape, jnp.float32, blocks=spec.blocks)


def place(blocks, count):
    """Return the matrices that have the blocks on their diagonal."""
    experts, out, width = blocks.shape
    own = blocks.reshape(experts, count, out // count, width)
    whole = jnp.zeros((experts, count, out // count, count, width), blocks.dtype)
    index = jnp.arange(count)
    return whole.at[:, index, :, index].set(jnp.swapaxes(own, 0, 1)).reshape(experts, out, count * width)


BLOCKS = 4


def slot(target, shape, dtype, settings, kept, *, weighted=False):
    """Return a ladder of ranks beside blocks that are always there."""
    sizes = shape.of(target)
    blocks = BlockDiagonal.abstract(sizes, dtype, blocks=BLOCKS)
    return Slot(lambda rank: (blocks, LowRank.abstract(sizes, dtype, rank=rank)), 1, break_even(sizes))


def fit(weight, template, settings, *, evidence, key=None):
    """Cut the blocks out, and fit factors to the rest."""
    blocks, factors = template
    experts, out, in_ = weight.shape
    own = np.asarray(weight, np.float32).reshape(experts, BLOCKS, out // BLOCKS, BLOCKS, in_ // BLOCKS)
    index = np.arange(BLOCKS)
    cut = own[:, index, :, index].swapaxes(0, 1).reshape(experts, out, in_ // BLOCKS)
    term = BlockDiagonal(blocks=jnp.asarray(cut, blocks.blocks.dtype), count_blocks=BLOCKS)
    rest = SVD.fit(
        jnp.asarray(weight) - term.materialize(), (factors,), SVDSettings(setting="paper"), evidence=evidence
    )
    return Fit((term, *rest.terms))


methods.register(
    SVD._replace(
        name="blocks", summary="blocks on the diagonal, and factors", slot=slot, fit=fit, working_bytes=lambda _: 0
    )
)
