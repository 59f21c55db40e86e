"""The demonstration: the bundled checkpoint compressed by SVD and MoBE at two sizes, and its cost in one table."""

import time
from pathlib import Path
from typing import Any

from jaxmoe.checkpoint import Checkpoint
from jaxmoe.checkpoint.output import output_folder
from jaxmoe.compression.api import compress
from jaxmoe.data import demo_checkpoint, demo_texts
from jaxmoe.evaluation import evaluate
from jaxmoe.report.events import OnEvent
from jaxmoe.report.records import Report
from jaxmoe.report.tables import table

METHODS = {"svd": {}, "mobe": {"steps": 1_000}}
"""The methods and their settings; a third of MoBE's steps loses little and keeps the demonstration short."""
RATIOS = (0.25, 0.5)


def run(output: Path, on_event: OnEvent) -> tuple[Any, ...]:
    """Compress the bundled checkpoint and measure the results.

    Args:
        output: folder for the compressed checkpoints, one subfolder each; finished ones are kept as they are.
        on_event: called with an event after every step.

    Returns:
        A JSON record, then what to print: a table and where things are.
    """
    source = Checkpoint.open(demo_checkpoint())
    output = output_folder(output, [source.folder], beside=(), into=True)
    rows = [{"name": "original", "folder": str(source.folder), "removed": 0.0, "bytes": source.bytes}]
    for name, chosen in METHODS.items():
        for ratio in RATIOS:
            folder = output / f"{name}-{ratio}"
            start = time.perf_counter()
            command = f"jaxmoe compress {source.folder} {folder} --method {name} --ratio {ratio}"
            command += "".join(f" --set {setting}={value}" for setting, value in chosen.items())
            options = {"ratio": ratio, "set": chosen, "command": command, "on_event": on_event}
            report = compress(source.folder, folder, name, **options)
            rows.append(
                {
                    "name": f"{name} {ratio:.0%}",
                    "folder": str(folder),
                    "removed": report.achieved["experts"],
                    "bytes": report.bytes.after,
                    "error": _mean_error(report),
                    "seconds": time.perf_counter() - start,
                }
            )
    for row in rows:
        evaluation = evaluate(row["folder"], text=demo_texts(), generate=0, on_event=on_event)
        row["perplexity"] = evaluation.geometric_mean_perplexity
        row["worst"] = {"name": evaluation.worst.name, "perplexity": evaluation.worst.perplexity}
    return {"results": rows, "output": str(output)}, _table(rows), _where(output)


def _mean_error(report: Report) -> float:
    errors = [own.error for layer in report.layers for own in layer.projections.values() if own.error is not None]
    return sum(errors) / len(errors)


def _table(rows):
    def cells(row):
        yield row["name"]
        yield f"{row['removed']:.3f}"
        yield f"{row['bytes'] / 1e6:.2f} MB"
        yield f"{row['error']:.3f}" if "error" in row else ""
        yield f"{row['perplexity']:.2f}"
        yield f"{row['worst']['perplexity']:.2f} {row['worst']['name']}"
        yield f"{row['seconds']:.1f}" if "seconds" in row else ""

    columns = ("model", "removed", "size", "error", "perplexity", "worst text", "seconds")
    title = (
        "A Qwen3-MoE model of 2.8 M parameters: removed fraction of its experts, mean relative error,\n"
        "geometric mean perplexity over five held-out texts"
    )
    return table(columns, map(cells, rows), title=title)


def _where(output: Path) -> str:
    first = output / f"{list(METHODS)[-1]}-{RATIOS[0]}"
    return (
        f"The compressed checkpoints are in {output}; each has its report.json and model card."
        " To load one with PyTorch:\n"
        f'  AutoModelForCausalLM.from_pretrained("{first}", trust_remote_code=True)'
    )
