"""One file per method: a recipe of scores, allocation, solvers and factors, and the registry of their names.

A method from elsewhere calls `register` when its module is imported. An installed package names that module under the
entry points of the group `jaxmoe.methods`, which are loaded when a name is asked for that is not here.
"""

from importlib.metadata import entry_points

from jaxmoe.errors import JaxmoeError
from jaxmoe.methods.camera import CAMERA
from jaxmoe.methods.d2moe import D2MOE
from jaxmoe.methods.frequency import FREQUENCY
from jaxmoe.methods.hc_smoe import HC_SMOE
from jaxmoe.methods.method import Evidence, Fit, Method, Outcome, Slot
from jaxmoe.methods.mobe import MOBE
from jaxmoe.methods.nystrom import NYSTROM
from jaxmoe.methods.pruning import PruningMethod
from jaxmoe.methods.reap import REAP
from jaxmoe.methods.rfid import RFID
from jaxmoe.methods.svd import SVD

AnyMethod = Method | PruningMethod
"""What a name may stand for: factors of the experts, or fewer and smaller ones."""

METHODS: dict[str, AnyMethod] = {}
"""The registered methods by name."""


def register(method: AnyMethod) -> AnyMethod:
    """Make a method known under its name, to the library and the command line."""
    if METHODS.get(method.name, method) is not method:
        raise JaxmoeError(f"a method named {method.name!r} is registered already: choose another name")
    METHODS[method.name] = method
    return method


def get(name: str) -> AnyMethod:
    """Return the method of that name.

    Example:
        >>> get("svd").summary
        'truncated SVD of every expert'
    """
    if name not in METHODS:
        for entry in entry_points(group="jaxmoe.methods"):
            entry.load()
    if name not in METHODS:
        raise JaxmoeError(f"unknown method {name!r}: the methods are {', '.join(sorted(METHODS))}")
    return METHODS[name]


def pruning_methods() -> str:
    """Return the names of the methods that remove experts or channels, for messages.

    Example:
        >>> pruning_methods()
        'camera, frequency, nystrom, reap'
    """
    return ", ".join(name for name, method in sorted(METHODS.items()) if isinstance(method, PruningMethod))


for _method in (SVD, MOBE, RFID, D2MOE, FREQUENCY, REAP, CAMERA, NYSTROM, HC_SMOE):
    register(_method)

__all__ = [
    "METHODS",
    "AnyMethod",
    "Evidence",
    "Fit",
    "Method",
    "Outcome",
    "PruningMethod",
    "Slot",
    "get",
    "pruning_methods",
    "register",
]
