"""How many bits everything gets that a quantising step stores: those of its name, or what a budget of bytes gives.

A unit of the budget is one expert's matrix, all matrices of an expert, a layer or the model; where terms stand for the
matrices, which experts share, no less than a target. Bytes are counted on abstract terms, as the files will hold them.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from jaxmoe.allocation import choose_bits, joined
from jaxmoe.compression.bit_costs import Losses
from jaxmoe.compression.budget import Budget, Sizes, Totals
from jaxmoe.compression.found import Found
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import Count, Dense, Term
from jaxmoe.methods import QuantisingMethod
from jaxmoe.methods.method import count

Bits = Mapping[int, Mapping[str, np.ndarray]]
"""Of each expert, an int array `[expert]`, by layer and target; of a linear map by its name, `[1]`."""

TURNS = 8
"""Times that a budget is spent anew with what is left: packing widths side by side takes a few bytes of its own."""


class _Place(NamedTuple):
    """One target of a layer's experts, or a linear map, as it is found."""

    layer: int
    target: str
    terms: tuple[Term, ...]

    @property
    def experts(self) -> int:
        return self.terms[0].shape[0]

    @property
    def apart(self) -> bool:
        """Whether each expert may have bits of its own."""
        return len(self.terms) == 1 and isinstance(self.terms[0], Dense)


def even_bits(found: Found, bits: int) -> Bits:
    """Return the same bits for everything that a model stores of its experts, and of maps that a step replaced."""
    every: dict[int, dict[str, np.ndarray]] = {}
    for place in _places(found):
        every.setdefault(place.layer, {})[place.target] = np.full(place.experts, bits)
    return every


def quantised(found: Found, method: QuantisingMethod, settings: Any, bits: Bits) -> Found:
    """Return the model with everything in its new form, abstract."""

    def terms(index: int, target: str, own: tuple[Term, ...]) -> tuple[Term, ...]:
        return method.abstract(own, settings, bits[index][target])

    layers = {
        index: replace(layer, terms={target: terms(index, target, own) for target, own in layer.terms.items()})
        for index, layer in found.layers.items()
    }
    linears = {
        index: tuple(
            replace(own, template=replace(own.template, terms=terms(index, own.source.name, own.template.terms)))
            for own in maps
        )
        for index, maps in found.linears.items()
    }
    replaced = {index: frozenset(layer.sizes.projections) for index, layer in layers.items()}
    return replace(found, layers=layers, replaced=replaced, linears=linears)


def spent_bits(
    found: Found, method: QuantisingMethod, settings: Any, budget: Budget, losses: Callable[[], Losses], added: Count
) -> Bits:
    """Return the bits that lose least in all, within a budget of bytes that is spent but for less than one step.

    Args:
        found: the model.
        method: what rounds.
        settings: an instance of `method.settings`, whose `bits_per` says what has bits of its own.
        budget: what is asked for, in bytes.
        losses: returns those of every width, in the order of `method.widths`; asked only if there is a way at all.
        added: what steps after it store beside its terms.

    Raises:
        JaxmoeError: the ratio is out of reach: the message names the reachable range.
    """
    widths = method.widths(settings)
    places = list(_places(found))
    sizes = np.array([[count(_terms(method, settings, own, bits)).bytes for bits in widths] for own in places])
    before = replace(found, replaced=_all(found)).before()
    extremes = [Sizes(before, _after(found, method, settings, bits, added)) for bits in (min(widths), max(widths))]
    beside = budget.scope(extremes[0].after) - int(sizes[:, widths.index(min(widths))].sum())
    room = budget.scope(before) - budget.removed(before) - beside
    if not sizes.min(1).sum() <= room < sizes.max(1).sum() + np.diff(np.sort(sizes, 1), axis=1).min(initial=1):
        raise JaxmoeError(
            f"{budget} is out of reach for {method.name} with {min(widths)} to {max(widths)} bits: it can remove"
            f" {budget.reach(extremes)}; choose a ratio in that range, or bits, as in {method.name}{max(widths)}"
        )
    unit, owner = _units(places, settings.bits_per), np.repeat(np.arange(len(places)), [own.experts for own in places])
    # Each expert takes an equal part of its target; what does not divide is seen to below.
    costs = np.concatenate([np.tile(-(-size // own.experts), (own.experts, 1)) for own, size in zip(places, sizes)])
    known = losses()
    lost = np.concatenate([known[own.layer][own.target] for own in places])
    costs, lost = joined(costs, unit), joined(lost, unit)
    options = np.array(widths)

    def shared(chosen: np.ndarray) -> list[np.ndarray]:
        return [options[chosen[unit[owner == position]]] for position in range(len(places))]

    def overhead(bits: list[np.ndarray], cost: int) -> int:
        """Return what terms take beyond their units' own, as where several widths lie in one target."""
        return sum(count(method.abstract(own.terms, settings, x)).bytes for own, x in zip(places, bits)) - cost

    best, tried, allowance = None, set(), 0
    while allowance not in tried and len(tried) < TURNS:
        tried.add(allowance)
        choice = choose_bits(costs, lost, room - allowance)
        bits = shared(choice.options)
        extra = overhead(bits, choice.cost)
        if choice.cost + extra <= room and (best is None or choice.loss < best[0]):
            best = choice.loss, bits
        allowance = extra
    if best is None:
        raise JaxmoeError(f"{budget}: no bits of {method.name} come that close; choose a slightly larger ratio")
    every: dict[int, dict[str, np.ndarray]] = {}
    for place, own in zip(places, best[1]):
        every.setdefault(place.layer, {})[place.target] = own
    return every


def _places(found: Found) -> Iterator[_Place]:
    for index in sorted({*found.layers, *found.linears}):
        if index in found.layers:
            for target, terms in found.layers[index].terms.items():
                yield _Place(index, target, terms)
        for own in found.linears.get(index, ()):
            yield _Place(index, own.source.name, own.template.terms)


def _terms(method: QuantisingMethod, settings: Any, place: _Place, bits: int) -> tuple[Term, ...]:
    return method.abstract(place.terms, settings, np.full(place.experts, bits))


def _all(found: Found) -> dict[int, frozenset[str]]:
    return {index: frozenset(layer.sizes.projections) for index, layer in found.layers.items()}


def _after(found: Found, method: QuantisingMethod, settings: Any, bits: int, added: Count) -> Totals:
    """Count the three scopes where everything has so many bits."""
    return quantised(found, method, settings, even_bits(found, bits)).after() + added


def _units(places: list[_Place], level: str) -> np.ndarray:
    """Return the unit of each expert of each place, numbered as they come; what is of one unit has equal bits."""
    names: list[tuple[int, ...]] = []
    for position, place in enumerate(places):
        for expert in range(place.experts):
            each = {"matrix": (position, expert), "expert": (place.layer, expert), "layer": (place.layer,), "model": ()}
            names.append(each[level] if place.apart or level in ("layer", "model") else (position,))
    number = {name: found for found, name in enumerate(dict.fromkeys(names))}
    return np.array([number[name] for name in names])
