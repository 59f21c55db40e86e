"""The formats in which quantised checkpoints are published and that are not read: how to tell and to call them.

A user who is refused wants to know what the folder holds and what to take instead. The tensors tell it where the config
says nothing, or something else.
"""

import re
from collections.abc import Mapping
from typing import Any

from jaxmoe.checkpoint.tensor_file import DTYPES, PACKED_BITS, TensorEntry

METHODS = {
    "aqlm": "AQLM",
    "auto-round": "AutoRound",
    "awq": "AWQ",
    "bitnet": "BitNet",
    "eetq": "EETQ",
    "fbgemm_fp8": "FBGEMM FP8",
    "fp8": "FP8",
    "fp_quant": "FP-Quant",
    "gguf": "GGUF",
    "gptq": "GPTQ",
    "higgs": "HIGGS",
    "hqq": "HQQ",
    "modelopt": "ModelOpt",
    "mxfp4": "MXFP4",
    "mxfp8": "MXFP8",
    "nvfp4": "NVFP4",
    "quanto": "Quanto",
    "quark": "Quark",
    "sinq": "SINQ",
    "spqr": "SpQR",
    "vptq": "VPTQ",
}
"""What a config calls a method that is commonly written in another way."""

READ = ("fp8", "mxfp4")
"""Methods that are read: what is left over beside them is of another format."""

TOOLS = {
    "bitsandbytes": "`model.dequantize()` of transformers",
    "compressed-tensors": "the library compressed-tensors",
}
"""What turns a format back into floating point."""

_TOLD_BY_TENSORS = {
    r"weight_global_scale$": "NVFP4",
    r"weight_scale_2$": "NVFP4",
    r"\.(?:absmax|quant_map|SCB)$|\.quant_state\.": "bitsandbytes",
    r"\.W_q$": "HQQ",
    r"\.weight\.(?:bitmask|compressed)$": "compressed-tensors",
    r"\.weight_packed$": "compressed-tensors",
    r"\.qweight$": "GPTQ or AWQ",
    r"_proj_blocks$": "MXFP4",
}
"""Names of tensors that a format alone has, by the format."""

_PARTS = re.compile(
    r"[._](?:qweight|qzeros|g_idx|absmax|nested_absmax|quant_map|SCB|W_q|bitmask|compressed"
    r"|weight_(?:packed|scale|scales|scale_inv|scale_2|shape|zero_point|g_idx|global_scale)"
    r"|input_scale|input_global_scale|activation_scale|quant_state\.\w+)$"
    r"|_proj_(?:blocks|scales|scale|scale_inv)$"
)
"""Names that only parts of quantised matrices have."""

_INTEGERS = {code for code, dtype in DTYPES.items() if dtype.kind in "iu"} | PACKED_BITS.keys()


def leftovers(tensors: Mapping[str, TensorEntry], settings: Mapping[str, Any]) -> list[str]:
    """Return the tensors that belong to a quantised matrix, by their names or, where a config says so, by their dtypes.

    Args:
        tensors: those that belong to no matrix that is read.
        settings: the config's, empty if it has none.
    """
    return [
        f"{name} ({entry.dtype})"
        for name, entry in tensors.items()
        if _PARTS.search(name)
        or (settings and entry.dtype in _INTEGERS and name.endswith(("weight", "_proj")) and len(entry.shape) > 1)
    ]


def format_name(tensors: Mapping[str, TensorEntry], settings: Mapping[str, Any]) -> str:
    """Return what a quantised checkpoint's format is called.

    Example:
        >>> format_name({}, {"quant_method": "gptq", "bits": 4})
        'GPTQ (4 bits)'
        >>> format_name({}, {"quant_method": "modelopt", "quant_algo": "NVFP4"})
        'ModelOpt (NVFP4)'
    """
    if any(name.endswith(".scale") and entry.dtype == "F8_E8M0" for name, entry in tensors.items()):
        return "FP4 with a power of two for each group (as DeepSeek-V4)"
    method = settings.get("quant_method")
    told = (kind for pattern, kind in _TOLD_BY_TENSORS.items() if any(re.search(pattern, name) for name in tensors))
    if not isinstance(method, str):
        method = "modelopt" if "quant_algo" in settings else "MLX" if "mode" in settings else None
        method = method or next(told, "MLX" if "bits" in settings else "an unknown format")
    elif method in READ:
        method = next(told, method)
    details = [settings.get(key) for key in ("format", "quant_algo", "bnb_4bit_quant_type")]
    bits = settings.get("bits")
    details.append(f"{bits} bits" if bits else None)
    detail = next((str(detail) for detail in details if detail), "")
    name = METHODS.get(method.removeprefix("intel/"), method)
    return f"{name} ({detail})" if detail else name


def tools(kind: str) -> str:
    """Return what else to do about a format, as the continuation of a sentence."""
    return "".join(f", or dequantise it with {tool}" for name, tool in TOOLS.items() if kind.startswith(name))
