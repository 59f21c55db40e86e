"""The factored checkpoint: what stands in its `config.json`, and the code that it carries.

A factored checkpoint has a `model_type` of its own, `jaxmoe_<original>`, so that no program without our code takes it
for the original and runs it with random experts. Its configuration is the original JSON edited in place: transformers
may write other keys than the hub has. The code in the folder is `jaxmoe/torch/runtime.py` as it is, plus a few lines
that name the architecture's classes; PyTorch is not needed to write it.

The tensors of a compressed layer stand in the files as `<module>.<name>`, where `<module>` is the experts module's path
in transformers and `<name>` a key of `CompressedLayer.tensors()`. Vectors of compressed experts (`model/auxiliary.py`)
stand beside them as `<module>.auxiliary.<projection>` in float32, and `main_experts` in the module's record.
"""

from collections.abc import Mapping
from importlib import resources
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

import jaxmoe
from jaxmoe.checkpoint.families import architecture
from jaxmoe.checkpoint.layout import Stack, check_layout
from jaxmoe.checkpoint.records import as_record
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import LayerShape, ShapeRecord
from jaxmoe.model.auxiliary import MainExperts

FORMAT_VERSION = 1
"""Of the layout that this module writes, and the newest that it reads."""

PREFIX = "jaxmoe_"
"""Of the factored `model_type`."""

_KEPT = ("model_type", "architectures", "auto_map")
"""The keys of the original configuration that are replaced, and kept beside the factors."""

_WHERE = "the jaxmoe record in config.json"
_MEND = "write the checkpoint again"


class Layout(msgspec.Struct, forbid_unknown_fields=True):
    """How the dense experts of a module lay on disk: in which dtype, and in which tensors."""

    dtype: Literal["bfloat16", "float16", "float32", "float64"]
    stacks: list[Stack]


class Module(NamedTuple):
    """What the record says of one experts module.

    Args:
        shape: its sizes.
        terms: what `CompressedLayer.from_tensors` takes beside the tensors.
        layout: how the dense experts lay on disk; None where it was not written down.
        main: the experts that run, where vectors stand in for the others; None where all chosen ones do.
    """

    shape: LayerShape
    terms: dict[str, list[dict[str, Any]]]
    layout: Layout | None
    main: MainExperts | None


class _Experts(msgspec.Struct, forbid_unknown_fields=True):
    shape: ShapeRecord
    terms: dict[str, list[dict[str, Any]]]
    layout: Layout | None = None
    main_experts: Annotated[int, msgspec.Meta(ge=1)] | None = None
    renorm: Literal["none", "main"] = "none"


_Path = Annotated[str, msgspec.Meta(pattern=r"^[^\x00-\x1f]*?\.layers\.[0-9]{1,6}\.[^\x00-\x1f]+\Z")]


class _Record(msgspec.Struct, forbid_unknown_fields=True):
    format_version: int
    version: str
    minimum_transformers: str
    model_type: str
    experts: Annotated[dict[_Path, _Experts], msgspec.Meta(min_length=1)]
    architectures: Any = None
    auto_map: Any = None


def factored_config(
    config: Mapping[str, Any],
    layers: Mapping[str, tuple[LayerShape, Mapping[str, Any]]],
    layouts: Mapping[str, Mapping[str, Any]] | None = None,
    main: MainExperts | None = None,
) -> dict[str, Any]:
    """Return the original configuration edited for factored experts.

    Args:
        config: the original `config.json`.
        layers: shape and spec (`CompressedLayer.spec`) of the compressed layers, by the path of the experts module in
            transformers. Layers that are not named keep their stock experts.
        layouts: how each module's dense experts lay on disk, so that they can be written like that again; it travels
            along and nothing here reads it.
        main: the experts that run, where vectors stand in for the others; None where all chosen ones do.

    Raises:
        JaxmoeError: if the architecture's factored checkpoints could not be run.
    """
    stock = architecture(config["model_type"])
    record = {
        "format_version": FORMAT_VERSION,
        "version": jaxmoe.__version__,
        "minimum_transformers": stock.since,
        **{key: config[key] for key in _KEPT if key in config},
        "experts": {
            module: {
                "shape": shape._asdict(),
                "terms": spec,
                **({"layout": layouts[module]} if layouts is not None else {}),
                **({} if main is None else main.as_json()),
            }
            for module, (shape, spec) in layers.items()
        },
    }
    causal = f"Factored{stock.causal}"
    edited = {
        "model_type": PREFIX + config["model_type"],
        "architectures": [causal],
        "auto_map": {
            **{key: code for key, code in (config.get("auto_map") or {}).items() if key == "AutoTokenizer"},
            "AutoConfig": f"configuration_jaxmoe.Factored{stock.config}",
            "AutoModel": f"modeling_jaxmoe.Factored{stock.base}",
            "AutoModelForCausalLM": f"modeling_jaxmoe.{causal}",
        },
        "jaxmoe": record,
    }
    return {**config, **edited}


def is_factored(config: Mapping[str, Any]) -> bool:
    """Tell whether a `config.json` is that of a factored checkpoint.

    Example:
        >>> is_factored({"model_type": "qwen3_moe"})
        False
    """
    return str(config.get("model_type", "")).startswith(PREFIX)


def read_spec(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Module]]:
    """Return the original configuration of a factored checkpoint, and what its record says of each experts module.

    Raises:
        JaxmoeError: if the checkpoint is not factored, its format is newer than this version's or its record damaged.
    """
    record = config.get("jaxmoe")
    if not is_factored(config) or not isinstance(record, Mapping):
        raise JaxmoeError(
            f"model_type {config.get('model_type')!r} is not a factored checkpoint: it has no jaxmoe record"
        )
    version = record.get("format_version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise JaxmoeError(
            f"the checkpoint has jaxmoe's format {version}, written by jaxmoe {record.get('version')}, and jaxmoe "
            f"{jaxmoe.__version__} reads up to {FORMAT_VERSION}: pip install --upgrade jaxmoe"
        )
    found = as_record(record, _Record, _WHERE, _MEND)
    if config["model_type"] != PREFIX + found.model_type:
        raise JaxmoeError(f"model_type {config['model_type']!r}, and in {_WHERE} {found.model_type!r}: {_MEND}")
    indices = [layer_index(module) for module in found.experts]
    if twice := sorted({index for index in indices if indices.count(index) > 1}):
        raise JaxmoeError(f"{_WHERE} names several modules of layer {', '.join(map(str, twice))}: {_MEND}")
    kept = {key: record[key] for key in _KEPT if key in record}
    original = {key: kept.get(key, value) for key, value in config.items() if key != "jaxmoe"}
    for key in _KEPT:
        if key not in kept:
            original.pop(key, None)
    return original, {name: _module(name, entry) for name, entry in found.experts.items()}


def layer_index(module: str) -> int:
    """Return the layer of an experts module by its path in transformers.

    Example:
        >>> layer_index("model.layers.3.mlp.experts")
        3
    """
    return int(module.split(".layers.")[1].split(".")[0])


def _module(name: str, entry: "_Experts") -> Module:
    shape = entry.shape.shape
    if entry.layout is not None:
        try:
            check_layout(entry.layout.stacks, shape)
        except JaxmoeError as error:
            raise JaxmoeError(f"the layout of {name} in {_WHERE}: {error}; {_MEND}") from None
    main = None if entry.main_experts is None else MainExperts(entry.main_experts, entry.renorm)
    return Module(shape, entry.terms, entry.layout, main)


def remote_code(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the Python files of a factored checkpoint by name.

    Args:
        config: the factored configuration, or the original one.
    """
    model_type = str(config["model_type"]).removeprefix(PREFIX)
    stock = architecture(model_type)
    configuration = f'''\
# SPDX-License-Identifier: Apache-2.0
# Copyright The jaxmoe developers
"""The configuration of {model_type} with factored experts, written by jaxmoe {jaxmoe.__version__}."""

import transformers
from packaging.version import Version

if Version(transformers.__version__) < Version("{stock.since}"):
    raise ImportError(
        "{model_type} with experts factored by jaxmoe needs transformers {stock.since} or newer, but "
        f"{{transformers.__version__}} is installed: pip install --upgrade transformers"
    )

from {stock.configuration} import {stock.config}  # noqa: E402


class Factored{stock.config}({stock.config}):
    model_type = "{PREFIX}{model_type}"
'''
    classes = f"""

from {stock.modeling} import (  # noqa: E402
    {stock.base},
    {stock.causal},
)

from .configuration_jaxmoe import Factored{stock.config}  # noqa: E402


class Factored{stock.base}(Factored, {stock.base}):
    config_class = Factored{stock.config}
    config: Factored{stock.config}


class Factored{stock.causal}(Factored, {stock.causal}):
    config_class = Factored{stock.config}
    config: Factored{stock.config}


copy_conversions(Factored{stock.config}, Factored{stock.base}, Factored{stock.causal})
"""
    runtime = resources.files("jaxmoe").joinpath("torch/runtime.py").read_text(encoding="utf-8")
    return {"configuration_jaxmoe.py": configuration, "modeling_jaxmoe.py": runtime + classes}
