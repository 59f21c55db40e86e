"""What a comparison says, as typed records: its cells, the rows made of them, and what the checkpoint itself shows.

A cell or a row of a size that cannot be reached has a `reason` and nothing measured; in the JSON, what was measured
stands beside the other keys.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from jaxmoe.report.evaluation_records import Evaluation
from jaxmoe.report.records import Change, Layer, Outcome, Record, Requested, Step


class CellMeasured(Record, frozen=True, kw_only=True):
    """What was measured of one compressed checkpoint.

    Args:
        output: its folder, which is there while it is needed, or kept.
        requested: the size that was asked for.
        achieved: removed fraction of "touched", "experts" and "model", in the unit that was asked for.
        removed: the same in both units.
        bits_per_weight: stored bits for each original number of the three scopes.
        parameters: of the whole model.
        bytes: of the whole model's tensors.
        loaded_bytes: of the weights that PyTorch holds when the checkpoint is loaded.
        outcomes: what a user should know.
        peak_bytes: peak memory of the process that compressed; None where the system does not say.
        active_parameters: that one token uses, in the mean.
        operations_per_token: of the routed experts' products.
        seconds: to compress, compiling included.
        layers: what every layer stores, with errors.
        evaluation: on the texts, against the original.
        allocation: the rule that shared the budget.
        steps: of a recipe of several.
    """

    output: str
    requested: Requested
    achieved: dict[str, float]
    removed: dict[str, dict[str, float]]
    bits_per_weight: dict[str, float]
    parameters: Change
    bytes: Change
    loaded_bytes: int
    outcomes: list[Outcome]
    peak_bytes: int | None
    active_parameters: float
    operations_per_token: float
    seconds: float
    layers: list[Layer]
    evaluation: Evaluation
    allocation: str | None = None
    steps: list[Step] | None = None

    def as_json(self) -> dict[str, Any]:
        return {**super().as_json(), "evaluation": self.evaluation.as_json()}


class _Measurable(Record, frozen=True, kw_only=True):
    """A record whose `measured`, None where there is nothing, stands beside its other keys in the JSON."""

    mark: ClassVar[str]
    """A key that tells that something was measured."""

    def as_json(self) -> dict[str, Any]:
        record = super().as_json()
        record.pop("measured", None)
        measured = getattr(self, "measured")  # noqa: B009
        return record if measured is None else {**record, **measured.as_json()}

    @classmethod
    def read(cls, record: Any) -> Self:
        if not isinstance(record, Mapping):
            return super().read(record)
        named = {*cls.__struct_fields__} - {"measured"}
        own = {name: value for name, value in record.items() if name in named}
        rest = {name: value for name, value in record.items() if name not in named}
        return super().read({**own, "measured": rest if cls.mark in rest else None})


class CellResult(_Measurable, frozen=True, kw_only=True):
    """One compression of a comparison: what tells it from all others, and what was measured.

    Args:
        context: fingerprint of what cells of one table have in common.
        method: the recipe's name.
        setting: "paper" or "improved".
        settings: all settings.
        changed: those that differ from the setting's own.
        seed: the random seed.
        calibrated: whether it was given the calibration.
        name: a name that a folder can have.
        command: the command line that makes the same.
        code: of methods from outside.
        ratio: removed fraction that was asked for; None for recipes that take none.
        of: of what.
        unit: what is counted; None for parameters.
        main_experts: how many of a token's experts run.
        targets: what is replaced; None for the routed experts alone.
        reason: why nothing was measured.
        measured: None where there is a reason.
    """

    mark: ClassVar[str] = "evaluation"

    context: str
    method: str
    setting: str
    settings: dict[str, Any]
    changed: dict[str, Any]
    seed: int
    calibrated: bool
    name: str
    command: str
    code: Any = None
    ratio: float | None = None
    of: str | None = None
    unit: str | None = None
    main_experts: int | None = None
    targets: tuple[str, ...] | None = None
    reason: str | None = None
    measured: CellMeasured | None = None

    @property
    def requested(self) -> Requested:
        """The size that was asked for."""
        unit = self.unit or "parameters"
        return Requested(ratio=self.ratio, of=self.of, unit=unit, main_experts=self.main_experts, targets=self.targets)


class Worst(Record, frozen=True, kw_only=True):
    """The text whose perplexity grew most, and how many times the original's it is."""

    name: str
    growth: float


class RowMeasured(Record, frozen=True, kw_only=True):
    """What a row says of its cells: means over the seeds.

    Args:
        achieved: removed fraction of "touched", "experts" and "model", in the unit that was asked for.
        removed: the same in both units.
        bits_per_weight: stored bits for each original number of the three scopes.
        parameters: of the whole model.
        bytes: of the whole model's tensors.
        loaded_bytes: of the weights that PyTorch holds when the checkpoint is loaded.
        perplexity: on each text.
        geometric_mean_perplexity: over the texts.
        growth: that in terms of the original's.
        nats_lost: loss of a token beyond the original's, mean over the texts.
        worst: of all texts; None for the original.
        kl: divergence from the original, nats per token, mean over the texts; None for the original, as all below.
        kl_median: that half of the tokens of all texts have at most.
        kl_p99: that 99 % of them have at most.
        kl_p999: that 99.9 % of them have at most.
        top1_agreement: fraction of the tokens at which both hold the same token for most likely.
        error: relative error of the matrices, mean over experts; None where none changed.
        weighted_error: the same, weighted by the calibration; None without.
        seconds: to compress.
        peak_bytes: peak memory of the process that compressed.
        active_parameters: that one token uses, in the mean.
        operations_per_token: of the routed experts' products.
        spread: standard deviations over several seeds.
        outcomes: how often the cells reported what.
        allocation: the rule that shared the budget.
    """

    achieved: dict[str, float]
    removed: dict[str, dict[str, float]]
    bits_per_weight: dict[str, float]
    parameters: int
    bytes: int
    loaded_bytes: int
    perplexity: dict[str, float]
    geometric_mean_perplexity: float
    growth: float
    nats_lost: float
    worst: Worst | None
    kl: float | None
    kl_median: float | None
    kl_p99: float | None
    kl_p999: float | None
    top1_agreement: float | None
    error: float | None
    weighted_error: float | None
    seconds: float | None
    peak_bytes: float | None
    active_parameters: float
    operations_per_token: float
    spread: dict[str, float]
    outcomes: dict[str, int]
    allocation: str | None = None


class Row(_Measurable, frozen=True, kw_only=True):
    """A row of the table: the original, or a contender at one size over its seeds.

    Args:
        method: the recipe's name, "original" for the original.
        setting: "paper" or "improved", empty for the original.
        changed: settings that differ from the setting's own.
        seeds: of the cells that were measured.
        calibrated: whether it was given the calibration; None for the original.
        requested: the size that was asked for; None for the original.
        commands: that make the cells.
        reason: why some cells were not measured.
        measured: None where none was.
    """

    mark: ClassVar[str] = "growth"

    method: str
    setting: str
    changed: dict[str, Any]
    seeds: list[int]
    calibrated: bool | None = None
    requested: Requested | None = None
    commands: tuple[str, ...] = ()
    reason: str | None = None
    measured: RowMeasured | None = None


class Text(Record, frozen=True, kw_only=True):
    """A text of the evaluation: its windows, and tokens at its end that fill none."""

    name: str
    windows: int
    left_out: int


class Routing(Record, frozen=True, kw_only=True):
    """How many tokens of each calibration text chose each expert, `counts[text][layer][expert]`."""

    layers: list[int]
    counts: dict[str, list[list[int]]]


class Spectrum(Record, frozen=True, kw_only=True):
    """The singular values of one projection of a layer.

    Args:
        layer: its index.
        projection: "gate", "up" or "down".
        size: singular values of a matrix.
        positions: which of them, from 1, are given.
        values: their size in terms of the largest one, mean over experts.
        effective_ranks: of each expert's matrix.
    """

    layer: int
    projection: str
    size: int
    positions: list[int]
    values: list[float]
    effective_ranks: list[float]


class Comparison(Record, frozen=True, kw_only=True):
    """What `compare` returns, and `comparison.json` holds.

    Args:
        jaxmoe: the version that measured.
        source: the checkpoint as it was given.
        model_type: its architecture.
        texts: that it was evaluated on.
        length: tokens in a window.
        calibration: what is known of the calibration; None without.
        rows: the original, then every contender at every size.
        cells: behind the rows.
        routing: None without calibration.
        spectra: of every projection of every layer.
        ignored_config_keys: keys of the source's config that were left out of account.
        no_page: why there is no HTML report.
    """

    jaxmoe: str
    source: str
    model_type: str
    texts: list[Text]
    length: int
    calibration: dict[str, Any] | None
    rows: list[Row]
    cells: list[CellResult]
    routing: Routing | None
    spectra: list[Spectrum]
    ignored_config_keys: list[str] | None = None
    no_page: str | None = None

    def as_json(self) -> dict[str, Any]:
        rows, cells = ([own.as_json() for own in found] for found in (self.rows, self.cells))
        return {**super().as_json(), "rows": rows, "cells": cells}

    @classmethod
    def read(cls, record: Any) -> Self:
        """Return the comparison that `comparison.json` holds.

        Raises:
            JaxmoeError: it is something else.
        """
        if not isinstance(record, Mapping):
            return super().read(record)
        parts: dict[str, Any] = {"rows": Row, "cells": CellResult}
        nested = {name: [kind.read(own) for own in record.get(name, ())] for name, kind in parts.items()}
        return super().read({**record, **nested})
