"""What a config says of positions: the frequencies of its `rope_parameters`, and those of a layer.

Frequencies are computed once, on the host: default, linear, dynamic with a fixed alpha, YaRN (arXiv 2309.00071),
LongRoPE (arXiv 2402.13753) and Llama 3's, as transformers computes them.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxmoe.checkpoint.families.parts.keys import (
    FLAG,
    POSITIONS,
    POSITIVE,
    POSITIVES,
    SHARE,
    WEIGHT,
    WORD,
    Kind,
    brief,
    check_kinds,
)
from jaxmoe.checkpoint.families.parts.settings import Settings
from jaxmoe.checkpoint.families.parts.windows import ATTENTION_KINDS, kind_of
from jaxmoe.errors import JaxmoeError
from jaxmoe.model.spec import Rotary

NEEDED: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": (),
    "yarn": ("original_max_position_embeddings",),
    "longrope": ("original_max_position_embeddings", "long_factor", "short_factor"),
    "llama3": ("original_max_position_embeddings", "factor", "low_freq_factor", "high_freq_factor"),
}
"""The rules by name, and what each cannot do without."""

KINDS: Mapping[str, Kind] = {
    **dict.fromkeys(("rope_type", "type"), WORD),
    **dict.fromkeys(("rope_theta", "factor", "alpha", "attention_factor"), POSITIVE),
    **dict.fromkeys(("beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor"), POSITIVE),
    **dict.fromkeys(("long_mscale", "short_mscale"), POSITIVE),
    **dict.fromkeys(("mscale", "mscale_all_dim"), WEIGHT),
    "partial_rotary_factor": SHARE,
    "original_max_position_embeddings": POSITIONS,
    "truncate": FLAG,
    **dict.fromkeys(("long_factor", "short_factor"), POSITIVES),
}
"""What may stand in `rope_parameters`."""


def rope_type(parameters: Mapping[str, Any]) -> str:
    """Return the name of the rule."""
    return parameters.get("rope_type") or parameters.get("type") or "default"


def rotary(parameters: Mapping[str, Any], head: int, *, interleaved: bool = False, positions: int = 0) -> Rotary:
    """Return the embedding that a config's `rope_parameters` describe.

    Args:
        parameters: with `rope_type`, `rope_theta` and what the type needs.
        head: numbers of a head, of which `partial_rotary_factor` are rotated.
        interleaved: whether neighbours form a pair.
        positions: `max_position_embeddings`, for types that compare with it.

    Raises:
        JaxmoeError: the type is unknown, or lacks something, or has something that is unknown or of the wrong kind.

    Example:
        >>> rotary({"rope_theta": 100.0}, 4).frequencies
        (1.0, 0.1)
    """
    parameters = {name: value for name, value in parameters.items() if value is not None}
    kind, size = _check(parameters, head)
    theta = float(parameters["rope_theta"])
    if kind == "dynamic" and parameters.get("alpha"):
        theta *= float(parameters["alpha"]) ** (size / (size - 2))
        kind = "default"
    plain = theta ** -(np.arange(0, size, 2) / size)
    scale, longest, far, far_scale = 1.0, None, (), 1.0
    if kind == "linear":
        plain = plain / float(parameters["factor"])
    elif kind == "dynamic":
        longest = positions
    elif kind == "yarn":
        plain, scale = _yarn(parameters, plain, theta, size, positions)
    elif kind == "llama3":
        plain = _llama3(parameters, plain)
    elif kind == "longrope":
        longest = int(parameters["original_max_position_embeddings"])
        factor = parameters.get("factor") or positions / longest
        scale = parameters.get("attention_factor") or (
            math.sqrt(1 + math.log(factor) / math.log(longest)) if factor > 1 else 1.0
        )
        far = _numbers(plain / np.asarray(parameters["long_factor"], float))
        plain = plain / np.asarray(parameters["short_factor"], float)
        far_scale = float(parameters.get("long_mscale") or scale)
        scale = float(parameters.get("short_mscale") or scale)
    return Rotary(
        frequencies=_numbers(plain),
        scale=float(scale),
        interleaved=interleaved,
        longest=longest,
        long_frequencies=far,
        long_scale=far_scale,
    )


def _check(parameters: Mapping[str, Any], head: int) -> tuple[str, int]:
    """Return the rule and how many numbers of a head it rotates."""
    if unknown := sorted(parameters.keys() - KINDS.keys()):
        listed = ", ".join(f"{name} ({brief(parameters[name])})" for name in unknown)
        raise JaxmoeError(f"config.json: jaxmoe does not know what {listed} does to the position embedding")
    check_kinds(parameters, KINDS)
    kind = rope_type(parameters)
    if kind not in NEEDED:
        raise JaxmoeError(f"config.json: rope_type {brief(kind)}: jaxmoe computes {', '.join(NEEDED)}")
    if missing := [name for name in NEEDED[kind] if name not in parameters]:
        raise JaxmoeError(
            f"config.json: rope_type {kind!r} needs {', '.join(missing)}: add them as the model's authors set them"
        )
    share = parameters.get("partial_rotary_factor", 1.0)
    size = int(head * share)
    problem = ""
    # Of an odd number the last goes in a pair with what follows, if there is something.
    if size < 1 or size + size % 2 > head or (size % 2 and kind == "yarn"):
        problem = f"{size} of a head's {head} numbers cannot be rotated in pairs (partial_rotary_factor = {share})"
    elif kind == "dynamic" and size == 2:
        problem = f"rope_type {kind!r} needs more than one pair of a head's {head} numbers"
    elif kind == "yarn" and parameters["rope_theta"] == 1:
        problem = "rope_type 'yarn' needs a rope_theta other than 1"
    elif kind == "longrope" and parameters["original_max_position_embeddings"] < 2:
        problem = "rope_type 'longrope' needs original_max_position_embeddings of 2 or more"
    elif kind == "llama3" and parameters["low_freq_factor"] >= parameters["high_freq_factor"]:
        problem = "rope_type 'llama3' needs a high_freq_factor above low_freq_factor"
    elif kind == "longrope" and (
        wrong := [name for name in ("long_factor", "short_factor") if len(parameters[name]) != size // 2]
    ):
        problem = f"{wrong[0]} has {len(parameters[wrong[0]])} entries for {size // 2} pairs"
    if problem:
        raise JaxmoeError(f"config.json: {problem}: mend the numbers")
    return kind, size


def _numbers(frequencies: np.ndarray) -> tuple[float, ...]:
    return tuple(float(x) for x in frequencies)


def mscale(factor: float, weight: float = 1.0) -> float:
    """Return YaRN's factor of the attention for a context that is `factor` times as long."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn(parameters: Mapping[str, Any], plain: np.ndarray, theta: float, size: int, positions: int):
    original = parameters["original_max_position_embeddings"]
    factor = parameters.get("factor") or positions / original
    scale = parameters.get("attention_factor")
    if scale is None:
        weight, weight_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
        scale = mscale(factor, weight) / mscale(factor, weight_all) if weight and weight_all else mscale(factor)

    def dimension(rotations: float) -> float:
        return size * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(parameters.get("beta_fast") or 32), dimension(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    ramp = np.clip((np.arange(size // 2) - low) / max(high - low, 0.001), 0, 1)
    return plain / factor * ramp + plain * (1 - ramp), scale


def _llama3(parameters: Mapping[str, Any], plain: np.ndarray) -> np.ndarray:
    factor, low, high = (float(parameters[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = parameters["original_max_position_embeddings"] * plain / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - smooth) * plain / factor + smooth * plain


def rope_parameters(s: Settings, index: int, *, partial: float = 1.0) -> dict[str, Any]:
    """Return what a layer's positions are computed from, put together as transformers does.

    The older `rope_scaling` replaces `rope_parameters` altogether; `rope_theta` and `partial_rotary_factor` beside them
    count where they are silent. Either may be nested by the kind of attention.
    """
    older, newer = s.take("rope_scaling", None), s.take("rope_parameters", None)
    given = older or newer or s.defaults.get("rope_parameters") or {}
    nested = [kind for kind in given if isinstance(given[kind], Mapping)]
    if nested:
        kind = kind_of(s, index, ATTENTION_KINDS)
        if kind not in nested:
            raise JaxmoeError(f"config.json: rope_parameters says nothing of {kind}, which layer {index} has")
        given = given[kind]
    beside = {
        "rope_theta": s.take("rope_theta"),
        "partial_rotary_factor": s.take("partial_rotary_factor", partial),
        "original_max_position_embeddings": s.take("max_position_embeddings"),
    }
    said = {name: value for name, value in given.items() if value is not None}
    original = s.take("original_max_position_embeddings", None)
    if original is not None and not nested:
        said["original_max_position_embeddings"] = original
    return {**beside, **said}


def rope(s: Settings, index: int, head: int, *, interleaved: bool = False, partial: float = 1.0) -> Rotary:
    """Return a layer's position embedding."""
    parameters = rope_parameters(s, index, partial=partial)
    return rotary(parameters, head, interleaved=interleaved, positions=s.take("max_position_embeddings"))
