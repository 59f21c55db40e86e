"""`scripts/readme_results.py`: one table of several reports, into a file, and the original again in PyTorch."""

import subprocess
import sys
from pathlib import Path

import pytest
from program import ENVIRONMENT

from jaxmoe.data import demo_texts

SCRIPT = Path(__file__).parents[2] / "scripts" / "readme_results.py"


def run(*arguments):
    command = [sys.executable, SCRIPT, *arguments]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=300)


def test_table_goes_into_the_readme(compared, tmp_path):
    pytest.importorskip("torch")
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- results -->\nold\n<!-- end of results -->\nafter\n", encoding="utf-8")
    done = run(compared.folder, "--into", readme, "--check", "0", "--text", demo_texts()[0].parent)
    assert done.returncode == 0, done.stderr
    assert float(done.stderr.strip().rsplit(" ", 1)[1]) < 1e-4, "the original in PyTorch"
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("before\n<!-- results -->\n`python ")
    assert text.endswith("\n<!-- end of results -->\nafter\n")
    assert done.stdout.strip() in text
    assert "\nold\n" not in text
    row = compared.row("svd", "improved")
    original = compared.row("original")["geometric_mean_perplexity"]
    wanted = (
        f"| source ({original:.2f}) | svd improved | {row['geometric_mean_perplexity']:.2f} (x{row['growth']:.3f}; "
    )
    assert wanted in done.stdout
    assert f"– source, mobe paper, steps=5, 0.8: {compared.row('mobe', 'paper')['reason']}" in done.stdout


def test_checkpoints_that_were_not_kept(compared):
    done = run(compared.folder, "--check", "1", "--text", demo_texts()[0].parent)
    assert done.returncode == 1
    assert "compare again with --keep" in done.stderr
    assert run(compared.folder, "--check", "1").returncode == 2
