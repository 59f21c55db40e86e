"""What the commands take: their arguments and options, and how the texts of some become values."""

import importlib
import importlib.util
import sys
import traceback
from dataclasses import fields
from enum import StrEnum
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from jaxmoe.errors import JaxmoeError


class Scope(StrEnum):
    touched = "touched"
    experts = "experts"
    model = "model"


class Export(StrEnum):
    factored = "factored"
    dense = "dense"
    slim = "slim"


class Setting(StrEnum):
    paper = "paper"
    improved = "improved"


class Settings(StrEnum):
    paper = "paper"
    improved = "improved"
    both = "both"


class Moments(StrEnum):
    none = "none"
    pooled = "pooled"
    expert = "expert"
    weighted = "weighted"


class Gradients(StrEnum):
    sequence = "sequence"
    token = "token"


class Allocation(StrEnum):
    uniform = "uniform"
    importance = "importance"
    spectral = "spectral"


class Form(StrEnum):
    dense = "dense"
    safetensors = "safetensors"
    orbax = "orbax"


class Schedule(StrEnum):
    cosine = "cosine"
    stable = "stable"


class Compute(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"


CheckpointArgument = Annotated[str, typer.Argument(metavar="CHECKPOINT", help="a folder or a hub id")]
OutputArgument = Annotated[Path, typer.Argument(metavar="OUTPUT", help="the folder to create")]
MethodOption = Annotated[
    str, typer.Option("--method", "-m", help="a method's name, such as svd or mobe, or a chain such as reap+mobe")
]
RatioOption = Annotated[float | None, typer.Option("--ratio", "-r", help="removed fraction, such as 0.4")]
MainExpertsOption = Annotated[
    int | None, typer.Option("--main-experts", help="with compressed_experts: how many of a token's experts run")
]
OfOption = Annotated[Scope, typer.Option("--of", help="what the ratio is a fraction of")]
SettingOption = Annotated[Setting, typer.Option("--setting", help="as published, or with jaxmoe's improvements")]
AllocationOption = Annotated[
    Allocation | None,
    typer.Option(
        "--allocation",
        help="share the budget over layers and projections uniformly, by what they cost (needs the statistics'"
        " gradients) or by their spectra; by default the method's own rule where the statistics allow it",
    ),
]
StatisticsOption = Annotated[
    Path | None,
    typer.Option("--statistics", metavar="FOLDER", help="what `calibrate` gathered, to weigh errors by"),
]
ExportOption = Annotated[
    Export | None,
    typer.Option(
        "--export",
        help="factored (the default): smaller files; dense: stock files of the old size; slim: smaller stock files, as"
        " methods that remove experts or channels always write",
    ),
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="a setting of the method; may be repeated")
]
TextOption = Annotated[
    list[Path],
    typer.Option(
        "--text", metavar="PATH", help="text file, folder of *.txt or JSON lines with a `text`; may be repeated"
    ),
]
LengthOption = Annotated[
    int | None,
    typer.Option("--length", help="tokens in a window; by default 256 where the context is up to 2048, else 2048"),
]
CalibrationOption = Annotated[
    int, typer.Option("--sequences", help="windows of each text, evenly spread over it", show_default=True)
]
GradientsOption = Annotated[
    Gradients | None,
    typer.Option("--gradients", help="keep the Fisher information too, of each sequence's or each token's loss"),
]
TargetsOption = Annotated[
    str,
    typer.Option(
        "--targets",
        metavar="LIST",
        help="what is replaced: experts, attention, shared (experts), dense (blocks without experts), or several",
    ),
]
SeedOption = Annotated[
    int,
    typer.Option(
        "--seed", min=0, max=2**32 - 1, metavar="NUMBER", help="of everything random: the order of data, starts"
    ),
]
RevisionOption = Annotated[str | None, typer.Option("--revision", help="branch, tag or commit of a hub id")]
IgnoreOption = Annotated[
    str | None,
    typer.Option(
        "--ignore-config-keys",
        metavar="KEY,...",
        help="keys of config.json that jaxmoe does not know and that change nothing in the model",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="one JSON object on standard output")]


def names(text: str | None) -> tuple[str, ...]:
    """Return the names of a list with commas; none for None.

    Example:
        >>> names("a, b"), names(None)
        (('a', 'b'), ())
    """
    return tuple(part for part in (name.strip() for name in (text or "").split(",")) if part)


def method_settings(method, setting: Setting, given: list[str] | None):
    """Build a method's settings from `--setting` and `--set NAME=VALUE`."""
    hints = get_type_hints(method.settings)
    names = [f.name for f in fields(method.settings) if f.name != "setting"]
    values: dict[str, Any] = {"setting": setting.value}
    for text in given or []:
        name, separator, value = text.partition("=")
        if not separator or name not in names:
            known = ", ".join(names) or "none"
            raise JaxmoeError(f"--set {text}: give NAME=VALUE; the settings of {method.name} are: {known}")
        values[name] = _parse(method.name, name, value, hints[name])
    return method.settings(**values)


def chain_settings(chain, setting: Setting, given: list[str] | None):
    """Build the settings of a chain from `--setting` and `--set STEP.NAME=VALUE`; `STEP.share` is the chain's own."""
    from jaxmoe.compression.chain import ChainSettings

    names = [step.name for step in chain.steps]
    own: dict[str, list[str]] = {name: [] for name in names}
    shares: dict[str, float] = {}
    for text in given or []:
        step, separator, rest = text.partition(".")
        if not separator or step not in own:
            raise JaxmoeError(f"--set {text}: give STEP.NAME=VALUE with a step of {chain.name}")
        if rest.startswith("share="):
            shares[step] = _parse(chain.name, f"{step}.share", rest.removeprefix("share="), float)
        else:
            own[step].append(rest)
    steps = tuple(method_settings(step, setting, own[step.name]) for step in chain.steps)
    parts = tuple(shares.get(name, 1.0) for name in names) if shares else None
    return ChainSettings(setting=setting.value, steps=steps, shares=parts)


def _parse(method: str, name: str, text: str, hint: Any) -> Any:
    kinds = get_args(hint) if get_origin(hint) is UnionType or get_args(hint) else (hint,)
    for kind in kinds:
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


def loss_weights(text: str) -> dict[str, float]:
    """Return the losses that `--loss NAME[=WEIGHT],...` names, by weight.

    Example:
        >>> loss_weights("distillation,balance=0.01")
        {'distillation': 1.0, 'balance': 0.01}
    """
    weights = {}
    for part in text.split(","):
        name, separator, weight = part.partition("=")
        try:
            weights[name] = float(weight) if separator else 1.0
        except ValueError:
            raise JaxmoeError(f"--loss {text}: {weight!r} is no number; give NAME or NAME=WEIGHT") from None
    return weights


def mesh_sizes(text: str) -> tuple[int, int]:
    """Return the sizes that `--mesh DATAxEXPERT` names.

    Example:
        >>> mesh_sizes("4x2")
        (4, 2)
    """
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) for part in parts):
        raise JaxmoeError(f"--mesh {text}: give DATAxEXPERT, such as 4x2")
    return int(parts[0]), int(parts[1])


def import_module(name: str) -> None:
    """Import a module, or a file whose name ends in .py, for the methods that it registers.

    Raises:
        JaxmoeError: it cannot be imported.
    """
    try:
        if not name.endswith(".py"):
            importlib.import_module(name)
            return
        path = Path(name).expanduser().resolve()
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if spec is None or spec.loader is None or not path.is_file():
            raise ImportError("there is no such file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
    except ImportError as error:
        raise JaxmoeError(f"--import {name}: {error}; give an installed module or a Python file") from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # Code of others, which may raise and even exit as it likes.
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise JaxmoeError(
            f"--import {name}: {type(error).__name__}: {error} ({place.filename}, line {place.lineno}); mend the module"
        ) from error


def named_contenders(names: str, setting: Settings, given: list[str] | None):
    """Build what `compare` compares from `--methods`, `--setting` and `--set METHOD[:SETTING]:NAME=VALUE`."""
    from jaxmoe.comparison import Contender
    from jaxmoe.compression.chain import Chain, find
    from jaxmoe.methods.compressed_experts import METHOD

    recipes = [
        METHOD if name == METHOD.name else find(name)
        for name in dict.fromkeys(filter(None, map(str.strip, names.split(","))))
    ]
    settings = [Setting.paper, Setting.improved] if setting is Settings.both else [Setting(setting.value)]
    wanted: dict[tuple[str, Setting], list[str]] = {(recipe.name, own): [] for recipe in recipes for own in settings}
    for text in given or []:
        head, separator, value = text.partition("=")
        method, *scope, name = head.split(":")
        to = [key for key in wanted if key[0] == method and (not scope or scope == [key[1].value])]
        if not separator or not to:
            known = ", ".join(":".join(key) for key in wanted)
            raise JaxmoeError(f"--set {text}: give METHOD:NAME=VALUE or METHOD:SETTING:NAME=VALUE of {known}")
        for key in to:
            wanted[key].append(f"{name}={value}")
    return [
        Contender(
            method=recipe,
            settings=(chain_settings if isinstance(recipe, Chain) else method_settings)(
                recipe, own, wanted[recipe.name, own]
            ),
        )
        for recipe in recipes
        for own in settings
    ]


def fractions(text: str) -> list[float]:
    """Return the numbers of a list such as .2,.4.

    Example:
        >>> fractions(".2, 0.4")
        [0.2, 0.4]
    """
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise JaxmoeError(f"--ratios {text}: give removed fractions, separated by commas, such as 0.2,0.4") from None


def numbers(text: str) -> list[int]:
    """Return the whole numbers of a list such as 2,1.

    Example:
        >>> numbers("2, 1")
        [2, 1]
    """
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise JaxmoeError(f"--main-experts {text}: give numbers of experts, separated by commas, such as 2,1") from None


def layer_span(text: str | None) -> tuple[int, int] | None:
    """Return the layers that `--layers FIRST:END` names, None if it is not given.

    Example:
        >>> layer_span("2:5"), layer_span(None)
        ((2, 5), None)
    """
    if text is None:
        return None
    first, separator, end = text.partition(":")
    try:
        span = int(first or 0), int(end) if end else sys.maxsize
    except ValueError:
        separator = ""
        span = (0, 0)
    if not separator or not 0 <= span[0] < span[1]:
        raise JaxmoeError(f"--layers {text}: give FIRST:END with FIRST < END, such as 0:16 (END is not included)")
    return span
