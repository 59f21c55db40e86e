# SPDX-License-Identifier: Apache-2.0
# Copyright The jaxmoe developers
"""The configuration of qwen3_moe with factored experts, written by jaxmoe 0.1.0."""

import transformers
from packaging.version import Version

if Version(transformers.__version__) < Version("5.16"):
    raise ImportError(
        "qwen3_moe with experts factored by jaxmoe needs transformers 5.16 or newer, but "
        f"{transformers.__version__} is installed: pip install --upgrade transformers"
    )

from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig  # noqa: E402


class FactoredQwen3MoeConfig(Qwen3MoeConfig):
    model_type = "jaxmoe_qwen3_moe"
