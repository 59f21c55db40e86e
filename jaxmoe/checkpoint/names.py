r"""The names of routed experts' tensors: one grammar for all architectures, which may add names of projections.

Four layouts are in use. What comes before the block (`model.layers.3.`) and the block's own name do not matter to it:

    per_expert  mlp.experts.7.gate_proj.weight          one matrix `[out, in]` per expert
    fused       mlp.experts.gate_up_proj                all experts, `[expert, out, in]` or `[expert, in, out]`
    stacked     block_sparse_moe.input_linear.weight    all experts, `[expert, out, in]`; a dense layer's is 2-D
    flat        ffn.experts.mlp.w1                      all experts' rows one below the other, `[expert * F, D]`

Quantised tensors are read under the name of the matrix that they stand for (`quantization.py`), so scales and packed
values do not appear here.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

ALIASES = {
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "gate_up_proj": "gate_up",
    "w1": "gate",
    "w3": "up",
    "w2": "down",
    "fc1": "gate",
    "fc3": "up",
    "fc2": "down",
    "v1": "up",
    "w13_weight": "gate_up",
    "w2_weight": "down",
    "input_linear": "gate_up",
    "output_linear": "down",
}
"""What the architectures call the projections."""

_LAYER = r"^(?P<prefix>(?:.*\.)?(?:layers|blocks)\.(?P<layer>\d{1,6})\.)"
_BLOCK = r"(?P<block>mlp|block_sparse_moe|feed_forward|mixer|moe|ffn)"
LAYOUTS = {
    "per_expert": _LAYER + _BLOCK + r"\.experts\.(?P<expert>\d{1,6})\."
    r"(?P<projection>gate_proj|up_proj|down_proj|gate_up_proj|w1|w2|w3|fc1|fc2|fc3OWN)\.(?P<leaf>weight|bias)$",
    "fused": _LAYER + r"(?:" + _BLOCK + r"\.)?experts\."
    r"(?P<projection>gate_up_proj|gate_proj|up_proj|down_proj|w13_weight|w2_weightOWN)(?P<leaf>|_bias)$",
    "stacked": _LAYER + _BLOCK + r"\."
    r"(?P<projection>input_linear|output_linear|gate_proj|up_proj|down_projOWN)\.(?P<leaf>weight)$",
    "flat": _LAYER + _BLOCK + r"\.experts\.mlp\.(?P<projection>w1|v1|w2)(?P<leaf>)$",
}
"""The layouts by name, as regular expressions; `OWN` stands for what one architecture alone calls the projections."""

_MTP = re.compile(r"(?:^|\.)mtp[._]")
_NUMBER = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.(\d{1,6})\.")


class ExpertName(NamedTuple):
    """The parts of a routed expert's tensor name.

    Args:
        prefix: of the layer, such as `model.layers.3.`.
        layer: its number.
        block: the module in it that holds the experts; empty where they lie in the layer itself.
        layout: a key of `LAYOUTS`.
        expert: its number, None where the tensor holds all of them.
        projection: `gate`, `up`, `down` or `gate_up`.
        bias: whether it is a bias.
        template: the name with `{expert}` in the place of the expert's number.
    """

    prefix: str
    layer: int
    block: str
    layout: str
    expert: int | None
    projection: str
    bias: bool
    template: str


class Grammar:
    """How the names of an architecture's experts are parsed.

    Args:
        projections: what it calls the projections beside the usual names, and what each holds: `gate`, `up`, `down` or
            `gate_up`.

    Example:
        >>> Grammar({"wi": "gate"}).classify("model.layers.3.mlp.experts.7.wi.weight", 2).projection
        'gate'
    """

    def __init__(self, projections: Mapping[str, str] = MappingProxyType({})):
        self.projections = {**ALIASES, **projections}
        own = "".join(f"|{re.escape(name)}" for name in projections)
        self.layouts = {name: re.compile(pattern.replace("OWN", own)) for name, pattern in LAYOUTS.items()}

    def classify(self, name: str, dimensions: int) -> ExpertName | None:
        """Parse a tensor's name; None if it holds no routed experts.

        Args:
            name: as on disk, or that of the matrix which a quantised tensor stands for.
            dimensions: of the tensor: a stacked linear map of all experts has three, a dense layer's has two.

        Example:
            >>> Grammar().classify("model.layers.3.mlp.experts.7.gate_proj.weight", 2)[1:7]
            (3, 'mlp', 'per_expert', 7, 'gate', False)
            >>> Grammar().classify("model.layers.3.mlp.shared_experts.gate_proj.weight", 2)
        """
        if "experts." in name:
            layouts = ("per_expert", "fused", "flat")
        elif dimensions == 3:
            layouts = ("stacked",)
        else:
            return None
        for layout in layouts:
            if (match := self.layouts[layout].match(name)) is None:
                continue
            groups = match.groupdict()
            expert, template = groups.get("expert"), name
            if expert is not None:
                template = f"{name[: match.start('expert')]}{{expert}}{name[match.end('expert') :]}"
            return ExpertName(
                prefix=groups["prefix"],
                layer=int(groups["layer"]),
                block=groups["block"] or "",
                layout=layout,
                expert=None if expert is None else int(expert),
                projection=self.projections[groups["projection"]],
                bias="bias" in groups["leaf"],
                template=template,
            )
        return None


def layer_number(name: str) -> tuple[str, int] | None:
    """Return what comes before a layer's number in a tensor's name, and the number; None if there is none.

    Example:
        >>> layer_number("model.layers.61.self_attn.q_proj.weight")
        ('model.layers.', 61)
    """
    match = _NUMBER.search(name)
    return None if match is None else (name[: match.start(1)], int(match.group(1)))


def is_mtp(name: str) -> bool:
    """Tell whether a tensor belongs to multi-token prediction by its name; such layers may also go by their number.

    Example:
        >>> is_mtp("mtp.layers.0.mlp.gate.weight"), is_mtp("model.mtp_block.0.norm.weight"), is_mtp("model.norm.weight")
        (True, True, False)
    """
    return "mtp" in name and _MTP.search(name) is not None
