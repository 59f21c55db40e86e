"""Plans and runs on opened checkpoints, for tests that look at what lies between the two."""

from pathlib import Path
from typing import Any

from jaxmoe.compression import engine
from jaxmoe.compression.budget import Budget
from jaxmoe.compression.engine import check_statistics
from jaxmoe.compression.factor import Factor, PlannedFactor
from jaxmoe.compression.factor_plan import make_plan as planned
from jaxmoe.compression.found import Found
from jaxmoe.compression.plan import Plan
from jaxmoe.compression.prune import PrunePass
from jaxmoe.compression.prune_plan import PrunePlan, make_prune_plan
from jaxmoe.compression.recipe import find
from jaxmoe.compression.step import Setup
from jaxmoe.compression.term_pass import TermPass, check_factored


def make_plan(checkpoint, method, settings, *, ratio, of="experts", unit="parameters", **options) -> Plan:
    """Return the plan of a factoring method."""
    return planned(Found.of(checkpoint), method, settings, Budget(ratio, of, unit), **options)


def compress(
    checkpoint, output: Path, plan: Plan, *, export="factored", seed=0, statistics=None, **options
) -> dict[str, Any]:
    """Carry out the plan of a factoring method, and return the report as JSON."""
    check_factored(checkpoint, export)
    check_statistics(Factor(method=plan.method, settings=plan.settings), statistics)
    setup = Setup(export=export, seed=seed, statistics=statistics)
    work = TermPass(found=Found.of(checkpoint), planned=[PlannedFactor(plan)], setup=setup)
    return work.carry_out(output, **options).as_json()


def run(checkpoint, output: Path, name: str, *, settings=None, statistics=None, **given) -> dict[str, Any]:
    """Carry out a recipe on an opened checkpoint, and return the report as JSON.

    Args:
        checkpoint: opened.
        output: the folder to create.
        name: of the recipe.
        settings: of its steps.
        statistics: opened.
        given: sizes, and options of `engine.compress`.
    """
    recipe = find(name, options=settings)
    sizes = {key: given.pop(key) for key in ("ratio", "of", "unit", "main_experts") if key in given}
    return engine.compress(checkpoint, output, recipe, recipe.asked(**sizes), statistics=statistics, **given).as_json()


def prune_plan(checkpoint, method, settings, *, ratio, of="experts", unit="parameters", **options) -> PrunePlan:
    """Return the plan of a pruning method."""
    return make_prune_plan(checkpoint, method, settings, Budget(ratio, of, unit), **options)


def prune(checkpoint, output: Path, plan: PrunePlan, *, statistics=None, **options) -> dict[str, Any]:
    """Carry out the plan of a pruning method, and return the report as JSON."""
    work = PrunePass(found=Found.of(checkpoint), plan=plan, statistics=statistics)
    return work.carry_out(output, **options).as_json()
