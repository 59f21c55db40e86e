"""What factors of a model will be stored, layer by layer and target by target, before anything runs."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from jaxmoe.checkpoint import MoELayer
from jaxmoe.compression.budget import Sizes
from jaxmoe.compression.found import Found
from jaxmoe.compression.linear_maps import PlannedLinear, describe_linear
from jaxmoe.factors import TARGETS, CompressedLayer
from jaxmoe.methods import Method


class PlannedLayer(NamedTuple):
    """One layer of the plan: `template` holds abstract terms, `touched` names the targets that the method fits."""

    source: MoELayer
    template: CompressedLayer
    touched: tuple[str, ...]

    @property
    def replaced(self) -> frozenset[str]:
        """The projections that the targets cover."""
        return frozenset(projection for target in self.touched for projection in TARGETS[target])


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will be stored, layer by layer.

    Args:
        method: what replaces the experts.
        settings: its settings.
        requested: `{"ratio", "of"}`, and `unit` where it is bytes.
        allocation: the rule that shared the budget, one of `slot_costs.RULES`.
        layers: those with routed experts.
        linears: the linear maps beside them that are replaced, by layer.
        notes: what a user should know of it, one sentence each.
        found: the model that it is made for.
        peak_bytes: predicted peak of anonymous memory beyond that of the idle program.
    """

    method: Method
    settings: Any
    requested: dict[str, Any]
    allocation: str
    layers: tuple[PlannedLayer, ...]
    found: Found = field(repr=False)
    peak_bytes: int
    linears: Mapping[int, tuple[PlannedLinear, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def after(self) -> Found:
        """The model that the plan leads to."""
        return replace(
            self.found,
            layers={layer.source.index: layer.template for layer in self.layers},
            replaced={layer.source.index: layer.replaced for layer in self.layers},
            linears=self.linears,
            notes=(*self.found.notes, *self.notes),
        )

    @property
    def sizes(self) -> Sizes:
        """The sizes of all three scopes before and after."""
        return Sizes(self.after.before(), self.after.after())

    def summary(self, sizes: Sizes | None = None) -> dict[str, Any]:
        """Return the plan as JSON, with the keys that other programs read; `sizes` as they came true, if known."""
        sizes = sizes or self.sizes
        return {
            "method": self.method.name,
            "settings": asdict(self.settings),
            "requested": self.requested,
            "allocation": self.allocation,
            "achieved": sizes.removed(self.requested.get("unit", "parameters")),
            **sizes.model(),
            "peak_bytes": self.peak_bytes,
            "layers": describe_layers(self.after),
        }


def describe_layers(found: Found) -> list[dict[str, Any]]:
    """Return what every layer stores of its experts' projections and of the linear maps that were replaced."""
    projections = {index: describe(layer) for index, layer in found.layers.items()}
    for index, linears in found.linears.items():
        own = {linear.source.name: describe_linear(linear.source.name, linear.template) for linear in linears}
        projections[index] = {**projections.get(index, {}), **own}
    return [{"layer": index, "projections": own} for index, own in sorted(projections.items())]


def describe(layer: CompressedLayer) -> dict[str, dict[str, Any]]:
    """Return for each projection its terms, ranks, stored numbers and bits, and the kept fraction.

    A term over gate and up counts half for each. Where the groups of experts of a real term have ranks of their own,
    these stand under `group_ranks`, and their mean under `ranks`.
    """
    projections: dict[str, dict[str, Any]] = {
        name: {"terms": [], "ranks": [], "parameters": 0, "bits_per_weight": 0.0} for name in layer.sizes.projections
    }
    for target, terms in layer.terms.items():
        covered = TARGETS[target]
        for term in terms:
            numbers, size = term.count()
            for position, name in enumerate(covered):
                entry = projections[name]
                entry["terms"].append({"target": target, **term.spec()})
                entry["ranks"].append(term.rank)
                entry["parameters"] += numbers // len(covered) + (position < numbers % len(covered))
                entry["bits_per_weight"] += 8 * size / len(covered) / int(np.prod(layer.sizes.of(name)))
                if term.known_ranks is not None:
                    entry.setdefault("group_ranks", []).append(list(term.known_ranks))
    for name, entry in projections.items():
        entry["kept"] = entry["parameters"] / int(np.prod(layer.sizes.of(name)))
    return projections
