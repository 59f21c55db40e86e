"""What the commands take: their arguments and options, and how the texts of some become values."""

import importlib
import importlib.util
import sys
import traceback
from enum import StrEnum
from pathlib import Path
from typing import Annotated

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


def given_settings(given: list[str] | None) -> dict[str, str]:
    """Return what `--set NAME=VALUE` gives, by name.

    Example:
        >>> given_settings(["steps=20", "mobe.rank=4"])
        {'steps': '20', 'mobe.rank': '4'}
    """
    found = {}
    for text in given or []:
        name, separator, value = text.partition("=")
        if not separator:
            raise JaxmoeError(f"--set {text}: give NAME=VALUE")
        found[name] = value
    return found


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
    from jaxmoe.compression.recipe import find

    recipes = [find(name).name for name in dict.fromkeys(filter(None, map(str.strip, names.split(","))))]
    settings = ["paper", "improved"] if setting is Settings.both else [setting.value]
    wanted: dict[tuple[str, str], dict[str, str]] = {(name, own): {} for name in recipes for own in settings}
    for text in given or []:
        head, separator, value = text.partition("=")
        method, *scope, name = head.split(":")
        to = [key for key in wanted if key[0] == method and (not scope or scope == [key[1]])]
        if not separator or not to:
            known = ", ".join(":".join(key) for key in wanted)
            raise JaxmoeError(f"--set {text}: give METHOD:NAME=VALUE or METHOD:SETTING:NAME=VALUE of {known}")
        for key in to:
            wanted[key][name] = value
    return [Contender(recipe=find(name, setting=own, options=options)) for (name, own), options in wanted.items()]


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
