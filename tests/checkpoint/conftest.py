"""Tiny models, each saved once per test session."""

import pytest
from tiny_models import save_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Return a function from family and dtype to the folder of a tiny checkpoint, which tests must not change."""
    pytest.importorskip("transformers")
    folders = {}

    def folder(family, dtype="float32"):
        if (family, dtype) not in folders:
            path = tmp_path_factory.mktemp(f"{family}-{dtype}") / family
            save_tiny(family, path, dtype=dtype)
            folders[family, dtype] = path
        return folders[family, dtype]

    return folder
