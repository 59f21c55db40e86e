"""The compressed linear map: one matrix outside of the routed experts as a sum of terms.

An attention projection, or a matrix of a shared expert or a dense MLP, is a layer of one expert with one target: the
same terms stand for it, of shape `(1, out, in)`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
from jaxtyping import Array, Float

from jaxmoe.arrays import AnyArray
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors.leaves import Count, pytree
from jaxmoe.factors.registry import check_taken, read_terms
from jaxmoe.factors.spec import Size, as_spec
from jaxmoe.factors.term import Term, Work


class LinearShape(NamedTuple):
    """Sizes of one linear map: outputs and inputs.

    Example:
        >>> LinearShape(out=6, in_=4).terms
        (1, 6, 4)
    """

    out: int
    in_: int

    @property
    def terms(self) -> tuple[int, int, int]:
        """The shape of its terms, `(1, out, in)`."""
        return 1, self.out, self.in_

    @property
    def numbers(self) -> int:
        """Numbers of the dense matrix."""
        return self.out * self.in_

    def as_json(self) -> dict[str, int]:
        """Return what stands in files."""
        return {"out": self.out, "in": self.in_}


class LinearShapeRecord(msgspec.Struct, forbid_unknown_fields=True):
    """A `LinearShape` as it stands in JSON, for msgspec to read.

    Example:
        >>> msgspec.convert({"out": 6, "in": 4}, LinearShapeRecord).shape
        LinearShape(out=6, in_=4)
    """

    out: Size
    in_: Size = msgspec.field(name="in")

    @property
    def shape(self) -> LinearShape:
        return LinearShape(self.out, self.in_)


@pytree(static=("sizes",))
@dataclass(frozen=True, kw_only=True)
class CompressedLinear:
    """One matrix `[out, in]` as a sum of terms, abstract (in a plan) or real; a bias is none of its business.

    Args:
        terms: each of shape `(1, out, in)`.
        sizes: outputs and inputs.

    Example:
        >>> from jaxmoe.factors import LowRank
        >>> sizes = LinearShape(out=6, in_=4)
        >>> CompressedLinear(sizes=sizes, terms=(LowRank.abstract(sizes.terms, "float32", rank=2),)).count().numbers
        20
    """

    terms: tuple[Term, ...]
    sizes: LinearShape

    def check(self) -> "CompressedLinear":
        """Return self, or raise if there is no term or a shape differs."""
        if not self.terms:
            raise JaxmoeError("no term for a linear map: it needs one at least")
        for term in self.terms:
            if term.shape != self.sizes.terms:
                raise JaxmoeError(f"a {term.kind} term of shape {term.shape}, not {self.sizes.terms}")
        return self

    def materialize(self) -> Float[Array, "out in"]:
        """Return the dense matrix, in float32."""
        return sum((term.materialize()[0] for term in self.terms[1:]), self.terms[0].materialize()[0])

    def apply(self, x: Float[AnyArray, "*batch in"]) -> Float[Array, "*batch out"]:
        """Return `x Wᵀ`, term by term, without forming the dense matrix."""
        rows = x.reshape(1, -1, self.sizes.in_)
        outs = [term.apply(rows) for term in self.terms]
        return sum(outs[1:], outs[0]).reshape(*x.shape[:-1], self.sizes.out)

    def count(self) -> Count:
        """Count stored numbers and bytes, exactly as on disk."""
        return sum((term.count() for term in self.terms), Count(0, 0))

    def work(self) -> Work:
        """Return what a token costs."""
        return sum((term.work(1) for term in self.terms), Work(0.0, 0.0))

    def tensors(self) -> dict[str, Any]:
        """Return the file layout: `{position}.{tensor}` to two-dimensional array."""
        return {
            f"{position}.{name}": array
            for position, term in enumerate(self.terms)
            for name, array in term.tensors().items()
        }

    def spec(self) -> list[dict[str, Any]]:
        """Return what stands in `config.json` beside the tensors: the terms' kinds and sizes."""
        return [term.spec() for term in self.terms]

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Any], spec: Any, sizes: LinearShape) -> "CompressedLinear":
        """Rebuild the map from its file layout and spec.

        Raises:
            JaxmoeError: the spec is not one, a term is unknown, or the tensors are not what it demands; the message
                names the term's position.
        """
        entries = as_spec(spec, list[dict[str, Any]], "the terms")
        terms, taken = read_terms(tensors, entries, sizes.terms)
        check_taken(tensors, taken)
        return cls(terms=terms, sizes=sizes).check()
