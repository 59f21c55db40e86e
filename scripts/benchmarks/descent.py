"""How robust the descent of variable projection is: many targets, several schedules, with returns and without.

Targets are layers of checkpoints (cut to one shape, perturbed, their rows, columns and experts rescaled) and structured
random matrices: few strong directions, near copies, entries and experts of very unequal size, planted mixtures, exact
low rank. Every fourth is fitted under a second moment of its inputs. Asked of every fit: that what is returned is not
above the best loss of its descent; of all schedules of a target: that a longer one is not worse than a shorter one; of
all targets of a size: that the mean error is not above that of the same descent without returns (`rise` infinite).

    python scripts/benchmarks/descent.py --checkpoints CHECKPOINT,CHECKPOINT --targets 200

Ends with 1 where something asked for does not hold.
"""

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from jaxmoe.checkpoint import Checkpoint
from jaxmoe.factors.shared_basis import ACTIVATIONS
from jaxmoe.solvers.basis_size import choose_bases
from jaxmoe.solvers.variable_projection import ROUNDING, variable_projection

SHAPE = (8, 64, 96)
"""Experts, rows and columns of every target."""

KEPT = 1.01
"""Error of what is returned over the best of its descent, whose float32 sums may be off by `ROUNDING`."""

NOISE = 1.02
"""Error of a longer schedule over that of a shorter one up to which both are called equal."""


class Target(NamedTuple):
    """Matrices to be fitted `[expert, row, column]`, and a moment of their inputs or None."""

    name: str
    weight: np.ndarray
    moment: np.ndarray | None


def orthonormal(random, size: int) -> np.ndarray:
    return np.linalg.qr(random.normal(size=(size, size)))[0]


def decaying(power: float):
    """Return a maker of matrices whose singular values fall with a power of their index, along shared directions."""

    def make(random):
        experts, rows, columns = SHAPE
        spread = np.arange(1, rows + 1.0) ** -power
        return np.swapaxes(random.normal(size=(experts, columns, rows)) * spread @ orthonormal(random, rows).T, 1, 2)

    return make


def copies(noise: float):
    """Return a maker of experts that differ from one another by so much of their size."""
    return lambda random: random.normal(size=(1, *SHAPE[1:])) + noise * random.normal(size=SHAPE)


def planted(random):
    experts, rows, columns = SHAPE
    bases, mixing = random.normal(size=(3, rows, columns)) / 2, random.normal(size=(experts, 3))
    features = np.asarray(ACTIVATIONS["wavelet"](np.einsum("em,mrq->erq", mixing, bases)))
    weight = random.normal(size=(experts, rows, rows)) @ features
    return weight + 0.02 * weight.std() * random.normal(size=SHAPE)


def low_rank(random):
    experts, rows, columns = SHAPE
    return random.normal(size=(experts, rows, rows // 2)) @ random.normal(size=(experts, rows // 2, columns))


def outliers(random):
    weight = random.normal(size=SHAPE)
    weight[:, :2] *= 20
    weight[:, :, 3] *= 20
    return weight


def rescaled(random, weight, rows=0.0, columns=0.0, experts=0.0):
    """Return matrices whose rows, columns and experts are multiplied by log-normal numbers of these widths."""
    for axis, width in enumerate((experts, rows, columns)):
        shape = [1, 1, 1]
        shape[axis] = weight.shape[axis]
        weight = weight * np.exp(width * random.normal(size=shape))
    return weight


STRUCTURED = {
    "gaussian": lambda random: random.normal(size=SHAPE),
    "power law": decaying(0.7),
    "steep power law": decaying(2.0),
    "copies": copies(0.1),
    "near copies": copies(0.02),
    "planted": planted,
    "unequal entries": lambda random: rescaled(random, random.normal(size=SHAPE), rows=1, columns=1),
    "unequal experts": lambda random: rescaled(random, random.normal(size=SHAPE), experts=1.5),
    "low rank": low_rank,
    "sparse": lambda random: random.normal(size=SHAPE) * (random.random(SHAPE) < 0.1),
    "outliers": outliers,
}
"""Makers of structured random matrices."""

CHANGED = {
    "as it is": lambda random, weight: weight,
    "perturbed": lambda random, weight: weight + 0.1 * weight.std() * random.normal(size=SHAPE),
    "rows and columns rescaled": partial(rescaled, rows=0.7, columns=0.7),
    "experts rescaled": partial(rescaled, experts=1.0),
    "a thousand times as large": lambda random, weight: 1000 * weight,
}
"""What is done to the layers of checkpoints."""


def cut(weight) -> np.ndarray | None:
    """Return the first experts, rows and columns of matrices laid along their longer side, None of smaller ones."""
    weight = np.asarray(weight, np.float32)
    weight = weight if weight.shape[1] <= weight.shape[2] else np.swapaxes(weight, 1, 2)
    return weight[tuple(slice(size) for size in SHAPE)] if np.all(np.array(weight.shape) >= SHAPE) else None


def layers(folders: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    for folder in folders:
        checkpoint = Checkpoint.open(folder)
        for layer in checkpoint.layers:
            parts = {name: checkpoint.projection(layer, name) for name in ("gate", "up", "down")}
            parts = {"gate_up": np.concatenate([parts["gate"], parts["up"]], axis=1), "down": parts["down"]}
            for name, weight in parts.items():
                if (small := cut(weight)) is not None:
                    yield f"{checkpoint.folder.name} {layer.index} {name}", small


def targets(folders: list[str], seed: int) -> Iterator[Target]:
    """Return targets without end, by turns from checkpoints and structured at random."""
    stored = list(layers(folders))
    number = 0
    while True:
        random = np.random.default_rng([seed, number])
        turn, structured = divmod(number, 2) if stored else (number, True)
        if structured:
            name = list(STRUCTURED)[turn % len(STRUCTURED)]
            weight = STRUCTURED[name](random)
        else:
            (source, whole), change = stored[turn % len(stored)], list(CHANGED)[turn % len(CHANGED)]
            name, weight = f"{source}, {change}", CHANGED[change](random, whole)
        moment = None
        if turn % 4 == 3:
            axes = orthonormal(random, SHAPE[2])
            moment = (axes * np.geomspace(1, 1e-3, SHAPE[2]) @ axes.T)[None].astype(np.float32)
        yield Target(name, weight.astype(np.float32), moment)
        number += 1


def error_of(fit, target: Target) -> float:
    """Return the relative error of the whole target in float64."""
    coefficients, bases, mixing = (np.asarray(x, np.float64) for x in (fit.coefficients, fit.bases, fit.mixing))
    blend = np.einsum("em,mrq->erq", mixing, bases)
    gap = coefficients @ (blend * (1 - blend**2) / (1 + blend**2) ** 3) - target.weight
    moment = np.eye(SHAPE[2]) if target.moment is None else target.moment[0].astype(np.float64)
    lost, whole = (np.sum((x @ moment) * x) for x in (gap, target.weight.astype(np.float64)))
    return float(np.sqrt(lost / whole))


def sizes(removed: float) -> dict[str, int]:
    experts, rows, columns = SHAPE
    bases = choose_bases(SHAPE, 1 - removed)
    rank = ((1 - removed) * experts * rows * columns - experts * bases) / (experts * rows + bases * columns)
    return {"bases": bases, "rank": max(1, min(rows, int(rank)))}


def mean(values) -> float:
    return float(np.exp(np.mean(np.log(np.maximum(values, ROUNDING**0.5)))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", default="", help="folders of checkpoints, with commas between them")
    parser.add_argument("--targets", type=int, default=22)
    parser.add_argument("--removed", default="0.166,0.25,0.4,0.6,0.8", help="removed shares, by turns")
    parser.add_argument("--steps", default="100,300,1000", help="lengths of the schedule, rising")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    removed = [float(x) for x in options.removed.split(",")]
    lengths = [int(x) for x in options.steps.split(",")]
    floor = ROUNDING**0.5
    faults, ways, worst = [], {"returned": 0, "lower rate": 0}, {"above best": 0.0, "longer": 0.0}
    errors: dict[tuple[float, int], list[tuple[float, float]]] = {}
    source = targets([folder for folder in options.checkpoints.split(",") if folder], options.seed)
    for number, target in zip(range(options.targets), source):
        share = removed[number % len(removed)]
        shorter = np.inf
        line = []
        for steps in lengths:
            solve = partial(
                variable_projection,
                target.weight,
                **sizes(share),
                steps=steps,
                moment=target.moment,
                key=jax.random.key(number),
            )
            fit, never = solve(), solve(rise=float("inf"))
            error, before = error_of(fit, target), error_of(never, target)
            above = error / float(np.sqrt(np.nanmin(fit.losses) + ROUNDING))
            longer = max(error, floor) / max(shorter, floor)
            where = f"{target.name}, {share:.1%} removed, {steps} steps"
            if above > KEPT:
                faults.append(f"{where}: what is returned is {above:.3f} times the best")
            if longer > NOISE:
                faults.append(f"{where}: {longer:.3f} times the error of the next shorter schedule")
            worst = {"above best": max(worst["above best"], above), "longer": max(worst["longer"], longer)}
            asked, chosen, _ = np.asarray(fit.rates)
            ways["returned"] += int(fit.returns) > 0
            ways["lower rate"] += bool(chosen < asked)
            errors.setdefault((share, steps), []).append((error, before))
            shorter = min(shorter, error)
            line.append(f"{error:.4f} ({before:.4f}, {int(fit.returns)} returns, rate {float(fit.rates[2]):.3g})")
        print(f"{target.name}, {share:.1%}:", "; ".join(line), file=sys.stderr, flush=True)
    print("| removed | steps | targets | mean error | without returns | largest ratio of both |")
    print("|---|---|---|---|---|---|")
    for (share, steps), both in sorted(errors.items()):
        now, before = np.array(both).T
        largest = np.max(np.maximum(now, floor) / np.maximum(before, floor))
        print(f"| {share:.1%} | {steps} | {len(both)} | {mean(now):.4f} | {mean(before):.4f} | {largest:.3f} |")
        if mean(now) > mean(before):
            faults.append(f"{share:.1%} removed, {steps} steps: a mean error above that without returns")
    fits = options.targets * len(lengths)
    print(f"\n{fits} fits, {ways['returned']} returned to their best, {ways['lower rate']} took a lower rate by trial.")
    print(f"Error over the best of the descent: at most {worst['above best']:.4f} ({KEPT} allowed).")
    print(f"Error over that of the next shorter schedule: at most {worst['longer']:.4f} ({NOISE} allowed).")
    for fault in faults:
        print(fault)
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
