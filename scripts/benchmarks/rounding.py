"""Streaming `jaxmoe compress --method rtn4` against a plain copy of the checkpoint's folder.

    python scripts/benchmarks/rounding.py [--folder FOLDER] [--gigabytes 1]

A random bf16 checkpoint of Qwen3-MoE shape, 8 layers of equal experts (128 x 1024), is written to a temporary folder
and removed again. Each setting runs as its users run it. CPU seconds are those of the whole program; "start" is what a
checkpoint of no layers would take, told from one of a single layer: the program's start, and compiling. The last column
is what the layers take beside that. The file system's cache is warm.
"""

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path

from conversion import HIDDEN, INTERMEDIATE, PROGRAM, generate, run
from one_core import table

LAYERS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to put the temporary folder")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the checkpoint")
    asked = parser.parse_args()
    experts = max(1, round(160 * asked.gigabytes))
    rows = []
    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        folder = Path(name)
        sizes = {"experts": experts, "hidden": HIDDEN, "intermediate": INTERMEDIATE}
        size = generate(folder / "source", layers=LAYERS, **sizes)
        # Of the same shapes: what is compiled depends on them.
        small = generate(folder / "small", layers=1, **sizes)
        os.sync()
        begin, used = time.perf_counter(), time.process_time()
        shutil.copytree(folder / "source", folder / "copy")
        wall, cpu = time.perf_counter() - begin, time.process_time() - used
        rows.append(["copy", f"{wall:.1f}", f"{cpu:.1f}", "", f"{size / 1e6 / cpu:.0f}"])
        for setting in ("paper", "improved"):
            found = {}
            for source in ("small", "source"):
                command = (PROGRAM, "compress", str(folder / source), str(folder / "out"), "--method", "rtn4")
                found[source] = run(*command, "--setting", setting)
                shutil.rmtree(folder / "out")
            rest = found["source"].cpu - found["small"].cpu
            start = found["small"].cpu - rest * small / (size - small)
            rows.append(
                [
                    setting,
                    f"{found['source'].wall:.1f}",
                    f"{found['source'].cpu:.1f}",
                    f"{start:.1f}",
                    f"{(size - small) / 1e6 / rest:.0f}",
                ]
            )
    print(f"{size / 1e6:.0f} MB\n")
    print(table(["", "seconds", "CPU seconds", "start (CPU seconds)", "MB / CPU second"], rows))


if __name__ == "__main__":
    main()
