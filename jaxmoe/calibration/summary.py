"""What calibration saw, in few numbers: tokens per text, and how evenly the experts of each layer were used."""

from typing import Any

import numpy as np

from jaxmoe.calibration.folder import Statistics


def summary(statistics: Statistics) -> dict[str, Any]:
    """Return what `jaxmoe calibrate --json` prints.

    A starved expert is one that fewer tokens chose than its inputs have dimensions: its second moments are singular.
    `busiest` is the largest share of a layer's assignments that one expert has, `even` what each would have.
    """
    record = statistics.record
    layers = []
    for index in statistics.layers:
        shape = record.layers[index]
        counts = statistics.read(index, "counts")
        never = np.flatnonzero(counts == 0).tolist()
        layers.append(
            {
                "layer": index,
                "experts": shape.experts,
                "never_routed": never,
                "starved": [e for e in np.flatnonzero(counts < shape.hidden).tolist() if e not in never],
                "busiest": float(counts.max() / max(1, counts.sum())),
                "even": 1 / shape.experts,
            }
        )
    return {
        "statistics": str(statistics.folder),
        "domains": [
            {"name": name, "sequences": record.sequences(name), "tokens": record.tokens(name)}
            for name in statistics.domains
        ],
        "tokens": sum(map(record.tokens, statistics.domains)),
        "moments": record.moments,
        "targets": ["experts", *record.targets],
        "gradients": record.gradients,
        "layers": layers,
    }
