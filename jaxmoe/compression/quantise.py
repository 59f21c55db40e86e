"""Quantising: bits instead of floats, of the matrices or of the terms that stand for them."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.checkpoint.families import exports
from jaxmoe.compression.budget import Sizes
from jaxmoe.compression.evidence import evidence
from jaxmoe.compression.factor import Factor
from jaxmoe.compression.found import Found, Layer, Source
from jaxmoe.compression.linear_maps import linear_evidence
from jaxmoe.compression.step import Asked, Context, Options, Step
from jaxmoe.compression.term_pass import TermStep, check_factored
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import TARGETS, Term, stack
from jaxmoe.methods.method import Evidence, Outcome, count
from jaxmoe.methods.quantising import chosen_bits


@dataclass(frozen=True, kw_only=True)
class Quantise(TermStep):
    """A step that stores what it finds in fewer bits."""

    stage: ClassVar[int] = 2
    once: ClassVar[bool] = True

    accepts: ClassVar[frozenset[str]] = frozenset({"layers", "sequential", "gradients", "statistics"})

    @property
    def bits(self) -> int | None:
        """Of every number; None where a budget chooses."""
        return chosen_bits(self.method, self.settings)

    def joins(self, before: Step, texts: bool) -> bool:
        """Without need of statistics, or behind factors, whose statistics are those of the inputs of the same matrices.

        There the original's matrices are still at hand, against which factors can be solved once more.
        """
        return not self.requires or isinstance(before, Factor)

    def forms(self, checkpoint: Source) -> list[str]:
        """Return the forms that the architecture can be written in."""
        return exports(checkpoint.dense_config()["model_type"])

    def check(self, checkpoint: Source, options: Options) -> None:
        """Raise if the result could not be written."""
        check_factored(checkpoint, options.export or "factored")

    def terms(self, terms: tuple[Term, ...]) -> tuple[Term, ...]:
        """Return the abstract terms as they will be stored, in the bits of all numbers."""
        if self.bits is None:
            named = f"{self.name}{self.method.widths(self.settings)[0]}"
            raise JaxmoeError(f"{self.name} does not say how many bits: name them, as in {named}")
        return self.method.abstract(terms, self.settings, np.full(terms[0].shape[0], self.bits))

    def plan(self, found: Found, asked: Asked, **_: Any) -> "PlannedQuantise":
        """Plan that all terms of all layers are stored so."""
        self.terms(next(iter(next(iter(found.layers.values())).terms.values())))
        assert self.bits is not None
        bits: dict[int, dict[str, np.ndarray]] = {
            index: {target: np.full(layer.sizes.experts, self.bits) for target in layer.terms}
            for index, layer in found.layers.items()
        }
        for index, linears in found.linears.items():
            bits.setdefault(index, {}).update({own.source.name: np.full(1, self.bits) for own in linears})
        return PlannedQuantise(step=self, found=found, bits=bits)


@dataclass(frozen=True, kw_only=True)
class PlannedQuantise:
    """A quantising step, planned.

    Args:
        step: what is planned.
        found: the model.
        bits: of each expert, `[expert]`, by layer and target; of a linear map by its name, `[1]`.
    """

    step: Quantise
    found: Found = field(repr=False)
    bits: Mapping[int, Mapping[str, np.ndarray]] = field(repr=False)

    def terms(self, index: int, target: str, terms: tuple[Term, ...]) -> tuple[Term, ...]:
        """Return the abstract terms of a target of a layer as they will be stored."""
        return self.step.method.abstract(terms, self.step.settings, self.bits[index][target])

    @cached_property
    def after(self) -> Found:
        """The model with everything in its new form."""
        layers = {
            index: replace(layer, terms={target: self.terms(index, target, own) for target, own in layer.terms.items()})
            for index, layer in self.found.layers.items()
        }
        replaced = {index: frozenset(layer.sizes.projections) for index, layer in layers.items()}
        linears = {
            index: tuple(
                replace(
                    own, template=replace(own.template, terms=self.terms(index, own.source.name, own.template.terms))
                )
                for own in found
            )
            for index, found in self.found.linears.items()
        }
        return replace(self.found, layers=layers, replaced=replaced, linears=linears)

    @property
    def peak_bytes(self) -> None:
        """Unknown."""

    def summary(self, sizes: Sizes) -> dict[str, Any]:
        """Return the plan as JSON."""
        return {
            "method": self.step.name,
            "settings": asdict(self.step.settings),
            "requested": {},
            "achieved": sizes.removed(),
            **sizes.model(),
        }

    def identity(self, context: Context) -> dict[str, Any]:
        """Return what decides the numbers."""
        return {"method": self.step.name, "settings": asdict(self.step.settings)}

    def calibration(self, context: Context) -> dict[str, Any] | None:
        """Return nothing: the statistics describe their text themselves."""

    def layers(self, layers: Iterator[Layer], context: Context) -> Iterator[Layer]:
        """Store one layer after the other."""
        for layer in layers:
            outcomes = list(layer.outcomes)
            seed = jax.random.fold_in(jax.random.key(context.setup.seed), layer.index)
            keys = (jax.random.fold_in(seed, position) for position in itertools.count())
            if layer.read is not None:
                experts = layer.held()
                read = partial(_matrices, context.found.reader(layer))
                terms = {}
                for target, own in experts.terms.items():
                    known = evidence(layer.sums, target, read, gated=experts.sizes.gated)
                    terms[target] = self._fit(layer.index, own, known, next(keys), outcomes)
                experts = replace(experts, terms=terms).check()
                layer = replace(layer, experts=experts, replaced=frozenset(experts.sizes.projections))
            linears = {}
            for planned in self.found.linears.get(layer.index, ()):
                known, told = linear_evidence(context.setup.statistics, planned.source)
                own = layer.linears[planned.source.name]
                outcomes += told
                linears[planned.source.name] = replace(
                    own, terms=self._fit(layer.index, own.terms, known, next(keys), outcomes)
                )
            yield replace(layer, linears=linears, outcomes=tuple(outcomes))

    def _fit(
        self, index: int, terms: tuple[Term, ...], known: Evidence, key: jax.Array, outcomes: list[Outcome]
    ) -> tuple[Term, ...]:
        """Return the terms of a target in their new form; what the user should know joins the outcomes."""
        bits = self.bits[index][known.target]
        fit = self.step.method.fit(terms, self.step.settings, bits, evidence=known, key=key)
        self._check(index, known.target, terms, fit.terms)
        outcomes += [outcome._replace(target=known.target) for outcome in fit.outcomes]
        return fit.terms

    def _check(self, index: int, target: str, before: tuple[Term, ...], after: tuple[Term, ...]) -> None:
        """Raise unless the terms are finite, and no larger than planned."""
        for array in jax.tree_util.tree_leaves(after):
            if not bool(jnp.isfinite(jnp.asarray(array).astype(jnp.float32)).all()):
                raise JaxmoeError(
                    f"layer {index}, {target}: {self.step.name} gave numbers that are not finite (NaN or overflow); try"
                    " another setting, or another method"
                )
        allowed = self.terms(index, target, before)
        if count(after).bytes > count(allowed).bytes:
            raise RuntimeError(f"{target}: {count(after)} of {count(allowed)}: a defect of {self.step.name}")


def _matrices(read: Callable[[str], Any], target: str) -> jax.Array:
    """Return the matrices of a target as the source has them, `[expert, out, in]` in float32."""
    return stack({name: jnp.asarray(read(name), jnp.float32) for name in TARGETS[target]}, target)
