"""From cells to the rows of a table: one for the original, then one for every contender and ratio, over its seeds."""

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

Record = Mapping[str, Any]

MEASURED = (
    "geometric_mean_perplexity",
    "growth",
    "nats_lost",
    "kl",
    "top1_agreement",
    "error",
    "weighted_error",
    "seconds",
    "peak_bytes",
    "active_parameters",
    "operations_per_token",
)
"""What a row gives as the mean over its seeds, and of which `spread` has the standard deviation."""


def rows(original: Record, cells: Sequence[Record]) -> list[dict[str, Any]]:
    """Return the rows of a comparison.

    Args:
        original: what was measured of the original.
        cells: the records of cells, finished or impossible, in any order.
    """
    first = {
        "method": "original",
        "setting": "",
        "changed": {},
        "seeds": [],
        "achieved": {"touched": 0.0, "experts": 0.0, "model": 0.0},
        "parameters": original["parameters"],
        "bytes": original["bytes"],
        "active_parameters": original["active_parameters"],
        "operations_per_token": original["operations_per_token"],
        **_quality(original["evaluation"], original["evaluation"]),
        "worst": None,
    }
    groups: dict[tuple, list[Record]] = {}
    for cell in cells:
        size = (cell.get("of", ""), cell.get("ratio", -cell.get("main_experts", 0)))
        groups.setdefault((cell["method"], cell["setting"], str(cell["changed"]), *size), []).append(cell)
    order = list(dict.fromkeys(cell["method"] for cell in cells))
    ordered = sorted(groups, key=lambda g: (order.index(g[0]), g[1] != "paper", *g[2:]))
    return [first, *(_row(original, sorted(groups[group], key=lambda c: c["seed"])) for group in ordered)]


def _row(original: Record, cells: Sequence[Record]) -> dict[str, Any]:
    done = [cell for cell in cells if "evaluation" in cell]
    names = ("method", "setting", "changed", "calibrated")
    row = {name: cells[0][name] for name in names}
    row["requested"] = {name: cells[0][name] for name in ("ratio", "of", "main_experts") if name in cells[0]}
    row["seeds"] = [cell["seed"] for cell in done]
    row["commands"] = [cell["command"] for cell in cells]
    if reasons := list(dict.fromkeys(cell["reason"] for cell in cells if "reason" in cell)):
        row["reason"] = "; ".join(reasons)
    if not done:
        return row
    measured = [_measured(original, cell) for cell in done]
    row["achieved"] = {scope: fmean(cell["achieved"][scope] for cell in done) for scope in done[0]["achieved"]}
    row["allocation"] = done[0].get("allocation")
    row["parameters"] = round(fmean(cell["parameters"]["after"] for cell in done))
    row["bytes"] = round(fmean(cell["bytes"]["after"] for cell in done))
    texts = measured[0]["perplexity"]
    row["perplexity"] = {name: fmean(own["perplexity"][name] for own in measured) for name in texts}
    worst = [own["worst"] for own in measured]
    row["worst"] = max(worst, key=lambda own: own["growth"])
    row["spread"] = {}
    for name in MEASURED:
        values = [own[name] for own in measured]
        row[name] = None if None in values else fmean(values)
        if len(values) > 1 and None not in values:
            row["spread"][name] = stdev(values)
    row["outcomes"] = dict(Counter(outcome["kind"] for cell in done for outcome in cell["outcomes"]).most_common())
    return row


def _measured(original: Record, cell: Record) -> dict[str, Any]:
    projections = [record for layer in cell["layers"] for record in layer["projections"].values()]
    # Where no matrix changes, nothing is said of their errors.
    errors, weighted = ([record.get(name) for record in projections] for name in ("error", "weighted_error"))
    return {
        **{name: cell[name] for name in ("seconds", "peak_bytes", "active_parameters", "operations_per_token")},
        **_quality(cell["evaluation"], original["evaluation"]),
        "error": None if None in errors else fmean(errors),
        "weighted_error": None if None in weighted else fmean(weighted),
    }


def _quality(own: Record, base: Record) -> dict[str, Any]:
    """Return how good a model is on all texts, and how much worse than the original.

    `nats_lost` is the mean over texts of the loss of a token beyond the original's; `worst` the text whose perplexity
    grew most.
    """
    pairs = list(zip(own["texts"], base["texts"], strict=True))
    growth = {text["name"]: text["perplexity"] / before["perplexity"] for text, before in pairs}
    worst = max(growth, key=lambda name: growth[name])
    return {
        "perplexity": {text["name"]: text["perplexity"] for text, _ in pairs},
        "geometric_mean_perplexity": own["geometric_mean_perplexity"],
        "growth": own["geometric_mean_perplexity"] / base["geometric_mean_perplexity"],
        "nats_lost": fmean(text["nats_per_token"] - before["nats_per_token"] for text, before in pairs),
        "worst": {"name": worst, "growth": growth[worst]},
        "kl": own.get("kl"),
        "top1_agreement": own.get("top1_agreement"),
    }
