"""Where a method comes from, if not with jaxmoe: what imports it again, and whether its code has changed."""

import inspect
from hashlib import sha256
from importlib.machinery import PathFinder
from typing import Any

from jaxmoe.methods import AnyMethod


def outside(function: Any) -> str | None:
    """Return what `--import` takes for the module of a function, None where that comes with jaxmoe."""
    module = inspect.getmodule(function)
    name = "__main__" if module is None else module.__name__
    top = name.split(".")[0]
    if module is None or top in ("jaxmoe", "__main__"):
        return None
    # A file that was imported by its path is not found by its name.
    return name if PathFinder.find_spec(top) is not None else str(module.__file__)


def code_of(method: AnyMethod) -> str | None:
    """Return a SHA-256 of the source of a method that does not come with jaxmoe, so that a changed one is new."""
    module = inspect.getmodule(made_by(method))
    if module is not None and module.__name__.split(".")[0] == "jaxmoe":
        return None
    try:
        source = inspect.getsource(made_by(method) if module is None or module.__name__ == "__main__" else module)
    except (OSError, TypeError):
        return None
    return sha256(source.encode()).hexdigest()


def made_by(method: AnyMethod) -> Any:
    """Return what a method is made of that has a place in some source: its fit, or its settings where it has none."""
    return getattr(method, "fit", method.settings)
