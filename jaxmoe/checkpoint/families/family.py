"""The record of an architecture: all that jaxmoe knows of one `model_type`."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from jaxmoe.checkpoint.families.parts import ALL, KINDS, NEUTRAL, USUAL, Kind, Rule, Settings, Shapes
from jaxmoe.checkpoint.families.parts.keys import check_kinds, decoder_config, lookup
from jaxmoe.checkpoint.families.parts.moe_layers import DEPTH
from jaxmoe.checkpoint.families.parts.transformers_classes import TransformersClasses
from jaxmoe.checkpoint.names import Grammar
from jaxmoe.model.spec import DecoderSpec

GROUPS, KEPT_GROUPS = "n_group|num_expert_group", "topk_group"
"""What configs call the groups of experts that a router chooses first, and how many of them; `n_groups` is Mamba's."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """One architecture. Keys of the config may be alternatives, `a|b`, of which the first present one counts.

    Of names on disk a record says what `checkpoint/names.py` (experts) and `checkpoint/decoder.py` (all else) do not.
    Without `decoder` the checkpoint can be read and compressed by its weights alone, and JAX does not run it; without
    `transformers` what is compressed is written dense only.

    Args:
        model_type: its name in `config.json`.
        actual_type: returns the `model_type` that a config is really of, where one name stands for several.
        experts: config key of the number of routed experts.
        top_k: config key of the experts per token.
        intermediate: config key of the expert intermediate size.
        hidden: config key of the size that the experts read and write.
        moe_layers: the rules that tell which layers have routed experts; the first one counts whose keys the config
            has. Without any, the tensors alone decide.
        defaults: what the config means by keys that are not there, where that differs from `USUAL`.
        kinds: what may stand under keys that no other architecture has.
        harmless: further keys that change nothing of what the decoder computes, separated by spaces.
        neutral: further keys that change nothing with these values.
        module: path of the experts' module in transformers, relative to the layer.
        renamed: prefixes on disk and in memory, where they differ.
        router: the router's tensor on disk, relative to the layer.
        routing: name of the routing rule.
        bias: the selection bias on disk, relative to the layer; empty if there is none.
        shared: the shared experts on disk, relative to the layer; empty if there are none.
        shared_module: their module in transformers, relative to the layer; empty if it has the name on disk.
        projections: what it calls the experts' projections on disk beside the usual names (`checkpoint.names.ALIASES`).
        names: other names on disk that differ from the usual ones (`checkpoint.decoder.USUAL_NAMES`).
        transposed: whether fused tensors are `[expert, in, out]`; None: the shape decides.
        interleaved: whether rows of gate and up alternate in fused tensors.
        gated: whether there is a gate projection.
        expert_biases: whether the experts have biases, which transformers keeps in one tensor for all of them.
        known: further names with "expert" in them that are no routed experts, as a regular expression.
        decoder: builds the spec of the decoder from the config and the shapes of the routed experts.
        transformers: the classes that run it in PyTorch.
        no_transformers: why there are none that factors could be put into.
        not_packed: why transformers does not load experts of few bits under their names on the hub; empty if it does.

    Example:
        >>> own = Family(model_type="own_moe", experts="num_experts", shared="mlp.shared_expert")
        >>> own.read({"num_experts": 8}, own.experts)
        8
    """

    model_type: str
    actual_type: Callable[[Mapping[str, Any]], str] | None = None
    experts: str = "num_experts|num_local_experts"
    top_k: str = "num_experts_per_tok"
    intermediate: str = "moe_intermediate_size"
    hidden: str = "hidden_size"
    moe_layers: tuple[Rule, ...] = (ALL,)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    harmless: str = ""
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    module: str = "mlp.experts"
    renamed: tuple[str, str] = ("", "")
    router: str = "mlp.gate.weight"
    routing: str = "softmax"
    bias: str = ""
    shared: str = ""
    shared_module: str = ""
    projections: Mapping[str, str] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    transposed: bool | None = False
    interleaved: bool = False
    gated: bool = True
    expert_biases: bool = False
    known: str = ""
    decoder: Callable[[Settings, Shapes], DecoderSpec] | None = None
    transformers: TransformersClasses | None = None
    no_transformers: str = "jaxmoe knows no transformers classes for it"
    not_packed: str = ""

    @property
    def keys(self) -> frozenset[str]:
        """The keys of the config that tell of its experts; of those that reach into an object, the object's."""
        names = (self.experts, self.top_k, self.intermediate, self.hidden, GROUPS, KEPT_GROUPS)
        return frozenset(key.split(".")[0] for own in names for key in own.split("|") if key)

    @cached_property
    def grammar(self) -> Grammar:
        """How the names of its experts are parsed."""
        return Grammar(self.projections)

    def memory(self, prefix: str) -> str:
        """Return the path of the experts' module in transformers from a layer's prefix on disk.

        Example:
            >>> record = Family(model_type="own", module="mixer.experts", renamed=("backbone.", "model."))
            >>> record.memory("backbone.layers.1.")
            'model.layers.1.mixer.experts'
        """
        on_disk, in_memory = self.renamed
        return prefix.replace(on_disk, in_memory, 1) + self.module

    def linear_module(self, tensor: str) -> str:
        """Return the path in transformers of a linear map beside the routed experts from its weight's name on disk.

        Example:
            >>> record = Family(model_type="own", shared="mlp.shared_mlp", shared_module="mlp.shared_experts")
            >>> record.linear_module("model.layers.1.mlp.shared_mlp.up_proj.weight")
            'model.layers.1.mlp.shared_experts.up_proj'
        """
        path = tensor.removesuffix(".weight").replace(*self.renamed, 1)
        return path.replace(f".{self.shared}.", f".{self.shared_module}.") if self.shared_module else path

    def read(self, config: Mapping[str, Any], keys: str) -> Any:
        """Return what a checkpoint's config says under one of the record's keys, None if it does not say."""
        return lookup(decoder_config(config), keys)

    def check(self, config: Mapping[str, Any]) -> None:
        """Raise if what a config says of its layers and experts is of another kind than it should be; all are listed.

        Args:
            config: the part of `config.json` that describes the decoder.
        """
        rules = {key for rule in self.moe_layers for key in (*rule.keys, *rule.others)}
        check_kinds(config, {**KINDS, **self.kinds}, {*self.keys, *DEPTH.split("|"), *rules})

    def settings(self, config: Mapping[str, Any], ignored: Collection[str] = ()) -> Settings:
        """Return a config as `decoder` reads it.

        Args:
            config: the part of `config.json` that describes the decoder.
            ignored: keys of it to leave out of account, where jaxmoe does not know what they mean.
        """
        return Settings(
            config,
            {**USUAL, **self.defaults},
            ignored,
            kinds={**KINDS, **self.kinds},
            harmless=self.harmless.split(),
            neutral={**NEUTRAL, **self.neutral},
        )


UNKNOWN = Family(
    model_type="",
    experts="num_experts|num_local_experts|n_routed_experts|moe_num_experts",
    top_k="num_experts_per_tok|num_experts_per_token|moe_topk|moe_k|top_k_experts",
    # What an unknown config means by its sizes cannot be told: the tensors decide.
    intermediate="",
    hidden="",
    transposed=None,
    moe_layers=(),
)
"""Where to look in the config of an architecture that is not known."""
