"""The model card: what was removed, what it cost, and the command that did it, in words a user of the hub reads."""

from collections.abc import Mapping
from typing import Any


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
    form = (
        "The experts are stored as factors: the model needs transformers 5.16 or newer and the code in this folder "
        "(`trust_remote_code=True`, or `import jaxmoe.torch` before loading)."
        if factored
        else "The experts were written back as dense matrices: any program that runs the original runs this folder, "
        "and nothing is saved on disk. The ratios below are those of the factors."
    )
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
        f"| parameters | {report['parameters']['before']:,} | {report['parameters']['after']:,} |",
        f"| bytes | {report['bytes']['before']:,} | {report['bytes']['after']:,} |",
        f"| in the files | | {report['stored']['parameters']:,} parameters, {report['stored']['bytes']:,} bytes |",
        "",
        "| removed fraction of | touched matrices | routed experts | model |",
        "|---|---|---|---|",
        _ratio_row("requested", {requested["of"]: requested["ratio"]} if requested.get("of") else {}),
        _ratio_row("achieved", achieved),
        "",
        "## Reconstruction error",
        "",
        "Relative Frobenius error of the stored numbers, mean over experts (worst expert in brackets).",
        "",
        "| layer | gate | up | down |",
        "|---|---|---|---|",
        *(_error_row(layer) for layer in report["layers"]),
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


def _error_row(layer: Mapping[str, Any]) -> str:
    def cell(name):
        record = layer["projections"].get(name)
        return "" if record is None else f"{record['error']:.4f} ({record['worst_error']:.4f})"

    return f"| {layer['layer']} | {' | '.join(cell(name) for name in ('gate', 'up', 'down'))} |"


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items() if value is not None)


def _calibration(calibration: Mapping[str, Any] | None) -> str:
    if calibration is None:
        return "none, the weights alone decided"
    texts = ", ".join(f"{name} {tokens:,}" for name, tokens in calibration["domains"].items())
    behind = ", each layer behind the compressed ones" if calibration["sequential"] else ""
    return f"{calibration['tokens']:,} tokens ({texts}){behind}"


def _outcome(outcome: Mapping[str, Any]) -> str:
    where = "" if outcome["layer"] is None else f"layer {outcome['layer']}, {outcome['target']}: "
    return f"{outcome['kind']}: {where}{outcome['detail']}"
