"""The README's results table from the reports of `jaxmoe compare`, and some of its numbers again in PyTorch.

    jaxmoe compare CHECKPOINT REPORT --methods svd,mobe --ratios .2,.4 --text FOLDER --setting both --keep
    python scripts/readme_results.py REPORT... [--into README.md] [--check 3 --text FOLDER]

A cell holds the geometric mean of the texts' perplexities, how many times the original's it is, and the text on which
it grew most. `--check N` repeats N cells, spread evenly over the table, and every original through transformers and
PyTorch, prints how far they are apart, and ends with an error if that is more than 0.1 %; it needs the compressed
checkpoints, so compare with `--keep`.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from jaxmoe.report.comparison import NOTHING, markdown, overview, reasons

TOLERANCE = 1e-3
"""Relative difference of perplexities that are said to be the same."""

BEGIN, END = "<!-- results -->", "<!-- end of results -->"


def main() -> None:
    arguments = parse()
    records = [json.loads((report / "comparison.json").read_bytes()) for report in arguments.reports]
    table = tabulate(records)
    print(table)
    if arguments.check is not None:
        check(records, arguments.text, arguments.check)
    if arguments.into:
        insert(arguments.into, f"`{shlex.join(['python', *sys.argv])}` gave:\n\n{table}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", type=Path, nargs="+", metavar="REPORT")
    parser.add_argument("--into", type=Path, help=f"file in which to replace what stands between {BEGIN} and {END}")
    parser.add_argument("--check", type=int, metavar="N", help="repeat the originals and N cells in PyTorch")
    parser.add_argument("--text", type=Path, help="with --check: folder of the texts that were evaluated")
    arguments = parser.parse_args()
    if arguments.check is not None and arguments.text is None:
        parser.error("--check needs --text FOLDER")
    return arguments


def tabulate(records: list[dict[str, Any]]) -> str:
    """Return one table of all reports, and why some of its cells are empty."""
    found = [overview(record) for record in records]
    sizes = list(dict.fromkeys(size for header, *_ in found for size in header[1:]))
    lines, notes = [], []
    for record, (header, *rows) in zip(records, found, strict=True):
        name = f"{Path(record['source']).name} ({record['rows'][0]['geometric_mean_perplexity']:.2f})"
        for row in rows:
            cells = dict(zip(header[1:], row[1:], strict=True))
            lines.append([name, row[0], *(cells.get(size, "") for size in sizes)])
        notes += [f"- {NOTHING} {Path(record['source']).name}, {reason}" for reason in reasons(record)]
    return "\n\n".join(
        [markdown(["checkpoint (original)", "method", *sizes], *lines), *(["\n".join(notes)] if notes else [])]
    )


def check(records: list[dict[str, Any]], texts: Path, count: int) -> None:
    """Repeat some evaluations in PyTorch; end the program if one is more than the tolerance away."""
    from jaxmoe.torch.perplexity import perplexity

    chosen = [(record, record["source"], record["rows"][0]) for record in records]
    cells = [
        (record, cell["output"], cell["evaluation"])
        for record in records
        for cell in record["cells"]
        if "output" in cell
    ]
    count = min(count, len(cells))
    chosen += [cells[(2 * i + 1) * len(cells) // (2 * count)] for i in range(count)]
    if missing := [folder for _, folder, _ in chosen if not Path(folder).exists()]:
        raise SystemExit(f"{', '.join(missing)} are not there: compare again with --keep")
    apart = []
    for record, folder, measured in chosen:
        paths = [texts / f"{text['name']}.txt" for text in record["texts"]]
        windows = max(text["windows"] for text in record["texts"])
        repeated = perplexity(folder, paths, length=record["length"], windows=windows)
        ours, theirs = measured["geometric_mean_perplexity"], repeated.geometric_mean_perplexity
        apart.append(abs(ours / theirs - 1))
        print(f"{folder}: {ours:.5f}, in PyTorch {theirs:.5f}, apart {apart[-1]:.1e}", file=sys.stderr)
    if max(apart) > TOLERANCE:
        raise SystemExit(f"jaxmoe and PyTorch are {max(apart):.1e} apart, more than {TOLERANCE:.1e}")


def insert(path: Path, text: str) -> None:
    """Replace what stands between the markers of a file."""
    before, rest = path.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
