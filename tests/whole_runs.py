"""Whole runs at the shapes of small trained models, as a program: `python whole_runs.py FOLDER CORES METHOD...`.

Calibrates and compresses one layer of each shape with each method, everything in one process, as notebooks do.
"""

import os
import sys
from pathlib import Path

import numpy as np
import plain_checkpoint
from planned import run

from jaxmoe import Checkpoint, StoredModel
from jaxmoe.calibration.collect import calibrate_windows
from jaxmoe.texts import Windows

SHAPES = {"small": (16, 128, 64), "narrow": (32, 256, 128), "wide": (8, 128, 256), "square": (8, 96, 96)}
"""Experts, hidden size, expert intermediate size."""

DESCENTS_AT = ("small", "square")
"""Where mobe and rfid run too: most of their time goes into tracing, which more shapes would only repeat."""

SETTINGS = {"mobe": {"steps": 12}, "rfid": {"steps": 12}, "svd": {}, "d2moe": {}, "nystrom": {}}


def prepared(folder: Path, shape: tuple[int, int, int]):
    """Write a checkpoint of one layer and calibrate it, gradients included."""
    experts, hidden, intermediate = shape
    sizes = {"num_experts": experts, "hidden_size": hidden, "moe_intermediate_size": intermediate}
    source = plain_checkpoint.write(folder, num_hidden_layers=1, **sizes)
    ids = np.random.default_rng(0).integers(0, 32, (6, 24), dtype=np.int32)
    text = Windows(name="text", fingerprint="x", ids=ids, counted=np.ones(ids.shape, bool), left_out=0)
    statistics = calibrate_windows(
        StoredModel(source), [text], folder.with_name(f"{folder.name}-statistics"), gradients="sequence"
    )
    return Checkpoint.open(source), statistics.check()


def main(folder: Path, names: list[str]) -> None:
    """Run the methods at all shapes, those that descend at two."""
    for label, shape in SHAPES.items():
        checkpoint, statistics = prepared(folder / label, shape)
        for name in names:
            if "steps" in SETTINGS[name] and label not in DESCENTS_AT:
                continue
            options = {"settings": SETTINGS[name], "statistics": statistics}
            report = run(checkpoint, folder / f"{label}-{name}", name, ratio=0.4, **options)
            assert report["complete"]
            print(label, name, flush=True)


if __name__ == "__main__":
    os.sched_setaffinity(0, map(int, sys.argv[2].split(",")))
    main(Path(sys.argv[1]), sys.argv[3:])
