"""The compressed layer: the routed experts of one MoE layer as sums of terms.

A term belongs to one *target*: a projection (`gate`, `up`, `down`) or `gate_up`, the two stacked along their outputs
(gate's rows first). The matrix of a projection is the sum of all terms that cover it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax.numpy as jnp
import msgspec
from jaxtyping import Array, Float

from jaxmoe.arrays import AnyArray
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors.leaves import EVERY, Count, pytree
from jaxmoe.factors.registry import check_taken, read_terms
from jaxmoe.factors.spec import Size, as_spec
from jaxmoe.factors.term import Term, Work, per_expert

PROJECTIONS = ("gate", "up", "down")
TARGETS = {"gate": ("gate",), "up": ("up",), "gate_up": ("gate", "up"), "down": ("down",)}
"""What each target covers, in the order in which the outputs are stacked."""


class LayerShape(NamedTuple):
    """Sizes of one MoE layer: routed experts, hidden size, expert intermediate size; `gated` is False without a gate.

    Example:
        >>> LayerShape(experts=16, hidden=128, intermediate=64).of("gate_up")
        (16, 128, 128)
    """

    experts: int
    hidden: int
    intermediate: int
    gated: bool = True

    @property
    def projections(self) -> tuple[str, ...]:
        return PROJECTIONS if self.gated else PROJECTIONS[1:]

    @property
    def numbers(self) -> int:
        """Numbers in all routed experts of the layer."""
        return len(self.projections) * self.experts * self.hidden * self.intermediate

    def of(self, target: str) -> tuple[int, int, int]:
        """Return `(experts, out, in)` of a target."""
        if target == "down":
            return self.experts, self.hidden, self.intermediate
        return self.experts, len(TARGETS[target]) * self.intermediate, self.hidden


class ShapeRecord(msgspec.Struct, forbid_unknown_fields=True):
    """A `LayerShape` as it stands in JSON (`LayerShape._asdict`), for msgspec to read.

    Example:
        >>> msgspec.convert({"experts": 2, "hidden": 4, "intermediate": 3}, ShapeRecord).shape
        LayerShape(experts=2, hidden=4, intermediate=3, gated=True)
    """

    experts: Size
    hidden: Size
    intermediate: Size
    gated: bool = True

    @property
    def shape(self) -> LayerShape:
        return LayerShape(**msgspec.structs.asdict(self))


def stack(weights: Mapping[str, Any], target: str) -> Float[Array, "expert out in"]:
    """Return a target's dense matrices from those of the projections.

    Example:
        >>> stack({"gate": jnp.zeros((2, 3, 4)), "up": jnp.ones((2, 3, 4))}, "gate_up").shape
        (2, 6, 4)
    """
    parts = [weights[projection] for projection in TARGETS[target]]
    return jnp.asarray(parts[0]) if len(parts) == 1 else jnp.concatenate([jnp.asarray(p) for p in parts], axis=1)


@pytree(static=("sizes",))
@dataclass(frozen=True, kw_only=True)
class CompressedLayer:
    """The experts of one layer as sums of terms, abstract (in a plan) or real.

    Args:
        terms: for each target the tuple of its terms.
        sizes: the layer's shape.

    Example:
        >>> from jaxmoe.factors import Dense, LowRank
        >>> sizes = LayerShape(experts=2, hidden=4, intermediate=3)
        >>> layer = CompressedLayer(sizes=sizes, terms={
        ...     "gate_up": (LowRank.abstract(sizes.of("gate_up"), "float32", rank=1),),
        ...     "down": (Dense.abstract(sizes.of("down"), "float32"),)})
        >>> layer.count().numbers == 2 * 1 * (6 + 4) + 2 * 4 * 3
        True
    """

    terms: dict[str, tuple[Term, ...]]
    sizes: LayerShape

    def check(self) -> "CompressedLayer":
        """Return self, or raise if a target is unknown, a shape differs or a projection has no term."""
        for target, terms in self.terms.items():
            if target not in TARGETS:
                raise JaxmoeError(f"unknown target {target!r}: the targets are {', '.join(TARGETS)}")
            for term in terms:
                if term.shape != self.sizes.of(target):
                    raise JaxmoeError(
                        f"{target}: a {term.kind} term of shape {term.shape}, not {self.sizes.of(target)}"
                    )
        covered = {p for target, terms in self.terms.items() if terms for p in TARGETS[target]}
        if missing := [p for p in self.sizes.projections if p not in covered]:
            raise JaxmoeError(f"no term for {', '.join(missing)}: every projection of the layer needs one")
        return self

    def materialize(self, projection: str, experts: slice = EVERY) -> Float[Array, "expert out in"]:
        """Return one projection's dense matrices, the sum of all terms that cover it, in float32."""
        total = None
        for target, terms in self.terms.items():
            if projection not in TARGETS[target]:
                continue
            for term in terms:
                dense = term.materialize(experts)
                if target != projection:
                    part = TARGETS[target].index(projection)
                    dense = dense[:, part * self.sizes.intermediate : (part + 1) * self.sizes.intermediate]
                total = dense if total is None else total + dense
        if total is None:
            raise JaxmoeError(f"no term for {projection}: the layer holds {', '.join(self.terms)}")
        return total

    def split(self) -> tuple["CompressedLayer", "CompressedLayer"]:
        """Return the terms of single experts and those whose matrix is the same for all, each possibly without any."""
        own, base = (
            {target: tuple(term for term in terms if term.for_all is for_all) for target, terms in self.terms.items()}
            for for_all in (False, True)
        )
        return replace(self, terms=own), replace(self, terms=base)

    def masked(self, rows: Float[AnyArray, "*row in"], projection: str) -> "CompressedLayer":
        """Return the layer with the choices made that terms for all experts of one projection make from their rows."""
        terms = {
            target: tuple(term.masked(rows) for term in terms) if projection in TARGETS[target] else terms
            for target, terms in self.terms.items()
        }
        return replace(self, terms=terms)

    def sums(
        self, rows: Float[AnyArray, "*row in"], projections: tuple[str, ...], product=per_expert
    ) -> dict[str, Float[Array, "*row _"]]:
        """Multiply activations by some projections, term by term, without densifying; without those that have no term.

        Every term is applied once, also where it covers several of the projections; `product` is that of `Term.apply`.
        """
        totals: dict[str, Any] = {}
        for target, terms in self.terms.items():
            wanted = [name for name in TARGETS[target] if name in projections]
            for term in terms if wanted else ():
                out = term.apply(rows, product)
                for name in wanted:
                    part = TARGETS[target].index(name) * self.sizes.intermediate
                    own = out if target == name else out[..., part : part + self.sizes.intermediate]
                    totals[name] = totals[name] + own if name in totals else own
        return totals

    def apply(
        self, rows: Float[AnyArray, "expert row in"], projections: tuple[str, ...], product=per_expert
    ) -> tuple[Float[Array, "expert row out"], ...]:
        """Multiply each expert's activations by some projections, see `sums`."""
        totals = self.sums(rows, projections, product)
        return tuple(totals[name] for name in projections)

    def count(self) -> Count:
        """Count stored numbers and bytes, exactly as on disk."""
        return sum((term.count() for terms in self.terms.values() for term in terms), Count(0, 0))

    def work(self, chosen: int) -> Work:
        """Return what a token costs in the layer's experts, in the mean over all choices of experts; see `Term.work`.

        Args:
            chosen: experts of a token, 1 to all.

        Example:
            >>> from jaxmoe.factors import Dense
            >>> sizes = LayerShape(experts=4, hidden=8, intermediate=2)
            >>> terms = {name: (Dense.abstract(sizes.of(name), "float32"),) for name in sizes.projections}
            >>> CompressedLayer(terms=terms, sizes=sizes).work(2)
            Work(numbers=96.0, operations=192.0)
        """
        if not 1 <= chosen <= self.sizes.experts:
            raise JaxmoeError(f"{chosen} experts of a token in a layer of {self.sizes.experts}: give 1 to all of them")
        return sum((term.work(chosen) for terms in self.terms.values() for term in terms), Work(0.0, 0.0))

    def tensors(self) -> dict[str, Any]:
        """Return the file layout: `{target}.{position}.{tensor}` to two-dimensional array."""
        return {
            f"{target}.{position}.{name}": array
            for target, terms in self.terms.items()
            for position, term in enumerate(terms)
            for name, array in term.tensors().items()
        }

    def spec(self) -> dict[str, list[dict[str, Any]]]:
        """Return what stands in `config.json` beside the tensors: for each target its terms' kinds and sizes."""
        return {target: [term.spec() for term in terms] for target, terms in self.terms.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Any], spec: Mapping[str, Any], sizes: LayerShape) -> "CompressedLayer":
        """Rebuild the layer from its file layout and spec.

        Raises:
            JaxmoeError: the spec is not one, a term is unknown, or the tensors are not what it demands; the message
                names the target and the term's position.
        """
        terms: dict[str, tuple[Term, ...]] = {}
        taken: set[str] = set()
        for target, entries in as_spec(spec, dict[str, list[dict[str, Any]]], "the terms").items():
            if target not in TARGETS:
                raise JaxmoeError(f"unknown target {target!r}: the targets are {', '.join(TARGETS)}")
            terms[target], own = read_terms(tensors, entries, sizes.of(target), target)
            taken |= own
        check_taken(tensors, taken)
        return cls(terms=terms, sizes=sizes).check()
