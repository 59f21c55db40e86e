"""The figures: each draws what the record holds into the axes that it is given."""

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from msgspec.structs import replace

from jaxmoe import Checkpoint
from jaxmoe.errors import JaxmoeError
from jaxmoe.report import plots

matplotlib.use("agg")


@pytest.fixture
def ax():
    return Figure().add_subplot()


def image(ax) -> np.ndarray:
    (drawn,) = ax.get_images()
    return np.asarray(drawn.get_array())


@pytest.mark.parametrize("measure", plots.MEASURES)
def test_pareto_has_a_line_for_each_contender(compared, ax, measure):
    assert plots.plot_pareto(compared.result, ax, measure=measure) is ax
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    # What cannot be reached has no point.
    assert sorted(names) == ["original", "svd improved", "svd paper"]
    for container in ax.containers:
        row = compared.measured(*container.get_label().split())
        np.testing.assert_allclose(container.lines[0].get_xydata(), [[row.bytes / 1e6, getattr(row, measure)]])


@pytest.mark.parametrize("size", plots.SIZES)
def test_sizes_on_the_other_axis(compared, ax, size):
    row = compared.measured("svd", "improved")
    plots.plot_pareto(compared.result, ax, size=size)
    (line,) = (own.lines[0] for own in ax.containers if own.get_label() == "svd improved")
    expected = {
        "bytes": row.bytes / 1e6,
        "bits_per_weight": row.bits_per_weight["experts"],
        "removed": 100 * row.removed["bytes"]["experts"],
        "parameters": row.parameters / 1e6,
        "loaded_bytes": row.loaded_bytes / 1e6,
    }
    np.testing.assert_allclose(line.get_xydata(), [[expected[size], row.geometric_mean_perplexity]])


@pytest.mark.parametrize("field", ["error", "bits_per_weight", "rank"])
def test_layers_show_every_cell(compared, ax, field):
    assert plots.plot_layers(compared.result, ax, projection="up", field=field) is ax
    cells = [compared.cell("svd", setting).measured for setting in ("paper", "improved")]
    expected = [[layer.projections["up"] for layer in cell.layers] for cell in cells]
    read = (lambda record: sum(record.ranks)) if field == "rank" else (lambda record: getattr(record, field))
    np.testing.assert_allclose(image(ax), np.array([[read(record) for record in cell] for cell in expected]).T)
    assert [label.get_text().split(" of ")[0] for label in ax.get_xticklabels()] == [
        "svd paper 0.8",
        "svd improved 0.8",
    ]


def test_weighted_errors_are_missing_where_nothing_was_weighed(compared, ax):
    drawn = image(plots.plot_layers(compared.result, ax, field="weighted_error"))
    assert np.isnan(drawn).all(axis=0).tolist() == [True, False]


def test_load_is_even_in_the_mean(compared, ax):
    assert plots.plot_load(compared.result, ax) is ax
    counts = np.array(compared.result.routing.counts["reference"])
    np.testing.assert_allclose(image(ax), counts / counts.sum(1, keepdims=True) * counts.shape[1])
    np.testing.assert_allclose(image(ax).mean(1), 1)


def test_the_only_domain_is_like_all(compared, ax):
    assert plots.plot_domain_load(compared.result, ax, domain="reference") is ax
    assert not image(ax).any()


def test_spectra_are_those_of_the_matrices(compared, ax):
    assert plots.plot_spectra(compared.result.spectra, ax, projection="down") is ax
    checkpoint = Checkpoint.open(compared.source)
    weight = checkpoint.projection(checkpoint.layers[0], "down").astype(np.float64)
    values = np.linalg.svd(weight, compute_uv=False)
    expected = (values / values[:, :1]).mean(0)
    line = ax.lines[0]
    np.testing.assert_allclose(line.get_xdata(), np.arange(1, 65) / 64)
    np.testing.assert_allclose(line.get_ydata(), expected, atol=2e-3)

    ranks = plots.plot_effective_ranks(compared.result.spectra, Figure().add_subplot(), projection="down")
    shares = values**2 / (values**2).sum(-1, keepdims=True)
    np.testing.assert_allclose(image(ranks)[0], np.exp(-(shares * np.log(shares)).sum(-1)), rtol=1e-3)


def test_new_axes_where_none_are_given(compared):
    from matplotlib import pyplot

    drawn = plots.plot_load(compared.result)
    assert drawn.figure.number in pyplot.get_fignums()
    pyplot.close(drawn.figure)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda data, ax: plots.plot_pareto(data, ax, measure="speed"), "measure 'speed': give geometric_mean"),
        (lambda data, ax: plots.plot_pareto(data, ax, size="height"), "size 'height': give bytes, bits_per_weight"),
        (lambda data, ax: plots.plot_layers(data, ax, field="x"), "field 'x': give error, weighted_error"),
        (lambda data, ax: plots.plot_layers(data, ax, projection="x"), "no cell has a projection 'x'"),
        (lambda data, ax: plots.plot_spectra(data.spectra, ax, projection="x"), "projection 'x': give gate, up, down"),
        (lambda data, ax: plots.plot_domain_load(data, ax, domain="x"), "domain 'x': give reference"),
        (lambda data, ax: plots.plot_load(replace(data, routing=None), ax), "compare with --calibration-text"),
    ],
)
def test_what_there_is_not(compared, ax, draw, message):
    with pytest.raises(JaxmoeError, match=message):
        draw(compared.result, ax)
