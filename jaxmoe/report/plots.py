"""The figures of a comparison, each a function of its record: `plot_x(data, ax=None) -> ax`.

They draw into the axes that they are given, or into new ones, and change nothing else, so that a notebook can arrange
them as it likes. `data` is what `jaxmoe.compare` returned; `Comparison.read` makes the same of a `comparison.json`.
Needs matplotlib, from the extra `plots`.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxmoe.errors import JaxmoeError
from jaxmoe.report.comparison import label, size_text
from jaxmoe.report.comparison_records import CellMeasured, CellResult, Comparison, Routing, RowMeasured, Spectrum
from jaxmoe.report.records import Projection

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINES = ("#2a78b5", "#c8553d", "#2f8f5b", "#9467bd", "#a9761b", "#cf5a94", "#7f7f7f", "#17909c")
"""Colours of lines: all at least 3 to 1 against white and against nearly black paper."""
MARKERS = "osD^vPX*"

FIELDS = {
    "error": "relative error",
    "weighted_error": "weighted error",
    "rank": "rank",
    "kept": "kept fraction",
    "bits_per_weight": "bits per weight",
}
"""What `plot_layers` can show, and what its colour bar says."""

MEASURES = {
    "geometric_mean_perplexity": "perplexity (geometric mean)",
    "nats_lost": "nats lost per token",
    "kl": "KL divergence, nats per token",
    "kl_p99": "KL divergence, 99 % of tokens",
    "kl_p999": "KL divergence, 99.9 % of tokens",
}
"""What `plot_pareto` can have on its upright axis, and what that says."""

SIZES: dict[str, tuple[str, Callable[[RowMeasured], float]]] = {
    "bytes": ("size of the checkpoint, MB", lambda row: row.bytes / 1e6),
    "bits_per_weight": ("bits per original expert weight", lambda row: row.bits_per_weight["experts"]),
    "removed": ("removed of the experts' bytes, %", lambda row: 100 * row.removed["bytes"]["experts"]),
    "parameters": ("stored numbers, millions", lambda row: row.parameters / 1e6),
    "loaded_bytes": ("weights when loaded, MB", lambda row: row.loaded_bytes / 1e6),
}
"""What it can have on its other axis, what that says, and where it stands in a row."""


def plot_pareto(
    data: Comparison,
    ax: "Axes | None" = None,
    *,
    measure: str = "geometric_mean_perplexity",
    size: str = "bytes",
) -> "Axes":
    """Plot quality against size: for every contender a line through its sizes; down and to the left is better.

    Args:
        data: of a comparison.
        ax: to draw into; new ones if None.
        measure: one of `MEASURES`.
        size: one of `SIZES`.
    """
    _known("measure", measure, MEASURES)
    _known("size", size, SIZES)
    ax = _axes(ax)
    from matplotlib.ticker import LogLocator, NullLocator, SymmetricalLogLocator

    title, place = SIZES[size]
    lines: dict[str, list[RowMeasured]] = {}
    for row in data.rows[1:]:
        if row.measured is not None:
            lines.setdefault(label(row), []).append(row.measured)
    for position, (name, rows) in enumerate(lines.items()):
        rows = sorted(rows, key=place)
        style: dict[str, Any] = {"color": LINES[position % len(LINES)], "marker": MARKERS[position % len(MARKERS)]}
        style |= {"linestyle": ("-", "--", ":")[position // len(LINES) % 3], "markersize": 5, "linewidth": 1.5}
        values = [getattr(row, measure) for row in rows]
        ax.errorbar([*map(place, rows)], values, yerr=_deviations(rows, measure), label=name, capsize=2, **style)
    if measure == "geometric_mean_perplexity":
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter("{x:g}")
        low, high = ax.get_ylim()
        if high > 5 * low:
            # With all nine, the labels of 80, 90 and 100 would meet.
            ax.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
    else:
        # The scale is linear below the smallest loss, so that nothing lost has a place too.
        losses = [abs(value) for rows in lines.values() for row in rows if (value := getattr(row, measure))]
        smallest = max(min(losses, default=1e-3), 1e-4)
        ax.set_yscale("symlog", linthresh=smallest, linscale=0.3)
        # Ticks as people say numbers; of many decades the powers of ten alone.
        steps = (1, 2, 5) if max(losses, default=1.0) < 100 * smallest else (1,)
        ax.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=smallest, subs=steps))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_locator(NullLocator())
    original = data.rows[0].measured
    if original is not None:
        # It does not diverge from itself.
        ax.axhline(getattr(original, measure) or 0.0, color="#7f7f7f", linewidth=1, linestyle=":", label="original")
    if size == "removed":
        ax.invert_xaxis()
    # Markers at the ends stay whole.
    ax.margins(y=0.08)
    ax.set_xlabel(title)
    ax.set_ylabel(MEASURES[measure])
    ax.grid(alpha=0.3, linewidth=0.5)
    # Below the axes: with many contenders there is no free corner.
    ax.legend(fontsize="small", frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    return ax


def cells_with_errors(data: Comparison) -> list[tuple[CellResult, CellMeasured]]:
    """Return the cells that changed matrices, and so have errors of these, with what was measured of them."""
    found = [(cell, cell.measured) for cell in data.cells if cell.measured is not None]
    return [own for own in found if next(iter(own[1].layers[0].projections.values())).error is not None]


def plot_layers(
    data: Comparison, ax: "Axes | None" = None, *, projection: str = "down", field: str = "error"
) -> "Axes":
    """Plot what every layer of every cell has in one projection: layers upright, cells side by side.

    Args:
        data: of a comparison.
        ax: to draw into; new ones if None.
        projection: "gate", "up" or "down".
        field: one of `FIELDS`; "rank" is that of all terms together.
    """
    _known("field", field, FIELDS)
    cells = cells_with_errors(data)
    if not any(projection in layer.projections for _, measured in cells for layer in measured.layers):
        raise JaxmoeError(f"no cell has a projection {projection!r}: give gate, up or down")
    layers = [layer.layer for layer in cells[0][1].layers]
    values = np.array(
        [[field_value(layer.projections.get(projection), field) for layer in own.layers] for _, own in cells]
    )
    names = [
        f"{label(cell)} {size_text(cell.requested).removesuffix(' of experts')}"
        + (f" seed {cell.seed}" if cell.seed else "")
        for cell, _ in cells
    ]
    ax = _heat(values.T, _axes(ax), bar=FIELDS[field])
    _ticks(ax, "y", layers, "layer")
    ax.set_xticks(range(len(names)), names, rotation=90, fontsize="small")
    ax.set_title(projection, loc="left")
    return ax


def plot_load(data: Comparison, ax: "Axes | None" = None) -> "Axes":
    """Plot how often every expert was chosen on the calibration texts: 1 where all experts of a layer are used alike.

    Args:
        data: of a comparison with calibration.
        ax: to draw into; new ones if None.
    """
    load = expert_load(data)
    ax = _heat(load.T, _axes(ax), bar="load")
    _ticks(ax, "y", _routing(data).layers, "layer")
    _ticks(ax, "x", range(len(load)), "expert")
    return ax


def plot_domain_load(data: Comparison, ax: "Axes | None" = None, *, domain: str) -> "Axes":
    """Plot how much more (or less) often every expert was chosen on one text than on all of them.

    Args:
        data: of a comparison with calibration.
        ax: to draw into; new ones if None.
        domain: the text's name.
    """
    _known("domain", domain, _routing(data).counts)
    own, every = expert_load(data, domain), expert_load(data)
    # Doublings; experts that were not chosen at all would be infinitely far.
    ratio = np.log2(np.maximum(own, 1 / 16) / np.maximum(every, 1 / 16))
    ax = _heat(ratio.T, _axes(ax), bar="doublings", centred=3.0)
    _ticks(ax, "y", _routing(data).layers, "layer")
    _ticks(ax, "x", range(len(own)), "expert")
    ax.set_title(domain, loc="left")
    return ax


def plot_spectra(spectra: Sequence[Spectrum], ax: "Axes | None" = None, *, projection: str = "down") -> "Axes":
    """Plot the singular values of one projection, a line for each layer: the mean over its experts.

    Args:
        spectra: of a comparison.
        ax: to draw into; new ones if None.
        projection: "gate", "up" or "down".
    """
    from matplotlib import colormaps

    ax, found = _axes(ax), _spectra(spectra, projection)
    colors = colormaps["viridis"](np.linspace(0.1, 0.8, len(found)))
    ends = {0, len(found) - 1}
    for position, (layer, color) in enumerate(zip(found, colors)):
        name = f"layer {layer.layer}" if position in ends else None
        ax.plot(np.array(layer.positions) / layer.size, layer.values, color=color, linewidth=1, label=name)
    ax.set_xlabel("position among the singular values")
    ax.set_ylabel("in terms of the largest")
    ax.set_ylim(0, 1.02)
    ax.set_title(projection, loc="left")
    ax.grid(alpha=0.3, linewidth=0.5)
    ax.legend(fontsize="small", frameon=False)
    return ax


def plot_effective_ranks(spectra: Sequence[Spectrum], ax: "Axes | None" = None, *, projection: str = "down") -> "Axes":
    """Plot the effective rank of every expert's matrix of one projection, see `jaxmoe.scores.effective_rank`.

    Args:
        spectra: of a comparison.
        ax: to draw into; new ones if None.
        projection: "gate", "up" or "down".
    """
    found = _spectra(spectra, projection)
    most = max(len(layer.effective_ranks) for layer in found)
    values = np.full((len(found), most), np.nan)
    for row, layer in zip(values, found):
        row[: len(layer.effective_ranks)] = layer.effective_ranks
    ax = _heat(values, _axes(ax), bar="effective rank")
    _ticks(ax, "y", [layer.layer for layer in found], "layer")
    _ticks(ax, "x", range(most), "expert")
    ax.set_title(projection, loc="left")
    return ax


def _axes(ax: "Axes | None") -> "Axes":
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError:
        raise JaxmoeError('plots need matplotlib: pip install "jaxmoe[plots]"') from None
    return pyplot.subplots(layout="constrained")[1]


def _known(what: str, value: str, known) -> None:
    if value not in known:
        raise JaxmoeError(f"{what} {value!r}: give {', '.join(known)}")


def _deviations(rows: Sequence[RowMeasured], measure: str) -> list[float] | None:
    found = [row.spread.get(measure) for row in rows]
    return None if None in found else [own for own in found if own is not None]


def field_value(record: Projection | None, field: str) -> float:
    """Return one of `FIELDS` of a projection's record, NaN where it was not measured."""
    if record is None:
        return np.nan
    value = sum(record.ranks) if field == "rank" else getattr(record, field)
    return value if isinstance(value, int | float) else np.nan


def _routing(data: Comparison) -> Routing:
    if data.routing is None:
        raise JaxmoeError("nothing is known of the routing: compare with --calibration-text")
    return data.routing


def expert_load(data: Comparison, domain: str | None = None) -> np.ndarray:
    """Return each expert's share of its layer's choices times the experts, `[expert, layer]`; NaN beyond the last."""
    counts = _routing(data).counts
    chosen = list(counts.values()) if domain is None else [counts[domain]]
    per_layer = [np.sum(parts, axis=0) for parts in zip(*chosen)]
    load = np.full((max(map(len, per_layer)), len(per_layer)), np.nan)
    for column, own in enumerate(per_layer):
        load[: len(own), column] = own / max(1, own.sum()) * len(own)
    return load


def _spectra(spectra: Sequence[Spectrum], projection: str) -> list[Spectrum]:
    _known("projection", projection, list(dict.fromkeys(entry.projection for entry in spectra)))
    return [entry for entry in spectra if entry.projection == projection]


def _heat(values: np.ndarray, ax: "Axes", *, bar: str, centred: float | None = None) -> "Axes":
    """Draw `[row, column]` as colours; `centred` is the largest size of either sign, with 0 in the middle."""
    low, colors = (None, "viridis") if centred is None else (-centred, "coolwarm")
    image = ax.imshow(values, aspect="auto", interpolation="nearest", cmap=colors, vmin=low, vmax=centred)
    ax.figure.colorbar(image, ax=ax, label=bar)
    return ax


def _ticks(ax: "Axes", axis: str, names: Sequence[int], title: str, most: int = 12) -> None:
    """Name some of the rows or columns, and say what they are."""
    at = range(0, len(names), -(-len(names) // most))
    {"x": ax.set_xticks, "y": ax.set_yticks}[axis](list(at), [str(names[i]) for i in at])
    {"x": ax.set_xlabel, "y": ax.set_ylabel}[axis](title)
