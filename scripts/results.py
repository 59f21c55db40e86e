"""The README's results table: perplexity of compressed checkpoints, for methods, settings and ratios.

    python scripts/results.py CHECKPOINT... --text FOLDER [--calibration FOLDER] [--into README.md] [--check 3]

Every combination runs `jaxmoe compress` into a folder of its own, as its users run it, and then `jaxmoe evaluate` on
every `*.txt` of the text folder. Variants that end in `:calibrated` use what `jaxmoe calibrate --gradients sequence`
gathered from the texts of the calibration folder, once for each checkpoint. A ratio is one of the experts, or, as
`0.4:touched`, of what a method replaces. A cell holds the geometric mean of the texts' perplexities, how many times the
original's it is, and the text on which it grew most. An interrupted run goes on where it stopped. Beside the table,
`results.json` keeps every number and the command behind it. `--check N` repeats N cells, spread evenly over the table,
and every original through transformers and PyTorch, prints how far they are apart, and ends with an error if that is
more than 0.1 %.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

VARIANTS = ("svd:paper", "svd:improved", "mobe:paper", "mobe:improved", "rfid:improved", "d2moe:improved")
CALIBRATED = (
    "svd:improved:calibrated",
    "mobe:improved:calibrated",
    "rfid:paper:calibrated",
    "rfid:improved:calibrated",
    "d2moe:paper:calibrated",
    "d2moe:improved:calibrated",
)
RATIOS = ("0.2", "0.4", "0.6", "0.8")
TOLERANCE = 1e-3
"""Relative difference of perplexities that are said to be the same."""

BEGIN, END = "<!-- results -->", "<!-- end of results -->"


@dataclass(frozen=True)
class Case:
    """One compression: a checkpoint, `method:setting[:calibrated]`, and `ratio[:of]` as written."""

    checkpoint: Path
    variant: str
    ratio: str
    settings: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.variant.replace(":", " ")

    @property
    def calibrated(self) -> bool:
        return self.variant.endswith(":calibrated")

    @property
    def removed(self) -> str:
        """The removed fraction as the table's header has it."""
        ratio, _, of = self.ratio.partition(":")
        return f"{float(ratio):.1%} of {of or 'experts'}"

    def folder(self, output: Path) -> Path:
        return output / self.checkpoint.name / f"{self.variant}-{self.ratio}".replace(":", "-")

    def statistics(self, output: Path) -> Path:
        return output / self.checkpoint.name / "statistics"

    def command(self, output: Path) -> list[str]:
        folder = str(self.folder(output))
        return ["compress", str(self.checkpoint), folder, *self.options(output), "--export", "factored"]

    def options(self, output: Path) -> list[str]:
        """What `compress` and `plan` are both told."""
        method, setting, *_ = self.variant.split(":")
        ratio, _, of = self.ratio.partition(":")
        options = ["--method", method, "--setting", setting, "--ratio", ratio, "--of", of or "experts"]
        options += ["--statistics", str(self.statistics(output))] if self.calibrated else []
        return options + [part for setting in self.settings for part in ("--set", setting)]


def main() -> None:
    arguments = parse()
    texts = sorted(arguments.text.glob("*.txt"))
    records = []
    for checkpoint in arguments.checkpoints:
        base = evaluate(checkpoint, texts, arguments, arguments.output / checkpoint.name / "original.json")
        original = {"checkpoint": checkpoint.name, "method": "original", "folder": str(checkpoint)}
        records.append({**original, "evaluation": base})
        for case in cases(checkpoint, arguments):
            if case.calibrated:
                calibrate(case, arguments)
            records.append(measure(case, texts, arguments))
            write(arguments.output, records)
    table = "\n\n".join([perplexities(records), *errors(records)])
    print(table)
    if arguments.check is not None:
        check(records, texts, arguments)
    if arguments.into:
        insert(arguments.into, f"`{shlex.join(['python', *sys.argv])}` gave:\n\n{table}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+", metavar="CHECKPOINT")
    parser.add_argument("--text", type=Path, required=True, help="folder of held-out texts, one domain per file")
    parser.add_argument("--output", type=Path, default=Path("out/results"))
    parser.add_argument("--calibration", type=Path, help="folder of the texts to calibrate on")
    parser.add_argument("--variants", help="method:setting[:calibrated], separated by commas; by default all")
    parser.add_argument("--ratios", default=",".join(RATIOS), help="removed fractions, ratio[:of]")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="[CHECKPOINT/]VARIANT:NAME=VALUE",
        dest="settings",
        help="a setting of a variant's method, for one checkpoint or for all",
    )
    parser.add_argument("--length", type=int, default=256, help="tokens in a window")
    parser.add_argument("--windows", type=int, help="so many windows of each text instead of all")
    parser.add_argument("--finished", action="store_true", help="tabulate what earlier runs measured, and run nothing")
    parser.add_argument("--check", type=int, metavar="N", help="repeat the originals and N cells in PyTorch")
    parser.add_argument("--into", type=Path, help=f"file in which to replace what stands between {BEGIN} and {END}")
    arguments = parser.parse_args()
    if arguments.variants is None:
        arguments.variants = ",".join(VARIANTS + CALIBRATED if arguments.calibration else VARIANTS)
    if ":calibrated" in arguments.variants and arguments.calibration is None:
        parser.error("calibrated variants need --calibration FOLDER")
    return arguments


def cases(checkpoint: Path, arguments: argparse.Namespace) -> Iterator[Case]:
    for variant, ratio in product(arguments.variants.split(","), arguments.ratios.split(",")):
        own = [s.removeprefix(f"{checkpoint.name}/") for s in arguments.settings]
        extra = tuple(s.removeprefix(f"{variant}:") for s in own if s.startswith(f"{variant}:"))
        yield Case(checkpoint, variant, ratio, extra)


def calibrate(case: Case, arguments: argparse.Namespace) -> None:
    """Gather the statistics of a checkpoint, unless they are there."""
    if case.statistics(arguments.output).exists():
        return
    command = ["calibrate", str(case.checkpoint), str(case.statistics(arguments.output))]
    command += ["--gradients", "sequence", "--length", str(arguments.length)]
    done = jaxmoe([*command, "--text", str(arguments.calibration)])
    if done.returncode:
        raise SystemExit(f"jaxmoe calibrate {case.checkpoint} ended with {done.returncode}")


def measure(case: Case, texts: list[Path], arguments: argparse.Namespace) -> dict[str, Any]:
    """Compress and evaluate one case; an infeasible ratio is a result too."""
    folder, command = case.folder(arguments.output), case.command(arguments.output)
    record: dict[str, Any] = {
        "checkpoint": case.checkpoint.name,
        "method": case.name,
        "ratio": case.removed,
        "folder": str(folder),
        "command": shlex.join(["jaxmoe", *command]),
    }
    cache = folder.parent / f"{folder.name}.json"
    if not arguments.finished:
        done = jaxmoe(command)
    elif not cache.exists():
        # An impossible size shows in the plan too, whatever the rule.
        plan = ["plan", str(case.checkpoint), *case.options(arguments.output), "--allocation", "uniform"]
        done = jaxmoe(plan)
        record["missing"] = True
    else:
        done = None
    if done is not None and done.returncode:
        reason = json.loads(done.stdout)["error"] if done.returncode == 1 else ""
        if "out of reach" not in reason:
            raise SystemExit(f"{record['command']} ended with {done.returncode}")
        return {**record, "infeasible": reason}
    if "missing" in record:
        return record
    report = json.loads((folder / "report.json").read_text())
    record |= {key: report[key] for key in ("achieved", "parameters", "bytes", "seconds", "peak_bytes", "layers")}
    return {**record, "evaluation": evaluate(folder, texts, arguments, cache)}


def evaluate(checkpoint: Path, texts: list[Path], arguments: argparse.Namespace, cache: Path) -> dict[str, Any]:
    """Return the evaluation of a checkpoint, from the cache where one of the same windows and texts stands there."""
    command = ["evaluate", str(checkpoint), "--length", str(arguments.length), "--generate", "0"]
    command += [part for path in texts for part in ("--text", str(path))]
    command += ["--sequences", str(arguments.windows)] if arguments.windows else []
    question = {
        "length": arguments.length,
        "windows": arguments.windows,
        "texts": [[path.name, path.stat().st_size] for path in texts],
        "config": (checkpoint / "config.json").stat().st_mtime_ns,
    }
    if cache.exists() and (known := json.loads(cache.read_text()))["question"] == question:
        return known["evaluation"]
    done = jaxmoe(command)
    if done.returncode:
        raise SystemExit(f"jaxmoe evaluate {checkpoint} ended with {done.returncode}")
    result = json.loads(done.stdout)
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text(json.dumps({"question": question, "evaluation": result}, indent=1))
    return result


def jaxmoe(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command as its users do, and say so."""
    print(shlex.join(["jaxmoe", *command]), file=sys.stderr, flush=True)
    return subprocess.run([sys.executable, "-m", "jaxmoe", *command, "--json"], stdout=subprocess.PIPE, text=True)


def check(records: list[dict[str, Any]], texts: list[Path], arguments: argparse.Namespace) -> None:
    """Repeat some evaluations in PyTorch; end the program if one is more than the tolerance away."""
    from jaxmoe.torch.perplexity import perplexity

    cells = [record for record in records if "ratio" in record and "evaluation" in record]
    count = min(arguments.check, len(cells))
    chosen = [record for record in records if record["method"] == "original"]
    chosen += [cells[(2 * i + 1) * len(cells) // (2 * count)] for i in range(count)]
    apart = []
    for record in chosen:
        ours = record["evaluation"]["geometric_mean_perplexity"]
        repeated = perplexity(record["folder"], texts, length=arguments.length, windows=arguments.windows)
        theirs = repeated.geometric_mean_perplexity
        apart.append(abs(ours / theirs - 1))
        print(f"{record['folder']}: {ours:.5f}, in PyTorch {theirs:.5f}, apart {apart[-1]:.1e}", file=sys.stderr)
    if max(apart) > TOLERANCE:
        raise SystemExit(f"jaxmoe and PyTorch are {max(apart):.1e} apart, more than {TOLERANCE:.1e}")


def perplexities(records: list[dict[str, Any]]) -> str:
    """Return the table of geometric-mean perplexities, and why some of its cells are empty."""
    ratios = list(dict.fromkeys(record["ratio"] for record in records if "ratio" in record))
    rows = [["checkpoint (original)", "method", *ratios]]
    rows.append(["---"] * len(rows[0]))
    notes = []
    bases = {r["checkpoint"]: r["evaluation"] for r in records if r["method"] == "original"}
    for name, method in dict.fromkeys((r["checkpoint"], r["method"]) for r in records if "ratio" in r):
        own = [r for r in records if (r["checkpoint"], r["method"]) == (name, method)]
        cells = {record["ratio"]: cell(record, bases[name]) for record in own}
        original = f"{name} ({bases[name]['geometric_mean_perplexity']:.2f})"
        rows.append([original, method, *(cells.get(ratio, "") for ratio in ratios)])
        notes += [f"– {name}, {method}: {r['infeasible'].split(': ', 1)[-1]}." for r in own if "infeasible" in r][:1]
    return "\n".join([markdown(rows), *(["", *(f"- {note}" for note in notes)] if notes else [])])


def cell(record: dict[str, Any], base: dict[str, Any]) -> str:
    if "infeasible" in record:
        return "–"
    if "missing" in record:
        return "not run"
    own = record["evaluation"]
    value = own["geometric_mean_perplexity"]
    pairs = zip(own["texts"], base["texts"], strict=True)
    grown, worst = max((text["perplexity"] / before["perplexity"], text["name"]) for text, before in pairs)
    return f"{value:.2f} (x{value / base['geometric_mean_perplexity']:.3f}; {worst} x{grown:.3f})"


def errors(records: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the table that compares the improved methods' reconstruction errors, layer by layer."""
    by_case = {(r["checkpoint"], r["method"], r["ratio"]): r["layers"] for r in records if "layers" in r}
    rows = []
    for (name, method, ratio), layers in by_case.items():
        other = by_case.get((name, "svd improved", ratio))
        if method != "mobe improved" or other is None:
            continue  # without calibration: plain errors are what these minimise
        cells = []
        for projection in layers[0]["projections"]:
            ours, theirs = ([x["projections"][projection]["error"] for x in side] for side in (layers, other))
            lower = sum(a < b for a, b in zip(ours, theirs, strict=True))
            cells.append(f"{mean(ours):.3f} / {mean(theirs):.3f} ({lower} of {len(ours)})")
        rows.append([name, ratio, *cells])
    if rows:
        header = ["checkpoint", "removed", "gate", "up", "down"]
        yield "Mean relative error, MoBE / SVD (improved settings), and in how many layers MoBE's is lower:"
        yield markdown([header, ["---"] * len(header), *rows])


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def markdown(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def write(output: Path, records: list[dict[str, Any]]) -> None:
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(json.dumps(records, indent=1))


def insert(path: Path, text: str) -> None:
    """Replace what stands between the markers of a file."""
    before, rest = path.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
