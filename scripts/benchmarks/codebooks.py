"""Codebooks of the rows of a matrix: jaxmoe's exact weighted k-means against scikit-learn's KMeans, row by row.

    python scripts/benchmarks/codebooks.py [--rounds 5] [--rows 256] [--columns 2048]

scikit-learn runs as SqueezeLLM's released code calls it: k-means++, one start, 50 iterations, seed 0. Gaussian rows
with exponential weights; both in float64. One core, CPU seconds, contestants in turn, medians. "loss" is scikit-learn's
weighted squared error in units of jaxmoe's: the mean over the rows, and the least and the most of any.
"""

import argparse
import statistics
import sys
from functools import partial
from typing import Any, cast

from one_core import alternate, pin, ratio, table

pin()

import jax  # noqa: E402
import numpy as np  # noqa: E402

from jaxmoe.solvers.codebooks import codebook  # noqa: E402

CODES = (4, 8, 16)


def scikit_learn(values, weights, codes):
    from sklearn.cluster import KMeans

    found = np.empty((len(values), codes))
    for row, (x, v) in enumerate(zip(values, weights)):
        means = KMeans(codes, n_init=cast(Any, 1), max_iter=50, random_state=0).fit(x[:, None], sample_weight=v)
        found[row] = np.sort(means.cluster_centers_[:, 0])
    return found


def loss(values, weights, codebooks) -> np.ndarray:
    """Return the weighted squared error of every row."""
    halves = (codebooks[:, 1:] + codebooks[:, :-1]) / 2
    nearest = np.array([own[np.searchsorted(cut, x)] for own, cut, x in zip(codebooks, halves, values)])
    return np.sum(weights * (values - nearest) ** 2, axis=1)


def measure(values, weights, codes: int, rounds: int) -> list[str]:
    with jax.enable_x64(True):
        ours = partial(jax.jit(partial(codebook, codes=codes)), jax.numpy.asarray(values), jax.numpy.asarray(weights))
        contestants = {
            "jaxmoe": lambda: jax.block_until_ready(ours()),
            "scikit-learn": lambda: scikit_learn(values, weights, codes),
        }
        seconds = alternate(contestants, rounds)
        losses = {name: loss(values, weights, np.asarray(run())) for name, run in contestants.items()}
    excess = losses["scikit-learn"] / losses["jaxmoe"]
    row = [str(codes), *(f"{statistics.median(times):.2f}" for times in seconds.values())]
    row += [f"{ratio(seconds['scikit-learn'], seconds['jaxmoe']):.1f}"]
    return [*row, f"{excess.mean():.3f}", f"{excess.min():.3f} to {excess.max():.3f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--columns", type=int, default=2048)
    asked = parser.parse_args()
    try:
        import sklearn
    except ImportError:
        sys.exit("scikit-learn is not installed (the extra `eval` brings it): there is nothing to compare with")
    rng = np.random.default_rng(0)
    values, weights = rng.normal(size=(asked.rows, asked.columns)), rng.exponential(size=(asked.rows, asked.columns))
    header = ["codes", "jaxmoe (CPU s)", "scikit-learn (CPU s)", "scikit-learn / jaxmoe", "loss, mean", "least to most"]
    rows = []
    for codes in CODES:
        print(f"{codes} codes ...", file=sys.stderr, flush=True)
        rows.append(measure(values, weights, codes, asked.rounds))
    print(f"jax {jax.__version__}, scikit-learn {sklearn.__version__}, {asked.rows} rows of {asked.columns}\n")
    print(table(header, rows))


if __name__ == "__main__":
    main()
