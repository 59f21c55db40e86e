"""The size of every term that factoring will store: one budget, shared over all layers and targets, and spent exactly.

A rule (`allocation.shares`) says who gets how much, in parameters or in bytes. Where further steps make the terms
smaller, as quantisation does, they are counted as these leave them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np

from jaxmoe.allocation import Ladder, Shares, allocate_counted, by_odds, kept_fractions, reachable
from jaxmoe.checkpoint import Checkpoint, MoELayer
from jaxmoe.checkpoint.roles import find_linear, weight_dtype
from jaxmoe.checkpoint.tensor_file import listing
from jaxmoe.compression.budget import NOTHING, Budget, Sizes, Totals
from jaxmoe.compression.evidence import Sums
from jaxmoe.compression.found import Found
from jaxmoe.compression.linear_maps import PlannedLinear
from jaxmoe.compression.plan import Plan, PlannedLayer
from jaxmoe.compression.slot_costs import choose_rule, shares
from jaxmoe.compression.step import EXPERTS, Step, behind
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import TARGETS, CompressedLayer, CompressedLinear, Count, Dense, Term
from jaxmoe.methods import Method, Slot
from jaxmoe.methods.method import count, linear_weight


def make_plan(
    found: Found,
    method: Method,
    settings: Any,
    budget: Budget,
    *,
    weighted: bool = False,
    allocation: str | None = None,
    targets: tuple[str, ...] = EXPERTS,
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
        targets: what is replaced, see `Options`.
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
    replaced = [method.targets(x.shape, settings) if "experts" in targets else {} for x in checkpoint.layers]
    maps, notes = _linear_slots(checkpoint, method, settings, targets)
    if maps:
        _check_experts_alone(budget, rule, targets)

    def slot_of(layer: MoELayer, target: str, kept: float) -> Slot:
        return method.slot(target, layer.shape, layer.dtype, settings, kept, weighted=weighted)

    places = [
        _Place(weight, (Dense.abstract(layer.shape.of(target), layer.dtype),), partial(slot_of, layer, target), then)
        for layer, own in zip(checkpoint.layers, replaced)
        for target, weight in own.items()
    ]
    of_experts = len(places)
    places += [_Place(linear_weight(own.source.name), own.template.terms, lambda kept, s=s: s, then) for own, s in maps]
    # What the targets would take dense, in the form in which everything is written.
    sizes = [place.size(budget, place.dense) for place in places]
    before, beside = _scopes(found, replaced, [own for own, _ in maps], then)
    room = budget.room(before, beside)

    def slots(rule: Shares, amount: float) -> list[Slot]:
        return [place.slot(kept) for place, kept in zip(places, kept_fractions(sizes, rule, amount))]

    def ladders(chosen: list[Slot]) -> list[Ladder]:
        return [
            slot.ladder(partial(place.size, budget), own)
            for place, slot, own in zip(places, chosen, sizes, strict=True)
        ]

    def fits(chosen: list[Slot]) -> bool:
        found = ladders(chosen)
        least, most = reachable(found)
        return least <= room <= most + max((x.step for x in found), default=0)

    def totals(chosen: list[Slot], end: int) -> Totals:
        experts, every = (reachable(ladders(chosen)[:cut])[end] for cut in (of_experts, None))
        return Totals(*(own + Count(x, x) for own, x in zip(beside, (every, experts, every))))

    even = by_odds([place.weight for place in places])
    # Whether there is a way at all is known before anything is measured.
    if not fits(slots(even, room)):
        extremes = totals(slots(even, 0), 0), totals(slots(even, sum(sizes)), 1)
        also = f" and the targets {','.join(targets)}" if targets != EXPERTS else ""
        raise JaxmoeError(
            f"{budget} is out of reach for {method.name} with these settings{also}: it can remove"
            f" {budget.reach(Sizes(before, after) for after in extremes)}; choose a ratio in that"
            " range, or another method or setting that replaces more projections"
        )
    sharing = shares(rule, checkpoint, replaced, statistics, [own.source for own, _ in maps])
    chosen = slots(sharing, room)
    if not fits(chosen):
        rule, sharing, chosen = "uniform", even, slots(even, room)

    def stored(levels: Sequence[int]) -> int:
        return sum(place.size(budget, slot.at(x)) for place, slot, x in zip(places, chosen, levels, strict=True))

    levels = allocate_counted(ladders(chosen), room, sharing, stored)
    fixed = iter([slot.at(level) for slot, level in zip(chosen, levels, strict=True)])
    layers = [
        _planned(layer, {target: next(fixed) for target in own}) for layer, own in zip(checkpoint.layers, replaced)
    ]
    linears = [replace(own, template=replace(own.template, terms=next(fixed))) for own, _ in maps]
    return assemble(
        found,
        method,
        settings,
        layers,
        linears=linears,
        notes=notes,
        requested={**budget.as_json(), **({} if targets == EXPERTS else {"targets": list(targets)})},
        allocation=rule,
        weighted=weighted,
    )


@dataclass(frozen=True)
class _Place:
    """Something that a budget is shared over: one target of the experts of a layer, or one linear map.

    weight: raises its share where nothing is measured; dense: as it is; slot: its sizes where it is to keep about a
    fraction of its numbers; then: the steps that work on its terms after that.
    """

    weight: float
    dense: tuple[Term, ...]
    slot: Callable[[float], Slot]
    then: Sequence[Step]

    def size(self, budget: Budget, terms: tuple[Term, ...]) -> int:
        """Return what terms take in the end, in the unit of a budget."""
        return budget.size(count(behind(self.then, terms)))


def _linear_slots(
    checkpoint: Checkpoint, method: Method, settings: Any, targets: tuple[str, ...]
) -> tuple[list[tuple[PlannedLinear, Slot]], tuple[str, ...]]:
    """Return the linear maps of some targets, dense, the sizes that each can take, and notes on what stays."""
    found, kept = [], []
    maps = [source for own in find_linear(checkpoint, targets).values() for source in own]
    for source in maps:
        assert method.linear_slot is not None
        dtype = weight_dtype(source, checkpoint.matrices)
        slot = method.linear_slot(source.shape, dtype, settings)
        dense = CompressedLinear(terms=(Dense.abstract(source.shape.terms, dtype),), sizes=source.shape)
        if slot.high < slot.low:
            kept.append(source.tensor)
        else:
            found.append((PlannedLinear(source=source, dtype=dtype, template=dense), slot))
    absent = [name for name in targets if name not in (*EXPERTS, *(source.target for source in maps))]
    notes = [f"The model has nothing of the targets {', '.join(absent)}."] if absent else []
    if kept:
        notes.append(f"No rank makes {listing(kept)} smaller: they are copied.")
    return found, tuple(notes)


def _check_experts_alone(budget: Budget, rule: str, targets: tuple[str, ...]) -> None:
    """Raise where what is asked for speaks of routed experts alone, and more than these is replaced."""
    if budget.of == "experts":
        raise JaxmoeError(
            f"--of experts: a ratio of the routed experts says nothing of the targets {','.join(targets)}; give --of"
            " model, or touched for all that is replaced"
        )
    if rule == "importance":
        raise JaxmoeError(
            f"allocation importance: the Fisher information is that of the experts alone, and the targets are"
            f" {','.join(targets)}: give uniform or spectral"
        )


def _scopes(
    found: Found, targets: Sequence[Mapping[str, float]], linears: Sequence[PlannedLinear], then: Sequence[Step]
) -> tuple[Totals, Totals]:
    """Count the three scopes before, and what they will hold beside the terms of some targets."""
    added = sum((step.adds(found) for step in then), NOTHING)
    replaced, experts = {}, added
    for layer, own in zip(found.original.layers, targets):
        replaced[layer.index] = frozenset(projection for target in own for projection in TARGETS[target])
        for projection in layer.shape.projections:
            if projection not in replaced[layer.index]:
                experts += count(behind(then, (Dense.abstract(layer.shape.of(projection), layer.dtype),)))
    own = replace(found, replaced=replaced, linears=_by_layer(linears))
    copied = own.copied()
    rest = Count(sum(planned.numbers for planned in copied), sum(planned.bytes for planned in copied))
    return own.before(), Totals(added, experts, experts + rest)


def _by_layer(linears: Sequence[PlannedLinear]) -> dict[int, tuple[PlannedLinear, ...]]:
    return {index: tuple(own) for index, own in groupby(linears, key=lambda linear: linear.source.index)}


def assemble(
    found: Found,
    method: Method,
    settings: Any,
    layers: Sequence[PlannedLayer],
    *,
    linears: Sequence[PlannedLinear] = (),
    notes: tuple[str, ...] = (),
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
        peak_bytes=max(
            *(_peak(method, planned, weighted) for planned in layers),
            *(_linear_peak(method, linear, weighted) for linear in linears),
            0,
        ),
        linears=_by_layer(linears),
        notes=notes,
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


def _linear_peak(method: Method, planned: PlannedLinear, weighted: bool) -> int:
    """Predict the bytes that fitting one linear map holds at once, as `_peak` does."""
    shape = planned.source.shape
    own = method.working_bytes(planned.template.terms)
    working = shape.numbers * (planned.dtype.itemsize + 4) + own
    if weighted:
        working += 2 * 8 * shape.numbers + own + 5 * 8 * shape.in_**2
    return working + planned.template.count().bytes
