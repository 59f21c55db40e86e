"""Which layers of a decoder have routed experts.

Configs say it in one of a dozen ways. A way is a rule; those that several architectures share stand here, the others
with the architecture, and a record names the rules that hold for it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxmoe.checkpoint.families.parts.keys import brief, lookup
from jaxmoe.errors import JaxmoeError

DEPTH = "num_hidden_layers|n_layers|num_layers"
"""What configs call the number of decoder layers."""


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


def _first_dense(config: Mapping[str, Any], layer: int) -> bool:
    frequency = config.get("moe_layer_freq", 1)
    every = layer % frequency == 0 if isinstance(frequency, int) else bool(frequency[layer])
    return layer >= config["first_k_dense_replace"] and every


ALL = Rule((), lambda config, layer: True)
MLP_LAYER_TYPES = Rule(("mlp_layer_types",), lambda config, layer: config["mlp_layer_types"][layer] == "sparse")
FIRST_DENSE = Rule(("first_k_dense_replace",), _first_dense, ("moe_layer_freq",))
NUM_DENSE_LAYERS = Rule(("num_dense_layers",), lambda config, layer: layer >= config["num_dense_layers"])


def num_layers(config: Mapping[str, Any]) -> int | None:
    """Return the number of decoder layers without those of multi-token prediction, None if the config does not say."""
    count = lookup(config, DEPTH)
    if count is None and (blocks := lookup(config, "layers_block_type|hybrid_override_pattern")) is not None:
        count = len(blocks)
    return count


def moe_layers(rules: Sequence[Rule], config: Mapping[str, Any]) -> list[int] | None:
    """Return the layers that have routed experts by the first rule that fits, None if the config does not say.

    Raises:
        JaxmoeError: if the config's description of its layers cannot be read.

    Example:
        >>> moe_layers([MLP_LAYER_TYPES, FIRST_DENSE], {"num_hidden_layers": 4, "first_k_dense_replace": 1})
        [1, 2, 3]
    """
    count = num_layers(config)
    for rule in rules:
        if count is not None and all(config.get(key) is not None for key in rule.keys):
            try:
                return [layer for layer in range(count) if rule.holds(config, layer)]
            except (TypeError, IndexError, KeyError, ZeroDivisionError) as error:
                values = ", ".join(f"{key} = {brief(config[key])}" for key in rule.keys)
                raise JaxmoeError(f"config.json does not tell which of {count} layers are MoE: {values}") from error
    return None
