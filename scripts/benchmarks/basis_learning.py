"""Learning the mixture of bases (MoBE): jaxmoe against the published algorithm in plain PyTorch.

    python scripts/benchmarks/basis_learning.py [--checkpoint FOLDER] [--layers 0,1] [--projections gate,up]
                                                [--bases 4,2] [--reference-steps 10000] [--rounds 5] [--json FILE]

Equal weights, start and shapes, rank = rows, one core, CPU seconds without compilation, in one process. First table:
time of a step, contestants in turn, medians over rounds; "gemm" is the share of a 1024 x 1024 matrix product's speed
that the step's products reach. Second table, for every matrix: the lowest error of all steps of the reference and the
time of the whole run; the improved solver with one fixed recipe, in a short and in its default schedule; and the
published algorithm in jaxmoe given the default schedule's time. "faster" is the reference's time over the schedule's,
where the schedule's error is not higher. Without a checkpoint the bundled one is measured.
"""

import argparse
import json
import statistics
import sys
import time
from functools import partial
from importlib import resources

from one_core import alternate, pin, ratio, table

pin()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import reference_mobe  # noqa: E402
import torch  # noqa: E402

from jaxmoe.checkpoint import Checkpoint  # noqa: E402
from jaxmoe.solvers.basis_learning import learn_basis  # noqa: E402
from jaxmoe.solvers.variable_projection import variable_projection  # noqa: E402

SHORT, DEFAULT = 300, 1000
"""Lengths of the improved solver's schedule."""

SPAN = 200
"""Steps that are timed at once."""


def seconds_of(run) -> tuple[float, object]:
    """Return the CPU seconds of a call whose program is compiled already, and its result."""
    jax.block_until_ready(run())
    begin = time.process_time()
    result = jax.block_until_ready(run())
    return time.process_time() - begin, result


def error_of(fit, weight) -> float:
    """Return the relative error over all experts."""
    energy = np.sum(np.square(weight, dtype=np.float64), axis=(1, 2))
    return float(np.sqrt(np.sum(np.square(np.asarray(fit.error, np.float64)) * energy) / np.sum(energy)))


def gemm_speed(rounds: int) -> float:
    """Return the floating-point operations in a second of a large float32 product."""
    square = jnp.ones((1024, 1024))
    product = jax.jit(lambda x: x @ x)
    seconds = [seconds_of(lambda: product(square))[0] for _ in range(rounds)]
    return 2 * 1024**3 / min(seconds)


def step_row(weight, bases: int, rounds: int) -> list[str]:
    """Time a step of the reference, of the published algorithm and of the improved one."""
    experts, rows, columns = weight.shape
    on_device = jnp.asarray(weight)
    published = partial(learn_basis, on_device, bases=bases, rank=rows, patience=None)
    improved = partial(variable_projection, on_device, bases=bases, rank=rows, trial=0)
    contestants = {}
    # Starts, final solutions and errors cancel in the difference of a long and a short run.
    for factor in (1, 3):
        steps = factor * SPAN
        contestants[f"reference {factor}"] = partial(reference_mobe.fit, weight, bases=bases, rank=rows, steps=steps)
        contestants[f"published {factor}"] = lambda s=steps: jax.block_until_ready(published(steps=s))
        contestants[f"improved {factor}"] = lambda s=steps: jax.block_until_ready(improved(steps=s))
    seconds = alternate(contestants, rounds)
    step = {
        name: [(a - b) / (2 * SPAN) for a, b in zip(seconds[f"{name} 3"], seconds[f"{name} 1"], strict=True)]
        for name in ("reference", "published", "improved")
    }
    entries = 2 * experts * rows * columns
    operations = {
        "published": 3 * entries * (rows + bases),
        "improved": entries * (4 * rows + 3 * bases) + 2 * experts * rows**3,
    }
    speed = gemm_speed(rounds)
    share = {name: work / statistics.median(step[name]) / speed for name, work in operations.items()}
    row = [" x ".join(map(str, weight.shape)), str(bases)]
    row += [f"{1e3 * statistics.median(times):.2f}" for times in step.values()]
    row += [f"{ratio(step['reference'], step[name]):.2f}" for name in ("published", "improved")]
    return row + [f"{share[name]:.0%}" for name in ("published", "improved")]


def race(weight, bases: int, reference_steps: int) -> dict[str, float]:
    """Run the reference to its end and the improved solver's schedules on one matrix."""
    rows = weight.shape[1]
    reference = reference_mobe.fit(weight, bases=bases, rank=rows, steps=reference_steps)
    on_device = jnp.asarray(weight)
    result = {"reference_error": float(reference.errors.min()), "reference_seconds": float(reference.seconds[-1])}
    for name, steps in (("short", SHORT), ("default", DEFAULT)):
        seconds, fit = seconds_of(partial(variable_projection, on_device, bases=bases, rank=rows, steps=steps))
        result |= {f"{name}_error": error_of(fit, weight), f"{name}_seconds": seconds}
    probe = partial(learn_basis, on_device, bases=bases, rank=rows, patience=None)
    step = (seconds_of(partial(probe, steps=3 * SPAN))[0] - seconds_of(partial(probe, steps=SPAN))[0]) / (2 * SPAN)
    equal = max(1, int(result["default_seconds"] / step))
    result["published_error_at_equal_time"] = error_of(probe(steps=equal), weight)
    return result


def faster(result, name: str) -> str:
    if result[f"{name}_error"] > result["reference_error"]:
        return "not reached"
    return f"{result['reference_seconds'] / result[f'{name}_seconds']:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=None, help="folder or hub id; the bundled checkpoint by default")
    parser.add_argument("--layers", default=None, help="positions of MoE layers, all by default")
    parser.add_argument("--projections", default="gate,up")
    parser.add_argument("--bases", default="4,2", help="numbers of bases to measure")
    parser.add_argument("--reference-steps", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", default=None, help="also write the second table's numbers to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    source = options.checkpoint or str(resources.files("jaxmoe.data") / "demo")
    checkpoint = Checkpoint.open(source)
    positions = range(len(checkpoint.layers)) if options.layers is None else map(int, options.layers.split(","))
    counts = [int(x) for x in options.bases.split(",")]
    cases = [
        (position, projection, bases)
        for position in positions
        for projection in options.projections.split(",")
        for bases in counts
    ]

    def read(position, projection):
        return np.asarray(checkpoint.projection(checkpoint.layers[position], projection), np.float32)

    print(f"jax {jax.__version__}, torch {torch.__version__}, {options.rounds} rounds\n")
    header = ["experts x rows x columns", "bases", "reference (CPU ms)", "published (CPU ms)", "improved (CPU ms)"]
    header += ["reference / published", "reference / improved", "published gemm", "improved gemm"]
    first = read(*cases[0][:2])
    print(table(header, [step_row(first, bases, options.rounds) for bases in counts]), "\n", flush=True)

    header = ["layer", "projection", "bases", f"reference, {options.reference_steps} steps (error)", "(CPU s)"]
    for steps in (SHORT, DEFAULT):
        header += [f"improved, {steps} steps (error)", "(CPU s)", "faster"]
    header += ["published in jaxmoe at equal time (error)"]
    rows, records = [], []
    for position, projection, bases in cases:
        print(f"layer {position}, {projection}, {bases} bases ...", file=sys.stderr, flush=True)
        result = race(read(position, projection), bases, options.reference_steps)
        row = [str(position), projection, str(bases)]
        row += [f"{result['reference_error']:.4f}", f"{result['reference_seconds']:.1f}"]
        for name in ("short", "default"):
            row += [f"{result[f'{name}_error']:.4f}", f"{result[f'{name}_seconds']:.2f}", faster(result, name)]
        rows.append([*row, f"{result['published_error_at_equal_time']:.4f}"])
        records.append({"layer": position, "projection": projection, "bases": bases, **result})
    print(table(header, rows))
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"source": source, "results": records}, file, indent=1)


if __name__ == "__main__":
    main()
