"""The architectures: where each keeps its experts, on disk and in transformers' memory, and what its config calls them.

One record per architecture, in words and no code: a new one is one entry here. Names of tensors are parsed by one
grammar for all (`names.py`); a record only says what names cannot. An architecture that is missing here but has
standard names is still read; then `UNKNOWN` tells where its config is looked into.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture. Keys of the config may be alternatives, `a|b`, of which the first present one counts.

    Args:
        model_types: the `model_type`s that share the record.
        experts: config key of the number of routed experts.
        top_k: config key of the experts per token.
        intermediate: config key of the expert intermediate size.
        hidden: config key of the size that the experts read and write.
        module: path of the experts' module in transformers, relative to the layer.
        renamed: prefixes on disk and in memory, where they differ.
        router: the router's tensor on disk, relative to the layer.
        routing: name of the routing rule.
        bias: the selection bias on disk, relative to the layer; empty if there is none.
        shared: the shared experts on disk, relative to the layer; empty if there are none.
        shared_module: their module in transformers, relative to the layer; empty if it has the name on disk.
        transposed: whether fused tensors are `[expert, in, out]`; None: the shape decides.
        interleaved: whether rows of gate and up alternate in fused tensors.
        gated: whether there is a gate projection.
        expert_biases: whether the experts have biases, which transformers keeps in one tensor for all of them.
        moe_layers: the rules, in `moe_layers.RULES`, that tell which layers have routed experts; the first one counts
            whose keys the config has. Without any, the tensors alone decide.
        known: further names with "expert" in them that are no routed experts, as a regular expression.
    """

    model_types: tuple[str, ...]
    experts: str = "num_experts|num_local_experts"
    top_k: str = "num_experts_per_tok"
    intermediate: str = "moe_intermediate_size"
    hidden: str = "hidden_size"
    module: str = "mlp.experts"
    renamed: tuple[str, str] = ("", "")
    router: str = "mlp.gate.weight"
    routing: str = "softmax"
    bias: str = ""
    shared: str = ""
    shared_module: str = ""
    transposed: bool | None = False
    interleaved: bool = False
    gated: bool = True
    expert_biases: bool = False
    moe_layers: tuple[str, ...] = ("all",)
    known: str = ""

    @property
    def name(self) -> str:
        """The first of its model types."""
        return self.model_types[0]

    @property
    def keys(self) -> frozenset[str]:
        """The keys of the config that tell of its experts; of those that reach into an object, the object's."""
        names = (self.experts, self.top_k, self.intermediate, self.hidden, GROUPS, KEPT_GROUPS)
        return frozenset(key.split(".")[0] for own in names for key in own.split("|") if key)

    def memory(self, prefix: str) -> str:
        """Return the path of the experts' module in transformers from a layer's prefix on disk.

        Example:
            >>> record = Family(model_types=("own",), module="mixer.experts", renamed=("backbone.", "model."))
            >>> record.memory("backbone.layers.1.")
            'model.layers.1.mixer.experts'
        """
        on_disk, in_memory = self.renamed
        return prefix.replace(on_disk, in_memory, 1) + self.module

    def linear_module(self, tensor: str) -> str:
        """Return the path in transformers of a linear map beside the routed experts from its weight's name on disk.

        Example:
            >>> record = Family(model_types=("own",), shared="mlp.shared_mlp", shared_module="mlp.shared_experts")
            >>> record.linear_module("model.layers.1.mlp.shared_mlp.up_proj.weight")
            'model.layers.1.mlp.shared_experts.up_proj'
        """
        path = tensor.removesuffix(".weight")
        return path.replace(f".{self.shared}.", f".{self.shared_module}.") if self.shared_module else path

    def read(self, config: Mapping[str, Any], keys: str) -> Any:
        """Return what a checkpoint's config says under one of the record's keys, None if it does not say."""
        return lookup(decoder_config(config), keys)


GROUPS, KEPT_GROUPS = "n_group|num_expert_group", "topk_group"
"""What configs call the groups of experts that a router chooses first, and how many of them; `n_groups` is Mamba's."""

UNKNOWN = Family(
    model_types=("",),
    experts="num_experts|num_local_experts|n_routed_experts|moe_num_experts",
    top_k="num_experts_per_tok|num_experts_per_token|moe_topk|moe_k|top_k_experts",
    # What an unknown config means by its sizes cannot be told: the tensors decide.
    intermediate="",
    hidden="",
    transposed=None,
    moe_layers=(),
)
"""Where to look in the config of an architecture that is not known."""


def decoder_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a config that describes the decoder: `text_config` in one of several modalities."""
    text = config.get("text_config")
    return text if isinstance(text, Mapping) and "hidden_size" not in config else config


def lookup(config: Mapping[str, Any], keys: str) -> Any:
    """Return the first present value of alternative keys, None if there is none; dots reach into nested objects.

    Example:
        >>> lookup({"ffn_config": {"size": 3}}, "width|ffn_config.size")
        3
    """
    for key in filter(None, keys.split("|")):
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            return value
    return None
