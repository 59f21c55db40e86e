"""What a ratio means for a model: how much goes and how much stays, in exact integers of parameters or of bytes.

A ratio is the removed fraction of the replaced matrices, of all routed experts or of the whole model, as they lie on
disk. Everything that may be asked of it stands here: that it is a fraction, of which scope and in which unit, what it
leaves, and which range can be reached.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import Any, NamedTuple

from jaxmoe.checkpoint import Checkpoint, MoELayer
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import TARGETS, Count

SCOPES = ("touched", "experts", "model")
"""What a ratio may be a fraction of: the matrices that the method replaces, all routed experts, the whole model."""

UNITS = ("parameters", "bytes")
"""What is counted."""

NOTHING = Count(0, 0)


class Totals(NamedTuple):
    """What the three scopes hold: the replaced matrices, all routed experts and the whole model.

    Example:
        >>> small, large = Count(1, 2), Count(10, 20)
        >>> (Totals(small, small, large) + large).model
        Count(numbers=20, bytes=40)
    """

    touched: Count
    experts: Count
    model: Count

    def __add__(self, other: tuple) -> "Totals":
        """Return the totals with so much more in each of them."""
        return Totals(*(own + other for own in self))


class Sizes(NamedTuple):
    """The three scopes before and after a compression.

    Example:
        >>> before = Totals(Count(200, 400), Count(300, 600), Count(400, 800))
        >>> after = Totals(Count(100, 400), Count(200, 600), Count(300, 800))
        >>> Sizes(before, after).removed()
        {'touched': 0.5, 'experts': 0.333..., 'model': 0.25}
        >>> Sizes(before, after).removed("bytes")["model"], Sizes(before, after).bits()["experts"]
        (0.0, 16.0)
    """

    before: Totals
    after: Totals

    def removed(self, unit: str = "parameters") -> dict[str, float]:
        """Return the removed fraction of each scope."""
        pairs = ((in_unit(before, unit), in_unit(after, unit)) for before, after in zip(self.before, self.after))
        return {scope: (before - after) / before for scope, (before, after) in zip(SCOPES, pairs)}

    def bits(self) -> dict[str, float]:
        """Return the stored bits for each number that every scope had before."""
        pairs = zip(SCOPES, self.before, self.after)
        return {scope: 8 * after.bytes / before.numbers for scope, before, after in pairs}

    def model(self) -> dict[str, Any]:
        """Return parameters and bytes of the whole model, and what all scopes lose, as plans and reports have them."""
        before, after = self.before.model, self.after.model
        return {
            "removed": {unit: self.removed(unit) for unit in UNITS},
            "bits_per_weight": self.bits(),
            "parameters": {"before": before.numbers, "after": after.numbers},
            "bytes": {"before": before.bytes, "after": after.bytes},
        }


def in_unit(count: Count, unit: str) -> int:
    """Return one of the two numbers of a count.

    Example:
        >>> in_unit(Count(3, 6), "bytes")
        6
    """
    return count.bytes if unit == "bytes" else count.numbers


@dataclass(frozen=True)
class Budget:
    """What is asked for: the removed fraction of a scope, in a unit.

    Args:
        ratio: removed fraction, between 0 and 1.
        of: what it is a fraction of, one of `SCOPES`.
        unit: what is counted, one of `UNITS`.

    Raises:
        JaxmoeError: one of them is none.

    Example:
        >>> Budget(0.4, "model").removed(Totals(Count(4, 8), Count(6, 12), Count(10, 20)))
        4
        >>> Budget(1.5)
        Traceback (most recent call last):
        ...
        jaxmoe.errors.JaxmoeError: ratio 1.5 is not a removed fraction: give a number between 0 and 1, such as 0.4
    """

    ratio: float
    of: str = "experts"
    unit: str = "parameters"

    def __post_init__(self):
        if self.of not in SCOPES:
            raise JaxmoeError(f"of {self.of!r}: give {', '.join(SCOPES)}")
        if self.unit not in UNITS:
            raise JaxmoeError(f"unit {self.unit!r}: give {' or '.join(UNITS)}")
        if not 0 < self.ratio < 1:
            raise JaxmoeError(
                f"ratio {self.ratio} is not a removed fraction: give a number between 0 and 1, such as 0.4"
            )

    def __str__(self) -> str:
        return f"ratio {self.ratio} of {self.of}" + (" in bytes" if self.unit == "bytes" else "")

    def as_json(self) -> dict[str, Any]:
        """Return what plans and reports say was requested; the unit only where it is not parameters."""
        return {"ratio": self.ratio, "of": self.of, **({"unit": self.unit} if self.unit != "parameters" else {})}

    def size(self, count: Count) -> int:
        """Return what a count amounts to in the budget's unit."""
        return in_unit(count, self.unit)

    def scope(self, totals: Totals) -> int:
        """Return what the scope that the ratio is a fraction of holds."""
        return self.size(getattr(totals, self.of))

    def removed(self, before: Totals) -> int:
        """Return how much has to go at least."""
        # The decimal that the user wrote, not its binary neighbour: 0.4 of 10 numbers are 4.
        return int(-(-Fraction(str(self.ratio)) * self.scope(before) // 1))

    def room(self, before: Totals, beside: Totals) -> int:
        """Return how much may be stored in place of the replaced matrices.

        Args:
            before: the model as it is.
            beside: what else each scope will hold.
        """
        return self.scope(before) - self.removed(before) - self.scope(beside)

    def reach(self, sizes: Iterable[Sizes]) -> str:
        """Return the range of ratios between some extreme sizes, for messages.

        Args:
            sizes: the smallest and the largest result, in any order.
        """
        found = [own.removed(self.unit) for own in sizes]
        return ", ".join(
            f"{min(own[scope] for own in found):.4f} to {max(own[scope] for own in found):.4f} of {scope}"
            for scope in SCOPES
        )


def disk_counts(checkpoint: Checkpoint, layer: MoELayer) -> dict[str, Count]:
    """Count what each projection of a layer's experts takes on disk; scales of quantised ones are bytes, not numbers.

    Args:
        checkpoint: the source.
        layer: one of its layers.
    """
    found = {}
    for stack in layer.layout:
        parts = TARGETS[stack.target]
        size = sum(part.bytes for name in stack.names(layer.shape) for part in checkpoint.matrices[name].parts)
        for position, projection in enumerate(parts):
            # The first of two projections in one tensor takes what does not divide.
            own = size // len(parts) + (size % len(parts) if position == 0 else 0)
            found[projection] = Count(prod(layer.shape.of(projection)), own)
    return found
