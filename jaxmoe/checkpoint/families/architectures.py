"""Which transformers classes run each architecture, for code that must not import transformers to know it."""

from typing import NamedTuple

from jaxmoe.errors import JaxmoeError


class Architecture(NamedTuple):
    """The stock classes of one `model_type`.

    Args:
        package: the folder under `transformers.models`, which names the modules in it.
        config: the configuration class.
        base: the base model's class.
        causal: the causal language model's class.
        since: the first transformers release with these classes and the experts that jaxmoe replaces.

    Example:
        >>> ARCHITECTURES["qwen3_moe"].modeling
        'transformers.models.qwen3_moe.modeling_qwen3_moe'
    """

    package: str
    config: str
    base: str
    causal: str
    since: str = "5.16"

    @property
    def configuration(self) -> str:
        """The module of the configuration class."""
        return f"transformers.models.{self.package}.configuration_{self.package}"

    @property
    def modeling(self) -> str:
        """The module of the model classes."""
        return f"transformers.models.{self.package}.modeling_{self.package}"


def _regular(package: str, stem: str, since: str = "5.16") -> Architecture:
    return Architecture(package, f"{stem}Config", f"{stem}Model", f"{stem}ForCausalLM", since)


def _text(package: str, stem: str) -> Architecture:
    return Architecture(package, f"{stem}TextConfig", f"{stem}TextModel", f"{stem}ForCausalLM")


_STEMS = {
    "afmoe": "Afmoe",
    "cohere2_moe": "Cohere2Moe",
    "deepseek_v2": "DeepseekV2",
    "deepseek_v3": "DeepseekV3",
    "deepseek_v32": "DeepseekV32",
    "dots1": "Dots1",
    "ernie4_5_moe": "Ernie4_5_Moe",
    "exaone_moe": "ExaoneMoe",
    "flex_olmo": "FlexOlmo",
    "glm4_moe": "Glm4Moe",
    "glm4_moe_lite": "Glm4MoeLite",
    "glm_moe_dsa": "GlmMoeDsa",
    "gpt_oss": "GptOss",
    "granitemoe": "GraniteMoe",
    "granitemoehybrid": "GraniteMoeHybrid",
    "granitemoeshared": "GraniteMoeShared",
    "hunyuan_v1_moe": "HunYuanMoEV1",
    "hy_v3": "HYV3",
    "jamba": "Jamba",
    "lfm2_moe": "Lfm2Moe",
    "mimo_v2_flash": "MiMoV2Flash",
    "minimax": "MiniMax",
    "minimax_m2": "MiniMaxM2",
    "mixtral": "Mixtral",
    "nemotron_h": "NemotronH",
    "olmoe": "Olmoe",
    "phimoe": "Phimoe",
    "qwen2_moe": "Qwen2Moe",
    "qwen3_moe": "Qwen3Moe",
    "qwen3_next": "Qwen3Next",
    "solar_open": "SolarOpen",
}

ARCHITECTURES: dict[str, Architecture] = {
    **{model_type: _regular(model_type, stem) for model_type, stem in _STEMS.items()},
    "bailing_hybrid": _regular("bailing_hybrid", "BailingHybrid", "5.20"),
    "kimi_linear": _regular("kimi_linear", "KimiLinear", "5.17"),
    "gemma4_text": _text("gemma4", "Gemma4"),
    "qwen3_5_moe_text": _text("qwen3_5_moe", "Qwen3_5Moe"),
    # Kimi-K2 is DeepSeek-V3's architecture; its own code is not needed.
    "kimi_k2": _regular("deepseek_v3", "DeepseekV3"),
}
"""By `model_type`. What is missing has no experts module in transformers that factors could replace."""

_REASONS = {
    "llama4": "its router scales the experts' input and every expert runs on every token",
    "llama4_text": "its router scales the experts' input and every expert runs on every token",
    "dbrx": "transformers keeps its experts in a module of another form",
    "jetmoe": "transformers keeps its experts in a module of another form",
    "longcat_flash": "transformers counts its identity experts among the routed ones",
}


def architecture(model_type: str) -> Architecture:
    """Return the stock classes of an architecture.

    Raises:
        JaxmoeError: if a factored checkpoint of it could not be run.
    """
    if model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type]
    reason = _REASONS.get(model_type, "jaxmoe knows no transformers classes for it")
    raise JaxmoeError(
        f"model_type {model_type!r} cannot be exported with factored experts ({reason}): export it dense, with"
        f" --export dense. Those that can: {', '.join(sorted(ARCHITECTURES))}"
    )


def exports(model_type: str) -> list[str]:
    """Return the forms in which a checkpoint of an architecture can be written where factors replace its experts.

    Example:
        >>> exports("mixtral"), exports("dbrx")
        (['dense', 'factored'], ['dense'])
    """
    return ["dense", *(["factored"] if model_type in ARCHITECTURES else [])]
