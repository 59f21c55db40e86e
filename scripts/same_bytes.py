"""Compare the tensors that two versions of the code write: `python scripts/same_bytes.py --against COMMIT [RUN...]`.

Carries the runs of `tests/same_bytes/runs.py` out with the code of the commit and with that of the working tree (or of
`--of COMMIT`), each in a process of its own, and tells which tensors differ. `--record` writes the checksums of the
commit beside the test, for this machine's kind of processor and these versions of JAX and numpy.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "tests" / "same_bytes" / "runs.py"
CHECKSUMS = RUNS.with_name("checksums.json")


def results(code: Path, work: Path, names: list[str]) -> dict:
    """Return what `runs.py` prints with the package of one folder."""
    print(f"with the code of {code}:", file=sys.stderr)
    path = os.pathsep.join(map(str, (code, ROOT / "tests", RUNS.parent)))
    environment = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, RUNS, work, *names], env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def differences(before: dict[str, list], after: dict[str, list]) -> list[str]:
    """Tell in lines how the tensors of one run differ."""
    lines = [
        f"changed {name}: {before[name][:2]} {after[name][:2]}"
        for name in before.keys() & after.keys()
        if before[name] != after[name]
    ]
    gone, new = before.keys() - after.keys(), after.keys() - before.keys()
    renamed = [(old, name) for old in sorted(gone) for name in sorted(new) if before[old] == after[name]]
    lines += [f"renamed {old} -> {name}" for old, name in renamed]
    lines += [f"gone {name}" for name in gone - {old for old, _ in renamed}]
    lines += [f"new {name}" for name in new - {name for _, name in renamed}]
    return sorted(lines)


def record(found: dict) -> None:
    """Write one digest for each run, in the place of earlier ones of the same platform."""
    sys.path[:0] = [str(RUNS.parent), str(RUNS.parents[1])]
    from runs import digest  # pyright: ignore[reportMissingImports]

    known = json.loads(CHECKSUMS.read_text()) if CHECKSUMS.exists() else []
    own = {"platform": found["platform"], "runs": {name: digest(run) for name, run in found["runs"].items()}}
    kept = [other for other in known if other["platform"] != own["platform"]]
    CHECKSUMS.write_text(json.dumps([*kept, own], indent=1) + "\n")


def main() -> int:
    """Compare, or record."""
    parser = argparse.ArgumentParser(description="Compare the tensors that two versions of the code write.")
    parser.add_argument("names", metavar="RUN", nargs="*", help="some runs alone")
    parser.add_argument("--against", metavar="COMMIT", required=True)
    parser.add_argument("--of", metavar="COMMIT", help="what is compared with it; by default the working tree")
    parser.add_argument("--record", action="store_true", help="write the checksums of --against beside the test")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work, trees, found = Path(folder), [], []
        try:
            commits = [options.against] if options.record else [options.against, options.of]
            for place, commit in enumerate(commits):
                code = ROOT
                if commit is not None:
                    code = work / f"code{place}"
                    add = ["git", "-C", str(ROOT), "worktree", "add", "--quiet", "--detach", str(code), commit]
                    subprocess.run(add, check=True)
                    trees.append(code)
                found.append(results(code, work / f"work{place}", options.names))
        finally:
            for code in trees:
                subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(code)], check=False)
    if options.record:
        record(found[0])
        return 0
    before, after = (each["runs"] for each in found)
    wrong = {name: lines for name in before if (lines := differences(before[name], after[name]))}
    for name, lines in wrong.items():
        print(f"{name}:", *lines, sep="\n  ")
    print(f"{len(before) - len(wrong)} of {len(before)} runs wrote the same bytes")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
