"""What the commands take: their arguments and options, and how the texts of some become values."""

import importlib
import importlib.util
import sys
import traceback
from enum import Enum, StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxmoe.errors import JaxmoeError


class Scope(StrEnum):
    touched = "touched"
    experts = "experts"
    model = "model"


class Unit(StrEnum):
    parameters = "parameters"
    bytes = "bytes"


class Export(StrEnum):
    factored = "factored"
    dense = "dense"
    slim = "slim"
    packed = "packed"
    packed_vllm = "packed-vllm"


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
    str | None,
    typer.Option("--method", "-m", help="a method's name, such as svd or mobe, or several such as reap+mobe"),
]
RatioOption = Annotated[float | None, typer.Option("--ratio", "-r", help="removed fraction, such as 0.4")]
MainExpertsOption = Annotated[
    int | None, typer.Option("--main-experts", help="with compressed_experts: how many of a token's experts run")
]
UnitOption = Annotated[Unit, typer.Option("--unit", help="what the ratio counts")]
RecipeOption = Annotated[
    Path | None,
    typer.Option("--recipe", metavar="FILE", help="YAML or JSON file of options, which those given here override"),
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
    typer.Option("--statistics", metavar="FOLDER", help="what `calibrate` gathered, to weight errors by"),
]
ExportOption = Annotated[
    Export | None,
    typer.Option(
        "--export",
        help="factored (the default): smaller files; dense: stock files of the old size; slim: smaller stock files, as"
        " methods that remove experts or channels always write; packed: stock files with experts of 4 or 8 bits, which"
        " transformers and vLLM load; packed-vllm: the same for vLLM alone, with widths of each layer",
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
    typer.Option("--seed", min=0, max=2**32 - 1, metavar="NUMBER", help="random seed"),
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
LayersOption = Annotated[str | None, typer.Option("--layers", metavar="A:B", help="work on layers A to B-1 only")]
ResumeOption = Annotated[bool, typer.Option("--resume/--no-resume", help="resume an unfinished run")]
JsonOption = Annotated[bool, typer.Option("--json", help="one JSON object on standard output")]


_OWN = ("checkpoint", "output", "recipe", "as_json")
"""What commands take beside options of the function behind them."""


def names(text: str | None) -> tuple[str, ...]:
    """Return the names of a list with commas; none for None.

    Example:
        >>> names("a, b"), names(None)
        (('a', 'b'), ())
    """
    return tuple(part for part in (name.strip() for name in (text or "").split(",")) if part)


def settings(given: list[str] | None) -> dict[str, str]:
    """Return the values that `--set NAME=VALUE` names.

    Example:
        >>> settings(["mobe.steps=300"])
        {'mobe.steps': '300'}
    """
    values = {}
    for text in given or []:
        name, separator, value = text.partition("=")
        if not separator:
            raise JaxmoeError(f"--set {text}: give NAME=VALUE")
        values[name] = value
    return values


def chosen(ctx: typer.Context, recipe: Path | None = None) -> dict[str, Any]:
    """Return the options that the command line gives, as the function behind a command takes them.

    Args:
        ctx: of the command.
        recipe: a file with further options, which those of the command line override.
    """
    from jaxmoe.compression.recipe_file import layer_span, read_recipe

    found = {} if recipe is None else read_recipe(recipe)
    for name, value in ctx.params.items():
        source = ctx.get_parameter_source(name)
        # From where its kind can be imported differs between typer's versions.
        if name in _OWN or source is None or source.name != "COMMANDLINE":
            continue
        if name == "set_":
            found["set"] = {**found.get("set", {}), **settings(value)}
        elif name == "layers":
            found[name] = layer_span(value)
        elif name == "ignore_config_keys":
            found[name] = names(value)
        else:
            found[name] = value.value if isinstance(value, Enum) else value
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
    """Import a module, or a file whose name ends in .py, for the methods and architectures that it registers.

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
