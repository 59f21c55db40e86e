"""The report of a recipe of several passes, put together from theirs."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxmoe.compression.budget import Sizes, Totals
from jaxmoe.methods.method import Outcome


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A recipe of several steps, of which a pass is the last: its report is about all of them.

    Args:
        identity: everything that decides the result; None where that is what decides the pass.
        source: folder that the recipe began with.
        summary: its `method`, `settings` and `requested`.
        before: what the source holds.
        reports: of the passes before, as JSON.
        begun: when the run began.
    """

    identity: Mapping[str, Any] | None
    source: Path
    summary: Mapping[str, Any]
    before: Totals
    reports: Sequence[Mapping[str, Any]]
    begun: float

    def report(
        self,
        last: Mapping[str, Any],
        sizes: Sizes,
        steps: Sequence[Mapping[str, Any]],
        note: str = "errors of the matrices are the last step's, against what the steps before it left",
    ) -> dict[str, Any]:
        """Return the report of the whole.

        Args:
            last: that of the last pass.
            sizes: its.
            steps: what it says of each of its steps.
            note: what to know of the errors, where there were passes before it.
        """
        known = [step for report in self.reports for step in report["steps"]]
        outcomes = [outcome for report in self.reports for outcome in report["outcomes"]]
        notes = [told(None, Outcome("note", "", note))] if self.reports else []
        return {
            **last,
            **self.summary,
            **whole_sizes(self.before, sizes, self.summary["requested"]),
            "source": str(self.source),
            "outcomes": [*outcomes, *last["outcomes"], *notes],
            "steps": [*known, *steps],
            "layer_seconds": sum(report["layer_seconds"] for report in self.reports) + last["layer_seconds"],
            "seconds": time.perf_counter() - self.begun,
            **({} if self.identity is None else {"run": dict(self.identity)}),
        }


def whole_sizes(before: Totals, last: Sizes, requested: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a recipe removes, as JSON, given its source and the sizes of its last step.

    Args:
        before: what the source holds.
        last: sizes of the last step.
        requested: what was asked for.
    """
    # Where several steps worked on the model, all routed experts are what they replaced.
    after = last.after._replace(touched=last.after.experts)
    sizes = Sizes(before._replace(touched=before.experts), after)
    return {"achieved": sizes.removed(requested.get("unit", "parameters")), **sizes.model()}


def told(layer: int | None, outcome: Outcome) -> dict[str, Any]:
    """Return an outcome as reports have it; `layer` is None for the whole model."""
    own = outcome._asdict()
    return {"layer": layer, **own, "target": own["target"] if layer is not None else None}
