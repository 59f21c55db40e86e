"""Seconds that a model is at work, without those of compiling its programs."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from jax import monitoring


class Clock:
    """What was measured so far, in seconds."""

    def __init__(self):
        self.seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Add the time of a `with` block, less what JAX spends in it on tracing and compiling.

        Example:
            >>> clock = Clock()
            >>> with clock.running():
            ...     time.sleep(0.01)
            >>> clock.seconds >= 0.01
            True
        """
        spans: list[tuple[float, float]] = []

        def note(event: str, start_time: float, end_time: float, **_) -> None:
            if event.startswith("/jax/core/compile"):
                spans.append((start_time, end_time))

        monitoring.register_event_time_span_listener(note)
        begin = time.time()
        try:
            yield
        finally:
            self.seconds += time.time() - begin - covered(spans)
            monitoring.unregister_event_time_span_listener(note)


def covered(spans: list[tuple[float, float]]) -> float:
    """Return the length of the union of some intervals: tracing a function may contain the tracing of others.

    Example:
        >>> covered([(1.0, 4.0), (2.0, 3.0), (6.0, 7.0)])
        4.0
    """
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total
