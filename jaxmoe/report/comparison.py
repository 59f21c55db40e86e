"""The rows of a comparison as tables: for a terminal, in Markdown, as CSV and for the page.

A column says once what it is called, what a row holds for it, and how a person reads it; every table takes its own
choice of columns. What a row does not have is an empty cell, so that a size that cannot be reached still has its row.
"""

import csv
import io
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from rich.cells import cell_len
from rich.table import Table

from jaxmoe.report.comparison_records import CellResult, Comparison, Row
from jaxmoe.report.records import Requested
from jaxmoe.report.tables import size, table

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
            return NOTHING if row.reason is not None else ""
        spread = None if row.measured is None else row.measured.spread.get(self.key)
        return self.show(value) if spread is None else f"{self.show(value)} ± {self.show(spread)}"


def label(row: Row | CellResult) -> str:
    """Return a contender in a few words.

    Example:
        >>> label(Row(method="mobe", setting="paper", changed={"steps": 20}, seeds=[]))
        'mobe paper, steps=20'
    """
    changed = [f"{name}={value}" for name, value in row.changed.items()]
    return ", ".join([" ".join(filter(None, [row.method, row.setting])), *changed])


def _of(*path: str) -> Callable[[Row], Any]:
    """Return what finds a field of what was measured, None where nothing was."""

    def value(row: Row) -> Any:
        found: Any = row.measured
        for name in path:
            found = found.get(name) if isinstance(found, dict) else getattr(found, name, None)
        return found

    return value


def size_text(size: Requested) -> str:
    """Return a size in few words.

    Example:
        >>> size_text(Requested(ratio=0.4, of="model", unit="bytes")), size_text(Requested(main_experts=2))
        ('0.4 of model', '2 experts run')
        >>> size_text(Requested(ratio=0.4, of="model")), size_text(Requested())
        ('0.4 of model in parameters', 'size of its own')
    """
    words = []
    if size.ratio is not None:
        words.append(f"{size.ratio:g} of {size.of}" + (" in parameters" if size.unit == "parameters" else ""))
    if size.main_experts is not None:
        words.append("1 expert runs" if size.main_experts == 1 else f"{size.main_experts} experts run")
    if size.targets is not None:
        words.append(f"on {', '.join(size.targets)}")
    return ", ".join(words) or "size of its own"


def _requested(row: Row) -> str | None:
    return None if row.requested is None else size_text(row.requested).removesuffix(" of experts")


def _outcomes(row: Row) -> str | None:
    counts = {} if row.measured is None else row.measured.outcomes
    return ", ".join(f"{kind} {count}" for kind, count in counts.items()) or None


def _calibrated(row: Row) -> str | None:
    return {True: "yes", False: "no", None: None}[row.calibrated]


def _seeds(row: Row) -> str | None:
    return str(len(row.seeds)) if row.seeds else None


PERCENT, NUMBER = "{:.2%}".format, size
FOUR = "{:.4f}".format


def _bytes(count: float) -> str:
    return size(count, "B")


COLUMNS = (
    Column("method", "method", label),
    Column(
        "asked",
        "asked for",
        _requested,
        help="the removed fraction that was asked for, of the experts' bytes unless it says",
    ),
    Column(
        "experts_bytes", "bytes removed", _of("removed", "bytes", "experts"), PERCENT, "of all routed experts' bytes"
    ),
    Column(
        "bits_per_weight",
        "bits per weight",
        _of("bits_per_weight", "experts"),
        "{:.3f}".format,
        "stored bits for each original number of the routed experts, all that stands for them counted",
    ),
    Column("bytes", "size", _of("bytes"), _bytes, "bytes of the checkpoint's tensors"),
    Column("loaded_bytes", "loaded", _of("loaded_bytes"), _bytes, "bytes of the weights when PyTorch has loaded them"),
    Column(
        "geometric_mean_perplexity",
        "perplexity",
        _of("geometric_mean_perplexity"),
        "{:.2f}".format,
        "geometric mean over the texts",
    ),
    Column("growth", "times original", _of("growth"), "{:.3f}".format, "that perplexity in terms of the original's"),
    Column("worst", "worst text", _of("worst", "name"), help="the text whose perplexity grew most"),
    Column("worst_growth", "its growth", _of("worst", "growth"), "{:.3f}".format, "how many times the original's"),
    Column("nats_lost", "nats lost", _of("nats_lost"), FOUR, "loss per token beyond the original's"),
    Column("kl", "KL", _of("kl"), FOUR, "divergence from the original's predictions, nats per token"),
    Column("kl_median", "KL median", _of("kl_median"), FOUR, "that half of the tokens have at most"),
    Column("kl_p99", "KL 99%", _of("kl_p99"), FOUR, "that 99 % of the tokens have at most"),
    Column("kl_p999", "KL 99.9%", _of("kl_p999"), FOUR, "that 99.9 % of the tokens have at most"),
    Column(
        "top1_agreement",
        "same top token",
        _of("top1_agreement"),
        PERCENT,
        "tokens at which both models agree on the next",
    ),
    Column("experts", "of experts", _of("removed", "parameters", "experts"), PERCENT, "of the routed experts' numbers"),
    Column("touched", "of touched", _of("removed", "parameters", "touched"), PERCENT, "of the replaced numbers"),
    Column("model", "of model", _of("removed", "parameters", "model"), PERCENT, "of the whole model's numbers"),
    Column("model_bytes", "bytes of model", _of("removed", "bytes", "model"), PERCENT, "of the whole model's bytes"),
    Column("error", "error", _of("error"), FOUR, "relative error of the matrices, mean over experts"),
    Column(
        "weighted_error",
        "weighted error",
        _of("weighted_error"),
        FOUR,
        "the same, weighted by what the experts see of the calibration texts",
    ),
    Column(
        "active_parameters",
        "active parameters",
        _of("active_parameters"),
        NUMBER,
        "stored numbers that one token uses, experts chosen at random",
    ),
    Column(
        "operations_per_token",
        "expert operations",
        _of("operations_per_token"),
        NUMBER,
        "operations per token in the routed experts' matrix products",
    ),
    Column("calibrated", "calibrated", _calibrated, help="whether it saw the calibration texts"),
    Column("seconds", "seconds", _of("seconds"), "{:.1f}".format, "to compress, compiling included"),
    Column("peak_bytes", "peak memory", _of("peak_bytes"), _bytes, "of the process while it compressed"),
    Column("outcomes", "outcomes", _outcomes, help="what the compression reported, and how often"),
    Column("seeds", "seeds", _seeds, help="runs behind the row"),
)

SHORT = (
    "method",
    "asked",
    "experts_bytes",
    "bits_per_weight",
    "bytes",
    "geometric_mean_perplexity",
    "growth",
    "worst",
    "worst_growth",
    "kl",
    "kl_p99",
    "kl_p999",
    "seconds",
)
"""What a terminal shows."""

DISPENSABLE = ("seconds", "bytes", "worst", "worst_growth", "kl_p99", "experts_bytes", "kl_p999", "kl")
"""What a narrow terminal does not show, in the order in which it is left out; `table.md` has all."""


def columns(record: Comparison, keys: Iterable[str] | None = None) -> list[Column]:
    """Return the columns of a comparison, all of them with one more for each text unless some are named."""
    if keys is not None:
        return [column for column in COLUMNS if column.key in set(keys)]
    texts = [
        Column(f"perplexity_{text.name}", text.name, _of("perplexity", text.name), "{:.2f}".format)
        for text in record.texts
    ]
    before = [column.key for column in COLUMNS].index("growth")
    return [*COLUMNS[:before], *texts, *COLUMNS[before:]]


def comparison_table(record: Comparison, width: int | None = None) -> Table:
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
        lines = [[column.text(row) for column in shown] for row in record.rows]
        if width is None or _least(titles, lines) <= width or (key := next(dropped, None)) is None:
            break
        keys.remove(key)
    grid = table(titles, lines)
    for column in grid.columns[1:]:
        column.no_wrap = True
    return grid


NAME, GAP = 14, 2
"""Characters that names of contenders have at least where they fold, and those between columns."""


def _least(titles: list[str], lines: list[list[str]]) -> int:
    """Return the characters that a table needs, of which only the first column may fold.

    Example:
        >>> _least(["method", "bits per\\nweight"], [["a very long method's name", "4.25"]])
        24
    """
    widths = [max(map(cell_len, [*title.split("\n"), *cells])) for title, *cells in zip(titles, *lines)]
    return min(widths[0], NAME) + sum(widths[1:]) + GAP * (len(widths) - 1)


def overview(record: Comparison) -> list[list[str]]:
    """Return contenders by sizes, the header first: perplexity, how many times the original's, and the worst text."""
    original, *others = record.rows
    asked = [_heading(row.requested or Requested()) for row in others]
    sizes = sorted(set(asked))
    perplexity = "" if original.measured is None else f"{original.measured.geometric_mean_perplexity:.2f}"
    lines = [[f"original {perplexity}", *(text for *_, text in sizes)]]
    cells = {(label(row), size): row for row, size in zip(others, asked)}
    for name in dict.fromkeys(map(label, others)):
        found = [cells.get((name, size)) for size in sizes]
        lines.append([name, *("" if row is None else _quality(row) for row in found)])
    return lines


def _heading(size: Requested) -> tuple[str, float, int, str]:
    """Return by what a size is sorted, and what it says above its column.

    Example:
        >>> _heading(Requested(ratio=0.4, of="experts", unit="bytes"))
        ('experts', 0.4, 0, '40% of experts')
    """
    text = size_text(size)
    if size.ratio is not None:
        text = text.replace(f"{size.ratio:g} of", f"{100 * size.ratio:g}% of", 1)
    return size.of or "running", size.ratio or 0.0, -(size.main_experts or 0), text


def _quality(row: Row) -> str:
    if row.measured is None:
        return NOTHING
    found = row.measured
    worst = "" if found.worst is None else f"; {found.worst.name} x{found.worst.growth:.3f}"
    return f"{found.geometric_mean_perplexity:.2f} (x{found.growth:.3f}{worst})"


def markdown(header: list[str], *lines: list[str]) -> str:
    """Return a table in Markdown.

    Example:
        >>> print(markdown(["a", "b"], ["1", "2"]))
        | a | b |
        | --- | --- |
        | 1 | 2 |
    """
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *lines])


def comparison_markdown(record: Comparison) -> str:
    """Return the overview and all columns in Markdown, then why some rows are empty, then the commands."""
    shown = columns(record)
    lines = [[c.text(row) for c in shown] for row in record.rows]
    parts = [markdown(*overview(record)), markdown([c.title for c in shown], *lines)]
    if notes := reasons(record):
        parts.append("\n".join(f"- {NOTHING} {note}" for note in notes))
    commands = [command for row in record.rows for command in row.commands]
    parts.append("```sh\n" + "\n".join(commands) + "\n```")
    return "\n\n".join(parts) + "\n"


def comparison_csv(record: Comparison) -> str:
    """Return all columns as numbers, one row each, with the standard deviations of several seeds and the commands."""
    shown = columns(record)
    measured = [{} if row.measured is None else row.measured.spread for row in record.rows]
    spreads = list(dict.fromkeys(key for spread in measured for key in spread))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*(c.key for c in shown), *(f"{key}_sd" for key in spreads), "reason", "commands"])
    for row, spread in zip(record.rows, measured, strict=True):
        values = [c.value(row) for c in shown]
        deviations = [spread.get(key) for key in spreads]
        commands = "\n".join(row.commands)
        writer.writerow(["" if v is None else v for v in [*values, *deviations, row.reason, commands]])
    return text.getvalue()


def reasons(record: Comparison) -> list[str]:
    """Return why rows are empty, one sentence each."""
    return [f"{label(row)}, {_requested(row)}: {row.reason}" for row in record.rows if row.reason is not None]
