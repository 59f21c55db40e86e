"""The report as a browser sees it: valid, alone, and readable without eyes."""

import re
from collections import Counter

import html5lib
import pytest
from msgspec.structs import replace

from jaxmoe.report.page import page
from jaxmoe.report.plots import LINES

WORDS = "{http://www.w3.org/1999/xhtml}"
DRAWN = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def text(compared):
    return (compared.folder / "index.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tree(text):
    # A parser for tests: in its strict mode it raises where a browser would mend.
    return html5lib.HTMLParser(strict=True).parse(text)


def shown(element) -> str:
    return " ".join("".join(element.itertext()).split())


def test_nothing_is_fetched(tree):
    for element in tree.iter():
        for name, value in element.attrib.items():
            if str(name).split("}")[-1] in ("src", "href", "action", "data", "srcset"):
                assert value.startswith(("#", "data:image/png;base64,")), (element.tag, name, value[:80])
    styles = "".join(shown(style) for style in tree.iter(f"{WORDS}style"))
    assert "@import" not in styles
    assert "url(" not in styles
    assert not list(tree.iter(f"{WORDS}link"))


def test_references_lead_somewhere(tree, text):
    ids = Counter(element.get("id") for element in tree.iter() if element.get("id"))
    assert not [name for name, count in ids.items() if count > 1]
    wanted = re.findall(r'href="#([^"]+)"', text) + re.findall(r"url\(#([^)]+)\)", text)
    assert wanted
    assert set(wanted) <= set(ids)


def test_every_figure_has_words(tree):
    figures = list(tree.iter(f"{WORDS}figure"))
    assert len(figures) == 11
    for figure in figures:
        (image,) = (element for element in figure.iter() if element.get("role") == "img")
        assert len(image.get("aria-label")) > 40
        assert shown(figure.find(f"{WORDS}figcaption"))
        (drawing,) = figure.iter(f"{DRAWN}svg")
        assert drawing.get("aria-hidden") == "true"
    headings = [element.tag.removeprefix(WORDS) for element in tree.iter() if re.fullmatch(r".*}h\d", str(element.tag))]
    assert headings[0] == "h1"
    assert set(headings[1:]) == {"h2"}


def test_table_holds_the_numbers(tree, compared):
    (table,) = tree.iter(f"{WORDS}table")
    assert shown(table.find(f"{WORDS}caption"))
    head, *rows = table.iter(f"{WORDS}tr")
    columns = [shown(cell) for cell in head]
    assert {cell.get("scope") for cell in head} == {"col"}
    assert {row[0].get("scope") for row in rows} == {"row"}
    assert len(rows) == len(compared.result.rows)
    for cells, row in zip(rows, compared.result.rows, strict=True):
        by_title = dict(zip(columns, cells, strict=True))
        expected = getattr(row.measured, "geometric_mean_perplexity", None)
        assert by_title["perplexity"].get("data-sort") == ("" if expected is None else str(expected))
        assert shown(by_title["perplexity"]) == ("–" if expected is None else f"{expected:.2f}")


def test_cells_give_their_commands_and_reasons(tree, compared):
    details = [each for each in tree.iter(f"{WORDS}details") if each.find(f"{WORDS}pre") is not None]
    assert [shown(each.find(f"{WORDS}pre")) for each in details] == [c.command for c in compared.result.cells]
    assert compared.cell("mobe", "paper").reason in shown(details[-1])
    notes = next(element for element in tree.iter(f"{WORDS}ul") if "asked for" in shown(element))
    assert compared.cell("mobe", "paper").reason in shown(notes)


def luminance(color: str) -> float:
    """Return the relative luminance of #rrggbb, as WCAG 2 defines it."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(first: str, second: str) -> float:
    low, high = sorted(map(luminance, (first, second)))
    return (high + 0.05) / (low + 0.05)


def test_colours_have_contrast(text):
    """Of text 4.5 to 1 and of lines 3 to 1, in the light and in the dark."""
    light, dark = (
        dict(re.findall(r"--(\w+): (#\w{6})", part)) for part in re.findall(r":root {(.*?)}", text, re.S)[:2]
    )
    for colors in (light, dark):
        for name in ("ink", "soft", "link"):
            for paper in ("paper", "band"):
                assert contrast(colors[name], colors[paper]) >= 4.5, (name, paper)
        for line in LINES:
            assert contrast(line, colors["paper"]) >= 3, line


def test_names_cannot_break_the_page(compared):
    """A text or a folder may be called anything."""
    strange = '<b onload="x">&'
    data = replace(compared.result, source=strange, routing=None, calibration=None)
    html5lib.HTMLParser(strict=True).parse(broken := page(data))
    assert strange not in broken
    assert "&lt;b onload=" in broken
