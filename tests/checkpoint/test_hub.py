"""From what a user names to a folder, without a network."""

from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import plain_checkpoint
import pytest
from huggingface_hub import errors

from jaxmoe.checkpoint import Checkpoint
from jaxmoe.checkpoint.hub import PATTERNS, resolve
from jaxmoe.errors import JaxmoeError


def raising(error):
    def download(*_, **__):
        raise error

    return download


def test_a_folder_is_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", raising(AssertionError("the hub was asked")))
    assert resolve(tmp_path) == resolve(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert resolve("~/model") == tmp_path / "model"


def test_anything_else_is_fetched(tmp_path, monkeypatch):
    folder = plain_checkpoint.write(tmp_path / "snapshot")
    asked = []

    def download(source, **options):
        asked.append((source, options))
        return str(folder)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert Checkpoint.open("some-org/some-model", revision="v2").folder == folder
    ((source, options),) = asked
    assert source == "some-org/some-model"
    assert options["revision"] == "v2"
    assert set(options["allow_patterns"]) == set(PATTERNS)
    assert not any(Path("modeling.py").match(pattern) for pattern in PATTERNS)
    assert not any(Path("pytorch_model.bin").match(pattern) for pattern in PATTERNS)
    wanted = ("config.json", "model-00001-of-00002.safetensors", "tokenizer.model", "merges.txt", "chat_template.jinja")
    assert all(any(Path(name).match(pattern) for pattern in PATTERNS) for name in wanted)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.LocalEntryNotFoundError("offline"), "cannot be reached"),
        (errors.OfflineModeIsEnabled("offline"), "cannot be reached"),
        (ConnectionError("reset"), "could not be fetched from the hub (reset): try again"),
    ],
)
def test_failures_of_the_hub(error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", raising(error))
    with pytest.raises(JaxmoeError) as caught:
        resolve("some-org/some-model")
    assert message in str(caught.value)
    assert "some-org/some-model" in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (errors.RepositoryNotFoundError, "no repository on the hub"),
        (errors.GatedRepoError, "asks for an agreement"),
        (errors.RevisionNotFoundError, "has no revision 'v9'"),
        (errors.HfHubHTTPError, "could not be fetched"),
    ],
)
def test_answers_of_the_hub(kind, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        raising(kind("answer", response=SimpleNamespace(headers={}, request=None))),
    )
    with pytest.raises(JaxmoeError) as caught:
        resolve("some-org/some-model", "v9")
    assert message in str(caught.value)


@pytest.mark.parametrize("source", ["./missing", "/no/such/folder", "a/b/c", "bad name", "some--model", "~/missing"])
def test_what_can_be_neither(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", raising(AssertionError("the hub was asked")))
    with pytest.raises(JaxmoeError, match="is no folder, and no hub id"):
        resolve(source)


def test_a_file_is_no_checkpoint(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(JaxmoeError, match="is a file: give the folder"):
        resolve(tmp_path / "model.safetensors")


def test_a_folder_has_no_revision(tmp_path):
    with pytest.raises(JaxmoeError, match="leave 'main' out"):
        resolve(tmp_path, "main")
