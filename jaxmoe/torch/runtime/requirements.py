# SPDX-License-Identifier: Apache-2.0
# Copyright The jaxmoe developers
"""Which checkpoints this code reads, and which transformers it needs."""

import transformers
from packaging.version import Version

FORMAT_VERSION = 3
"""The newest format of factored checkpoints that this code reads."""

MINIMUM_TRANSFORMERS = "5.16"
"""Older versions have other experts modules, or none, and some would compute wrong numbers in silence."""

if Version(transformers.__version__) < Version(MINIMUM_TRANSFORMERS):
    raise ImportError(
        f"this checkpoint was factored by jaxmoe and needs transformers {MINIMUM_TRANSFORMERS} or newer, but "
        f"{transformers.__version__} is installed: pip install --upgrade transformers"
    )
