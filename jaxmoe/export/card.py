"""The model card: what was removed, what it cost, and the command that did it, in words a user of the hub reads."""

from collections.abc import Mapping, Sequence
from typing import Any

_FORMS = {
    "factored": "The experts are stored as factors: the model needs transformers 5.16 or newer and the code in this"
    " folder (`trust_remote_code=True`, or `import jaxmoe.torch` before loading). The tokenizer needs none of it:"
    " `AutoTokenizer.from_pretrained(..., trust_remote_code=False)` loads it without asking.",
    "dense": "The experts were written back as dense matrices: any program that runs the original runs this folder, and"
    " nothing is saved on disk. The ratios below are those of the factors.",
    "slim": "Some of the experts, or some of their channels, were removed: any program that runs the original"
    " architecture runs this folder.",
}
"""What a reader has to know of each form of a checkpoint."""


def model_card(report: Mapping[str, Any]) -> str:
    """Return the README.md of a compressed checkpoint.

    Args:
        report: the run's report.
    """
    factored = report["export"] == "factored"
    requested, achieved = report["requested"], report["achieved"]
    load = (
        "from transformers import AutoModelForCausalLM\n\n"
        'model = AutoModelForCausalLM.from_pretrained("PATH_OF_THIS_FOLDER"'
        + (", trust_remote_code=True" if factored else "")
        + ")"
    )
    form = _FORMS[report["export"]]
    lines = [
        "---",
        "library_name: transformers",
        "tags: [jaxmoe, mixture-of-experts, compressed]",
        "---",
        "",
        f"# Compressed with jaxmoe: {report['method']}",
        "",
        form,
        "",
        "```python",
        load,
        "```",
        "",
        "## Size",
        "",
        "| | before | after |",
        "|---|---|---|",
        *(
            f"| {name.replace('_', ' ')} | {report[name]['before']:,} | {report[name]['after']:,} |"
            for name in ("parameters", "bytes", "active_parameters", "operations_per_token", "experts_per_token")
            if name in report
        ),
        f"| in the files | | {report['stored']['parameters']:,} parameters, {report['stored']['bytes']:,} bytes |",
        "",
        "| removed fraction of | touched matrices | routed experts | model |",
        "|---|---|---|---|",
        _ratio_row("requested", {requested["of"]: requested["ratio"]} if requested.get("of") else {}),
        _ratio_row("achieved", achieved),
        "",
        *_errors(report["layers"]),
        "",
        "## How it was made",
        "",
        f"- method: {report['method']}, settings: {_settings(report['settings'])}, seed {report['seed']}",
        f"- calibration: {_calibration(report.get('calibration'))}",
        f"- command: `{report['command']}`" if report["command"] else "- made through the Python interface",
        f"- time {report['layer_seconds']:.1f} s for the layers, peak memory {report['peak_bytes'] / 1e6:.0f} MB",
        f"- jaxmoe {report['jaxmoe']}",
        "",
        "## What to know",
        "",
        *([f"- {_outcome(outcome)}" for outcome in report["outcomes"]] or ["- nothing unusual happened"]),
        "",
    ]
    return "\n".join(lines)


def _ratio_row(name: str, ratios: Mapping[str, float]) -> str:
    cells = (f"{ratios[scope]:.4f}" if scope in ratios else "" for scope in ("touched", "experts", "model"))
    return f"| {name} | {' | '.join(cells)} |"


def _errors(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the section on errors: of the matrices, or of the experts' sum where vectors stand in for some experts."""
    if not all("error" in record for layer in layers for record in layer["projections"].values()):
        return [
            "## Experts that do not run",
            "",
            "The experts are stored as they were. For every token those of the largest router weights run, and vectors"
            " of the others scale their inputs (Compressed Experts, arXiv 2503.00634). Relative squared error of the"
            " experts' sum, with these experts left out and with vectors in their place:",
            "",
            "| layer | left out | stood in for |",
            "|---|---|---|",
            *(
                f"| {layer['layer']} | {layer['error']['before']:.4f} | {layer['error']['after']:.4f} |"
                for layer in layers
                if "error" in layer
            ),
        ]
    return [
        "## Reconstruction error",
        "",
        "Relative Frobenius error of the stored numbers, mean over experts (worst expert in brackets).",
        "",
        "| layer | gate | up | down |",
        "|---|---|---|---|",
        *(_error_row(layer) for layer in layers),
    ]


def _error_row(layer: Mapping[str, Any]) -> str:
    def cell(name):
        record = layer["projections"].get(name)
        return "" if record is None else f"{record['error']:.4f} ({record['worst_error']:.4f})"

    return f"| {layer['layer']} | {' | '.join(cell(name) for name in ('gate', 'up', 'down'))} |"


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} ({_settings(value)})" if isinstance(value, Mapping) else f"{name}={value}"
        for name, value in settings.items()
        if value is not None
    )


def _calibration(calibration: Mapping[str, Any] | None) -> str:
    if calibration is None:
        return "none, the weights alone decided"
    texts = ", ".join(f"{name} {tokens:,}" for name, tokens in calibration["domains"].items())
    behind = ", each layer behind the compressed ones" if calibration["sequential"] else ""
    return f"{calibration['tokens']:,} tokens ({texts}){behind}"


def _outcome(outcome: Mapping[str, Any]) -> str:
    where = "" if outcome["layer"] is None else f"layer {outcome['layer']}, {outcome['target']}: "
    return f"{outcome['kind']}: {where}{outcome['detail']}"
