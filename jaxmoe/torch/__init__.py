"""Factored checkpoints in PyTorch: after `import jaxmoe.torch` transformers loads them without a trust flag.

`statistics` gathers calibration statistics from any stock transformers model.
"""

try:
    import torch as _torch  # noqa: F401
    import transformers as _transformers  # noqa: F401
except ImportError as error:
    raise ImportError('jaxmoe.torch needs PyTorch and transformers: pip install "jaxmoe[torch]"') from error

from jaxmoe.torch.registration import factored_classes, register
from jaxmoe.torch.runtime.blended import cache_blends
from jaxmoe.torch.runtime.experts import FactoredExperts
from jaxmoe.torch.runtime.linear import FactoredLinear
from jaxmoe.torch.runtime.loading import swap_modules
from jaxmoe.torch.statistics import statistics

register()

__all__ = [
    "FactoredExperts",
    "FactoredLinear",
    "cache_blends",
    "factored_classes",
    "register",
    "statistics",
    "swap_modules",
]
