"""Truncated SVD of a whole layer: jaxmoe against torch.linalg.svd, numpy and an eigen-decomposition in PyTorch.

    python scripts/benchmarks/svd.py [--rounds 7]

All contestants return factors [expert, out, rank] and [expert, rank, in] in float32. Weighted: the objective is
||(W - L R) Q||_F with Q Qᵀ the second moment of the inputs; the others take the SVD of W Q, or the eigenvectors of its
Gram matrix, and project W on the leading left vectors. One core, CPU seconds, contestants in turn, medians. "excess"
is how much larger than the float64 optimum the worst expert's error is, as a fraction.
"""

import argparse
import statistics
import sys
from functools import partial

from one_core import alternate, pin, ratio, table

pin()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

from jaxmoe.solvers.weighted_svd import weighted_svd  # noqa: E402

SHAPES = [(16, 64, 128, 25), (32, 96, 256, 44), (32, 128, 256, 48), (64, 256, 512, 96), (2, 768, 2048, 349)]
"""Experts, outputs, inputs, rank: `demo`, three small models, two experts of Qwen3-30B-A3B."""


def numpy_svd(weight, root, rank):
    u, s, vt = np.linalg.svd(weight if root is None else weight @ root, full_matrices=False)
    left = u[..., :rank]
    return (left * s[:, None, :rank], vt[:, :rank]) if root is None else (left, left.swapaxes(1, 2) @ weight)


def torch_svd(weight, root, rank):
    u, s, vt = torch.linalg.svd(weight if root is None else weight @ root, full_matrices=False)
    left = u[..., :rank]
    return (left * s[:, None, :rank], vt[:, :rank]) if root is None else (left, left.mT @ weight)


def torch_gram(weight, root, rank):
    weighted = weight if root is None else weight @ root
    left = torch.linalg.eigh(weighted @ weighted.mT)[1].flip(-1)[..., :rank]
    return left, left.mT @ weight


def excess(weight, root, factors, rank) -> float:
    """Return how much larger than the optimum the worst expert's error is, computed in float64."""
    exact = weight.astype(np.float64)
    right = np.eye(weight.shape[2]) if root is None else root.astype(np.float64)
    left_factor, right_factor = (np.asarray(x, np.float64) for x in factors)
    reached = np.linalg.norm((exact - left_factor @ right_factor) @ right, axis=(1, 2))
    singular = np.linalg.svd(exact @ right, compute_uv=False)
    return float(np.max(reached / np.linalg.norm(singular[:, rank:], axis=1) - 1))


def measure(shape, weighted: bool, rounds: int) -> list[str]:
    experts, out, in_, rank = shape
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((experts, out, in_), np.float32)
    root = None
    if weighted:
        # A second moment with a decaying spectrum, condition number 1e4.
        basis = np.linalg.qr(rng.standard_normal((in_, in_)))[0]
        root = (basis * np.logspace(0, -2, in_)).astype(np.float32)
    moment = None if root is None else jnp.asarray(root @ root.T)[None]
    jitted = jax.jit(partial(weighted_svd, rank=rank))
    on_jax, on_torch = jnp.asarray(weight), torch.from_numpy(weight)
    torch_root = None if root is None else torch.from_numpy(root)
    contestants = {
        "jaxmoe": lambda: jax.block_until_ready(jitted(on_jax, column_moment=moment)),
        "torch svd": lambda: torch_svd(on_torch, torch_root, rank),
        "numpy svd": lambda: numpy_svd(weight, root, rank),
        "torch eigh": lambda: torch_gram(on_torch, torch_root, rank),
    }
    seconds = alternate(contestants, rounds)
    row = [" x ".join(map(str, shape[:3])), str(rank), "moment" if weighted else "plain"]
    row += [f"{1e3 * statistics.median(times):.1f}" for times in seconds.values()]
    row += [f"{ratio(seconds[name], seconds['jaxmoe']):.2f}" for name in list(contestants)[1:]]
    return [*row, f"{excess(weight, root, contestants['jaxmoe']()[:2], rank):.0e}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    names = ["jaxmoe", "torch svd", "numpy svd", "torch eigh"]
    header = ["experts x out x in", "rank", "weights"] + [f"{name} (CPU ms)" for name in names]
    header += [f"{name} / jaxmoe" for name in names[1:]] + ["excess"]
    rows = []
    for shape in SHAPES:
        for weighted in (False, True):
            print(f"{shape} {'weighted' if weighted else 'plain'} ...", file=sys.stderr, flush=True)
            rows.append(measure(shape, weighted, rounds))
    print(f"jax {jax.__version__}, torch {torch.__version__}, numpy {np.__version__}, {rounds} rounds\n")
    print(table(header, rows))


if __name__ == "__main__":
    main()
