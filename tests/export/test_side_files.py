"""What of a checkpoint travels with its weights."""

import shutil

from jaxmoe.data import demo_checkpoint
from jaxmoe.export.folder import complete_folder, side_files
from jaxmoe.export.orbax import to_orbax, to_safetensors


def test_chat_templates_travel_with_their_folder(tmp_path):
    source = shutil.copytree(demo_checkpoint(), tmp_path / "model")
    name = "additional_chat_templates/tool_use.jinja"
    (source / name).parent.mkdir()
    (source / name).write_text("{{ tools }}")
    (source / "additional_chat_templates" / "notes.txt").write_text("no template")
    (source / ".hidden").write_text("left")
    files = side_files(source)
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", name} == files.keys()
    output = tmp_path / "out"
    output.mkdir()
    complete_folder(output, layers=[], copied=[], config={}, code={}, beside=files)
    to_orbax(source, tmp_path / "orbax")
    to_safetensors(tmp_path / "orbax", tmp_path / "back")
    for folder in (output, tmp_path / "orbax", tmp_path / "back"):
        assert (folder / name).read_text() == "{{ tools }}"
        assert not (folder / ".hidden").exists()
