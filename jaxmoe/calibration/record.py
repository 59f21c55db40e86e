"""What a statistics folder says of itself in `statistics.json`: of which model, from which texts, what was kept.

    {"schema": 1, "jaxmoe": "0.1.0", "model": SHA-256, "tokenizer": SHA-256, "ties": "lowest index first",
     "moments": "weighted", "gradients": null,
     "domains": {"code": [{"fingerprint": SHA-256, "sequences": 128, "length": 256, "tokens": 32640}]},
     "layers": {"3": {"experts": 64, "hidden": 2048, "intermediate": 1024, "gated": true}}}

The record is known before the first token runs, so it also tells whether an unfinished folder belongs to the same run.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jaxmoe
from jaxmoe.calibration.statistics import MOMENTS
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import LayerShape

SCHEMA = 1
"""The layout of statistics folders that this version writes, and the newest that it reads."""

TIES = "lowest index first"
"""How experts with equal router scores are chosen between."""

GRADIENTS = (None, "sequence", "token")
"""Of what the Fisher information sums squared gradients: not kept, of a sequence's mean loss, of a token's loss."""


class Source(NamedTuple):
    """A text as it was used.

    Args:
        fingerprint: of the text.
        sequences: windows that ran.
        length: tokens in a window.
        tokens: tokens that count.
    """

    fingerprint: str
    sequences: int
    length: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Record:
    """What statistics were gathered from.

    Args:
        model: fingerprint of the checkpoint.
        tokenizer: fingerprint of its tokenizer; None if the tokens came from elsewhere.
        domains: for each domain the texts behind it, one unless runs were merged.
        layers: shape of each layer by its index in the decoder.
        moments: which second moments were kept, one of `MOMENTS`.
        gradients: whether and how the Fisher information was kept, one of `GRADIENTS`.
    """

    model: str
    tokenizer: str | None
    domains: Mapping[str, tuple[Source, ...]]
    layers: Mapping[int, LayerShape]
    moments: str = "weighted"
    gradients: str | None = None

    def __post_init__(self):
        if self.moments not in MOMENTS or self.gradients not in GRADIENTS:
            raise JaxmoeError(
                f"moments {self.moments!r}, gradients {self.gradients!r}: give one of {MOMENTS} and of {GRADIENTS}"
            )
        if not self.domains or not self.layers:
            raise JaxmoeError(f"{len(self.domains)} domains and {len(self.layers)} layers: statistics need one of each")
        # They become names of folders.
        if wrong := [name for name in self.domains if not name or name.startswith(".") or {"/", "\\"} & {*name}]:
            raise JaxmoeError(f"{', '.join(map(repr, wrong))} cannot be the name of a domain: rename the text")

    def tokens(self, domain: str) -> int:
        """Return how many tokens of a domain count."""
        return sum(source.tokens for source in self.domains[domain])

    def sequences(self, domain: str) -> int:
        """Return how many sequences of a domain ran."""
        return sum(source.sequences for source in self.domains[domain])

    def describe(self) -> dict[str, Any]:
        """Return in few words what a report says of the statistics: tokens of each domain, and in all."""
        return {
            "domains": {name: self.tokens(name) for name in self.domains},
            "tokens": sum(map(self.tokens, self.domains)),
            "moments": self.moments,
        }

    def as_json(self) -> dict[str, Any]:
        """Return the content of `statistics.json`."""
        return {
            "schema": SCHEMA,
            "jaxmoe": jaxmoe.__version__,
            "model": self.model,
            "tokenizer": self.tokenizer,
            "ties": TIES,
            "moments": self.moments,
            "gradients": self.gradients,
            "domains": {name: [source._asdict() for source in sources] for name, sources in self.domains.items()},
            "layers": {str(index): shape._asdict() for index, shape in sorted(self.layers.items())},
        }

    @classmethod
    def read(cls, path: Path) -> "Record":
        """Read a `statistics.json`.

        Raises:
            JaxmoeError: it is damaged, or of a newer schema.
        """
        try:
            content = json.loads(path.read_bytes())
            if content["schema"] > SCHEMA:
                raise JaxmoeError(
                    f"{path} has schema {content['schema']}, and jaxmoe {jaxmoe.__version__} reads up to {SCHEMA}:"
                    f" upgrade jaxmoe, or calibrate again (it was written by jaxmoe {content.get('jaxmoe')})"
                )
            return cls(
                model=content["model"],
                tokenizer=content["tokenizer"],
                domains={name: tuple(Source(**s) for s in sources) for name, sources in content["domains"].items()},
                layers={int(index): LayerShape(**shape) for index, shape in content["layers"].items()},
                moments=content["moments"],
                gradients=content["gradients"],
            )
        except JaxmoeError:
            raise
        except OSError as error:
            raise JaxmoeError(f"{path} cannot be read: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise JaxmoeError(f"{path} is damaged ({error!r}): calibrate again") from error
