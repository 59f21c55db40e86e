"""Factoring: terms in place of the experts' matrices, fitted one target after the other."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

from jaxmoe.checkpoint.factored import CompressedCheckpoint
from jaxmoe.checkpoint.families import exports
from jaxmoe.checkpoint.roles import find_linear
from jaxmoe.checkpoint.workspace import fingerprint
from jaxmoe.compression.budget import Sizes
from jaxmoe.compression.evidence import Sums
from jaxmoe.compression.factor_plan import make_plan
from jaxmoe.compression.fit import fit_layer, fit_linear
from jaxmoe.compression.found import Found, Layer, Source
from jaxmoe.compression.plan import Plan
from jaxmoe.compression.step import Asked, Context, Options, Step
from jaxmoe.compression.term_pass import TermStep, check_factored


@dataclass(frozen=True, kw_only=True)
class Factor(TermStep):
    """A step that stores terms in place of the experts' matrices."""

    stage: ClassVar[int] = 1
    whole: ClassVar[bool] = True
    accepts: ClassVar[frozenset[str]] = frozenset({"layers", "sequential", "allocation", "gradients", "statistics"})

    @property
    def takes(self) -> str:
        """The removed fraction."""
        return "ratio"

    @property
    def allocation(self) -> str:
        """The method's own rule in the improved setting."""
        return self.method.allocation if self.settings.setting == "improved" else "uniform"

    def forms(self, checkpoint: Source) -> list[str]:
        """Return the forms that the architecture can be written in."""
        return exports(checkpoint.dense_config()["model_type"])

    def check(self, checkpoint: Source, options: Options) -> None:
        """Raise if the terms could not be written."""
        check_factored(checkpoint, options.export or "factored")

    def check_targets(self, checkpoint: Source, targets: tuple[str, ...]) -> None:
        """Raise if the method does not replace linear maps, or the checkpoint has none of a target."""
        if self.method.linear_slot is None:
            super().check_targets(checkpoint, targets)
        if not isinstance(checkpoint, CompressedCheckpoint):
            find_linear(checkpoint, targets)

    def plan(
        self,
        found: Found,
        asked: Asked,
        *,
        options: Options,
        statistics: Sums | None,
        weighted: bool,
        then: Sequence[Step],
        nearest: bool = False,
        measure: bool = True,
    ) -> "PlannedFactor":
        """Choose the size of every term, see `make_plan`."""
        assert asked.budget is not None
        plan = make_plan(
            found,
            self.method,
            self.settings,
            asked.budget,
            weighted=weighted,
            allocation=options.allocation if measure else "uniform",
            targets=options.targets,
            statistics=statistics,
            then=then,
        )
        return PlannedFactor(plan)


@dataclass(frozen=True)
class PlannedFactor:
    """A factoring step, planned."""

    plan: Plan

    @property
    def after(self) -> Found:
        """The model with terms for matrices."""
        return self.plan.after

    @property
    def peak_bytes(self) -> int:
        """Predicted peak of memory."""
        return self.plan.peak_bytes

    def facts(self, index: int) -> dict[str, Any]:
        """Return nothing: what it stores says all."""
        return {}

    def summary(self, sizes: Sizes) -> dict[str, Any]:
        """Return the plan as JSON."""
        return self.plan.summary(sizes)

    def calibration(self, context: Context) -> dict[str, Any] | None:
        """Return nothing: the statistics describe their text themselves."""

    def identity(self, context: Context) -> dict[str, Any]:
        """Return what decides the numbers."""
        plan = self.plan
        linears = {own.source.module: own.template.spec() for linears in plan.linears.values() for own in linears}
        return {
            "method": plan.method.name,
            "settings": asdict(plan.settings),
            "requested": plan.requested,
            "allocation": plan.allocation,
            "terms": fingerprint({str(p.source.index): p.template.spec() for p in plan.layers}),
            **({"linears": fingerprint(linears)} if linears else {}),
        }

    def layers(self, layers: Iterator[Layer], context: Context) -> Iterator[Layer]:
        """Fit one layer after the other: its experts, if it has any, then its linear maps."""
        planned = {own.source.index: own for own in self.plan.layers}
        source, seed, statistics = context.found.original, context.setup.seed, context.setup.statistics
        for layer in layers:
            outcomes, histories, linears = list(layer.outcomes), {}, {}
            if (own := planned.get(layer.index)) is not None:
                experts, told, histories = fit_layer(source, self.plan, own, seed, layer.sums)
                layer = replace(layer, experts=experts, replaced=own.replaced)
                outcomes += told
            for linear in self.plan.linears.get(layer.index, ()):
                linears[linear.source.name], told = fit_linear(source, self.plan, linear, seed, statistics)
                outcomes += told
            facts = {**layer.facts, "losses": histories}
            yield replace(layer, linears=linears, outcomes=tuple(outcomes), facts=facts)
