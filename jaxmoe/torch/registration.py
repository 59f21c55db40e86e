"""Make transformers' Auto classes know every factored architecture, without importing any before it is used.

Importing the configuration and model modules of all architectures takes seconds. So a stand-in is registered for each,
which makes and registers the real classes when a checkpoint first asks for them.
"""

from functools import cache
from importlib import import_module
from pathlib import Path

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from jaxmoe.checkpoint.factored_format import PREFIX
from jaxmoe.checkpoint.families import architecture, known
from jaxmoe.export.remote_code import remote_code
from jaxmoe.factors.registry import KINDS, twin
from jaxmoe.torch.runtime.loading import Factored, copy_conversions


def load_twins() -> None:
    """Import the PyTorch twin of every registered term, which registers itself."""
    for kind in KINDS:
        import_module(twin(kind))


class Installed(Factored):
    """The factored classes of the installed package: what they save carries its code, like any factored checkpoint."""

    def __init__(self, config, *args, **kwargs):
        # Terms may have been registered since this module was imported.
        load_twins()
        super().__init__(config, *args, **kwargs)

    def save_pretrained(self, save_directory, is_main_process=True, **kwargs):
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            code = remote_code({"model_type": self.config.model_type, "jaxmoe": self.config.jaxmoe})
            for name, text in code.items():
                Path(save_directory, name).write_text(text, encoding="utf-8")


@cache
def factored_classes(model_type: str) -> tuple[type, type, type]:
    """Return configuration, base model and causal language model of a factored architecture, registered.

    Args:
        model_type: the original one, such as `qwen3_moe`.

    Raises:
        JaxmoeError: if the architecture has no factored form.
    """
    stock = architecture(model_type)
    try:
        configuration, modeling = import_module(stock.configuration), import_module(stock.modeling)
    except ImportError as error:
        raise ImportError(
            f"{model_type} needs transformers {stock.since} or newer: pip install --upgrade transformers"
        ) from error
    parent = getattr(configuration, stock.config)
    names = {"__module__": __name__}
    config = type(f"Factored{stock.config}", (parent,), {**names, "model_type": PREFIX + model_type})
    base, causal = (
        type(f"Factored{name}", (Installed, getattr(modeling, name)), {**names, "config_class": config})
        for name in (stock.base, stock.causal)
    )
    copy_conversions(config, base, causal)
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, base, exist_ok=True)
    AutoModelForCausalLM.register(config, causal, exist_ok=True)
    return config, base, causal


def _stand_in(original: str) -> type:
    """Return what `AutoConfig` holds until the first checkpoint of an architecture is opened."""

    def new(cls, *args, **kwargs):
        return factored_classes(original)[0](*args, **kwargs)

    def from_dict(cls, config_dict, **kwargs):
        return factored_classes(original)[0].from_dict(config_dict, **kwargs)

    body = {
        "__module__": __name__,
        "model_type": PREFIX + original,
        "__new__": new,
        "from_dict": classmethod(from_dict),
    }
    return type(f"Factored_{original}", (), body)


def register() -> None:
    """Register every factored architecture with `AutoConfig`, `AutoModel` and `AutoModelForCausalLM`."""
    load_twins()
    for model_type in (name for name, family in known().items() if family.transformers):
        AutoConfig.register(PREFIX + model_type, _stand_in(model_type), exist_ok=True)
