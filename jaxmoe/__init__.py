"""jaxmoe: compress the experts of Mixture-of-Experts language models, in JAX.

The numbers are pure functions of arrays (`weighted_svd`, `learn_basis`, `variable_projection`, `allocate`); what they
give is stored in terms (`Dense`, `LowRank`, `Grouped`, ...); a method is a short recipe of both (`methods`); `compress`
runs one over a checkpoint. The names below are loaded when they are first used, so that importing jaxmoe costs nothing.
"""

import warnings
from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "jaxmoe.allocation": ("Ladder", "allocate"),
    "jaxmoe.calibration.checkpoint": ("calibrate",),
    "jaxmoe.calibration.folder": ("Statistics",),
    "jaxmoe.calibration.statistics": ("LayerStatistics",),
    "jaxmoe.checkpoint": ("Checkpoint", "MoELayer"),
    "jaxmoe.checkpoint.factored": ("CompressedCheckpoint",),
    "jaxmoe.checkpoint.inspection": ("inspect",),
    "jaxmoe.checkpoint.stored_model": ("StoredModel",),
    "jaxmoe.comparison": ("compare",),
    "jaxmoe.errors": ("JaxmoeError",),
    "jaxmoe.evaluation": ("Evaluation", "evaluate"),
    "jaxmoe.export.dense": ("densify",),
    "jaxmoe.factors": (
        "CompressedLayer",
        "Count",
        "Dense",
        "Grouped",
        "Hashed",
        "LayerShape",
        "LowRank",
        "Merged",
        "Shared",
        "SharedBasis",
        "Sparse",
        "Term",
        "stack",
    ),
    "jaxmoe.factors.error": ("relative_errors",),
    "jaxmoe.model": ("Decoder",),
    "jaxmoe.compression.api": ("compress", "plan"),
    "jaxmoe.compression.recipe_file": ("read_recipe",),
    "jaxmoe.recovery": ("Training",),
    "jaxmoe.recovery.recover": ("recover",),
    "jaxmoe.solvers.basis_learning": ("learn_basis",),
    "jaxmoe.solvers.mixture": ("solve_coefficients",),
    "jaxmoe.solvers.residual": ("hashed_residual", "largest_entries"),
    "jaxmoe.solvers.second_moment": ("expert_moments",),
    "jaxmoe.solvers.variable_projection": ("variable_projection",),
    "jaxmoe.solvers.weighted_svd": ("weighted_svd",),
}
_DEPRECATED = {
    "Contender": "compare with the names of methods",
    "Plan": "plan",
    "calibrate_checkpoint": "calibrate",
    "evaluate_checkpoint": "evaluate",
    "make_plan": "plan",
}
"""Names of earlier versions, and what to call instead."""
_HOME = {name: module for module, names in _HOMES.items() for name in names}

_MODULES = ("methods", "scores")

__all__ = sorted([*_HOME, *_MODULES])


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name in _MODULES:
        return import_module(f"jaxmoe.{name}")
    if name in _DEPRECATED:
        warnings.warn(f"jaxmoe.{name} is deprecated, use jaxmoe.{_DEPRECATED[name]}", DeprecationWarning, stacklevel=2)
        return getattr(import_module("jaxmoe.deprecated"), name)
    raise AttributeError(f"module 'jaxmoe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
