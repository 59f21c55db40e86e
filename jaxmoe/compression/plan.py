"""What a ratio means for this model: the size of every term of every layer, before anything runs.

A ratio is the removed fraction of the touched matrices, of all routed experts or of the whole model. It becomes one
budget of stored numbers, which a rule (`allocation.shares`) shares over all layers and targets, and which is spent
exactly.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from jaxmoe.allocation import Shares, allocate, by_odds, kept_fractions, reachable
from jaxmoe.checkpoint import Checkpoint, MoELayer
from jaxmoe.compression.evidence import Sums
from jaxmoe.compression.slot_costs import choose_rule, shares
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import TARGETS, CompressedLayer, Count, Dense, Term
from jaxmoe.methods import Method, Slot

SCOPES = ("touched", "experts", "model")
"""What a ratio may be a fraction of: the matrices that the method replaces, all routed experts, the whole model."""


class Sizes(NamedTuple):
    """Numbers that the three honest ratios are made of.

    touched: in the matrices that are replaced; experts: in all routed experts; model: in the whole model; stored: what
    replaces the touched ones.

    Example:
        >>> Sizes(touched=200, experts=300, model=400, stored=100).removed()
        {'touched': 0.5, 'experts': 0.333..., 'model': 0.25}
    """

    touched: int
    experts: int
    model: int
    stored: int

    def removed(self) -> dict[str, float]:
        """Return the removed fraction of each scope."""
        return {scope: (self.touched - self.stored) / getattr(self, scope) for scope in SCOPES}


class PlannedLayer(NamedTuple):
    """One layer of the plan: `template` holds abstract terms, `touched` names the targets that the method fits."""

    source: MoELayer
    template: CompressedLayer
    touched: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will be stored, layer by layer.

    requested: `{"ratio", "of"}`; allocation: the rule that shared the budget, one of `measuring.RULES`; sizes: numbers
    of the three ratios; parameters and bytes: `{"before", "after"}` of the whole model as factored; peak_bytes:
    predicted peak of anonymous memory beyond that of the idle program.
    """

    method: Method
    settings: Any
    requested: dict[str, Any]
    allocation: str
    layers: tuple[PlannedLayer, ...]
    sizes: Sizes
    parameters: dict[str, int]
    bytes: dict[str, int]
    peak_bytes: int

    def with_stored(self, stored: Mapping[int, Count]) -> "Plan":
        """Return the plan with what some layers really store, by their index: never more than was planned."""
        planned = {layer.source.index: layer.template.count() for layer in self.layers}
        less = sum((Count(*(a - b for a, b in zip(planned[i], own))) for i, own in stored.items()), Count(0, 0))
        return replace(
            self,
            sizes=self.sizes._replace(stored=self.sizes.stored - less.numbers),
            parameters={**self.parameters, "after": self.parameters["after"] - less.numbers},
            bytes={**self.bytes, "after": self.bytes["after"] - less.bytes},
        )

    def summary(self) -> dict[str, Any]:
        """Return the plan as JSON, with the keys that other programs read."""
        return {
            "method": self.method.name,
            "settings": asdict(self.settings),
            "requested": self.requested,
            "allocation": self.allocation,
            "achieved": self.sizes.removed(),
            "parameters": self.parameters,
            "bytes": self.bytes,
            "peak_bytes": self.peak_bytes,
            "layers": [{"layer": layer.source.index, "projections": describe(layer.template)} for layer in self.layers],
        }


def describe(layer: CompressedLayer) -> dict[str, dict[str, Any]]:
    """Return for each projection its terms, ranks, stored numbers and the kept fraction that these are.

    A term over gate and up counts half for each. Where the groups of experts of a real term have ranks of their own,
    these stand under `group_ranks`, and their mean under `ranks`.
    """
    projections: dict[str, dict[str, Any]] = {
        name: {"terms": [], "ranks": [], "parameters": 0} for name in layer.sizes.projections
    }
    for target, terms in layer.terms.items():
        covered = TARGETS[target]
        for term in terms:
            numbers = term.count().numbers
            for position, name in enumerate(covered):
                entry = projections[name]
                entry["terms"].append({"target": target, **term.spec()})
                entry["ranks"].append(term.rank)
                entry["parameters"] += numbers // len(covered) + (position < numbers % len(covered))
                if term.known_ranks is not None:
                    entry.setdefault("group_ranks", []).append(list(term.known_ranks))
    for name, entry in projections.items():
        entry["kept"] = entry["parameters"] / int(np.prod(layer.sizes.of(name)))
    return projections


def make_plan(
    checkpoint: Checkpoint,
    method: Method,
    settings: Any,
    *,
    ratio: float,
    of: str = "experts",
    weighted: bool = False,
    allocation: str | None = None,
    statistics: Sums | None = None,
) -> Plan:
    """Choose the size of every term so that at least the asked fraction is removed, and as little more as possible.

    Args:
        checkpoint: the source.
        method: what replaces the experts.
        settings: an instance of `method.settings`.
        ratio: removed fraction, between 0 and 1.
        of: what the ratio is a fraction of, one of `SCOPES`.
        weighted: whether second moments will weigh the errors: equal size, other shapes of terms, more memory.
        allocation: how the budget is shared over layers and targets, one of `measuring.RULES`; None takes the method's
            own where the setting is "improved" and the statistics allow it, else "uniform".
        statistics: calibrated statistics, which imply `weighted`; "importance" and "spectral" measure with them.

    Raises:
        JaxmoeError: the ratio is not a fraction, or out of reach: the message names the reachable range; or the
            statistics lack what the allocation needs.
    """
    if of not in SCOPES:
        raise JaxmoeError(f"of {of!r}: give {', '.join(SCOPES)}")
    if not 0 < ratio < 1:
        raise JaxmoeError(f"ratio {ratio} is not a removed fraction: give a number between 0 and 1, such as 0.4")
    weighted = weighted or statistics is not None
    preferred = method.allocation if settings.setting == "improved" else "uniform"
    rule = choose_rule(allocation, preferred, statistics)
    targets = [method.targets(layer.shape, settings) for layer in checkpoint.layers]
    names = [(layer, target) for layer, own in zip(checkpoint.layers, targets) for target in own]
    sizes = [int(np.prod(layer.shape.of(target))) for layer, target in names]
    touched = sum(sizes)
    experts = sum(layer.shape.numbers for layer in checkpoint.layers)
    scope = {"touched": touched, "experts": experts, "model": checkpoint.parameters}[of]
    # The decimal that the user wrote, not its binary neighbour: 0.4 of 10 numbers are 4.
    budget = int(touched - -(-Fraction(str(ratio)) * scope // 1))

    def slots(rule: Shares, numbers: float) -> list[Slot]:
        kept = kept_fractions(sizes, rule, numbers)
        return [
            method.slot(target, layer.shape, layer.dtype, settings, own, weighted=weighted)
            for (layer, target), own in zip(names, kept)
        ]

    def fits(chosen: list[Slot]) -> bool:
        ladders = [slot.ladder() for slot in chosen]
        least, most = reachable(ladders)
        return least <= budget <= most + max((x.step for x in ladders), default=0)

    even = by_odds([weight for own in targets for weight in own.values()])
    # Whether there is a way at all is known before anything is measured.
    if not fits(slots(even, budget)):
        least, _ = reachable([slot.ladder() for slot in slots(even, 0)])
        _, most = reachable([slot.ladder() for slot in slots(even, touched)])
        totals = Sizes(touched, experts, checkpoint.parameters, 0)
        raise JaxmoeError(_out_of_reach(method, ratio, of, totals, (least, most)))
    sharing = shares(rule, checkpoint, targets, statistics)
    chosen = slots(sharing, budget)
    if not fits(chosen):
        rule, sharing, chosen = "uniform", even, slots(even, budget)
    levels = allocate([slot.ladder() for slot in chosen], budget, sharing)
    terms = {(layer.index, target): slot.at(level) for (layer, target), slot, level in zip(names, chosen, levels)}
    layers = [
        _planned(layer, {target: terms[layer.index, target] for target in own})
        for layer, own in zip(checkpoint.layers, targets)
    ]
    requested = {"ratio": ratio, "of": of}
    return assemble(checkpoint, method, settings, layers, requested=requested, allocation=rule, weighted=weighted)


def assemble(
    checkpoint: Checkpoint,
    method: Method,
    settings: Any,
    layers: Sequence[PlannedLayer],
    *,
    requested: dict[str, Any],
    allocation: str = "uniform",
    weighted: bool = False,
) -> Plan:
    """Count a plan whose terms are chosen already, such as one of full rank that no ratio would give."""
    stored = sum((planned.template.count() for planned in layers), Count(0, 0))
    experts = sum(layer.shape.numbers for layer in checkpoint.layers)
    dense = sum(int(np.prod(p.source.shape.of(t))) for p in layers for t in p.touched)
    untouched = experts - dense
    copied = sum(planned.bytes for planned in checkpoint.copied())
    return Plan(
        method=method,
        settings=settings,
        requested=requested,
        allocation=allocation,
        layers=tuple(layers),
        sizes=Sizes(dense, experts, checkpoint.parameters, stored.numbers - untouched),
        parameters={"before": checkpoint.parameters, "after": checkpoint.parameters - experts + stored.numbers},
        bytes={"before": checkpoint.bytes, "after": copied + stored.bytes},
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


def _out_of_reach(method: Method, ratio: float, of: str, sizes: Sizes, extremes: tuple[int, int]) -> str:
    def span(scope):
        low, high = (sizes._replace(stored=stored).removed()[scope] for stored in reversed(extremes))
        return f"{low:.4f} to {high:.4f} of {scope}"

    return (
        f"ratio {ratio} of {of} is out of reach for {method.name} with these settings: "
        f"it can remove {', '.join(span(scope) for scope in SCOPES)}; choose a ratio in that range, "
        "or another method or setting that replaces more projections"
    )
