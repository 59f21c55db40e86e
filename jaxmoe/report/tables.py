"""Plain tables of plans, checkpoints and reports, for a terminal."""

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from jaxmoe.report.evaluation_records import Evaluation, TextEvaluation
from jaxmoe.report.events import span
from jaxmoe.report.records import Layer, PlanSummary, Projection, Report, Step
from jaxmoe.report.recovery_records import RecoveryReport


def size(count: float, unit: str = "") -> str:
    """Return a count in engineering notation.

    Example:
        >>> size(2_830_000), size(5_681_464, "B")
        ('2.83 M', '5.68 MB')
    """
    for factor, prefix in ((1e12, "T"), (1e9, "G" if unit else "B"), (1e6, "M"), (1e3, "k")):
        if count >= factor:
            return f"{count / factor:.2f} {prefix}{unit}"
    return f"{count:.0f} {unit}".strip()


def table(columns: Iterable[str], rows: Iterable[Iterable[Any]], title: str | None = None) -> Table:
    """Return a table whose first column is left-aligned and the others right-aligned."""
    grid = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for position, column in enumerate(columns):
        grid.add_column(column, justify="left" if position == 0 else "right", overflow="fold")
    for row in rows:
        grid.add_row(*(escape(str(cell)) for cell in row))
    return grid


def term(spec: Mapping[str, Any]) -> str:
    """Return one term in a few words.

    Example:
        >>> term({"target": "down", "kind": "shared_basis", "bases": 4, "rank": 17, "transposed": True, "mean": False})
        'shared_basis bases=4 rank=17 transposed'
    """
    parts = [spec["kind"]]
    for name, value in spec.items():
        if name in ("kind", "target") or value is False:
            continue
        parts.append(name if value is True else f"{name}={value}")
    return " ".join(parts)


def plan_tables(plan: PlanSummary) -> list[Any]:
    """Return what `plan` prints: sizes, what every layer will hold (equal neighbours on one row), steps and memory."""

    def stored(layer: Layer) -> dict[str, str]:
        # A term over gate and up stands in the records of both.
        words: dict[str, dict[str, None]] = {}
        for own in layer.projections.values():
            for spec in own.terms:
                words.setdefault(spec["target"], {})[term(spec)] = None
        return {target: " + ".join(parts) for target, parts in words.items()}

    rows = []
    for targets, group in groupby(plan.layers, key=stored):
        members = list(group)
        indices = span([layer.layer for layer in members])
        for target, words in targets.items():
            covered = [
                own for own in members[0].projections.values() if any(spec["target"] == target for spec in own.terms)
            ]
            parameters = sum(own.parameters for own in covered)
            kept = sum(own.kept for own in covered) / len(covered)
            rows.append((indices, target, words, f"{parameters:,}", f"{kept:.3f}"))
    shared = None if plan.allocation is None else f"the budget is shared by the rule {plan.allocation!r}"
    columns = ("layer", "target", "stored as", "parameters per layer", "kept")
    tables: list[Any] = [*size_tables(plan), table(columns, rows, title=shared)]
    if plan.steps is not None:
        tables.append(steps_table(plan.steps))
    if plan.peak_bytes is not None:
        tables.append(f"predicted peak memory beyond the idle program: {size(plan.peak_bytes, 'B')}")
    if plan.loads_in:
        tables.append(f"will load in: {'; '.join(plan.loads_in)}")
    if plan.exports == ["dense"]:
        tables.append("this architecture has no factored form: only dense can be written, with --export dense")
    return tables


def report_tables(report: Report) -> list[Table]:
    """Return what `compress` prints: steps, errors, and sizes."""
    steps = [] if report.steps is None else [steps_table(report.steps)]
    errors = any(own.error is not None for layer in report.layers for own in layer.projections.values())
    learned = [layer for layer in report.layers if layer.error is not None]
    return [
        *steps,
        *([error_table(report.layers)] if errors else []),
        *([linear_table(report.layers)] if any(layer.linear_maps for layer in report.layers) else []),
        *([skipped_table(learned)] if learned else []),
        *size_tables(report),
    ]


def steps_table(steps: Iterable[Step]) -> Table:
    """Return what every step of a recipe removes of what it finds."""
    rows = []
    for step in steps:
        kept = ", ".join(f"{number} {unit} stay" for unit, number in (step.kept or {}).items())
        rows.append((step.method, f"{step.achieved['experts']:.4f}", kept or "factors"))
    return table(("step", "removes of the experts that it finds", "what stays"), rows)


def size_tables(record: PlanSummary) -> list[Table]:
    """Return the tables of sizes and ratios of a plan or a report, in numbers, in bytes and in bits per weight."""
    requested = record.requested
    # Reports of earlier versions say it in one unit, and say nothing of bits.
    removed, bits = record.removed or {requested.unit: record.achieved}, record.bits_per_weight
    rows = [
        (
            scope,
            f"{requested.ratio:.4f}" if requested.of == scope else "",
            *(f"{own[scope]:.4f}" for own in removed.values()),
            *(() if bits is None else (f"{bits[scope]:.3f}",)),
        )
        for scope in record.achieved
    ]
    asked = "requested" if requested.ratio is None else f"requested, {requested.unit}"
    columns = ("removed of", asked, *removed, *(() if bits is None else ("bits per weight",)))
    sizes = [(name.replace("_", " "), f"{own.before:,}", f"{own.after:,}") for name, own in record.changes().items()]
    return [table(columns, rows), table(("model", "before", "after"), sizes)]


def error_table(layers: Sequence[Layer]) -> Table:
    """Return relative errors per layer and projection, mean over experts and the worst expert."""
    of_experts = [layer for layer in layers if len(layer.projections) > len(layer.linear_maps)]
    names = list(dict.fromkeys(n for layer in layers for n in layer.projections if n not in layer.linear_maps))

    def cell(own: Projection | None) -> str:
        return "" if own is None or own.error is None else f"{own.error:.4f} ({own.worst_error:.4f})"

    rows = [(layer.layer, *(cell(layer.projections.get(name)) for name in names)) for layer in of_experts]
    return table(("layer", *names), rows, title="relative error, mean over experts (worst)")


def linear_table(layers: Sequence[Layer]) -> Table:
    """Return relative errors of linear maps beside the experts, mean over the layers and the worst layer."""
    errors: dict[str, list[tuple[float, int]]] = {}
    for layer in layers:
        for name, own in layer.linear_maps.items():
            errors.setdefault(name, []).append((own.error or 0.0, layer.layer))
    rows = []
    for name, found in errors.items():
        worst, index = max(found)
        rows.append((name, f"{sum(error for error, _ in found) / len(found):.4f}", f"{worst:.4f}", index))
    return table(("matrix", "mean over layers", "worst", "in layer"), rows, title="relative error beside the experts")


def skipped_table(layers: Iterable[Layer]) -> Table:
    """Return the error of each layer without some experts and with what compensates for them, and what they weigh."""
    rows = []
    for layer in layers:
        if layer.error is not None:
            weights = (layer.importance or {}).get("by_rank", ())
            rows.append(
                (
                    layer.layer,
                    f"{layer.error.before:.4f}",
                    f"{layer.error.after:.4f}",
                    ", ".join(f"{share:.1%}" for share in weights),
                    len(layer.never_auxiliary or ()),
                )
            )
    columns = ("layer", "left out", "compensated for", "weight of the best, second, ...", "never auxiliary")
    return table(columns, rows, title="relative squared error of the experts' sum, on tokens set apart")


def calibration_table(record: Mapping[str, Any]) -> Table:
    """Return how evenly the experts of each layer were used, and which saw too little."""
    rows = (
        (
            layer["layer"],
            layer["experts"],
            f"{layer['busiest']:.1%} (even: {layer['even']:.1%})",
            len(layer["starved"]),
            len(layer["never_routed"]),
        )
        for layer in record["layers"]
    )
    texts = ", ".join(f"{domain['name']} {domain['tokens']:,}" for domain in record["domains"])
    title = f"{record['tokens']:,} tokens ({texts})"
    return table(("layer", "experts", "busiest expert's share", "starved", "never routed"), rows, title=title)


def evaluation_tables(record: Evaluation) -> list[Any]:
    """Return what `evaluate` prints: the loss on every text, distance from the original, continuations, and speed."""
    before = record.against
    columns, last = ["text", "tokens", "nats per token", "perplexity"], ["geometric mean", "", ""]
    rows = [[own.name, f"{own.tokens:,}", f"{own.nats_per_token:.4f}", f"{own.perplexity:.3f}"] for own in record.texts]
    rows.append([*last, f"{record.geometric_mean_perplexity:.3f}"])
    if before is not None:
        columns.append("original's")
        perplexities = [*(text.perplexity for text in before.texts), before.geometric_mean_perplexity]
        rows = [[*row, f"{perplexity:.3f}"] for row, perplexity in zip(rows, perplexities, strict=True)]
    left_out = sum(text.left_out for text in record.texts)
    facts = Text(
        f"worst text: {record.worst.name} ({record.worst.perplexity:.3f}); windows of {record.length} tokens,"
        f" {left_out:,} tokens at the ends of the texts left out; {record.tokens_per_second:,.0f} tokens per second"
    )
    distance = [distance_table(record)] if record.kl is not None else []
    continued = any(text.generation is not None for text in record.texts)
    return [table(columns, rows), *distance, facts, *([generation_lines(record.texts)] if continued else [])]


def distance_table(record: Evaluation) -> Table:
    """Return the divergence from the original on every text and on all tokens: mean, percentiles, agreement."""

    def row(name: str, own: TextEvaluation | Evaluation) -> tuple[str, ...]:
        spread = own.kl_percentiles
        points = () if spread is None else (spread.median, spread.p99, spread.p999)
        shown = ["" if x is None else f"{x:.5f}" for x in (own.kl, *points)]
        return name, *shown, f"{own.top1_agreement or 0:.2%}"

    rows = [*(row(text.name, text) for text in record.texts), row("all texts", record)]
    columns = ("text", "mean", "median", "99 %", "99.9 %", "same top token")
    return table(columns, rows, title="KL divergence from the original, nats per token")


def generation_lines(texts: Iterable[TextEvaluation]) -> Text:
    """Return the greedy continuation of each text that has one, and how much it repeats itself.

    Example:
        >>> from jaxmoe.report.evaluation_records import Continuation
        >>> own = {"prompt": "Once upon", "continuation": " a time", "repetition": 0.0, "repetition_of_text": 0.0}
        >>> tale = Continuation(**own, period=None, degenerate=False)
        >>> loss = {"tokens": 1, "left_out": 0, "nats_per_token": 1.0}
        >>> print(generation_lines([TextEvaluation(name="tales", **loss, generation=tale)]))
        Greedy continuations; how much of them repeats itself (4-grams), and how much of the text:
        tales, 0% (0%): "...Once upon" -> " a time"
    """
    lines = ["Greedy continuations; how much of them repeats itself (4-grams), and how much of the text:"]
    for text in texts:
        own = text.generation
        if own is None:
            continue
        prompt, continuation = (json.dumps(x, ensure_ascii=False) for x in (own.prompt[-24:], own.continuation))
        loops = f", period {own.period}" if own.period else ""
        flag = f", DEGENERATE{loops}" if own.degenerate else loops
        share = f"{own.repetition:.0%} ({own.repetition_of_text:.0%})"
        lines.append(f'{text.name}, {share}{flag}: "...{prompt[1:]} -> {continuation}')
    return Text("\n".join(lines))


def inspection_tables(record: Mapping[str, Any]) -> list[Any]:
    """Return what `inspect` prints: the model on one table, its MoE layers (equal neighbours on one row) on another."""
    facts = [
        ("folder", record["folder"]),
        ("architecture", record["model_type"] + ("" if record["known"] else " (unknown to jaxmoe)")),
        ("parameters", f"{record['parameters']:,} ({size(record['parameters'])})"),
        ("in routed experts", f"{record['expert_parameters']:,}"),
        ("size", f"{record['bytes']:,} bytes ({size(record['bytes'], 'B')}) in {record['tensors']:,} tensors"),
        ("dtypes", ", ".join(f"{name} {size(count, 'B')}" for name, count in record["dtypes"].items())),
        *(
            (name.replace("_", " "), record[name])
            for name in ("experts_per_token", "main_experts", "routing")
            if record.get(name)
        ),
        ("can be written", ", ".join(record["exports"]) or "as it is"),
    ]
    rows = []
    shape_of = dict(zip(record["moe_layers"], record["layers"], strict=True))

    def sizes(index):
        return tuple(shape_of[index][name] for name in ("experts", "hidden", "intermediate"))

    for shape, group in groupby(record["moe_layers"], key=sizes):
        rows.append((span(list(group)), *shape))
    layers = table(("MoE layers", "experts", "hidden size", "expert intermediate size"), rows)
    facts_table = Table(box=None, pad_edge=False, show_header=False)
    for name, value in facts:
        facts_table.add_row(name, str(value))
    return [facts_table, layers, *(f"note: {note}" for note in record["notes"])]


def recovery_tables(report: RecoveryReport) -> list[Table]:
    """Return the tables of a training: what was trained on what, its losses, and what a user should know."""
    trained, data, training = report.trained, report.data, report.training
    about = (
        ("trained", f"{', '.join(trained.sets)}: {size(trained.parameters)} parameters"),
        ("steps", f"{training['steps']} of {training['rows']} rows of {data.length} tokens"),
        ("text", f"{size(data.tokens)} tokens, {data.passes:.2f} passes"),
        ("seconds", f"{report.seconds:.0f}"),
    )
    losses = [(name, f"{loss.first_tenth:.4f}", f"{loss.last_tenth:.4f}") for name, loss in report.losses.items()]
    notes = (
        [table(("what to know", ""), [(own.kind, own.detail) for own in report.outcomes])] if report.outcomes else []
    )
    return [table(("", ""), about), table(("loss", "first tenth of the steps", "last"), losses), *notes]
