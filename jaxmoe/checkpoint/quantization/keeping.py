"""Quantised matrices that no step replaces stay as they are: when that is so, and what a config then says.

The transformers quantiser that a config names loads them, and leaves out the modules that the config tells it to. So a
result that it does not know the modules of can still hold them, as long as these are told.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jaxmoe.checkpoint.quantization.matrix import Matrix
from jaxmoe.checkpoint.quantization.settings import RECORDS
from jaxmoe.checkpoint.tensor_file import Planned

LEFT_OUT = {"fp8": "modules_to_not_convert", "compressed-tensors": "ignore"}
"""The methods whose quantisers were tried on what is left of a model, and the key under which a config names modules
that they leave out."""


def obstacle(settings: Mapping[str, Any], matrices: Collection[Matrix], form: str) -> str | None:
    """Return why quantised matrices cannot stay as they are, None where they can.

    Args:
        settings: the config's, empty if it has none.
        matrices: those that no step replaces.
        form: of the result.

    Example:
        >>> obstacle({"quant_method": "modelopt"}, [], "factored")
        'transformers has no quantiser that is known to load modelopt beside other modules'
    """
    method = settings.get("quant_method")
    if form not in ("factored", "slim"):
        return f"the form {form} has none, or its own alone"
    if form == "slim" and method == "compressed-tensors":
        return "of a stock architecture, transformers takes either all or none of the experts from compressed-tensors"
    if method not in LEFT_OUT:
        return f"transformers has no quantiser that is known to load {method or 'them'} beside other modules"
    if wrong := [m.name for m in matrices if method == "fp8" and not m.parts[-1].name.endswith("_scale_inv")]:
        return f"the quantiser of {method} does not know scales under such names as {wrong[0]} has"
    return None


def leaving_out(
    config: Mapping[str, Any], settings: Mapping[str, Any], copied: Sequence[Planned], modules: Collection[str]
) -> dict[str, Any]:
    """Return a config that says how what stays is quantised, and which modules are not; the same where nothing stays.

    Args:
        config: of the result.
        settings: of the source, of a method of `LEFT_OUT`.
        copied: tensors of the result that come from the source.
        modules: paths in transformers of those that were replaced.

    Example:
        >>> part = Planned("q_proj.weight", "F8_E4M3", (2, 2), lambda: None, stands_for=4)
        >>> leaving_out({}, {"quant_method": "fp8", "modules_to_not_convert": ["lm_head"]}, [part], ["mlp.experts"])
        {'quantization_config': {'quant_method': 'fp8', 'modules_to_not_convert': ['lm_head', 'mlp.experts']}}
    """
    if all(tensor.stands_for is None for tensor in copied):
        return dict(config)
    method = settings["quant_method"]
    key = LEFT_OUT[method]
    # Everything below a module, too, and none whose name merely begins with its.
    names = modules if method == "fp8" else [rf"re:{re.escape(module)}(\..*)?$" for module in modules]
    told = settings.get(key)
    known = list(told) if isinstance(told, list | tuple) else []
    new = [name for name in names if name not in known]
    return {**config, RECORDS[0]: {**settings, key: [*known, *new]}}
