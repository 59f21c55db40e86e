"""What calibration costs beside the forward pass, and its memory on a checkpoint of 4 GB.

    python scripts/benchmarks/calibration.py [CHECKPOINT] [--text PATH ...] [--windows 128] [--folder FOLDER]
                                             [--gigabytes 4]

Cost: CPU seconds of the perplexity of some windows, of calibration with second moments, and with the Fisher information
too, on one core, in alternation; median and ratio. The bundled texts are short: every text's sums are written for
each layer, which weighs more the shorter it is. Memory: peak anonymous memory (see conversion.py) of `jaxmoe
calibrate` and `jaxmoe evaluate` on random checkpoints of equal layers (32 experts of 1024 x 512), 40 of them and 10.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from one_core import alternate, pin, ratio, table

pin()

from conversion import PROGRAM, generate, run  # noqa: E402

from jaxmoe.calibration.collect import calibrate_windows  # noqa: E402
from jaxmoe.checkpoint.stored_model import StoredModel  # noqa: E402
from jaxmoe.data import demo_checkpoint, demo_texts  # noqa: E402
from jaxmoe.evaluation.evaluate import evaluate_windows  # noqa: E402
from jaxmoe.texts import Tokenizer, text_windows  # noqa: E402

SHAPE = {"experts": 32, "hidden": 1024, "intermediate": 512, "vocabulary": 4096}


def cost(checkpoint: Path, paths: Sequence[Path], windows: int, rounds: int) -> str:
    """Return the table of CPU seconds, each round running everything once."""
    model = StoredModel(checkpoint)
    texts = text_windows(paths, Tokenizer.open(checkpoint), length=256, count=windows)

    def calibrated(**options) -> Callable[[], object]:
        def once() -> None:
            with tempfile.TemporaryDirectory() as folder:
                calibrate_windows(model, texts, Path(folder) / "statistics", **options)

        return once

    work = {
        "perplexity": lambda: evaluate_windows(model, texts),
        "--moments expert": calibrated(moments="expert"),
        "--moments weighted": calibrated(),
        "--moments expert --gradients sequence": calibrated(moments="expert", gradients="sequence"),
        "--moments weighted --gradients sequence": calibrated(gradients="sequence"),
        "--moments weighted --gradients token": calibrated(gradients="token"),
    }
    seconds = alternate(work, rounds)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    tokens = sum(text.ids.size for text in texts)
    rows = [
        [name, f"{value:.2f}", f"{tokens / value:,.0f}", f"{ratio(seconds[name], seconds['perplexity']):.2f}"]
        for name, value in medians.items()
    ]
    return table([f"{checkpoint.name}, {tokens:,} tokens", "CPU s", "tokens per CPU s", "of perplexity"], rows)


def memory(folder: Path, gigabytes: float) -> str:
    """Return the table of peaks, of the full checkpoint and of a quarter of its layers."""
    deep = round(10 * gigabytes)
    rows = []
    for layers in (deep, deep // 4):
        source = folder / f"source-{layers}"
        size = generate(source, layers=layers, **SHAPE)
        shutil.copy(demo_checkpoint() / "tokenizer.json", source)
        text = ("--text", str(demo_texts()[0]), "--sequences", "16", "--length", "256")
        calibration = run(PROGRAM, "calibrate", str(source), str(folder / f"statistics-{layers}"), *text)
        evaluation = run(PROGRAM, "evaluate", str(source), *text, "--generate", "0")
        rows.append(
            [
                f"{layers} layers, {size / 1e9:.2f} GB",
                *(f"{value / 1e6:.0f}" for value in (calibration.anonymous, evaluation.anonymous)),
                *(f"{value:.0f}" for value in (calibration.wall, evaluation.wall)),
            ]
        )
        shutil.rmtree(source)
        shutil.rmtree(folder / f"statistics-{layers}")
    columns = ["checkpoint", "calibrate, peak MB", "evaluate, peak MB", "calibrate, s", "evaluate, s"]
    return table(columns, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path, default=demo_checkpoint())
    parser.add_argument("--folder", type=Path, help="where to put the temporary folder")
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the larger checkpoint, 0 for none")
    parser.add_argument("--text", nargs="+", type=Path, help="the bundled ones by default")
    parser.add_argument("--windows", type=int, default=128, help="of each text, at most")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(cost(arguments.checkpoint, arguments.text or demo_texts(), arguments.windows, arguments.rounds))
    if arguments.gigabytes:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            print()
            sys.stdout.flush()
            print(memory(Path(folder), arguments.gigabytes))


if __name__ == "__main__":
    main()
