"""Plans of opened checkpoints as earlier versions had them, for one more version.

`jaxmoe.make_plan` makes one, `jaxmoe.compress` carries it out; both take names of methods and checkpoints now.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxmoe.checkpoint import Checkpoint
from jaxmoe.compression import engine
from jaxmoe.compression.evidence import Sums
from jaxmoe.compression.recipe import KINDS, Recipe
from jaxmoe.compression.step import Asked, Options
from jaxmoe.methods import AnyMethod
from jaxmoe.report.records import Report


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A recipe of one step, and what it is asked for."""

    checkpoint: Checkpoint
    recipe: Recipe
    asked: Asked
    allocation: str | None
    weighted: bool
    statistics: Sums | None

    def summary(self) -> dict[str, Any]:
        """Return the plan as JSON."""
        options = Options(allocation=self.allocation)
        known = {"statistics": self.statistics, "weighted": self.weighted}
        return engine.plan(self.checkpoint, self.recipe, self.asked, options=options, **known).as_json()

    def compress(self, output: str | Path, statistics: Any, options: dict[str, Any], **how: Any) -> Report:
        """Carry the plan out."""
        chosen = Options(allocation=self.allocation, **options)
        known = self.statistics if statistics is None else statistics
        return engine.compress(
            self.checkpoint, output, self.recipe, self.asked, options=chosen, statistics=known, **how
        )


def make_plan(
    checkpoint: Checkpoint,
    method: AnyMethod,
    settings: Any,
    *,
    ratio: float,
    of: str = "experts",
    weighted: bool = False,
    allocation: str | None = None,
    statistics: Sums | None = None,
) -> Plan:
    """Plan a method on an opened checkpoint."""
    recipe = contender(method=method, settings=settings)
    return Plan(
        checkpoint=checkpoint,
        recipe=recipe,
        asked=recipe.asked(ratio=ratio, of=of),
        allocation=allocation,
        weighted=weighted,
        statistics=statistics,
    )


def contender(*, method: AnyMethod, settings: Any) -> Recipe:
    """Return the recipe of a method with its settings."""
    return Recipe(steps=(KINDS[method.kind](method=method, settings=settings),), setting=settings.setting)
