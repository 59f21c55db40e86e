"""The results table, end to end on the bundled checkpoint."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from program import ENVIRONMENT

from jaxmoe.data import demo_checkpoint, demo_texts

SCRIPT = Path(__file__).parents[2] / "scripts" / "results.py"


@pytest.mark.slow
def test_table_holds_what_was_measured(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- results -->\nold\n<!-- end of results -->\nafter\n", encoding="utf-8")
    command = [
        sys.executable,
        SCRIPT,
        demo_checkpoint(),
        "--text",
        demo_texts()[0].parent,
        "--output",
        tmp_path / "out",
    ]
    command += ["--calibration", demo_texts()[0].parent]
    command += [
        "--variants",
        "svd:improved,svd:improved:calibrated,mobe:paper",
        "--ratios",
        "0.166,0.8:touched",
        "--windows",
        "4",
    ]
    command += ["--set", "mobe:paper:steps=20", "--into", readme, "--check", "2"]

    def run():
        return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True, timeout=600)

    first = run()
    printed = first.stdout
    apart = [float(line.rsplit(" ", 1)[1]) for line in first.stderr.splitlines() if "in PyTorch" in line]
    assert len(apart) == 3, "the original and two cells"
    assert max(apart) < 1e-4
    records = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    by_method = {(r["method"], r.get("ratio")): r for r in records}
    assert "out of reach" in by_method["mobe paper", "80.0% of touched"]["infeasible"]
    base, svd = (by_method[key]["evaluation"] for key in (("original", None), ("svd improved", "16.6% of experts")))
    assert svd["geometric_mean_perplexity"] > base["geometric_mean_perplexity"]
    value = svd["geometric_mean_perplexity"]
    cell = f"{value:.2f} (x{value / base['geometric_mean_perplexity']:.3f}; "
    assert cell in next(line for line in printed.splitlines() if "| svd improved |" in line)
    weighted = by_method["svd improved calibrated", "16.6% of experts"]["evaluation"]["geometric_mean_perplexity"]
    assert base["geometric_mean_perplexity"] < weighted < value
    row = next(line for line in printed.splitlines() if "| mobe paper |" in line)
    assert row.rstrip().endswith("| – |")

    text = readme.read_text(encoding="utf-8")
    assert text.startswith("before\n<!-- results -->\n")
    assert text.endswith("<!-- end of results -->\nafter\n")
    assert printed.strip() in text
    assert "\nold\n" not in text
    assert run().stdout == printed, "a second run measures nothing anew and prints the same"
