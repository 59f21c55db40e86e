"""What a statistics folder says of itself in `statistics.json`: of which model, from which texts, what was kept.

    {"schema": 1, "jaxmoe": "0.1.0", "model": SHA-256, "tokenizer": SHA-256, "ties": "lowest index first",
     "moments": "weighted", "gradients": null,
     "domains": {"code": [{"fingerprint": SHA-256, "sequences": 128, "length": 256, "tokens": 32640}]},
     "layers": {"3": {"experts": 64, "hidden": 2048, "intermediate": 1024, "gated": true}}}

Where inputs of further linear maps were kept, schema 2 adds of which targets, and what every layer holds of them:

     "targets": ["attention"], "inputs": {"3": {"attention.input": 2048, "attention.mixed": 4096}}

The record is known before the first token runs, so it also tells whether an unfinished folder belongs to the same run.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

import jaxmoe
from jaxmoe.calibration.statistics import MOMENTS
from jaxmoe.checkpoint.records import read_record
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import LayerShape, ShapeRecord
from jaxmoe.factors.spec import Size
from jaxmoe.model.roles import LINEAR_TARGETS, ROLES

SCHEMA = 2
"""The newest layout of statistics folders that this version reads; what keeps routed experts alone is of the first."""

TIES = "lowest index first"
"""How experts with equal router scores are chosen between."""

GRADIENTS = (None, "sequence", "token")
"""Of what the Fisher information sums squared gradients: not kept, of a sequence's mean loss, of a token's loss."""

Amount = Annotated[int, msgspec.Meta(ge=0, lt=2**62)]
"""Of tokens or of what holds them."""


@dataclass(frozen=True)
class Source:
    """A text as it was used.

    Args:
        fingerprint: of the text.
        sequences: windows that ran.
        length: tokens in a window.
        tokens: tokens that count.
    """

    fingerprint: str
    sequences: Amount
    length: Amount
    tokens: Amount


_NAME = re.compile(r"[^./\\\x00-\x1f][^/\\\x00-\x1f]*")
_NAME_BYTES = 200


class _Version(msgspec.Struct):
    """What every schema has."""

    schema: Annotated[int, msgspec.Meta(ge=1)]
    jaxmoe: str = "unknown"


_Index = Annotated[str, msgspec.Meta(pattern=r"^(0|[1-9][0-9]{0,4})\Z")]


class _Content(msgspec.Struct, forbid_unknown_fields=True):
    """What a `statistics.json` of this schema holds."""

    schema: int
    jaxmoe: str
    model: str
    tokenizer: str | None
    ties: Literal["lowest index first"]
    moments: str
    gradients: str | None
    domains: dict[str, Annotated[list[Source], msgspec.Meta(min_length=1)]]
    layers: dict[_Index, ShapeRecord]
    targets: list[str] = []
    inputs: dict[_Index, dict[str, Size]] = {}


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
        targets: beside the routed experts, whose linear maps' inputs were kept, from `model.roles.LINEAR_TARGETS`.
        inputs: for each layer the activations whose second moments its file holds, and their sizes, see `inputs.py`.
    """

    model: str
    tokenizer: str | None
    domains: Mapping[str, tuple[Source, ...]]
    layers: Mapping[int, LayerShape]
    moments: str = "weighted"
    gradients: str | None = None
    targets: tuple[str, ...] = ()
    inputs: Mapping[int, Mapping[str, int]] = field(default_factory=dict)

    def __post_init__(self):
        if self.moments not in MOMENTS or self.gradients not in GRADIENTS:
            raise JaxmoeError(
                f"moments {self.moments!r}, gradients {self.gradients!r}: give one of {MOMENTS} and of {GRADIENTS}"
            )
        if not self.domains or not self.layers:
            raise JaxmoeError(f"{len(self.domains)} domains and {len(self.layers)} layers: statistics need one of each")
        known = {role.reads for role in ROLES.values()}
        if odd := sorted(
            {*self.targets} - {*LINEAR_TARGETS} | {n for own in self.inputs.values() for n in own} - known
        ):
            raise JaxmoeError(f"unknown targets or inputs {', '.join(map(repr, odd))}")
        # They become names of folders.
        if wrong := [name for name in self.domains if not _can_be_name(name)]:
            raise JaxmoeError(f"{', '.join(map(repr, wrong))} cannot be the name of a domain: rename the text")

    def tokens(self, domain: str) -> int:
        """Return how many tokens of a domain count."""
        return sum(source.tokens for source in self.domains[domain])

    def sequences(self, domain: str) -> int:
        """Return how many sequences of a domain ran."""
        return sum(source.sequences for source in self.domains[domain])

    @property
    def visited(self) -> tuple[int, ...]:
        """The layers of which something is kept, in ascending order."""
        return tuple(sorted({*self.layers, *(index for index, own in self.inputs.items() if own)}))

    def describe(self) -> dict[str, Any]:
        """Return in few words what a report says of the statistics: tokens of each domain, and in all."""
        return {
            "domains": {name: self.tokens(name) for name in self.domains},
            "tokens": sum(map(self.tokens, self.domains)),
            "moments": self.moments,
            **({"targets": ["experts", *self.targets]} if self.targets else {}),
        }

    def as_json(self) -> dict[str, Any]:
        """Return the content of `statistics.json`."""
        inputs = {str(index): dict(own) for index, own in sorted(self.inputs.items())}
        return {
            "schema": 2 if self.targets else 1,
            "jaxmoe": jaxmoe.__version__,
            "model": self.model,
            "tokenizer": self.tokenizer,
            "ties": TIES,
            "moments": self.moments,
            "gradients": self.gradients,
            "domains": {name: [asdict(source) for source in sources] for name, sources in self.domains.items()},
            "layers": {str(index): shape._asdict() for index, shape in sorted(self.layers.items())},
            **({"targets": list(self.targets), "inputs": inputs} if self.targets else {}),
        }

    @classmethod
    def read(cls, path: Path) -> "Record":
        """Read a `statistics.json`.

        Raises:
            JaxmoeError: it is damaged, or of a newer schema.
        """
        mend = "calibrate again"
        version = read_record(path, _Version, mend)
        if version.schema > SCHEMA:
            raise JaxmoeError(
                f"{path} has schema {version.schema}, and jaxmoe {jaxmoe.__version__} reads up to {SCHEMA}:"
                f" upgrade jaxmoe, or calibrate again (it was written by jaxmoe {version.jaxmoe})"
            )
        content = read_record(path, _Content, mend)
        try:
            return cls(
                model=content.model,
                tokenizer=content.tokenizer,
                domains={name: tuple(sources) for name, sources in content.domains.items()},
                layers={int(index): entry.shape for index, entry in content.layers.items()},
                moments=content.moments,
                gradients=content.gradients,
                targets=tuple(content.targets),
                inputs={int(index): own for index, own in content.inputs.items()},
            )
        except JaxmoeError as error:
            raise JaxmoeError(f"{path}: {error}; {mend}") from None


def _can_be_name(domain: str) -> bool:
    """Tell whether a folder can have the name of a domain, and files names that begin with it.

    Example:
        >>> _can_be_name("code"), _can_be_name("../code")
        (True, False)
    """
    # A name that is not UTF-8 on disk holds surrogates, which JSON cannot.
    size = len(domain.encode(errors="surrogatepass"))
    surrogates = any("\ud800" <= letter <= "\udfff" for letter in domain)
    return _NAME.fullmatch(domain) is not None and size <= _NAME_BYTES and not surrogates
