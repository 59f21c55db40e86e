"""Progress of a run: a bar with the time left on a terminal, plain lines elsewhere, JSON lines for programs.

Where nothing is heard of for ten minutes, a watchdog says so, and whether the program still computes.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jaxmoe.report.events import Counted, Event, OnEvent
from jaxmoe.report.watchdog import Watchdog


@contextmanager
def progress(total: int, *, as_json: bool, doing: str = "compressing", unit: str = "layers") -> Iterator[OnEvent]:
    """Yield the function that a pipeline calls with its events; everything goes to standard error."""
    with Watchdog() as watchdog, _shown(total, as_json=as_json, doing=doing, unit=unit) as show:

        def on_event(event: Event) -> None:
            watchdog.heard(str(event))
            show(event)

        yield on_event


@contextmanager
def _shown(total: int, *, as_json: bool, doing: str, unit: str) -> Iterator[OnEvent]:
    if as_json:
        yield lambda event: print(json.dumps(event.as_json()), file=sys.stderr, flush=True)
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda event: print(event, file=sys.stderr, flush=True)
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

        def show(event: Event) -> None:
            if isinstance(event, Counted):
                bar.update(task, completed=event.done, total=event.total)
            else:
                bar.console.print(str(event), highlight=False)

        yield show
