"""Pin a benchmark to one core and measure contestants in turn. Call `pin` before numpy, jax or torch are imported."""

import os
import statistics
import time
from collections.abc import Callable, Mapping


def pin() -> None:
    """Bind this process, and all threads that the libraries will start, to one core."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    # Every library shall choose the kernels that suit the processor.
    for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
        os.environ.pop(name, None)
    os.environ["JAX_PLATFORMS"] = "cpu"


def alternate(contestants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the CPU seconds of every round of every contestant, run in turn after one unmeasured round."""
    for run in contestants.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            begin = time.process_time()
            run()
            seconds[name].append(time.process_time() - begin)
    return seconds


def ratio(slow: list[float], fast: list[float]) -> float:
    """Return the median over rounds of how many times longer the first takes: drift of the machine cancels."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
