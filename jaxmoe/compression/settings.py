"""Settings of a recipe's steps from what a user gives them: text of the command line, or values."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from jaxmoe.errors import JaxmoeError
from jaxmoe.export.packed import BITS, PACKED
from jaxmoe.methods.quantising import QuantisingMethod


def step_settings(method: Any, setting: str, given: Mapping[str, Any]) -> Any:
    """Return an instance of a method's settings.

    Args:
        method: its record.
        setting: "paper" or "improved".
        given: values by name; text is read as what the setting takes.

    Raises:
        JaxmoeError: there is no such setting, or it does not take that.

    Example:
        >>> from jaxmoe import methods
        >>> step_settings(methods.get("mobe"), "paper", {"steps": "20"}).steps
        20
    """
    hints = get_type_hints(method.settings)
    names = [own.name for own in fields(method.settings) if own.init and own.name != "setting"]
    values: dict[str, Any] = {"setting": setting, **_fixed(method, given)}
    for name, value in given.items():
        if name not in names:
            known = ", ".join(names) or "none"
            raise JaxmoeError(
                f"--set {name}={_shown(value)}: give NAME=VALUE; the settings of {method.name} are: {known}"
            )
        values[name] = parse(method.name, name, value, hints[name]) if isinstance(value, str) else value
    return method.settings(**values)


def _fixed(method: Any, given: Mapping[str, Any]) -> dict[str, int]:
    """Return the bits that a method's name ends in, if it does."""
    if (bits := getattr(method, "fixed", None)) is None:
        return {}
    if "bits" in given:
        bare = method.name.removesuffix(str(bits))
        raise JaxmoeError(
            f"--set bits={given['bits']}: the name {method.name} says {bits} bits; give one of them, {method.name} or"
            f" {bare} with --set bits"
        )
    return {"bits": bits}


def parse(method: str, name: str, text: str, hint: Any) -> Any:
    """Return what a text says of a setting.

    Args:
        method: whose setting it is.
        name: of the setting.
        text: as given.
        hint: its type; of several the first one that fits.

    Example:
        >>> parse("mobe", "steps", "20", int | None), parse("rtn", "zero", "none", Literal["none", "real"] | None)
        (20, 'none')
    """
    kinds = get_args(hint) if get_origin(hint) in (UnionType, Union) else (hint,)
    for kind in kinds:
        if get_origin(kind) is Literal:
            if text not in get_args(kind):
                raise JaxmoeError(f"--set {name}={text}: {method} takes {name} as {', '.join(get_args(kind))}")
            return text
        if kind is bool:
            if text.lower() not in ("true", "false"):
                raise JaxmoeError(f"--set {name}={text}: {method} takes {name} as true or false")
            return text.lower() == "true"
        if kind in (int, float, str):
            try:
                return kind(text)
            except ValueError:
                raise JaxmoeError(f"--set {name}={text}: {method} takes {name} as {kind.__name__}") from None
    raise JaxmoeError(f"--set {name}={text}: {name} cannot be set from the command line")


def split(steps: Sequence[str], given: Mapping[str, Any]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Return what is given to each step, and the steps' shares of the budget.

    Args:
        steps: names of the steps.
        given: values by `STEP.NAME`, and by `NAME` where there is one step; `STEP.share` is the recipe's own.

    Raises:
        JaxmoeError: a value is for no step.

    Example:
        >>> split(["reap", "svd"], {"reap.multiple": 8, "svd.share": "2"})
        ([{'multiple': 8}, {}], {'svd': 2.0})
    """
    own: dict[str, dict[str, Any]] = {name: {} for name in steps}
    shares: dict[str, float] = {}
    for key, value in given.items():
        step, separator, name = key.partition(".")
        if not separator and len(steps) == 1:
            step, name = steps[0], key
        if step not in own or not name:
            raise JaxmoeError(f"--set {key}={_shown(value)}: give STEP.NAME=VALUE with a step of {'+'.join(steps)}")
        if name == "share" and len(steps) > 1:
            shares[step] = parse("+".join(steps), key, str(value), float)
        else:
            own[step][name] = value
    return list(own.values()), shares


def changed(method: Any, settings: Any) -> dict[str, Any]:
    """Return the settings that differ from those of "paper" or "improved" as they come.

    Args:
        method: its record.
        settings: an instance of its settings.

    Example:
        >>> from jaxmoe import methods
        >>> mobe = methods.get("mobe")
        >>> changed(mobe, mobe.settings(setting="paper", steps=20))
        {'steps': 20}
    """
    usual = step_settings(method, settings.setting, {})
    values = {own.name: getattr(settings, own.name) for own in fields(settings) if own.init}
    return {name: value for name, value in values.items() if value != getattr(usual, name)}


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def of_form(method: Any, export: str | None) -> tuple[Any, dict[str, Any]]:
    """Return a method as a form of the result lets it choose bits, and the settings that it asks of it by default."""
    if export not in PACKED or not isinstance(method, QuantisingMethod):
        return method, {}
    asked = {"zero": "none", "scale": "bfloat16", "bits_per": "model" if export == "packed" else "layer"}
    names = {own.name for own in fields(method.settings)}
    choosing = method._replace(widths=_packed_widths) if method.takes_bits else method
    return choosing, {name: value for name, value in asked.items() if name in names}


def _packed_widths(settings: Any) -> tuple[int, ...]:
    return BITS
