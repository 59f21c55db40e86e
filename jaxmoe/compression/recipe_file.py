"""Recipes as files: every option of `jaxmoe plan` and `jaxmoe compress`, under its own name, in YAML or JSON.

    method: reap+mobe
    ratio: 0.4
    set: {mobe.steps: 300}
    text: [calibration]

Options with hyphens may be written with underscores; lists of names may be text with commas, as on the command line.
Paths are relative to the working directory. How to run it (`--resume`, `--json`) is no part of a recipe. `recipe.yaml`
in every output is such a file, and makes the same output again.
"""

import json
import reprlib
import sys
from collections.abc import Collection, Hashable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import msgspec
import yaml

from jaxmoe.checkpoint.families import Family
from jaxmoe.checkpoint.records import read_bytes
from jaxmoe.compression.evidence import Sums
from jaxmoe.compression.recipe import Recipe
from jaxmoe.compression.step import EXPERTS, Asked, Options, Texts
from jaxmoe.errors import JaxmoeError, shortened
from jaxmoe.texts.reading import at_home

NAME = "recipe.yaml"
"""The file in every output."""

Names = list[str] | str
Value = bool | int | float | str | None


class RecipeFile(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What a recipe file may hold; the arguments of `jaxmoe.compress` say what each option means."""

    method: str | None = None
    ratio: float | None = None
    main_experts: int | None = None
    of: str | None = None
    unit: str | None = None
    setting: str | None = None
    set: dict[str, Value] | None = None
    targets: Names | None = None
    allocation: str | None = None
    statistics: str | None = None
    text: Names | None = None
    sequences: int | None = None
    length: int | None = None
    gradients: str | None = None
    sequential: bool | None = None
    export: str | None = None
    seed: int | None = None
    layers: str | list[int] | None = None
    revision: str | None = None
    ignore_config_keys: Names | None = None


_TYPES = {own.name: own.type for own in msgspec.structs.fields(RecipeFile)}
_TAKES = {
    str | None: "text",
    float | None: "a number",
    int | None: "a whole number",
    bool | None: "true or false",
    Names | None: "text, or a list of texts",
    str | list[int] | None: "FIRST:END in quotes, or a list of the two",
    dict[str, Value] | None: "settings by name, such as {steps: 300}",
}
"""What an option of some type takes, in words."""


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Return the options that stand in a recipe file, as `jaxmoe.compress` takes them.

    Raises:
        JaxmoeError: the file is missing, no YAML or JSON, or holds an option or a value that there is not; the message
            names the line or the option, and what it takes.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "recipe.yaml")
        ...     _ = path.write_text("{method: reap+mobe, ratio: 0.4, set: {mobe.steps: 300}}")
        ...     read_recipe(path)
        {'method': 'reap+mobe', 'ratio': 0.4, 'set': {'mobe.steps': 300}}
    """
    path = Path(path).expanduser()
    found = _decoded(path)
    if not isinstance(found, Mapping):
        raise JaxmoeError(f"{path} holds no options: give them by name, such as method: svd")
    named = {str(key).replace("-", "_"): (str(key), value) for key, value in found.items()}
    if unknown := [key for name, (key, _) in named.items() if name not in _TYPES]:
        raise JaxmoeError(f"{path}: {'; '.join(map(_unknown, unknown))}")
    if len(named) < len(found):
        raise JaxmoeError(f"{path}: an option stands there twice, with a hyphen and with an underscore: give it once")
    problems, options = [], {}
    for name, (key, value) in named.items():
        try:
            options[name] = msgspec.convert(value, _TYPES[name])
        except msgspec.ValidationError as error:
            where = f" ({error})" if isinstance(value, list | dict) else ""
            problems.append(
                f"{key}: {reprlib.repr(value)} is nothing that it takes{where}, give {_TAKES[_TYPES[name]]}"
            )
    if problems:
        raise JaxmoeError(f"{path}: {'; '.join(problems)}")
    return {name: _normal(name, value) for name, value in options.items() if value is not None}


def _normal(name: str, value: Any) -> Any:
    """Return an option as `jaxmoe.compress` takes it."""
    if name == "layers":
        return layer_span(value if isinstance(value, str) else ":".join(map(str, value)))
    if name == "ignore_config_keys" and isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    return value


def layer_span(text: str) -> tuple[int, int]:
    """Return the layers that FIRST:END names.

    Example:
        >>> layer_span("2:5")
        (2, 5)
    """
    first, separator, end = text.partition(":")
    try:
        span = int(first or 0), int(end) if end else sys.maxsize
    except ValueError:
        separator = ""
        span = (0, 0)
    if not separator or not 0 <= span[0] < span[1]:
        raise JaxmoeError(f"--layers {text}: give FIRST:END with FIRST < END, such as 0:16 (END is not included)")
    return span


def _unknown(key: str) -> str:
    near = get_close_matches(key.replace("-", "_"), _TYPES, n=3, cutoff=0.5)
    return (
        f"there is no option {shortened(key)!r}, {'do you mean ' if near else 'there are '}{', '.join(near or _TYPES)}?"
    )


def _decoded(path: Path) -> Any:
    content = read_bytes(path, limit=1 << 20)
    try:
        text = content.decode()
        return json.loads(text) if path.suffix == ".json" else yaml.load(text, _Loader)
    except UnicodeDecodeError:
        raise JaxmoeError(f"{path} is not UTF-8: give text in YAML or JSON") from None
    except json.JSONDecodeError as error:
        raise JaxmoeError(f"{path}, line {error.lineno}: this is no JSON ({error.msg})") from None
    except yaml.MarkedYAMLError as error:
        line = 1 if error.problem_mark is None else error.problem_mark.line + 1
        raise JaxmoeError(f"{path}, line {line}: this is no YAML ({error.problem})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise JaxmoeError(f"{path} is no YAML ({error})") from None


class _Loader(yaml.SafeLoader):
    """YAML whose mappings name nothing twice: of two values, one would be dropped without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [key.value for key, _ in node.value]
        if twice := [name for name in names if names.count(name) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]} stands there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def recorded(
    recipe: Recipe,
    asked: Asked,
    *,
    options: Options,
    texts: Texts | None,
    statistics: Sums | None,
    seed: int,
    ignored: Collection[str] = (),
    family: Family | None = None,
) -> str:
    """Return the recipe file of a run: all that decides its output, with absolute paths.

    Args:
        recipe: the steps.
        asked: the sizes.
        options: how it was carried out; where it was some layers at a time, the file is about all of them.
        texts: it was calibrated on, None without.
        statistics: that were given to it; where there are texts, these are what counts.
        seed: the random seed.
        ignored: keys of the source's config that were left out of account.
        family: the source's architecture, None where it is not known.
    """
    found: dict[str, Any] = {"method": recipe.name}
    if asked.budget is not None:
        found |= asked.budget.as_json()
    found |= {"main_experts": asked.main_experts, "setting": recipe.setting, "set": recipe.changed or None}
    targets = None if options.targets == EXPERTS else list(options.targets)
    found |= {"targets": targets, "allocation": options.allocation, "export": options.export, "seed": seed}
    if texts is not None:
        most = max(len(text.ids) for text in texts.windows)
        found |= {
            "text": [_absolute(path) for path in texts.paths],
            # Of a text, no more windows are taken than it has.
            "sequences": most if texts.sequences is None else texts.sequences,
            "length": texts.length,
            "gradients": options.gradients,
            "sequential": options.sequential or None,
        }
    elif statistics is not None:
        found["statistics"] = _absolute(statistics.reads[0])
    imports = "".join(f" --import {name}" for name in recipe.imports(family))
    return recipe_yaml(
        found | {"ignore_config_keys": list(ignored) or None},
        comment=f"jaxmoe{imports} compress CHECKPOINT OUTPUT --recipe {NAME}",
    )


def _absolute(path: str | Path) -> str:
    return str(at_home(path).absolute())


def recipe_yaml(options: Mapping[str, Any], *, comment: str = "") -> str:
    """Return the file that holds some options, such as `read_recipe` reads again.

    Args:
        options: by name; None is left out.
        comment: lines above them.

    Example:
        >>> print(recipe_yaml({"method": "svd", "ratio": 0.4, "text": None}, comment="smaller"))
        # smaller
        method: svd
        ratio: 0.4
        <BLANKLINE>
    """
    record = msgspec.to_builtins(RecipeFile(**options))
    above = "".join(f"# {line}\n" for line in comment.splitlines())
    return above + yaml.safe_dump(record, sort_keys=False, allow_unicode=True, width=120)
