"""The watchdog speaks of silence, and tells a run that computes from one that hangs."""

import time

from jaxmoe.report.watchdog import Watchdog


def _watched(during, silence=0.2):
    said = []
    with Watchdog(silence, said.append) as watchdog:
        during(watchdog)
    return said


def test_says_that_a_silent_run_hangs():
    said = _watched(lambda watchdog: (watchdog.heard("layer 3"), time.sleep(0.7)))
    assert 1 <= len(said) <= 3
    assert "last: layer 3" in said[0]
    assert "hanging" in said[0]


def test_says_that_a_silent_run_computes():
    def compute(_):
        end = time.monotonic() + 0.7
        while time.monotonic() < end:
            pass

    assert "still computing" in _watched(compute)[0]


def test_is_quiet_while_steps_finish():
    def work(watchdog):
        for step in range(20):
            time.sleep(0.05)
            watchdog.heard(f"step {step}")

    assert _watched(work, silence=1.0) == []
