"""Windows of random tokens, some of which do not count, for tests that need no text."""

import numpy as np

from jaxmoe.texts import Windows


def random_windows(name="text", windows=6, length=16, seed=0) -> Windows:
    ids = np.random.default_rng(seed).integers(3, 120, (windows, length)).astype(np.int32)
    counted = np.ones(ids.shape, bool)
    counted[:, 0] = False
    counted[1, 9] = False
    return Windows(name=name, fingerprint=f"{name}{seed}", ids=ids, counted=counted, left_out=0)
