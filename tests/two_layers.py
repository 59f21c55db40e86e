"""The bundled checkpoint's first two layers, for tests of whole commands: every further layer costs compilations."""

import json
import shutil
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import ml_dtypes  # noqa: F401  numpy learns bfloat16
from safetensors.numpy import load_file, save_file

from jaxmoe.data import demo_checkpoint

FOLDER = TemporaryDirectory(prefix="jaxmoe-tests-")


def two_layers(folder: Path) -> Path:
    """Write the first two layers of the bundled checkpoint as a checkpoint of their own."""
    shutil.copytree(demo_checkpoint(), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    tensors = load_file(folder / "model.safetensors")
    kept = {
        name: array for name, array in tensors.items() if not name.startswith(("model.layers.2.", "model.layers.3."))
    }
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@cache
def short_demo() -> Path:
    """Return the two layers' folder, written once a process, for tests that leave it as it is."""
    return two_layers(Path(FOLDER.name) / "demo")
