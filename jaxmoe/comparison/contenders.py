"""What a comparison compares: recipes of any kind, each in one or both settings, and the cheap baselines beside them.

A recipe with the setting "paper" is given the calibration only where the published method needs it; "improved" is
always given it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxmoe import methods
from jaxmoe.checkpoint import Checkpoint
from jaxmoe.comparison.cells import Cell
from jaxmoe.compression.recipe import Recipe, find
from jaxmoe.compression.recipe_file import read_recipe
from jaxmoe.compression.step import Options
from jaxmoe.errors import JaxmoeError

SETTINGS = {"paper": ("paper",), "improved": ("improved",), "both": ("paper", "improved")}
FACTORED = "svd"
BASELINES = (FACTORED, "frequency", "reap", "rtn", "gptq")
"""Truncated SVD of every expert, pruning of whole experts, and rounding of all numbers."""


def contenders(
    names: Sequence[str | Recipe] | str, *, setting: str = "improved", set: Mapping[str, Any] | None = None
) -> list[Recipe]:
    """Return the recipes that some names spell, and those that are recipes already as they are.

    Args:
        names: of methods and recipes, or a text of them with commas in between; a name may be that of a recipe file, of
            which method, setting and settings count.
        setting: "paper", "improved" or "both".
        set: settings by `METHOD:NAME`, or by `METHOD:SETTING:NAME` for one of both.

    Raises:
        JaxmoeError: a name, a setting or a method's setting is unknown.

    Example:
        >>> [own.setting for own in contenders("mobe", setting="both", set={"mobe:paper:steps": 20})]
        ['paper', 'improved']
    """
    if setting not in SETTINGS:
        raise JaxmoeError(f"setting {setting!r}: give {' or '.join(SETTINGS)}")
    listed = names.split(",") if isinstance(names, str) else names
    found = dict.fromkeys(_read(own.strip()) if isinstance(own, str) else own for own in listed)
    spelled = dict.fromkeys(find(own).name for own in found if own and isinstance(own, str))
    wanted: dict[tuple[str, str], dict[str, Any]] = {(name, own): {} for name in spelled for own in SETTINGS[setting]}
    for key, value in (set or {}).items():
        method, *scope, name = key.split(":") if ":" in key else ("", key)
        to = [own for own in wanted if own[0] == method and (not scope or scope == [own[1]])]
        if not to:
            known = ", ".join(":".join(own) for own in wanted)
            raise JaxmoeError(f"--set {key}={value}: give METHOD:NAME=VALUE or METHOD:SETTING:NAME=VALUE of {known}")
        for own in to:
            wanted[own][name] = value
    recipes = [find(name, setting=own, options=given) for (name, own), given in wanted.items()]
    return [*recipes, *(own for own in found if isinstance(own, Recipe))]


def _read(name: str) -> str | Recipe:
    """Return the recipe of a recipe file, and any other name as it is."""
    if not name.endswith((".yaml", ".yml", ".json")):
        return name
    options = read_recipe(name)
    if "method" not in options:
        raise JaxmoeError(f"{name} names no method: give one, such as method: svd")
    return find(options["method"], setting=options.get("setting", "improved"), options=options.get("set"))


def with_baselines(
    recipes: Sequence[Recipe], able: Callable[[Recipe], bool], wanted: Sequence[str] | str | None = None
) -> list[Recipe]:
    """Return the recipes, and before them cheap ones that nobody has to name, unless they are there.

    Args:
        recipes: what is compared.
        able: whether a recipe can be carried out with what there is: the checkpoint, its statistics, unit and targets.
        wanted: names of the baselines, as a list or a text with commas in between, none in an empty one or "none"; None
            for all that can be carried out.

    Raises:
        JaxmoeError: a name is of no baseline, or of one that cannot be carried out.

    Example:
        >>> [own.name for own in with_baselines([find("mobe")], lambda own: True, "svd,rtn")]
        ['svd', 'rtn', 'mobe']
    """
    listed = wanted.split(",") if isinstance(wanted, str) else BASELINES if wanted is None else wanted
    names = [own.strip() for own in listed if own.strip() not in ("", "none")]
    if unknown := [own for own in names if own not in BASELINES]:
        raise JaxmoeError(f"no baselines: {', '.join(unknown)}; give some of {', '.join(BASELINES)}, or none")
    if not recipes:
        return []
    there = {(own.name, own.setting) for own in recipes}
    known = {name for name, _ in there}
    settings = dict.fromkeys(own.setting for own in recipes)
    baselines = [find(FACTORED, setting=own) for own in settings if FACTORED in names and (FACTORED, own) not in there]
    baselines += [find(own) for own in names if own in methods.METHODS and own not in known and own != FACTORED]
    possible = [own for own in baselines if able(own)]
    if wanted is not None and len(possible) < len(baselines):
        impossible = dict.fromkeys(own.name for own in baselines if own not in possible)
        raise JaxmoeError(f"baselines that cannot be carried out here: {', '.join(impossible)}; leave them out")
    return [*possible, *recipes]


def calibrated(recipe: Recipe) -> bool:
    """Tell whether a recipe is given the calibration, where there is any.

    Example:
        >>> calibrated(find("svd")), calibrated(find("svd", setting="paper")), calibrated(find("reap", setting="paper"))
        (True, False, True)
    """
    return recipe.setting == "improved" or bool(recipe.requires)


def wants_gradients(recipe: Recipe) -> bool:
    """Tell whether a recipe needs the Fisher information, or shares its budget better with it."""
    return recipe.needs_gradients or (recipe.setting == "improved" and recipe.allocation == "importance")


def check_all(checkpoint: Checkpoint, recipes: Sequence[Recipe], targets: tuple[str, ...]) -> None:
    """Raise if some recipe could not be carried out on such targets, or written, before calibration starts."""
    for recipe in recipes:
        recipe.check(checkpoint, Options(texts=True, targets=targets))


def able(recipe: Recipe, checkpoint: Checkpoint, cells: Sequence[Cell], *, texts: bool) -> bool:
    """Tell whether a recipe can be carried out: on this checkpoint, with or without texts, at such sizes and targets.

    Args:
        recipe: what is asked about.
        checkpoint: the source.
        cells: of the recipe.
        texts: whether there are texts to calibrate on.
    """
    try:
        for cell in cells:
            recipe.check(checkpoint, Options(texts=texts, targets=cell.targets))
            recipe.asked(**cell.size)
    except JaxmoeError:
        return False
    return texts or not recipe.requires
