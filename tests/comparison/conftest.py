"""One small comparison, for all tests that read it."""

import pytest
from small_comparison import ASKED, Compared, contenders
from two_layers import two_layers

from jaxmoe.comparison import compare


@pytest.fixture(scope="session")
def compared(tmp_path_factory) -> Compared:
    folder = tmp_path_factory.mktemp("comparison")
    source = two_layers(folder / "source")
    return Compared(source, folder / "report", compare(source, folder / "report", contenders(), **ASKED))
