"""Factoring: terms in place of the experts' matrices, sized by one budget and fitted one target after the other.

The budget of a ratio is shared over all layers and targets by a rule (`allocation.shares`) and spent exactly, in
parameters or in bytes. Where further steps make the terms smaller, as quantisation does, they are counted as these
leave them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.allocation import Ladder, Shares, allocate, by_odds, kept_fractions, reachable
from jaxmoe.checkpoint import Checkpoint, MoELayer
from jaxmoe.checkpoint.families import exports
from jaxmoe.checkpoint.workspace import fingerprint
from jaxmoe.compression.budget import NOTHING, Budget, Sizes, Totals
from jaxmoe.compression.evidence import LayerSums, Sums, evidence
from jaxmoe.compression.evidence import outcomes as calibration_outcomes
from jaxmoe.compression.plan import Plan, PlannedLayer
from jaxmoe.compression.slot_costs import choose_rule, shares
from jaxmoe.compression.step import Asked, Context, Found, Layer, Options, Source, Step, behind
from jaxmoe.compression.svd_fallback import behind_svd, svd_instead
from jaxmoe.compression.term_pass import TermStep, check_factored
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import TARGETS, CompressedLayer, Count, Dense, Term
from jaxmoe.methods import Method, Outcome, Slot
from jaxmoe.methods.method import REORDERED, count


@dataclass(frozen=True, kw_only=True)
class Factor(TermStep):
    """A step that stores terms in place of the experts' matrices."""

    stage: ClassVar[int] = 1
    takes: ClassVar[str | None] = "ratio"
    whole: ClassVar[bool] = True
    accepts: ClassVar[frozenset[str]] = frozenset({"layers", "sequential", "allocation", "gradients", "statistics"})

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
    ) -> "PlannedFactor":
        """Choose the size of every term, see `make_plan`."""
        assert asked.budget is not None
        plan = make_plan(
            found,
            self.method,
            self.settings,
            asked.budget,
            weighted=weighted,
            allocation=options.allocation,
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

    def summary(self, sizes: Sizes) -> dict[str, Any]:
        """Return the plan as JSON."""
        return self.plan.summary(sizes)

    def calibration(self, context: Context) -> dict[str, Any] | None:
        """Return nothing: the statistics describe their text themselves."""

    def identity(self, context: Context) -> dict[str, Any]:
        """Return what decides the numbers."""
        plan = self.plan
        return {
            "method": plan.method.name,
            "settings": asdict(plan.settings),
            "requested": plan.requested,
            "allocation": plan.allocation,
            "terms": fingerprint({str(p.source.index): p.template.spec() for p in plan.layers}),
        }

    def layers(self, layers: Iterator[Layer], context: Context) -> Iterator[Layer]:
        """Fit one layer after the other."""
        planned = {own.source.index: own for own in self.plan.layers}
        for layer in layers:
            own = planned[layer.index]
            experts, outcomes, histories = fit_layer(
                context.found.original, self.plan, own, context.setup.seed, layer.sums
            )
            yield replace(
                layer,
                experts=experts,
                replaced=own.replaced,
                outcomes=(*layer.outcomes, *outcomes),
                facts={**layer.facts, "losses": histories},
            )


def make_plan(
    found: Found,
    method: Method,
    settings: Any,
    budget: Budget,
    *,
    weighted: bool = False,
    allocation: str | None = None,
    statistics: Sums | None = None,
    then: Sequence[Step] = (),
) -> Plan:
    """Choose the size of every term so that at least the asked fraction is removed, and as little more as possible.

    Args:
        found: the model, of dense experts.
        method: what replaces the experts.
        settings: an instance of `method.settings`.
        budget: what is asked for.
        weighted: whether second moments will weigh the errors: equal size, other shapes of terms, more memory.
        allocation: how the budget is shared over layers and targets, one of `slot_costs.RULES`; None takes the method's
            own where the setting is "improved" and the statistics allow it, else "uniform".
        statistics: calibrated statistics, which imply `weighted`; "importance" and "spectral" measure with them.
        then: steps that work on the terms after that.

    Raises:
        JaxmoeError: the ratio is out of reach: the message names the reachable range; or the statistics lack what the
            allocation needs.
    """
    checkpoint = found.original
    weighted = weighted or statistics is not None
    preferred = method.allocation if settings.setting == "improved" else "uniform"
    rule = choose_rule(allocation, preferred, statistics)
    targets = [method.targets(layer.shape, settings) for layer in checkpoint.layers]
    names = [(layer, target) for layer, own in zip(checkpoint.layers, targets) for target in own]

    def size(terms: tuple[Term, ...]) -> int:
        """Return what terms take in the end, in the unit of the budget."""
        return budget.size(count(behind(then, terms)))

    # What the targets would take dense, in the form in which everything is written.
    sizes = [size((Dense.abstract(layer.shape.of(target), layer.dtype),)) for layer, target in names]
    before, beside = _scopes(found, targets, then)
    room = budget.room(before, beside)

    def slots(rule: Shares, amount: float) -> list[Slot]:
        kept = kept_fractions(sizes, rule, amount)
        return [
            method.slot(target, layer.shape, layer.dtype, settings, own, weighted=weighted)
            for (layer, target), own in zip(names, kept)
        ]

    def ladders(chosen: list[Slot]) -> list[Ladder]:
        return [slot.ladder(size, own) for slot, own in zip(chosen, sizes)]

    def fits(chosen: list[Slot]) -> bool:
        found = ladders(chosen)
        least, most = reachable(found)
        return least <= room <= most + max((x.step for x in found), default=0)

    even = by_odds([weight for own in targets for weight in own.values()])
    # Whether there is a way at all is known before anything is measured.
    if not fits(slots(even, room)):
        least, _ = reachable(ladders(slots(even, 0)))
        _, most = reachable(ladders(slots(even, sum(sizes))))
        raise JaxmoeError(
            f"{budget} is out of reach for {method.name} with these settings: it can remove"
            f" {budget.reach(Sizes(before, beside + Count(end, end)) for end in (least, most))}; choose a ratio in that"
            " range, or another method or setting that replaces more projections"
        )
    sharing = shares(rule, checkpoint, targets, statistics)
    chosen = slots(sharing, room)
    if not fits(chosen):
        rule, sharing, chosen = "uniform", even, slots(even, room)
    levels = allocate(ladders(chosen), room, sharing)
    terms = {(layer.index, target): slot.at(level) for (layer, target), slot, level in zip(names, chosen, levels)}
    layers = [
        _planned(layer, {target: terms[layer.index, target] for target in own})
        for layer, own in zip(checkpoint.layers, targets)
    ]
    return assemble(found, method, settings, layers, requested=budget.as_json(), allocation=rule, weighted=weighted)


def _scopes(found: Found, targets: Sequence[Mapping[str, float]], then: Sequence[Step]) -> tuple[Totals, Totals]:
    """Count the three scopes before, and what they will hold beside the terms of some targets."""
    added = sum((step.adds(found) for step in then), NOTHING)
    replaced, experts = {}, added
    for layer, own in zip(found.original.layers, targets):
        replaced[layer.index] = frozenset(projection for target in own for projection in TARGETS[target])
        for projection in layer.shape.projections:
            if projection not in replaced[layer.index]:
                experts += count(behind(then, (Dense.abstract(layer.shape.of(projection), layer.dtype),)))
    copied = found.original.copied()
    rest = Count(sum(planned.numbers for planned in copied), sum(planned.bytes for planned in copied))
    return replace(found, replaced=replaced).before(), Totals(added, experts, experts + rest)


def assemble(
    found: Found,
    method: Method,
    settings: Any,
    layers: Sequence[PlannedLayer],
    *,
    requested: dict[str, Any],
    allocation: str = "uniform",
    weighted: bool = False,
) -> Plan:
    """Return the plan of terms that are chosen already, such as some of full rank that no ratio would give."""
    return Plan(
        method=method,
        settings=settings,
        requested=requested,
        allocation=allocation,
        layers=tuple(layers),
        found=found,
        peak_bytes=max((_peak(method, planned, weighted) for planned in layers), default=0),
    )


def _planned(layer: MoELayer, terms: dict[str, tuple[Term, ...]]) -> PlannedLayer:
    touched, terms = tuple(terms), dict(terms)
    covered = {projection for target in terms for projection in TARGETS[target]}
    for projection in layer.shape.projections:
        if projection not in covered:
            terms[projection] = (Dense.abstract(layer.shape.of(projection), layer.dtype),)
    template = CompressedLayer(terms=terms, sizes=layer.shape).check()
    return PlannedLayer(layer, template, touched)


def _peak(method: Method, planned: PlannedLayer, weighted: bool) -> int:
    """Predict the bytes that fitting one layer holds at once: its factors, one target twice, and the solver's own.

    Second moments add the layer's sums, weighted or not, and for one target theirs and the solver's copies; the solver
    then may work in float64.
    """
    shape = planned.source.shape
    worst = 0
    for target in planned.touched:
        numbers = int(np.prod(planned.source.shape.of(target)))
        own = method.working_bytes(planned.template.terms[target])
        working = numbers * (planned.source.dtype.itemsize + 4) + own
        if weighted:
            working += 2 * 8 * numbers + own + 3 * 8 * shape.experts * shape.of(target)[2] ** 2
        worst = max(worst, working)
    sums = 2 * 8 * shape.experts * (shape.hidden**2 + shape.intermediate**2) if weighted else 0
    return worst + sums + planned.template.count().bytes


def fit_layer(
    checkpoint: Checkpoint, plan: Plan, planned: PlannedLayer, seed: int, sums: LayerSums | None
) -> tuple[CompressedLayer, list[Outcome], dict[str, list[float]]]:
    """Fit one layer and return it with what happened and the thinned history of the losses."""
    source, template = planned.source, planned.template
    key = jax.random.fold_in(jax.random.key(seed), source.index)
    terms, outcomes, histories = {}, calibration_outcomes(sums, planned.touched, source.shape), {}

    def read(target: str) -> jax.Array:
        return jax.device_put(checkpoint.target(source, target), may_alias=True)

    for position, (target, abstract) in enumerate(template.terms.items()):
        if target not in planned.touched:
            terms[target] = (Dense(weight=checkpoint.projection(source, target)),)
            continue
        weight, known = read(target), evidence(sums, target, read, gated=source.shape.gated)
        fit = plan.method.fit(weight, abstract, plan.settings, evidence=known, key=jax.random.fold_in(key, position))
        for array in jax.tree_util.tree_leaves(fit.terms):
            if not bool(jnp.isfinite(array.astype(jnp.float32)).all()):
                raise JaxmoeError(
                    f"layer {source.index}, {target}: {plan.method.name} gave factors that {source.dtype} cannot hold "
                    "(NaN or overflow); try another setting or seed"
                )
        if count(fit.terms).bytes > count(abstract).bytes:
            raise RuntimeError(f"{target}: {count(fit.terms)} of {count(abstract)}: a defect of {plan.method.name}")
        terms[target] = fit.terms
        outcomes += [outcome._replace(target=target) for outcome in fit.outcomes]
        if all(outcome.kind != REORDERED for outcome in fit.outcomes):
            behind = behind_svd(weight, fit.terms, known.moment, target)
            yields = behind is not None and plan.method.falls_back_to_svd and plan.settings.setting == "improved"
            if behind is not None and yields and (closer := svd_instead(weight, fit.terms, known)) is not None:
                terms[target] = closer
                behind = behind._replace(kind="svd_instead", detail=f"{behind.detail}; it is stored instead")
            outcomes += [] if behind is None else [behind]
        if len(fit.losses):
            thin = max(1, len(fit.losses) // 50)
            histories[target] = [float(x) for x in (*fit.losses[::thin], fit.losses[-1])]
    return CompressedLayer(terms=terms, sizes=source.shape).check(), outcomes, histories
