"""The model card: what was removed, what it cost, and the command that did it, in words a user of the hub reads."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxmoe.report.records import Calibration, Layer, Outcome, Projection, Report

_FORMS = {
    "factored": "The experts are stored as factors or in few bits: the model needs transformers 5.16 or newer and the"
    " code in this folder (`trust_remote_code=True`, or `import jaxmoe.torch` before loading). The tokenizer needs none"
    " of it: `AutoTokenizer.from_pretrained(..., trust_remote_code=False)` loads it without asking.",
    "dense": "The experts were written back as dense matrices: any program that runs the original runs this folder, and"
    " nothing is saved on disk. The ratios below are those of the factors.",
    "slim": "Some of the experts, or some of their channels, were removed: any program that runs the original"
    " architecture runs this folder.",
    "packed": "The experts are packed integers in the format `pack-quantized` of compressed-tensors: transformers 5.16"
    " or newer loads them without any flag where the package compressed-tensors is installed, and expands them in"
    " memory; vLLM keeps them packed.",
    "packed-vllm": "**Only for vLLM.** The experts are packed integers in the format `pack-quantized` of"
    " compressed-tensors, of other widths in each layer. transformers takes the width of one layer for all of them: it"
    " loads this folder without a word, and computes nonsense.",
}
"""What a reader has to know of each form of a checkpoint."""


_COUNTED = {"parameters": "stored numbers", "bytes": "bytes"}
"""What each unit counts, in words: of numbers in few bits, many share one that is stored."""


def model_card(report: Report) -> str:
    """Return the README.md of a compressed checkpoint.

    Args:
        report: of a run that is complete.
    """
    stored = report.stored
    factored = ", trust_remote_code=True" if report.export == "factored" else ""
    load = [
        "from transformers import AutoModelForCausalLM",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("PATH_OF_THIS_FOLDER"{factored})',
    ]
    if report.export == "packed-vllm":
        load = ["from vllm import LLM", "", 'model = LLM("PATH_OF_THIS_FOLDER")']
    lines = [
        "---",
        "library_name: transformers",
        "tags: [jaxmoe, mixture-of-experts, compressed]",
        "---",
        "",
        f"# Compressed with jaxmoe: {report.method}",
        "",
        _FORMS[report.export],
        "",
        "```python",
        *load,
        "```",
        "",
        "## Size",
        "",
        "| | before | after |",
        "|---|---|---|",
        *(f"| {name.replace('_', ' ')} | {own.before:,} | {own.after:,} |" for name, own in report.changes().items()),
        *([] if stored is None else [f"| in the files | | {stored.parameters:,} parameters, {stored.bytes:,} bytes |"]),
        "",
        "| | replaced matrices | routed experts | model |",
        "|---|---|---|---|",
        *_ratio_rows(report),
        "",
        *_errors(report.layers),
        "",
        "## How it was made",
        "",
        f"- method: {report.method}, settings: {_settings(report.settings)}, seed {report.seed}",
        f"- calibration: {_calibration(report.calibration)}",
        f"- command: `{report.command}`" if report.command else "- made through the Python interface",
        "- the same again: `jaxmoe compress CHECKPOINT OUTPUT --recipe recipe.yaml`, with the file in this folder",
        f"- time {report.layer_seconds:.1f} s for the layers, peak memory {(report.peak_bytes or 0) / 1e6:.0f} MB",
        f"- jaxmoe {report.jaxmoe}",
        "",
        "## What to know",
        "",
        *([f"- {_outcome(outcome)}" for outcome in report.outcomes] or ["- nothing unusual happened"]),
        "",
    ]
    return "\n".join(lines)


def _ratio_rows(report: Report) -> list[str]:
    """Return the removed fractions, as requested and in every unit, and the bits that are left of a number."""
    requested, bits = report.requested, report.bits_per_weight
    removed = report.removed or {requested.unit: report.achieved}
    asked = {requested.of: requested.ratio} if requested.of and requested.ratio else {}
    return [
        *([_ratio_row(f"fraction of {_COUNTED[requested.unit]} to remove", asked)] if asked else []),
        *(_ratio_row(f"fraction of {_COUNTED[unit]} removed", own) for unit, own in removed.items()),
        *([] if bits is None else [_ratio_row("stored bits for each original number", bits)]),
    ]


def _ratio_row(name: str, ratios: Mapping[str, float]) -> str:
    cells = (f"{ratios[scope]:.4f}" if scope in ratios else "" for scope in ("touched", "experts", "model"))
    return f"| {name} | {' | '.join(cells)} |"


def _errors(layers: Sequence[Layer]) -> list[str]:
    """Return the section on errors: of the matrices, or of the experts' sum where vectors compensate for some."""
    names = list(
        dict.fromkeys(name for layer in layers for name, own in layer.projections.items() if own.error is not None)
    )
    if not names:
        return [
            "## Experts that do not run",
            "",
            "The experts are stored as they were. For every token those of the largest router weights run, and vectors"
            " of the others scale their inputs (Compressed Experts, arXiv 2503.00634). Relative squared error of the"
            " experts' sum, with these experts left out and with vectors in their place:",
            "",
            "| layer | left out | compensated for |",
            "|---|---|---|",
            *(
                f"| {layer.layer} | {layer.error.before:.4f} | {layer.error.after:.4f} |"
                for layer in layers
                if layer.error is not None
            ),
        ]
    return [
        "## Reconstruction error",
        "",
        "Relative Frobenius error of what is stored, mean over experts (worst expert in brackets).",
        "",
        f"| layer | {' | '.join(names)} |",
        f"|---|{'---|' * len(names)}",
        *(
            f"| {layer.layer} | {' | '.join(_error(layer.projections.get(name)) for name in names)} |"
            for layer in layers
        ),
    ]


def _error(own: Projection | None) -> str:
    if own is None or own.error is None:
        return ""
    return f"{own.error:.4f}" + ("" if own.worst_error is None else f" ({own.worst_error:.4f})")


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} ({_settings(value)})" if isinstance(value, Mapping) else f"{name}={value}"
        for name, value in settings.items()
        if value is not None
    )


def _calibration(calibration: Calibration | None) -> str:
    if calibration is None:
        return "none, the weights alone decided"
    texts = ", ".join(f"{name} {tokens:,}" for name, tokens in calibration.domains.items())
    behind = ", each layer behind the compressed ones" if calibration.sequential else ""
    return f"{calibration.tokens:,} tokens ({texts}){behind}"


def _outcome(outcome: Outcome) -> str:
    where = ", ".join(filter(None, [None if outcome.layer is None else f"layer {outcome.layer}", outcome.target]))
    return f"{outcome.kind}: {where and f'{where}: '}{outcome.detail}"
