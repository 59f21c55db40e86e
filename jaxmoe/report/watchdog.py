"""A thread that speaks up when a run has long been silent: it may compute, or it may hang."""

import sys
import threading
import time
from collections.abc import Callable

SILENCE = 600.0
"""Seconds without a finished step after which the watchdog speaks, and again after each further such span."""

IDLE = 0.01
"""A program that used less than this share of one core since hangs."""


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


class Watchdog:
    """Watches for the length of a `with` block.

    Args:
        silence: seconds without a step after which it speaks.
        say: takes its message; by default it goes to standard error.

    Example:
        >>> with Watchdog() as watchdog:
        ...     watchdog.heard("layer 0 (1 of 6)")
    """

    def __init__(self, silence: float = SILENCE, say: Callable[[str], None] = _say):
        self.silence = silence
        self.say = say
        self.last = "the start"
        self.steps = 0
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.stopped.set()
        self.thread.join()

    def heard(self, step: str) -> None:
        """Take note of a finished step."""
        self.last = step
        self.steps += 1

    def _watch(self) -> None:
        seen, since, used = self.steps, time.monotonic(), time.process_time()
        while not self.stopped.wait(min(1.0, self.silence / 4)):
            if self.steps != seen:
                seen, since, used = self.steps, time.monotonic(), time.process_time()
                continue
            silent = time.monotonic() - since
            if silent < self.silence:
                continue
            computed = time.process_time() - used
            self.say(silence_message(silent, computed, self.last))
            since, used = time.monotonic(), time.process_time()


def silence_message(silent: float, computed: float, last: str) -> str:
    """Return what there is to say of a silent run.

    Args:
        silent: seconds since the last step, or since this was last said.
        computed: seconds of processor time used in them.
        last: the last finished step.

    Example:
        >>> silence_message(600, 1140, "layer 0 (1 of 6)")
        'no step has finished for 10 minutes (last: layer 0 (1 of 6)); 190 % of a core in use: still computing'
        >>> silence_message(600, 0.1, "the start")
        'no step has finished for 10 minutes (last: the start); 0 % of a core in use: waiting for a disk, or ...'
    """
    share = computed / silent
    doing = (
        "still computing"
        if share > IDLE
        else "waiting for a disk, or hanging; if this stays so, stop it and run the same command again, and report it"
        " with the output of `jaxmoe --version`"
    )
    minutes = f"no step has finished for {silent / 60:.0f} minutes (last: {last})"
    return f"{minutes}; {100 * share:.0f} % of a core in use: {doing}"
