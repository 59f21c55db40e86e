"""One file per method: a recipe of scores, allocation, solvers and factors, and the registry of their names.

A method from elsewhere calls `register` when its module is imported. An installed package names that module under the
entry points of the group `jaxmoe.methods`, which are loaded when a name is asked for that is not here.
"""

import re
from importlib.metadata import entry_points

from jaxmoe.errors import JaxmoeError
from jaxmoe.methods.camera import CAMERA
from jaxmoe.methods.compressed_experts import COMPRESSED_EXPERTS, SkippingMethod
from jaxmoe.methods.d2moe import D2MOE
from jaxmoe.methods.frequency import FREQUENCY
from jaxmoe.methods.fwsvd import FWSVD
from jaxmoe.methods.hc_smoe import HC_SMOE
from jaxmoe.methods.method import Evidence, Fit, Method, Outcome, Slot
from jaxmoe.methods.milo import MILO
from jaxmoe.methods.mobe import MOBE
from jaxmoe.methods.nystrom import NYSTROM
from jaxmoe.methods.pruning import PruningMethod
from jaxmoe.methods.quantising import QuantisingMethod, QuantisingSettings
from jaxmoe.methods.quantmoe import QUANTMOE
from jaxmoe.methods.reap import REAP
from jaxmoe.methods.recover import RECOVER, RecoveryMethod
from jaxmoe.methods.rfid import RFID
from jaxmoe.methods.rounding import GPTQ, HQQ, RTN
from jaxmoe.methods.slim_llm import SLIM_LLM
from jaxmoe.methods.squeezellm import SQUEEZELLM
from jaxmoe.methods.svd import SVD

AnyMethod = Method | PruningMethod | QuantisingMethod | SkippingMethod | RecoveryMethod
"""What a name may stand for: a record of any `kind` of step."""

METHODS: dict[str, AnyMethod] = {}
"""The registered methods by name."""


def register(method: AnyMethod) -> AnyMethod:
    """Make a method known under its name, to the library and the command line."""
    if METHODS.get(method.name, method) is not method:
        raise JaxmoeError(f"a method named {method.name!r} is registered already: choose another name")
    METHODS[method.name] = method
    return method


def get(name: str) -> AnyMethod:
    """Return the method of that name; of a quantising one, the bits may stand behind it, as in `gptq4`.

    Raises:
        JaxmoeError: there is none, or it has no such bits.

    Example:
        >>> get("svd").summary
        'truncated SVD of every expert'
    """
    found = _named(name)
    if found is None:
        for entry in entry_points(group="jaxmoe.methods"):
            entry.load()
        found = _named(name)
    if found is None:
        known = [f"{own}, {own}4" if takes_bits(own) else own for own in sorted(METHODS)]
        raise JaxmoeError(f"unknown method {name!r}: the methods are {', '.join(known)}")
    return found


def _named(name: str) -> AnyMethod | None:
    if name in METHODS:
        return METHODS[name]
    parts = re.fullmatch(r"(.*\D)([1-9]\d*)", name)
    if parts is None or not takes_bits(parts[1]):
        return None
    method = METHODS[parts[1]]
    assert isinstance(method, QuantisingMethod)
    try:
        return method.at(int(parts[2]))
    except JaxmoeError as error:
        raise JaxmoeError(f"{name}: {error}") from None


def takes_bits(name: str) -> bool:
    """Tell whether bits may stand behind a name.

    Example:
        >>> takes_bits("svd")
        False
    """
    method = METHODS.get(name)
    return isinstance(method, QuantisingMethod) and method.takes_bits


def names(kind: str) -> list[str]:
    """Return the names of the methods of a kind: "remove", "factor", "quantise", "skip" or "recover".

    Example:
        >>> names("remove")
        ['camera', 'frequency', 'nystrom', 'reap']
    """
    return [name for name, method in sorted(METHODS.items()) if method.kind == kind]


def of_linear_maps() -> list[str]:
    """Return the names of the methods that also replace attention, shared experts and dense blocks.

    Example:
        >>> of_linear_maps()
        ['svd']
    """
    return [name for name, method in sorted(METHODS.items()) if getattr(method, "linear_slot", None) is not None]


for _method in (
    SVD,
    FWSVD,
    MOBE,
    RFID,
    D2MOE,
    HC_SMOE,
    FREQUENCY,
    REAP,
    CAMERA,
    NYSTROM,
    COMPRESSED_EXPERTS,
    RECOVER,
    RTN,
    HQQ,
    GPTQ,
    QUANTMOE,
    SQUEEZELLM,
    MILO,
    SLIM_LLM,
):
    register(_method)

__all__ = [
    "METHODS",
    "AnyMethod",
    "Evidence",
    "Fit",
    "Method",
    "Outcome",
    "PruningMethod",
    "QuantisingMethod",
    "QuantisingSettings",
    "RecoveryMethod",
    "SkippingMethod",
    "Slot",
    "get",
    "names",
    "of_linear_maps",
    "register",
    "takes_bits",
]
