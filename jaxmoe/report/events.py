"""What happens during a run, as it happens: small records that its caller hears one after another.

Their JSON has the kind under `event`; as text, an event is the line that a person reads.
"""

from collections.abc import Callable, Mapping
from typing import Any, Self

from jaxmoe.errors import JaxmoeError
from jaxmoe.report.records import Improvement, Projection, Record


class Event(Record, tag_field="event", frozen=True, kw_only=True):
    """What all events have in common.

    Example:
        >>> read_event({"event": "complete", "output": "small"})
        Complete(output='small')
    """


OnEvent = Callable[[Event], None]
"""What a run calls with every event."""


def ignore(event: Event) -> None:
    """Take no notice."""


class Counted(Event, frozen=True, kw_only=True):
    """One of `total` equal steps is done: what moves a progress bar."""

    done: int
    total: int


class LayerDone(Counted, tag="layer", frozen=True, kw_only=True):
    """A layer is compressed, or was by an earlier run.

    Args:
        layer: its index.
        resumed: whether an earlier run did it.
        seconds: that it took.
        projections: what it stores.
        error: of the sum of its experts, with those left out that do not run, and with what compensates for them.
    """

    layer: int
    resumed: bool
    seconds: float
    projections: dict[str, Projection]
    error: Improvement | None = None

    def __str__(self) -> str:
        errors = ", ".join(f"{name} {own.error:.4f}" for name, own in self.projections.items() if own.error is not None)
        how = "kept from an earlier run" if self.resumed else f"{self.seconds:.1f} s"
        told = f": relative error {errors}" if errors else ""
        if self.error is not None:
            told += f": error of its output {self.error.before:.4f} -> {self.error.after:.4f}"
        return f"layer {self.layer} ({self.done} of {self.total}, {how}){told}"


class Calibrated(Counted, tag="calibrated", frozen=True, kw_only=True):
    """The statistics of a layer are gathered."""

    layer: int

    def __str__(self) -> str:
        return f"layer {self.layer} calibrated ({self.done} of {self.total})"


class Forward(Counted, tag="forward", frozen=True, kw_only=True):
    """All texts went through a layer of a model."""

    model: str

    def __str__(self) -> str:
        return f"{self.model}: forward through layer {self.done} of {self.total}"


class TrainingStep(Counted, tag="step", frozen=True, kw_only=True):
    """An update of a training is done; the JSON has its `metrics` beside the other keys.

    Example:
        >>> TrainingStep(done=1, total=2, metrics={"loss": 0.5}).as_json()
        {'event': 'step', 'done': 1, 'total': 2, 'loss': 0.5}
    """

    metrics: Mapping[str, float]

    def as_json(self) -> dict[str, Any]:
        record = super().as_json()
        return record | record.pop("metrics")

    @classmethod
    def read(cls, record: Any) -> Self:
        named = ("event", "done", "total")
        own = {name: record[name] for name in named if name in record}
        return super().read({**own, "metrics": {name: record[name] for name in record if name not in named}})

    def __str__(self) -> str:
        return f"step {self.done} of {self.total}: loss {self.metrics['loss']:.4f}"


class Damaged(Event, tag="damaged", frozen=True, kw_only=True):
    """Something of an earlier run cannot be used."""

    reason: str
    instead: str

    def __str__(self) -> str:
        return f"{self.reason}: {self.instead}"


class CellDone(Event, tag="cell", frozen=True, kw_only=True):
    """A cell of a comparison is measured, or has a `reason` why it cannot be."""

    name: str
    done: int
    total: int
    reason: str | None = None
    perplexity: float | None = None
    kl: float | None = None
    kl_p99: float | None = None
    kl_p999: float | None = None
    seconds: float | None = None

    def __str__(self) -> str:
        found = self.reason or f"perplexity {self.perplexity:.2f}, compressed in {self.seconds:.1f} s"
        if self.kl is not None:
            found += f", KL {self.kl:.4f} (99 % of the tokens below {self.kl_p99:.4f}, 99.9 % below {self.kl_p999:.4f})"
        return f"{self.name} ({self.done} of {self.total}): {found}"


class Waiting(Event, tag="waiting", frozen=True, kw_only=True):
    """The layers of this run are done, and others' are not."""

    layers: list[int]

    def __str__(self) -> str:
        return f"this run's layers are done; layers {span(self.layers)} are still to come from other runs"


class Complete(Event, tag="complete", frozen=True, kw_only=True):
    """The output is complete.

    Example:
        >>> print(Complete(output="small"))
        written: small
    """

    output: str

    def __str__(self) -> str:
        return f"written: {self.output}"


_KINDS = (LayerDone, Calibrated, Forward, TrainingStep, Damaged, CellDone, Waiting, Complete)
_KIND = {kind.__struct_config__.tag: kind for kind in _KINDS}


def read_event(record: Mapping[str, Any]) -> Event:
    """Return the event that `as_json` made this of.

    Raises:
        JaxmoeError: there is no such event.
    """
    kind = _KIND.get(record.get("event"))
    if kind is None:
        raise JaxmoeError(f"there is no event {record.get('event')!r}: there are {', '.join(map(str, _KIND))}")
    return kind.read(record)


def without_complete(on_event: OnEvent) -> OnEvent:
    """Return the same, deaf to the word that an output is complete: for steps of something larger."""
    return lambda event: None if isinstance(event, Complete) else on_event(event)


def span(indices: list[int]) -> str:
    """Return consecutive layer numbers as a range.

    Example:
        >>> span([3, 4, 5]), span([7])
        ('3-5', '7')
    """
    return str(indices[0]) if len(indices) == 1 else f"{indices[0]}-{indices[-1]}"
