"""Progress of a run: a bar with the time left on a terminal, plain lines elsewhere, JSON lines for programs.

Where nothing is heard of for ten minutes, a watchdog says so, and whether the program still computes.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jaxmoe.report.tables import span
from jaxmoe.report.watchdog import Watchdog


@contextmanager
def progress(total: int, *, as_json: bool, doing: str = "compressing", unit: str = "layers") -> Iterator:
    """Yield the function that a pipeline calls with its events; everything goes to standard error."""
    with Watchdog() as watchdog, _shown(total, as_json=as_json, doing=doing, unit=unit) as show:

        def on_event(event: dict[str, Any]) -> None:
            watchdog.heard(describe(event))
            show(event)

        yield on_event


@contextmanager
def _shown(total: int, *, as_json: bool, doing: str, unit: str) -> Iterator:
    if as_json:
        yield lambda event: print(json.dumps(event), file=sys.stderr, flush=True)
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda event: print(describe(event), file=sys.stderr, flush=True)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(doing, total=total)

        def show(event: dict[str, Any]) -> None:
            if event["event"] in ("layer", "forward", "calibrated", "step"):
                bar.update(task, completed=event["done"], total=event["total"])
            else:
                bar.console.print(describe(event), highlight=False)

        yield show


def describe(event: dict[str, Any]) -> str:
    """Return an event as one line.

    Example:
        >>> describe({"event": "complete", "output": "small"})
        'written: small'
    """
    if event["event"] == "layer":
        errors = ", ".join(f"{name} {record['error']:.4f}" for name, record in event["projections"].items())
        how = "kept from an earlier run" if event["resumed"] else f"{event['seconds']:.1f} s"
        return f"layer {event['layer']} ({event['done']} of {event['total']}, {how}): relative error {errors}"
    if event["event"] == "main_experts":
        error = event["error"]
        learned = "" if error is None else f": error of its output {error['before']:.4f} -> {error['after']:.4f}"
        return f"layer {event['layer']} ({event['done']} of {event['total']}, {event['seconds']:.1f} s){learned}"
    if event["event"] == "calibrated":
        return f"layer {event['layer']} calibrated ({event['done']} of {event['total']})"
    if event["event"] == "forward":
        return f"{event['model']}: forward through layer {event['done']} of {event['total']}"
    if event["event"] == "step":
        return f"step {event['done']} of {event['total']}: loss {event['loss']:.4f}"
    if event["event"] == "damaged":
        return f"{event['reason']}: {event['instead']}"
    if event["event"] == "cell":
        found = event.get("reason") or f"perplexity {event['perplexity']:.2f}, compressed in {event['seconds']:.1f} s"
        return f"{event['name']} ({event['done']} of {event['total']}): {found}"
    if event["event"] == "waiting":
        return f"this run's layers are done; layers {span(event['layers'])} are still to come from other runs"
    return f"written: {event['output']}"
