"""The rows of a comparison as tables: for a terminal, in Markdown, as CSV and for the page.

A column says once what it is called, what a row holds for it, and how a person reads it; every table takes its own
choice of columns. What a row does not have is an empty cell, so that a size that cannot be reached still has its row.
"""

import csv
import io
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from jaxmoe.report.tables import size, table

Row = Mapping[str, Any]
NOTHING = "–"
"""What stands where nothing was measured because the size cannot be reached."""


class Column(NamedTuple):
    """One column of the tables.

    Args:
        key: its name for programs.
        title: its name for people.
        value: `row -> value`, None where the row has none.
        show: `value -> text`.
        help: one sentence on what the number is.
    """

    key: str
    title: str
    value: Callable[[Row], Any]
    show: Callable[[Any], str] = str
    help: str = ""

    def text(self, row: Row) -> str:
        """Return what a person reads; with several seeds also the standard deviation."""
        value = self.value(row)
        if value is None:
            return NOTHING if "reason" in row else ""
        spread = row.get("spread", {}).get(self.key)
        return self.show(value) if spread is None else f"{self.show(value)} ± {self.show(spread)}"


def label(row: Row) -> str:
    """Return a contender in a few words.

    Example:
        >>> label({"method": "mobe", "setting": "paper", "changed": {"steps": 20}})
        'mobe paper, steps=20'
    """
    changed = [f"{name}={value}" for name, value in row["changed"].items()]
    return ", ".join([" ".join(filter(None, [row["method"], row["setting"]])), *changed])


def _at(*path: str) -> Callable[[Row], Any]:
    def value(row: Row) -> Any:
        found: Any = row
        for name in path:
            found = None if found is None else found.get(name)
        return found

    return value


def size_text(size: Mapping[str, Any]) -> str:
    """Return a size, or that of a record that has its keys, in few words.

    Example:
        >>> size_text({"ratio": 0.4, "of": "model"}), size_text({"main_experts": 2})
        ('0.4 of model', '2 experts run')
    """
    if "main_experts" in size:
        return "1 expert runs" if size["main_experts"] == 1 else f"{size['main_experts']} experts run"
    return f"{size['ratio']:g} of {size['of']}"


def _requested(row: Row) -> str | None:
    if "requested" not in row:
        return None
    return size_text(row["requested"]).removesuffix(" of experts")


def _outcomes(row: Row) -> str | None:
    counts = row.get("outcomes") or {}
    return ", ".join(f"{kind} {count}" for kind, count in counts.items()) or None


def _calibrated(row: Row) -> str | None:
    return {True: "yes", False: "no", None: None}[row.get("calibrated")]


def _seeds(row: Row) -> str | None:
    return None if not row["seeds"] else str(len(row["seeds"]))


PERCENT, NUMBER = "{:.2%}".format, size

COLUMNS = (
    Column("method", "method", label),
    Column(
        "removed",
        "asked for",
        _requested,
        help="the removed fraction that was asked for, of the experts unless it says",
    ),
    Column("experts", "of experts", _at("achieved", "experts"), PERCENT, "removed of all routed experts' numbers"),
    Column("touched", "of touched", _at("achieved", "touched"), PERCENT, "removed of the matrices that are replaced"),
    Column("model", "of model", _at("achieved", "model"), PERCENT, "removed of the whole model's numbers"),
    Column("bytes", "size", _at("bytes"), lambda x: size(x, "B"), "bytes of the checkpoint's tensors"),
    Column(
        "geometric_mean_perplexity",
        "perplexity",
        _at("geometric_mean_perplexity"),
        "{:.2f}".format,
        "geometric mean over the texts",
    ),
    Column("growth", "times original", _at("growth"), "{:.3f}".format, "that perplexity in terms of the original's"),
    Column("worst", "worst text", _at("worst", "name"), help="the text whose perplexity grew most"),
    Column("worst_growth", "its growth", _at("worst", "growth"), "{:.3f}".format, "how many times the original's"),
    Column("nats_lost", "nats lost", _at("nats_lost"), "{:.4f}".format, "loss per token beyond the original's"),
    Column("kl", "KL", _at("kl"), "{:.4f}".format, "divergence from the original's predictions, nats per token"),
    Column(
        "top1_agreement",
        "same top token",
        _at("top1_agreement"),
        PERCENT,
        "tokens at which both models agree on the next",
    ),
    Column("error", "error", _at("error"), "{:.4f}".format, "relative error of the matrices, mean over experts"),
    Column(
        "weighted_error",
        "weighted error",
        _at("weighted_error"),
        "{:.4f}".format,
        "the same, weighted by what the experts see of the calibration texts",
    ),
    Column(
        "active_parameters",
        "active parameters",
        _at("active_parameters"),
        NUMBER,
        "stored numbers that one token uses, experts chosen at random",
    ),
    Column(
        "operations_per_token",
        "expert operations",
        _at("operations_per_token"),
        NUMBER,
        "operations per token in the routed experts' matrix products",
    ),
    Column("calibrated", "calibrated", _calibrated, help="whether it saw the calibration texts"),
    Column("seconds", "seconds", _at("seconds"), "{:.1f}".format, "to compress, compiling included"),
    Column(
        "peak_bytes", "peak memory", _at("peak_bytes"), lambda x: size(x, "B"), "of the process while it compressed"
    ),
    Column("outcomes", "outcomes", _outcomes, help="what the compression reported, and how often"),
    Column("seeds", "seeds", _seeds, help="runs behind the row"),
)

SHORT = (
    "method",
    "removed",
    "experts",
    "bytes",
    "geometric_mean_perplexity",
    "growth",
    "worst",
    "worst_growth",
    "kl",
    "seconds",
)
"""What a terminal shows."""

DISPENSABLE = ("seconds", "kl", "bytes", "experts")
"""What a narrow terminal does not show, in the order in which it is left out; `table.md` has all."""


def columns(record: Mapping[str, Any], keys: Iterable[str] | None = None) -> list[Column]:
    """Return the columns of a comparison, all of them with one more for each text unless some are named."""
    if keys is not None:
        return [column for column in COLUMNS if column.key in set(keys)]
    texts = [
        Column(f"perplexity_{text['name']}", text["name"], _at("perplexity", text["name"]), "{:.2f}".format)
        for text in record["texts"]
    ]
    before = [column.key for column in COLUMNS].index("growth")
    return [*COLUMNS[:before], *texts, *COLUMNS[before:]]


def comparison_table(record: Mapping[str, Any], width: int | None = None) -> Table:
    """Return the table that a terminal shows; where it is too wide for that, less important columns are left out.

    Args:
        record: of a comparison.
        width: of the terminal in characters; None for any.
    """
    keys = [*SHORT]
    dropped = iter(DISPENSABLE)
    while True:
        shown = columns(record, keys)
        # Headings wrap and numbers do not; names of contenders fold where they must.
        titles = [column.title.replace(" ", "\n") for column in shown]
        grid = table(titles, [[column.text(row) for column in shown] for row in record["rows"]])
        for column in grid.columns[1:]:
            column.no_wrap = True
        wide = Console(width=1_000)
        least = Measurement.get(wide, wide.options, grid).minimum
        if width is None or least <= width or (key := next(dropped, None)) is None:
            return grid
        keys.remove(key)


def overview(record: Mapping[str, Any]) -> list[list[str]]:
    """Return contenders by sizes, the header first: perplexity, how many times the original's, and the worst text.

    Example:
        >>> row = {"method": "svd", "setting": "paper", "changed": {}, "requested": {"ratio": 0.4, "of": "experts"}}
        >>> quality = {"geometric_mean_perplexity": 4.0, "growth": 2.0, "worst": {"name": "code", "growth": 3.0}}
        >>> overview({"rows": [{"geometric_mean_perplexity": 2.0}, row | quality]})
        [['original 2.00', '40% of experts'], ['svd paper', '4.00 (x2.000; code x3.000)']]
    """
    original, *others = record["rows"]
    asked = [_heading(row["requested"]) for row in others]
    sizes = sorted(set(asked))
    lines = [[f"original {original['geometric_mean_perplexity']:.2f}", *(text for *_, text in sizes)]]
    cells = {(label(row), size): row for row, size in zip(others, asked)}
    for name in dict.fromkeys(map(label, others)):
        found = [cells.get((name, size)) for size in sizes]
        lines.append([name, *("" if row is None else _quality(row) for row in found)])
    return lines


def _heading(size: Mapping[str, Any]) -> tuple[str, float, str]:
    """Return by what a size is sorted, and what it says above its column."""
    if "ratio" in size:
        return size["of"], size["ratio"], f"{100 * size['ratio']:g}% of {size['of']}"
    return "running", -size["main_experts"], size_text(size)


def _quality(row: Row) -> str:
    if "growth" not in row:
        return NOTHING
    worst = f"{row['worst']['name']} x{row['worst']['growth']:.3f}"
    return f"{row['geometric_mean_perplexity']:.2f} (x{row['growth']:.3f}; {worst})"


def markdown(header: list[str], *lines: list[str]) -> str:
    """Return a table in Markdown.

    Example:
        >>> print(markdown(["a", "b"], ["1", "2"]))
        | a | b |
        | --- | --- |
        | 1 | 2 |
    """
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *lines])


def comparison_markdown(record: Mapping[str, Any]) -> str:
    """Return the overview and all columns in Markdown, then why some rows are empty, then the commands."""
    shown = columns(record)
    lines = [[c.text(row) for c in shown] for row in record["rows"]]
    parts = [markdown(*overview(record)), markdown([c.title for c in shown], *lines)]
    if notes := reasons(record):
        parts.append("\n".join(f"- {NOTHING} {note}" for note in notes))
    commands = [command for row in record["rows"] for command in row.get("commands", ())]
    parts.append("```sh\n" + "\n".join(commands) + "\n```")
    return "\n\n".join(parts) + "\n"


def comparison_csv(record: Mapping[str, Any]) -> str:
    """Return all columns as numbers, one row each, with the standard deviations of several seeds and the commands."""
    shown = columns(record)
    spreads = list(dict.fromkeys(key for row in record["rows"] for key in row.get("spread", {})))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*(c.key for c in shown), *(f"{key}_sd" for key in spreads), "reason", "commands"])
    for row in record["rows"]:
        values = [c.value(row) for c in shown]
        deviations = [row.get("spread", {}).get(key) for key in spreads]
        commands = "\n".join(row.get("commands", ()))
        writer.writerow(["" if v is None else v for v in [*values, *deviations, row.get("reason"), commands]])
    return text.getvalue()


def reasons(record: Mapping[str, Any]) -> list[str]:
    """Return why rows are empty, one sentence each."""
    return [f"{label(row)}, {_requested(row)}: {row['reason']}" for row in record["rows"] if "reason" in row]
