"""Plan and carry out any method: factors of the experts, or fewer and smaller ones."""

from pathlib import Path
from typing import Any

from jaxmoe.checkpoint import Checkpoint
from jaxmoe.compression import run
from jaxmoe.compression.evidence import Sums
from jaxmoe.compression.plan import Plan, make_plan
from jaxmoe.compression.prune import slim
from jaxmoe.compression.pruned_sizes import SlimPlan, make_slim_plan
from jaxmoe.compression.run import Amend, unchanged
from jaxmoe.errors import JaxmoeError
from jaxmoe.methods import AnyMethod, PruningMethod, pruning_methods
from jaxmoe.report.events import OnEvent, ignore


def check_form(
    checkpoint: Checkpoint,
    method: AnyMethod,
    *,
    export: str | None = None,
    layers: tuple[int, int] | None = None,
    sequential: bool = False,
) -> None:
    """Raise unless a method can be carried out like that, so that nothing is calibrated in vain.

    Args:
        checkpoint: the source.
        method: any.
        export: form of the result, "slim" or one of `run.EXPORTS`; None for the method's own.
        layers: some layers alone.
        sequential: whether every layer is calibrated behind the compressed ones.
    """
    if isinstance(method, PruningMethod):
        if layers is not None or sequential or export not in (None, "slim"):
            raise JaxmoeError(
                f"{method.name} goes through all layers at once and writes a checkpoint of the original architecture:"
                " leave out --layers, --sequential and --export"
            )
        return
    if export == "slim":
        raise JaxmoeError(
            f"--export slim: {method.name} removes no experts and no channels; these do: {pruning_methods()}"
        )
    run.check_export(checkpoint, export or "factored")


def plan_compression(
    checkpoint: Checkpoint,
    method: AnyMethod,
    settings: Any,
    *,
    ratio: float,
    of: str = "experts",
    weighted: bool = False,
    allocation: str | None = None,
    statistics: Sums | None = None,
) -> Plan | SlimPlan:
    """Plan a compression; the arguments are those of `plan.make_plan`.

    Raises:
        JaxmoeError: the ratio is out of reach, or the method does not take an argument.
    """
    if isinstance(method, PruningMethod):
        if allocation not in (None, "uniform"):
            raise JaxmoeError(f"--allocation {allocation}: {method.name} keeps the same number in every layer")
        return make_slim_plan(checkpoint, method, settings, ratio=ratio, of=of)
    return make_plan(
        checkpoint,
        method,
        settings,
        ratio=ratio,
        of=of,
        weighted=weighted,
        allocation=allocation,
        statistics=statistics,
    )


def carry_out(
    checkpoint: Checkpoint,
    output: str | Path,
    plan: Plan | SlimPlan,
    *,
    export: str | None = None,
    seed: int = 0,
    layers: tuple[int, int] | None = None,
    resume: bool = True,
    command: str = "",
    statistics: Sums | None = None,
    amend: Amend = unchanged,
    on_event: OnEvent = ignore,
) -> dict[str, Any]:
    """Carry out a plan and return the report; the arguments are those of `run.compress`.

    Args:
        checkpoint: the source.
        output: the folder to create.
        plan: from `plan_compression`.
        export: see `check_form`; None for "slim" where the plan is one, else "factored".
        seed: of everything random; slimming has nothing that is.
        layers: as there; slimming goes through all of them, since it takes seconds.
        resume: as there.
        command: as there.
        statistics: as there.
        amend: as there.
        on_event: as there.

    Raises:
        JaxmoeError: the method does not take an argument, or the run fails.
    """
    check_form(checkpoint, plan.method, export=export, layers=layers)
    shared = {"resume": resume, "command": command, "statistics": statistics, "amend": amend, "on_event": on_event}
    if isinstance(plan, SlimPlan):
        return slim(checkpoint, output, plan, **shared)
    return run.compress(checkpoint, output, plan, export=export or "factored", seed=seed, layers=layers, **shared)
