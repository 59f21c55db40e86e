"""Which classes of transformers run an architecture, for code that must not import transformers to know it."""

from typing import NamedTuple


class TransformersClasses(NamedTuple):
    """The classes that run one architecture, of transformers or of another package that is written for it.

    Args:
        configuration: the module of the configuration class.
        modeling: the module of the model classes.
        config: the configuration class.
        base: the base model's class.
        causal: the causal language model's class.
        since: the first transformers release with these classes and the experts that jaxmoe replaces.
    """

    configuration: str
    modeling: str
    config: str
    base: str
    causal: str
    since: str = "5.16"


def stock(package: str, stem: str, *, text: bool = False, since: str = "5.16") -> TransformersClasses:
    """Return transformers' own classes, which lie in one folder and have one stem.

    Args:
        package: the folder under `transformers.models`, which names the modules in it.
        stem: what the classes' names begin with.
        text: whether they are the text part of a model of several modalities.
        since: the first transformers release that has them.

    Example:
        >>> stock("qwen3_moe", "Qwen3Moe").modeling
        'transformers.models.qwen3_moe.modeling_qwen3_moe'
        >>> stock("gemma4", "Gemma4", text=True)[2:]
        ('Gemma4TextConfig', 'Gemma4TextModel', 'Gemma4ForCausalLM', '5.16')
    """
    folder, part = f"transformers.models.{package}", "Text" if text else ""
    return TransformersClasses(
        configuration=f"{folder}.configuration_{package}",
        modeling=f"{folder}.modeling_{package}",
        config=f"{stem}{part}Config",
        base=f"{stem}{part}Model",
        causal=f"{stem}ForCausalLM",
        since=since,
    )
