"""One small comparison, for all tests that read it."""

import pytest
from small_comparison import ASKED, Compared, contenders
from two_layers import two_layers

from jaxmoe.comparison import compare, run


@pytest.fixture(scope="session")
def compared(tmp_path_factory) -> Compared:
    folder = tmp_path_factory.mktemp("comparison")
    source = two_layers(folder / "source")
    with pytest.MonkeyPatch.context() as changed:
        # Compiling again takes seconds.
        changed.setattr(run.jax, "clear_caches", lambda: None)
        return Compared(source, folder / "report", compare(source, folder / "report", contenders(), **ASKED))
