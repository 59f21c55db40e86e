"""Merged: experts that share one matrix, in clusters; the router chooses between them as before."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jaxmoe.arrays import AnyArray
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors.leaves import EVERY, Abstract, Leaf, plain, pytree, values
from jaxmoe.factors.registry import register
from jaxmoe.factors.spec import Size, TermSpec
from jaxmoe.factors.term import Term, Work, chance, per_expert


@register
@pytree()
@dataclass(frozen=True, kw_only=True)
class Merged(Term):
    """W_e = M_c(e), one matrix for every cluster of experts.

    Stored numbers: clusters * out * in + experts.

    Args:
        weight: M of one cluster after the other, `[cluster, out, in]`.
        labels: the cluster of every expert, int32, `[1, expert]`.

    Example:
        >>> term = Merged(weight=jnp.array([[[1.0]], [[2.0]]]), labels=jnp.array([[1, 0, 1]]))
        >>> term.materialize().ravel().tolist(), term.count().numbers
        ([2.0, 1.0, 2.0], 5)
    """

    class Spec(TermSpec, tag="merged"):
        clusters: Size

    kind: ClassVar[str] = "merged"
    named: ClassVar[Mapping[str, str]] = {"weight": "merged"}
    weight: Float[Leaf, "cluster out in"]
    labels: Int[AnyArray | Abstract, "1 expert"]

    @classmethod
    def abstract(cls, shape, dtype, *, clusters: int) -> "Merged":
        """Return the term without values: `shape` is `(experts, out, in)`."""
        experts, out, in_ = shape
        return cls(weight=Abstract((clusters, out, in_), dtype), labels=Abstract((1, experts), jnp.int32))

    @property
    def shape(self):
        return self.labels.shape[1], self.weight.shape[1], self.weight.shape[2]

    def materialize(self, experts=EVERY):
        return values(self.weight)[jnp.asarray(self.labels)[0, experts]]

    def apply(self, rows, product=per_expert):
        return product(rows, jnp.asarray(plain(self.weight))[jnp.asarray(self.labels)[0]])

    def work(self, chosen):
        experts, out, in_ = self.shape
        members = np.bincount(np.asarray(self.labels)[0], minlength=self.weight.shape[0])
        used = sum(chance(experts, chosen, int(size)) for size in members)
        return Work(used * out * in_, 2.0 * chosen * out * in_)

    def described(self):
        return self.Spec(clusters=self.weight.shape[0])

    @classmethod
    def planned(cls, spec, shape):
        return cls.abstract(shape, jnp.float32, clusters=spec.clusters)

    def checked(self):
        clusters, labels = self.weight.shape[0], np.asarray(self.labels)
        if not 0 <= labels.min() <= labels.max() < clusters:
            raise JaxmoeError(
                f"labels of merged experts {labels.min()} to {labels.max()}: there are {clusters} clusters"
            )
        return self
