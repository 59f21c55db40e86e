"""The architectures that are known by `model_type`, and what is asked of them: one line here for each lineage.

A family from elsewhere calls `register` when its module is imported. An installed package names that module under the
entry points of the group `jaxmoe.families`, which are loaded when a name is asked for that is not here.
"""

from collections.abc import Collection, Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from jaxmoe.checkpoint.families import (
    afmoe,
    bailing,
    cohere,
    dbrx,
    deepseek,
    dots,
    ernie,
    exaone,
    gemma,
    glm,
    gpt_oss,
    granite,
    hunyuan,
    jamba,
    jetmoe,
    kimi,
    lfm,
    llama,
    mimo,
    minimax,
    mixtral,
    nemotron,
    olmo,
    phi,
    qwen,
    solar,
    step,
)
from jaxmoe.checkpoint.families.family import UNKNOWN, Family
from jaxmoe.checkpoint.families.parts import Shapes, TransformersClasses
from jaxmoe.checkpoint.families.parts.keys import brief, decoder_config
from jaxmoe.errors import JaxmoeError
from jaxmoe.model.spec import DecoderSpec

FAMILIES: dict[str, Family] = {}
"""The registered architectures by `model_type`."""

_LINEAGES = (
    *(afmoe, bailing, cohere, dbrx, deepseek, dots, ernie, exaone, gemma, glm, gpt_oss, granite, hunyuan, jamba),
    *(jetmoe, kimi, lfm, llama, mimo, minimax, mixtral, nemotron, olmo, phi, qwen, solar, step),
)

_NOT_EXPORTED = {"longcat_flash": "transformers counts its identity experts among the routed ones"}
"""Why architectures that have no record, and are read by their standard names, are written dense only."""


def register(family: Family) -> Family:
    """Make an architecture known under its `model_type`, to the library and the command line.

    Raises:
        JaxmoeError: another one is registered under that name.
    """
    if FAMILIES.get(family.model_type, family) is not family:
        raise JaxmoeError(f"an architecture {family.model_type!r} is registered already: choose another model_type")
    FAMILIES[family.model_type] = family
    return family


for _lineage in _LINEAGES:
    for _family in _lineage.FAMILIES:
        register(_family)


@cache
def _load_installed() -> None:
    for entry in entry_points(group="jaxmoe.families"):
        entry.load()


def known() -> Mapping[str, Family]:
    """Return all architectures by `model_type`, those of installed packages included."""
    _load_installed()
    return FAMILIES


def get(model_type: Any) -> Family | None:
    """Return the record of that name, None if there is none.

    Example:
        >>> get("mixtral").router
        'block_sparse_moe.gate.weight'
    """
    if not isinstance(model_type, str):
        return None
    return FAMILIES.get(model_type) or known().get(model_type)


def find_family(config: Mapping[str, Any]) -> Family | None:
    """Return the record of the architecture that a `config.json` is of, or None if there is none."""
    decoder = decoder_config(config)
    family = get(config.get("model_type")) or get(decoder.get("model_type"))
    if family is not None and family.actual_type is not None:
        return get(family.actual_type(decoder))
    return family


def decoder_spec(config: Mapping[str, Any], shapes: Shapes, ignored: Collection[str] = ()) -> DecoderSpec:
    """Return what a checkpoint's decoder computes.

    Args:
        config: the part of `config.json` that describes the decoder.
        shapes: of the routed experts, by layer.
        ignored: keys of the config to leave out of account, where jaxmoe does not know what they mean.

    Raises:
        JaxmoeError: the architecture is not one that jaxmoe runs, values are of the wrong kind or contradict one
            another, or an attribute is neither handled nor known to be harmless; all of them are listed.
    """
    model_type = config.get("model_type")
    family = get(model_type)
    if family is None or family.decoder is None:
        run = sorted(name for name, other in known().items() if other.decoder)
        raise JaxmoeError(
            f"model_type {brief(model_type)}: jaxmoe runs {', '.join(run)}; statistics of others can be"
            " gathered through PyTorch (`jaxmoe.torch.statistics`)"
        )
    settings = family.settings(config, ignored)
    spec = family.decoder(settings, shapes)
    settings.finish()
    return spec


def runs(model_type: str) -> bool:
    """Tell whether jaxmoe itself runs the decoder of an architecture.

    Example:
        >>> runs("mixtral"), runs("dbrx")
        (True, False)
    """
    family = get(model_type)
    return family is not None and family.decoder is not None


def architecture(model_type: str) -> TransformersClasses:
    """Return the classes that run an architecture in PyTorch.

    Raises:
        JaxmoeError: if a factored checkpoint of it could not be run.
    """
    family = get(model_type) or UNKNOWN
    if family.transformers is not None:
        return family.transformers
    reason = _NOT_EXPORTED.get(model_type, family.no_transformers)
    can = sorted(name for name, other in known().items() if other.transformers)
    raise JaxmoeError(
        f"model_type {model_type!r} cannot be exported with factored experts ({reason}): export it dense, with"
        f" --export dense. Those that can: {', '.join(can)}"
    )


def exports(model_type: str) -> list[str]:
    """Return the forms in which a checkpoint of an architecture can be written where factors replace its experts.

    Example:
        >>> exports("mixtral"), exports("dbrx")
        (['dense', 'factored'], ['dense'])
    """
    family = get(model_type)
    return ["dense", *(["factored"] if family is not None and family.transformers else [])]
