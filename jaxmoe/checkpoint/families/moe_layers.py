"""Which layers of a decoder have routed experts, and which belong to multi-token prediction.

The config says it in one of a dozen ways; each is a rule here, and a family names those that hold for it.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxmoe.checkpoint.families.family import Family, lookup
from jaxmoe.checkpoint.families.keys import brief, check_kinds
from jaxmoe.errors import JaxmoeError

_DEPTH = "num_hidden_layers|n_layers|num_layers"


@dataclass(frozen=True)
class Rule:
    """Which layers have routed experts.

    Args:
        keys: of the config, all of which have to be there.
        holds: what it makes of them for one layer.
        others: keys that may be there.
    """

    keys: tuple[str, ...]
    holds: Callable[[Mapping[str, Any], int], bool] = field(repr=False)
    others: tuple[str, ...] = ()


def _llama4_step(config: Mapping[str, Any], layer: int) -> bool:
    return (layer + 1) % config["interleave_moe_layer_step"] == 0


def _ernie(config: Mapping[str, Any], layer: int) -> bool:
    first = config.get("moe_layer_start_index", 0)
    last = config.get("moe_layer_end_index", -1)
    return (layer + 1) % config["moe_layer_interval"] == 0 and first <= layer and (last < 0 or layer <= last)


def _qwen(config: Mapping[str, Any], layer: int) -> bool:
    return (layer + 1) % config["decoder_sparse_step"] == 0 and layer not in (config.get("mlp_only_layers") or ())


def _first_dense(config: Mapping[str, Any], layer: int) -> bool:
    frequency = config.get("moe_layer_freq", 1)
    every = layer % frequency == 0 if isinstance(frequency, int) else bool(frequency[layer])
    return layer >= config["first_k_dense_replace"] and every


RULES: dict[str, Rule] = {
    "all": Rule((), lambda config, layer: True),
    "mlp_layer_types": Rule(("mlp_layer_types",), lambda config, layer: config["mlp_layer_types"][layer] == "sparse"),
    "layers_block_type": Rule(
        ("layers_block_type",), lambda config, layer: config["layers_block_type"][layer] == "moe"
    ),
    "hybrid_override_pattern": Rule(
        ("hybrid_override_pattern",), lambda config, layer: config["hybrid_override_pattern"][layer] == "E"
    ),
    "moe_layer_freq": Rule(("moe_layer_freq",), lambda config, layer: bool(config["moe_layer_freq"][layer])),
    "first_k_dense_replace": Rule(("first_k_dense_replace",), _first_dense, ("moe_layer_freq",)),
    "num_dense_layers": Rule(("num_dense_layers",), lambda config, layer: layer >= config["num_dense_layers"]),
    "decoder_sparse_step": Rule(("decoder_sparse_step",), _qwen, ("mlp_only_layers",)),
    "expert_layer_period": Rule(
        ("expert_layer_period", "expert_layer_offset"),
        lambda config, layer: layer % config["expert_layer_period"] == config["expert_layer_offset"],
    ),
    "moe_layers": Rule(("moe_layers",), lambda config, layer: layer in config["moe_layers"]),
    "interleave_moe_layer_step": Rule(("interleave_moe_layer_step",), _llama4_step),
    "moe_layer_interval": Rule(("moe_layer_interval",), _ernie, ("moe_layer_start_index", "moe_layer_end_index")),
}
"""The rules by the name that families use."""


def check_config(family: Family, config: Mapping[str, Any]) -> None:
    """Raise if what a config says of its layers and experts is of another kind than it should be; all are listed."""
    rules = {key for name in family.moe_layers for key in (*RULES[name].keys, *RULES[name].others)}
    check_kinds(config, names={*family.keys, *_DEPTH.split("|"), *rules})


def num_layers(config: Mapping[str, Any]) -> int | None:
    """Return the number of decoder layers without those of multi-token prediction, None if the config does not say."""
    count = lookup(config, _DEPTH)
    if count is None and (blocks := lookup(config, "layers_block_type|hybrid_override_pattern")) is not None:
        count = len(blocks)
    return count


def moe_layers(family: Family, config: Mapping[str, Any]) -> list[int] | None:
    """Return the layers that have routed experts by the config, None if it does not say.

    Raises:
        JaxmoeError: if the config's description of its layers cannot be read.
    """
    count = num_layers(config)
    for rule in (RULES[name] for name in family.moe_layers):
        if count is not None and all(config.get(key) is not None for key in rule.keys):
            try:
                return [layer for layer in range(count) if rule.holds(config, layer)]
            except (TypeError, IndexError, KeyError, ZeroDivisionError) as error:
                values = ", ".join(f"{key} = {brief(config[key])}" for key in rule.keys)
                raise JaxmoeError(f"config.json does not tell which of {count} layers are MoE: {values}") from error
    return None


_MTP = re.compile(r"(?:^|\.)mtp[._]")


def is_mtp(name: str) -> bool:
    """Tell whether a tensor belongs to multi-token prediction by its name; such layers may also go by their number.

    Example:
        >>> is_mtp("mtp.layers.0.mlp.gate.weight"), is_mtp("model.mtp_block.0.norm.weight"), is_mtp("model.norm.weight")
        (True, True, False)
    """
    return "mtp" in name and _MTP.search(name) is not None
