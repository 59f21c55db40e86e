"""Rounding with error feedback (GPTQ) of experts of Qwen3-30B-A3B: jaxmoe against plain PyTorch, expert by expert.

    python scripts/benchmarks/gptq.py [--experts 4] [--rounds 5] [--bits 4]

Gate and up, 768 x 2048, see one second moment, down, 2048 x 768, another, which are given; groups of 64 with integer
zeros whose scales are not searched for, damping 0.01, columns in their own order. The PyTorch side is written from the
publication's formulas: the factor of the inverse by two Cholesky decompositions, columns one by one in blocks of 128,
the rest of the columns by one product for each block, and one factor for gate and up. jaxmoe's side also compares with
plain rounding. One core, CPU seconds, contestants in turn, medians. "loss" is tr (W - Ŵ) C (W - Ŵ)ᵀ of all matrices, in
units of plain PyTorch's.
"""

import argparse
import statistics
import sys

from one_core import alternate, pin, ratio, table

pin()

import jax  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

from jaxmoe.factors.store import Store  # noqa: E402
from jaxmoe.solvers.error_feedback import error_feedback  # noqa: E402

HIDDEN, INTERMEDIATE, GROUP, BLOCK, DAMPING = 2048, 768, 64, 128, 0.01


def inverse_factor(moment: torch.Tensor) -> torch.Tensor:
    """Return U, upper triangular, with (C + damping)^-1 = Uᵀ U."""
    damped = moment + DAMPING * moment.diagonal().mean() * torch.eye(len(moment))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)


def plain_gptq(weight: torch.Tensor, upper: torch.Tensor, bits: int) -> torch.Tensor:
    """Return a matrix rounded as published."""
    weight, top = weight.clone(), 2**bits - 1
    found = torch.empty_like(weight)
    for start in range(0, weight.shape[1], BLOCK):
        block, own = weight[:, start : start + BLOCK].clone(), upper[start : start + BLOCK, start : start + BLOCK]
        errors = torch.empty_like(block)
        for column in range(block.shape[1]):
            if column % GROUP == 0:
                group = block[:, column : column + GROUP]
                low, high = group.amin(1).clamp(max=0), group.amax(1).clamp(min=0)
                scale = ((high - low) / top).to(torch.bfloat16).float()
                zero = torch.clamp(torch.round(-low / scale), 0, top)
            w = block[:, column]
            value = scale * (torch.clamp(torch.round(w / scale + zero), 0, top) - zero)
            found[:, start + column] = value
            error = (w - value) / own[column, column]
            block[:, column:] -= error[:, None] * own[column, column:]
            errors[:, column] = error
        weight[:, start + BLOCK :] -= errors @ upper[start : start + BLOCK, start + BLOCK :]
    return found


def moments(rng, experts: int, side: int) -> np.ndarray:
    """Return second moments of inputs with a decaying spectrum."""
    inputs = rng.standard_normal((experts, 2 * side, side), np.float32) * np.logspace(0, -1.5, side, dtype=np.float32)
    mixed = inputs @ np.linalg.qr(rng.standard_normal((side, side)))[0].astype(np.float32)
    return mixed.swapaxes(1, 2) @ mixed / len(mixed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bits", type=int, default=4)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    hidden, inner = (moments(rng, asked.experts, side) for side in (HIDDEN, INTERMEDIATE))
    weights = {
        name: rng.standard_normal((asked.experts, *shape), np.float32)
        for name, shape in (
            ("gate", (INTERMEDIATE, HIDDEN)),
            ("up", (INTERMEDIATE, HIDDEN)),
            ("down", (HIDDEN, INTERMEDIATE)),
        )
    }
    seen = {"gate": hidden, "up": hidden, "down": inner}
    store = Store(bits=asked.bits, group=GROUP)
    on_torch = {name: torch.from_numpy(x) for name, x in weights.items()}
    torch_seen = {name: torch.from_numpy(x) for name, x in seen.items()}

    def ours() -> dict:
        found = {
            name: error_feedback(x, store, moment=seen[name], damping=DAMPING, search=False)
            for name, x in weights.items()
        }
        return jax.block_until_ready(found)

    def plain() -> dict:
        found = {name: torch.empty_like(x) for name, x in on_torch.items()}
        for expert in range(asked.experts):
            shared = inverse_factor(torch_seen["gate"][expert])
            own = inverse_factor(torch_seen["down"][expert])
            for name, upper in (("gate", shared), ("up", shared), ("down", own)):
                found[name][expert] = plain_gptq(on_torch[name][expert], upper, asked.bits)
        return found

    def loss(values: dict) -> float:
        rest = {name: np.asarray(x) - weights[name] for name, x in values.items()}
        return sum(float(np.sum((x @ seen[name]) * x)) for name, x in rest.items())

    print(f"{asked.experts} experts ...", file=sys.stderr, flush=True)
    seconds = alternate({"jaxmoe": ours, "torch": plain}, asked.rounds)
    worse = loss({name: x.values(store) for name, x in ours().items()}) / loss(plain())
    row = [f"{statistics.median(times) / asked.experts:.2f}" for times in seconds.values()]
    row = [*row, f"{ratio(seconds['torch'], seconds['jaxmoe']):.2f}", f"{worse:.3f}"]
    print(f"jax {jax.__version__}, torch {torch.__version__}, {asked.bits} bits, {asked.rounds} rounds\n")
    print(table(["jaxmoe (CPU s an expert)", "PyTorch (CPU s an expert)", "PyTorch / jaxmoe", "loss"], [row]))


if __name__ == "__main__":
    main()
