"""The report of a comparison: one HTML file that needs nothing else, neither network nor jaxmoe.

Figures are SVG inside the page. Their ink is `currentColor`, so that they follow the page into the dark and onto paper,
and every one has a text alternative and a caption.
"""

import io
import re
from collections.abc import Callable
from math import isnan
from typing import Any, NamedTuple

from jaxmoe.errors import JaxmoeError
from jaxmoe.report import plots
from jaxmoe.report.comparison import NOTHING, columns, label, reasons, size_text
from jaxmoe.report.comparison_records import CellResult, Comparison
from jaxmoe.report.tables import size

INK = "#010203"
"""Stands for the colour of the text around a figure."""

WIDTH = 7.4
"""Inches of a figure: about the text width of the page."""

STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "jaxmoe",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}


class Figure(NamedTuple):
    """A figure of the page: its heading, what it shows, what a reader without eyes is told, and the drawing."""

    id: str
    title: str
    caption: str
    alternative: str
    svg: str


def page(data: Comparison) -> str:
    """Return the report of a comparison as HTML.

    Args:
        data: what `jaxmoe.compare` returned.

    Raises:
        JaxmoeError: jinja2 or matplotlib is not installed.
    """
    try:
        import jinja2
        import matplotlib
    except ImportError as error:
        raise JaxmoeError(f'the HTML report needs {error.name}: pip install "jaxmoe[plots]"') from None
    with matplotlib.rc_context(STYLE):
        figures = _figures(data)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jaxmoe.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    shown = columns(data)
    rows = [[{"text": column.text(row), "sort": _sortable(column.value(row))} for column in shown] for row in data.rows]
    return environment.get_template("comparison.html").render(
        data=data,
        columns=shown,
        rows=rows,
        figures=figures,
        reasons=reasons(data),
        cells=[(_title(cell), size_text(cell.requested), cell) for cell in data.cells],
        size=size,
        nothing=NOTHING,
    )


def _sortable(value: Any) -> str:
    return "" if value is None else str(value)


def _title(cell: CellResult) -> str:
    seed = f", seed {cell.seed}" if cell.seed else ""
    return f"{label(cell)}, {size_text(cell.requested)}{seed}"


def _figures(data: Comparison) -> list[Figure]:
    return [*_pareto(data), *_layers(data), *_routing(data), *_matrices(data)]


def _pareto(data: Comparison) -> list[Figure]:
    done = [(row, row.measured) for row in data.rows[1:] if row.measured is not None]
    if not done:
        return []
    best, quality = min(done, key=lambda own: own[1].growth)
    least, most = (size(end(own.bytes for _, own in done), "B") for end in (min, max))
    told = (
        f"{len({label(row) for row, _ in done})} contenders, {len(done)} points from {least} to {most}; nearest to the"
        f" original is {label(best)} with {quality.growth:.3f} times its perplexity. The table has all numbers."
    )
    shared = "Each line is a contender, each point a size; down and to the left is better."
    found = []
    for measure, title, caption in (
        ("geometric_mean_perplexity", "Perplexity against size", shared),
        ("nats_lost", "Nats lost against size", shared),
        ("kl_p999", "The worst tokens against size", f"Of 1,000 tokens one diverges more than that. {shared}"),
    ):
        svg = _draw([lambda ax, m=measure: plots.plot_pareto(data, ax, measure=m)], height=_tall(done), name=measure)
        found.append(Figure(measure.replace("_", "-"), title, caption, f"Line plot. {told}", svg))
    return found


def _tall(rows: list[Any]) -> float:
    """Return the inches of axes with a legend of so many contenders below, two on a line."""
    return 3.4 + 0.17 * -(-len({label(row) for row, _ in rows}) // 2)


def _layers(data: Comparison) -> list[Figure]:
    cells = plots.cells_with_errors(data)
    if not cells:
        return []
    names = list(dict.fromkeys(name for _, own in cells for layer in own.layers for name in layer.projections))
    # Those of the linear maps beside the experts would fill the page.
    names = [name for name in names if "." not in name]
    found = []
    for field, title, caption in (
        ("error", "Error of every layer", "Relative error of the matrices, mean over the experts of a layer."),
        ("kept", "Kept share of every layer", "Which fraction of its numbers a layer keeps: who got how much."),
        (
            "bits_per_weight",
            "Bits in every layer",
            "Stored bits for each original number; empty where the matrices that stay are as they were.",
        ),
        (
            "rank",
            "Rank in every layer",
            "Rank of all terms together, mean over experts; full where a matrix is untouched.",
        ),
    ):
        values = {
            name: [plots.field_value(layer.projections.get(name), field) for _, own in cells for layer in own.layers]
            for name in names
        }
        values = {name: [x for x in own if not isnan(x)] for name, own in values.items()}
        spans = ", ".join(f"{name} {min(own):.3g} to {max(own):.3g}" for name, own in values.items() if own)
        told = f"Heat maps of {plots.FIELDS[field]}, layers by cells, one for each projection: {spans}."
        drawings = [lambda ax, n=name, f=field: plots.plot_layers(data, ax, projection=n, field=f) for name in names]
        svg = _draw(drawings, height=_height(len(cells[0][1].layers)), name=field, shared=1.6)
        found.append(Figure(f"layers-{field}", title, caption, told, svg))
    return found


def _routing(data: Comparison) -> list[Figure]:
    if data.routing is None:
        return []
    layers, counts = data.routing.layers, data.routing.counts
    load = plots.expert_load(data)
    told = (
        f"Heat map of the load of {len(load)} experts in {len(layers)} layers. The busiest has {load.max():.1f} times"
        f" what an even load would give it, the least used {load.min():.2f} times."
    )
    height = _height(len(layers))
    every = _draw([lambda ax: plots.plot_load(data, ax)], height=height + 0.5, name="load")
    domains = [lambda ax, d=domain: plots.plot_domain_load(data, ax, domain=d) for domain in counts]
    own = _draw(domains, height=height, name="domains", shared=0.5)
    names = ", ".join(counts)
    return [
        Figure("load", "Load of the experts", "How often each expert was chosen; 1 is even.", told, every),
        Figure(
            "domains",
            "Load by text",
            "How much more often an expert was chosen on one text than on all: 1 is twice as often, -1 half as often.",
            f"Heat maps of experts by layers, one for each calibration text: {names}.",
            own,
        ),
    ]


def _matrices(data: Comparison) -> list[Figure]:
    found = data.spectra
    names = list(dict.fromkeys(entry.projection for entry in found))
    layers = len({entry.layer for entry in found})
    means = {
        name: [rank / e.size for e in found if e.projection == name for rank in e.effective_ranks] for name in names
    }
    told = ", ".join(f"{name} {sum(own) / len(own):.0%}" for name, own in means.items())
    spectra = [lambda ax, n=name: plots.plot_spectra(found, ax, projection=n) for name in names]
    ranks = [lambda ax, n=name: plots.plot_effective_ranks(found, ax, projection=n) for name in names]
    return [
        Figure(
            "spectra",
            "Singular values of the original",
            "The slower a line falls, the more a low rank costs. Mean over the experts of a layer.",
            f"Line plots of singular values, one for each projection, a line for each of {layers} layers.",
            _draw(spectra, height=2.6, name="spectra"),
        ),
        Figure(
            "effective-ranks",
            "Effective ranks of the original",
            "How many directions an expert's matrix uses: the exponential of the entropy of its energies.",
            f"Heat maps of experts by layers. In the mean, of the full rank: {told}.",
            _draw(ranks, height=_height(layers), name="ranks", shared=0.5),
        ),
    ]


def _height(layers: int) -> float:
    """Return the inches of a heat map with so many layers."""
    return min(3.2, 0.9 + 0.14 * layers)


def _draw(drawings: list[Callable[[Any], Any]], *, height: float, name: str, shared: float | None = None) -> str:
    """Return one SVG of axes below each other, each of that height in inches; `shared` inches lie below the last.

    With `shared`, axes name their columns below the last of them only.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Drawing

    figure = Drawing(figsize=(WIDTH, height * len(drawings) + (shared or 0)), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots(len(drawings), 1, squeeze=False)[:, 0]
    for ax, draw in zip(axes, drawings):
        draw(ax)
        if shared is not None and ax is not axes[-1]:
            ax.tick_params(labelbottom=False)
            ax.set_xlabel("")
    content = io.StringIO()
    figure.savefig(content, format="svg", transparent=True)
    return _embedded(content.getvalue(), name)


def _embedded(svg: str, name: str) -> str:
    """Return an SVG file as a part of a page: without its declarations, with ids of its own and the page's ink."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg, count=2)
    # Images are named by their content, so that equal ones have equal names, to which nothing refers.
    svg = re.sub(r'(<image\b[^>]*?)\s+id="[^"]*"', r"\1", svg)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg)
    # The text alternative stands on the element around it.
    svg = svg.replace("<svg", '<svg aria-hidden="true" focusable="false"', 1)
    return svg.replace(INK, "currentColor").strip()
