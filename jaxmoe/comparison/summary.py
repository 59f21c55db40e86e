"""From cells to the rows of a table: one for the original, then one for every contender and size, over its seeds."""

from collections import Counter
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

from jaxmoe.compression.budget import SCOPES
from jaxmoe.report.comparison_records import CellMeasured, CellResult, Row, RowMeasured, Worst
from jaxmoe.report.evaluation_records import Evaluation
from jaxmoe.report.records import Record


class Original(Record, frozen=True, kw_only=True):
    """What was measured of the original.

    Args:
        parameters: of the whole model.
        bytes: of its tensors.
        loaded_bytes: of the weights that PyTorch holds.
        bits_per_weight: of the experts (of "touched", too) and of the model.
        active_parameters: that one token uses, in the mean.
        operations_per_token: of the routed experts' products.
        evaluation: on the texts.
    """

    parameters: int
    bytes: int
    loaded_bytes: int
    bits_per_weight: dict[str, float]
    active_parameters: float
    operations_per_token: float
    evaluation: Evaluation

    def as_json(self) -> dict[str, Any]:
        return {**super().as_json(), "evaluation": self.evaluation.as_json()}


def rows(original: Original, cells: Sequence[CellResult]) -> list[Row]:
    """Return the rows of a comparison.

    Args:
        original: what was measured of the original.
        cells: finished or impossible, in any order.
    """
    nothing: dict[str, float] = dict.fromkeys(SCOPES, 0.0)
    measured = RowMeasured(
        achieved=nothing,
        removed={"parameters": nothing, "bytes": nothing},
        **{name: getattr(original, name) for name in ("parameters", "bytes", "loaded_bytes", "bits_per_weight")},
        **{name: getattr(original, name) for name in ("active_parameters", "operations_per_token")},
        **_quality(original.evaluation, original.evaluation) | {"worst": None},
        **dict.fromkeys(("error", "weighted_error", "seconds", "peak_bytes")),
        spread={},
        outcomes={},
    )
    groups: dict[tuple, list[CellResult]] = {}
    for cell in cells:
        size = (cell.of or "", cell.unit or "", cell.ratio or 0.0, -(cell.main_experts or 0), cell.targets or ())
        groups.setdefault((cell.method, cell.setting, str(cell.changed), *size), []).append(cell)
    order = list(dict.fromkeys(cell.method for cell in cells))
    ordered = sorted(groups, key=lambda g: (order.index(g[0]), g[1] != "paper", *g[2:]))
    first = Row(method="original", setting="", changed={}, seeds=[], measured=measured)
    return [first, *(_row(original, sorted(groups[group], key=lambda c: c.seed)) for group in ordered)]


def _row(original: Original, cells: Sequence[CellResult]) -> Row:
    first = cells[0]
    done = [(cell.seed, cell.measured) for cell in cells if cell.measured is not None]
    reasons = dict.fromkeys(cell.reason for cell in cells if cell.reason is not None)
    return Row(
        **{name: getattr(first, name) for name in ("method", "setting", "changed", "calibrated", "requested")},
        seeds=[seed for seed, _ in done],
        commands=tuple(cell.command for cell in cells),
        reason="; ".join(reasons) or None,
        measured=_means(original, [own for _, own in done]) if done else None,
    )


def _means(original: Original, done: Sequence[CellMeasured]) -> RowMeasured:
    found = [_measured(original, cell) for cell in done]
    means, spread = {}, {}
    for name, first in found[0].items():
        if name in ("perplexity", "worst"):
            continue
        values = [own[name] for own in found]
        means[name] = None if first is None or None in values else fmean(values)
        if len(values) > 1 and means[name] is not None:
            spread[name] = stdev(values)
    outcomes = Counter(outcome.kind for cell in done for outcome in cell.outcomes)
    return RowMeasured(
        achieved=_mean_of([cell.achieved for cell in done]),
        removed={unit: _mean_of([cell.removed[unit] for cell in done]) for unit in done[0].removed},
        bits_per_weight=_mean_of([cell.bits_per_weight for cell in done]),
        allocation=done[0].allocation,
        parameters=round(fmean(cell.parameters.after for cell in done)),
        bytes=round(fmean(cell.bytes.after for cell in done)),
        loaded_bytes=round(fmean(cell.loaded_bytes for cell in done)),
        perplexity=_mean_of([own["perplexity"] for own in found]),
        # The worst of all seeds, not of their mean.
        worst=max((own["worst"] for own in found), key=lambda own: own.growth),
        outcomes=dict(outcomes.most_common()),
        spread=spread,
        **means,
    )


def _mean_of(found: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: fmean(own[name] for own in found) for name in found[0]}


def _measured(original: Original, cell: CellMeasured) -> dict[str, Any]:
    projections = [record for layer in cell.layers for record in layer.projections.values()]
    # Where no matrix changes, nothing is said of their errors.
    errors, weighted = ([getattr(own, name) for own in projections] for name in ("error", "weighted_error"))
    return {
        **{name: getattr(cell, name) for name in ("seconds", "peak_bytes", "active_parameters")},
        "operations_per_token": cell.operations_per_token,
        **_quality(cell.evaluation, original.evaluation),
        "error": _mean(errors),
        "weighted_error": _mean(weighted),
    }


def _mean(values: Sequence[Any]) -> float | None:
    return fmean(values) if all(isinstance(value, float | int) for value in values) and values else None


def _quality(own: Evaluation, base: Evaluation) -> dict[str, Any]:
    """Return how good a model is on all texts, and how much worse than the original."""
    pairs = list(zip(own.texts, base.texts, strict=True))
    growth = {text.name: text.perplexity / before.perplexity for text, before in pairs}
    worst = max(growth, key=lambda name: growth[name])
    spread = own.kl_percentiles
    return {
        "perplexity": {text.name: text.perplexity for text, _ in pairs},
        "geometric_mean_perplexity": own.geometric_mean_perplexity,
        "growth": own.geometric_mean_perplexity / base.geometric_mean_perplexity,
        "nats_lost": fmean(text.nats_per_token - before.nats_per_token for text, before in pairs),
        "worst": Worst(name=worst, growth=growth[worst]),
        "kl": own.kl,
        "kl_median": None if spread is None else spread.median,
        "kl_p99": None if spread is None else spread.p99,
        "kl_p999": None if spread is None else spread.p999,
        "top1_agreement": own.top1_agreement,
    }
