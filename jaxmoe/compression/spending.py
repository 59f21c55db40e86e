"""How the steps of a recipe share one budget: what falls to each of them, given what those before it left."""

import math
from collections.abc import Sequence
from typing import Any

from jaxmoe.compression.budget import Budget, Totals
from jaxmoe.compression.evidence import Sums
from jaxmoe.compression.found import Found
from jaxmoe.compression.recipe import Recipe
from jaxmoe.compression.step import Asked, Options, Step
from jaxmoe.errors import JaxmoeError


class Spending:
    """What a recipe removes in all, and what of it falls to each of its steps.

    Args:
        recipe: the steps.
        asked: the sizes of the whole.
        before: what the source holds.

    Raises:
        JaxmoeError: more is to go than the routed experts hold.
    """

    def __init__(self, recipe: Recipe, asked: Asked, before: Totals):
        self.recipe, self.asked, self.before = recipe, asked, before
        self.sized = [step for step in recipe.steps if step.takes == "ratio"]
        if (budget := asked.budget) is None or len(self.sized) == 1:
            return
        # All routed experts are what several steps replace.
        self.scope = "model" if budget.of == "model" else "experts"
        self.removed = Budget(budget.ratio, self.scope, budget.unit).removed(before)
        if self.removed >= budget.size(before.experts):
            raise JaxmoeError(f"{budget} is more than all routed experts: choose a smaller one")

    def of(self, step: Step, found: Found) -> Asked:
        """Return what a step is asked for, given the model that it finds."""
        budget = self.asked.budget
        if budget is None or step not in self.sized or len(self.sized) == 1:
            return self.asked
        if step is not self.sized[-1]:
            kept = 1 - self.removed / budget.size(self.before.experts)
            ratio = 1 - kept ** self.recipe.share(step)
        else:
            ratio = self._rest(budget, found.before())
        return self.asked._replace(budget=Budget(ratio, "experts", budget.unit))

    def _rest(self, budget: Budget, found: Totals) -> float:
        """Return the fraction of the experts that it finds that the last step which takes a ratio removes."""
        gone = budget.size(getattr(self.before, self.scope)) - budget.size(getattr(found, self.scope))
        if gone >= self.removed:
            *first, last = (step.name for step in self.sized)
            raise JaxmoeError(
                f"{'+'.join(first)} cannot remove so little of this model that anything is left for {last} at {budget}:"
                " choose a larger ratio, or one of them alone"
            )
        # Rounded up, so that the plan never keeps a number too many.
        return math.nextafter((self.removed - gone) / budget.size(found.experts), 1)

    def requested(self) -> dict[str, Any]:
        """Return what plans and reports say was requested."""
        budget, main = self.asked
        sizes = self.recipe.unit if budget is None else budget.as_json()
        return sizes if main is None else {**sizes, "main_experts": main}

    def plan(
        self,
        steps: Sequence[Step],
        found: Found,
        options: Options,
        statistics: Sums | None,
        *,
        weighted: bool,
        measure: bool = True,
    ) -> list[Any]:
        """Plan the steps of one pass on what it finds; `measure` is that of `Step.plan`."""
        planned = []
        for step in steps:
            last = not self.sized or step is self.sized[-1]
            after = self.recipe.steps[self.recipe.steps.index(step) + 1 :]
            planned.append(
                step.plan(
                    found,
                    self.of(step, found),
                    options=options,
                    statistics=statistics,
                    weighted=weighted,
                    then=after if last else (),
                    nearest=not last,
                    measure=measure,
                )
            )
            found = planned[-1].after
        return planned
