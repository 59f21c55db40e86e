"""Which programs load a checkpoint of some form: what was tried, in words for plans, reports and model cards."""

from collections.abc import Collection

from jaxmoe.export.packed import Scheme, most_devices
from jaxmoe.factors import LayerShape

VERSIONS = {"transformers": "5.16", "compressed-tensors": "0.15", "vllm": "0.32"}
"""The oldest versions with which each form was tried."""


def loads_in(form: str, model_type: str, packed: Collection[tuple[LayerShape, Scheme]] = ()) -> tuple[str, ...]:
    """Return the programs that load a checkpoint, one sentence each; and where one reads it wrongly, that.

    Args:
        form: "factored", "dense", "slim" or one of `packed.PACKED`.
        model_type: the architecture's name.
        packed: sizes and schemes of the packed layers.

    Example:
        >>> loads_in("slim", "mixtral")
        ('every program that runs mixtral',)
    """
    if form in ("dense", "slim"):
        return (f"every program that runs {model_type}",)
    if form == "factored":
        return (
            f"transformers {VERSIONS['transformers']} or newer, with `trust_remote_code=True` or `import jaxmoe.torch`",
        )
    devices = min((most_devices(shape, scheme.group) for shape, scheme in packed), default=1)
    parallel = "one device" if devices == 1 else f"up to {devices} devices of tensor parallelism"
    vllm = f"vLLM {VERSIONS['vllm']} or newer: the experts stay packed in memory, on {parallel}"
    if form == "packed-vllm":
        return (
            vllm,
            "not transformers, which takes the widths of one layer for all and gives wrong numbers without a word",
        )
    return (
        f"transformers {VERSIONS['transformers']} or newer with compressed-tensors {VERSIONS['compressed-tensors']} or"
        " newer, without any flag: the experts become floats in memory",
        vllm,
    )
