"""Quantising: bits instead of floats, of the matrices or of the terms that stand for them."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxmoe.checkpoint.families import exports
from jaxmoe.compression.budget import Sizes
from jaxmoe.compression.evidence import evidence
from jaxmoe.compression.found import Found, Layer, Source
from jaxmoe.compression.linear_maps import linear_evidence
from jaxmoe.compression.step import Asked, Context, Options
from jaxmoe.compression.term_pass import TermStep, check_factored
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import TARGETS, Term, stack
from jaxmoe.methods.method import Evidence, Outcome, count


@dataclass(frozen=True, kw_only=True)
class Quantise(TermStep):
    """A step that stores what it finds in fewer bits."""

    stage: ClassVar[int] = 2
    once: ClassVar[bool] = True

    accepts: ClassVar[frozenset[str]] = frozenset({"layers", "sequential", "gradients", "statistics"})

    def joins(self, texts: bool) -> bool:
        """Where it needs no statistics of what it finds, in the pass of the step before."""
        return not self.requires

    def forms(self, checkpoint: Source) -> list[str]:
        """Return the forms that the architecture can be written in."""
        return exports(checkpoint.dense_config()["model_type"])

    def check(self, checkpoint: Source, options: Options) -> None:
        """Raise if the result could not be written."""
        check_factored(checkpoint, options.export or "factored")

    def terms(self, terms: tuple[Term, ...]) -> tuple[Term, ...]:
        """Return the abstract terms as they will be stored."""
        return self.method.abstract(terms, self.settings)

    def plan(self, found: Found, asked: Asked, **_: Any) -> "PlannedQuantise":
        """Plan that all terms of all layers are stored so."""
        return PlannedQuantise(step=self, found=found)


@dataclass(frozen=True, kw_only=True)
class PlannedQuantise:
    """A quantising step, planned.

    Args:
        step: what is planned.
        found: the model.
    """

    step: Quantise
    found: Found = field(repr=False)

    @cached_property
    def after(self) -> Found:
        """The model with everything in its new form."""
        layers = {
            index: replace(layer, terms={target: self.step.terms(own) for target, own in layer.terms.items()})
            for index, layer in self.found.layers.items()
        }
        replaced = {index: frozenset(layer.sizes.projections) for index, layer in layers.items()}
        linears = {
            index: tuple(
                replace(own, template=replace(own.template, terms=self.step.terms(own.template.terms))) for own in found
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
        fit = self.step.method.fit(terms, self.step.settings, evidence=known, key=key)
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
        allowed = self.step.terms(before)
        if count(after).bytes > count(allowed).bytes:
            raise RuntimeError(f"{target}: {count(after)} of {count(allowed)}: a defect of {self.step.name}")


def _matrices(read: Callable[[str], Any], target: str) -> jax.Array:
    """Return the matrices of a target as the source has them, `[expert, out, in]` in float32."""
    return stack({name: jnp.asarray(read(name), jnp.float32) for name in TARGETS[target]}, target)
