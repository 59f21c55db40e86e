"""What a config says of how its weights are quantised."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from jaxmoe.errors import JaxmoeError

RECORDS = ("quantization_config", "compression_config", "quantization")
"""The keys of a config under which it says how its weights are quantised; the last one is MLX's."""


def quantization_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the quantisation settings of a config, wherever they stand in it; empty if there are none.

    Example:
        >>> quantization_config({"text_config": {"quantization_config": {"quant_method": "fp8"}}})
        {'quant_method': 'fp8'}
    """
    for key in RECORDS:
        if isinstance(config.get(key), Mapping):
            return config[key]
    found = (quantization_config(value) for value in config.values() if isinstance(value, Mapping))
    return next(filter(None, found), {})


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without quantisation settings, in the original order of keys.

    Example:
        >>> without_quantization({"a": 1, "text_config": {"b": 2, "quantization_config": {"quant_method": "fp8"}}})
        {'a': 1, 'text_config': {'b': 2}}
    """
    return {
        key: without_quantization(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in RECORDS or not isinstance(value, Mapping | None)
    }


class Group(NamedTuple):
    """A config group of compressed-tensors.

    Args:
        name: in the config.
        targets: modules: their paths, regular expressions behind `re:`, or names of classes.
        weights: how their weights are held.
    """

    name: str
    targets: tuple[str, ...]
    weights: Mapping[str, Any]


def groups(settings: Mapping[str, Any]) -> list[Group]:
    """Return what compressed-tensors says of weights, group by group.

    Example:
        >>> groups({"config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}}}})
        [Group(name='group_0', targets=('Linear',), weights={'num_bits': 4})]
    """
    named = settings.get("config_groups")
    found = []
    for name, group in named.items() if isinstance(named, Mapping) else ():
        if isinstance(group, Mapping) and isinstance(group.get("weights"), Mapping):
            found.append(Group(name, _texts(group.get("targets")), group["weights"]))
    return found


def group_of(module: str, settings: Mapping[str, Any]) -> Group | None:
    """Return the group that the settings put a linear map into, None where they put it into none.

    A group that names the module counts before one whose expression matches, and that before one for all of its class,
    as in compressed-tensors. The names are those on disk: where one group alone is left, it is taken whatever it names,
    since transformers' names in memory may differ.

    Args:
        module: path of the map, as on disk.
        settings: the config's.

    Raises:
        JaxmoeError: a regular expression is none.

    Example:
        >>> settings = {"config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 8}}}}
        >>> settings["config_groups"]["b"] = {"targets": ["re:.*down_proj"], "weights": {"num_bits": 4}}
        >>> [group_of(f"mlp.experts.0.{name}_proj", settings).name for name in ("up", "down")]
        ['a', 'b']
    """
    found = groups(settings)
    for matches in (lambda group: module in group.targets, lambda group: _matches(module, group.targets)):
        if own := next(filter(matches, found), None):
            return own
    classes = (group for group in found if any(_is_class(target) for target in group.targets))
    return next(classes, found[0] if len(found) == 1 else None)


def ignored(module: str, settings: Mapping[str, Any]) -> bool:
    """Tell whether the settings of compressed-tensors leave a module out, by its name.

    Raises:
        JaxmoeError: a regular expression is none.

    Example:
        >>> ignored("model.layers.0.mlp.gate", {"ignore": ["lm_head", "re:.*gate$"]})
        True
    """
    names = _texts(settings.get("ignore"))
    return module in names or _matches(module, names)


def _matches(module: str, targets: Iterable[str]) -> bool:
    try:
        return any(re.match(target[3:], module) for target in targets if target.startswith("re:"))
    except (re.error, RecursionError, OverflowError) as error:
        raise JaxmoeError(
            f"quantization_config in config.json: a target or `ignore` is no expression ({error})"
        ) from None


def _is_class(target: str) -> bool:
    return target.isidentifier()


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(text for text in value if isinstance(text, str)) if isinstance(value, list | tuple) else ()
