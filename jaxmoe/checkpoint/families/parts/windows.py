"""Which layers see all tokens before a token and which a window of them, as configs say it."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from jaxmoe.checkpoint.families.parts.settings import Settings
from jaxmoe.errors import JaxmoeError
from jaxmoe.model.spec import Attention, Norm

ATTENTION_KINDS = ("full_attention", "sliding_attention")


def everywhere(s: Settings, index: int) -> int | None:
    """Return the window of a family that has one in all layers or none."""
    window = s.take("sliding_window", None)
    return None if window is None else open_window(window)


def where_used(s: Settings, index: int) -> int | None:
    """Return the window of a family whose config has a switch for it."""
    used = s.take("use_sliding_window")
    s.take("sliding_window", None)
    return everywhere(s, index) if used else None


def by_kind(s: Settings, index: int) -> int | None:
    """Return the window of a family whose config names the layers that have one."""
    window = s.take("sliding_window", None)
    if kind_of(s, index, ATTENTION_KINDS) != "sliding_attention":
        return None
    if window is None:
        raise JaxmoeError(f"config.json: layer {index} has a sliding window, and sliding_window is null")
    return open_window(window)


def derive_kinds(s: Settings, slides: Callable[[int], bool]) -> None:
    """Fill in `layer_types`, where the config does not name them, by what tells whether a layer has a window."""
    depth = s.take("num_hidden_layers")
    s.derive("layer_types", ["sliding_attention" if slides(index) else "full_attention" for index in range(depth)])


def open_window(size: int) -> int:
    """Return the size of a window; raise if a token would not see even itself."""
    if size < 1:
        raise JaxmoeError("config.json: sliding_window is 0, so that no token would see any: give null for no window")
    return size


def kind_of(s: Settings, index: int, known: Sequence[str]) -> str:
    """Return the kind of a layer's attention, one of those that are known."""
    kinds, depth = s.take("layer_types"), s.take("num_hidden_layers")
    if len(kinds) != depth:
        raise JaxmoeError(f"config.json: layer_types names {len(kinds)} layers of {depth}")
    # What transformers called it in some versions.
    kind = "full_attention" if kinds[index] == "attention" else kinds[index]
    if kind not in known:
        raise JaxmoeError(f"config.json: layer {index} has {kind}, which is none of {', '.join(known)}")
    return kind


def rotary_where_sliding(attention: Callable[[Settings, int, Norm], Attention]):
    """Return what builds attention whose positions count only in the layers that have a window, if any has."""

    def make(s: Settings, index: int, layer_norm: Norm) -> Attention:
        built = attention(s, index, layer_norm)
        return built if built.window or not s.take("sliding_window", None) else replace(built, rotary=None)

    return make
