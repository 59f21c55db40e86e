"""Quantising: bits instead of floats, of the matrices or of the terms that stand for them."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.checkpoint import Checkpoint
from jaxmoe.checkpoint.families import exports
from jaxmoe.checkpoint.workspace import fingerprint
from jaxmoe.compression.bit_costs import assumed_losses, chosen_measure, measured_losses
from jaxmoe.compression.bits import Bits, even_bits, quantised, spent_bits
from jaxmoe.compression.budget import NOTHING, Sizes
from jaxmoe.compression.evidence import Sums, evidence
from jaxmoe.compression.evidence import outcomes as calibration_outcomes
from jaxmoe.compression.factor import Factor
from jaxmoe.compression.found import Found, Layer, Source, matrices
from jaxmoe.compression.linear_maps import linear_evidence
from jaxmoe.compression.step import Asked, Context, Options, Step
from jaxmoe.compression.term_pass import TermStep, check_factored
from jaxmoe.errors import JaxmoeError
from jaxmoe.export.packed import PACKED, can_pack, check_packable
from jaxmoe.factors import Term
from jaxmoe.methods.method import Evidence, Outcome, count
from jaxmoe.methods.quantising import chosen_bits


@dataclass(frozen=True, kw_only=True)
class Quantise(TermStep):
    """A step that stores what it finds in fewer bits."""

    stage: ClassVar[int] = 2
    once: ClassVar[bool] = True
    share: ClassVar[float] = 4.0
    unit: ClassVar[str | None] = "bytes"

    accepts: ClassVar[frozenset[str]] = frozenset({"layers", "sequential", "gradients", "statistics"})

    @property
    def takes(self) -> str | None:
        """The removed fraction, where neither its name nor its settings say how many bits."""
        return "ratio" if self.bits is None else None

    @property
    def bits(self) -> int | None:
        """Of every number; None where a budget chooses."""
        return chosen_bits(self.method, self.settings)

    @property
    def needs_gradients(self) -> bool:
        """Also where a budget chooses the bits, by what they cost."""
        return super().needs_gradients or (self.bits is None and self.settings.setting == "improved")

    def joins(self, before: Step, texts: bool) -> bool:
        """Without need of statistics, or behind factors, whose statistics are those of the inputs of the same matrices.

        There the original's matrices are still at hand, against which factors can be solved once more.
        """
        return not self.requires or isinstance(before, Factor)

    def forms(self, checkpoint: Source) -> list[str]:
        """Return the forms that the architecture can be written in; which the bits allow, the plan finds."""
        packed = PACKED if isinstance(checkpoint, Checkpoint) and can_pack(checkpoint) else ()
        return [*exports(checkpoint.dense_config()["model_type"]), *packed]

    def check(self, checkpoint: Source, options: Options) -> None:
        """Raise if the result could not be written, or bits would be shared before anything is known."""
        if options.export in PACKED and isinstance(checkpoint, Checkpoint):
            check_packable(checkpoint, options.export)
        else:
            check_factored(checkpoint, options.export or "factored")
        if options.sequential and self.bits is None:
            raise JaxmoeError(
                f"--sequential: bits are shared over all layers before the first is quantised; leave it out, or name"
                f" the bits, as in {self.method.name}{self.method.widths(self.settings)[-1]}"
            )

    def terms(self, terms: tuple[Term, ...]) -> tuple[Term, ...]:
        """Return the abstract terms as they will be stored, where it says how many bits."""
        assert self.bits is not None
        return self.method.abstract(terms, self.settings, np.full(terms[0].shape[0], self.bits))

    def plan(
        self,
        found: Found,
        asked: Asked,
        *,
        statistics: Sums | None,
        measure: bool,
        then: Sequence[Step],
        **_: Any,
    ) -> "PlannedQuantise":
        """Choose the bits of every expert's matrices, or plan that all have those of the step.

        Raises:
            JaxmoeError: the ratio is out of reach: the message names the reachable range.
        """
        if self.bits is not None:
            return PlannedQuantise(step=self, found=found, bits=even_bits(found, self.bits))
        assert asked.budget is not None
        method, settings, widths = self.method, self.settings, self.method.widths(self.settings)
        losses = partial(assumed_losses, found, widths)
        if measure:
            losses = partial(measured_losses, found, method, settings, widths, statistics)
        added = sum((step.adds(found) for step in then), NOTHING)
        bits = spent_bits(found, method, settings, asked.budget, losses, added)
        requested = asked.budget.as_json()
        rule = chosen_measure(statistics) if measure else "sizes"
        return PlannedQuantise(step=self, found=found, bits=bits, requested=requested, allocation=rule)


@dataclass(frozen=True, kw_only=True)
class PlannedQuantise:
    """A quantising step, planned.

    Args:
        step: what is planned.
        found: the model.
        bits: of each expert, `[expert]`, by layer and target; of a linear map by its name, `[1]`.
        requested: what was asked for; the unit alone where the step says how many bits.
        allocation: what the bits of a budget were chosen by, see `bit_costs`; None where there was none.
    """

    step: Quantise
    found: Found = field(repr=False)
    bits: Bits = field(repr=False)
    requested: dict[str, Any] = field(default_factory=lambda: {"unit": "bytes"})
    allocation: str | None = None

    @cached_property
    def after(self) -> Found:
        """The model with everything in its new form."""
        return quantised(self.found, self.step.method, self.step.settings, self.bits)

    @property
    def peak_bytes(self) -> None:
        """Unknown."""

    def facts(self, index: int) -> dict[str, Any]:
        """Return the bits of every expert of a layer, by target, where a budget chose them."""
        if self.step.bits is not None:
            return {}
        return {"bits": {target: own.tolist() for target, own in self.bits.get(index, {}).items()}}

    def summary(self, sizes: Sizes) -> dict[str, Any]:
        """Return the plan as JSON."""
        return {
            "method": self.step.name,
            "settings": asdict(self.step.settings),
            "requested": self.requested,
            **({} if self.allocation is None else {"allocation": self.allocation}),
            "achieved": sizes.removed("bytes"),
            **sizes.model(),
        }

    def identity(self, context: Context) -> dict[str, Any]:
        """Return what decides the numbers."""
        chosen = {str(index): {target: own.tolist() for target, own in x.items()} for index, x in self.bits.items()}
        return {
            "method": self.step.name,
            "settings": asdict(self.step.settings),
            "requested": self.requested,
            "bits": fingerprint(chosen),
        }

    def calibration(self, context: Context) -> dict[str, Any] | None:
        """Return nothing: the statistics describe their text themselves."""

    def layers(self, layers: Iterator[Layer], context: Context) -> Iterator[Layer]:
        """Store one layer after the other."""
        for layer in layers:
            outcomes = list(layer.outcomes)
            seed = jax.random.fold_in(jax.random.key(context.setup.seed), layer.index)
            keys = (jax.random.fold_in(seed, position) for position in itertools.count())
            if layer.read is not None:
                first, experts = layer.experts is None, layer.held()
                if first and self.step.requires:
                    outcomes += calibration_outcomes(layer.sums, tuple(experts.terms), experts.sizes)
                read = partial(matrices, context.found.reader(layer))
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
        allowed = self.step.method.abstract(before, self.step.settings, self.bits[index][target])
        if count(after).bytes > count(allowed).bytes:
            raise RuntimeError(f"{target}: {count(after)} of {count(allowed)}: a defect of {self.step.name}")
