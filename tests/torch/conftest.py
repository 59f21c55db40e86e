"""Keep the code that transformers copies out of checkpoints away from the user's cache."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1]))


@pytest.fixture(scope="session", autouse=True)
def _code_cache(tmp_path_factory):
    dynamic = pytest.importorskip("transformers").dynamic_module_utils
    before = dynamic.HF_MODULES_CACHE
    dynamic.HF_MODULES_CACHE = str(tmp_path_factory.mktemp("modules"))
    yield
    dynamic.HF_MODULES_CACHE = before
