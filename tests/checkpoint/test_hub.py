"""From what a user names to a folder, without a network."""

from types import SimpleNamespace

import huggingface_hub
import plain_checkpoint
import pytest
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects

from jaxmoe.checkpoint import Checkpoint
from jaxmoe.checkpoint.hub import resolve
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


INDEX = "model.safetensors.index.json"
SHARDS = [f"model-{number:05d}-of-00002.safetensors" for number in (1, 2)]
SMALL = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
READ = [*SMALL, "additional_chat_templates/tool_use.jinja", "tokenizer.model", "merges.txt", "LICENSE"]
ELSE = [
    *("README.md", "modeling_moe.py", "pytorch_model.bin", "consolidated.safetensors.index.json", "params.json"),
    *("consolidated-00001-of-00002.safetensors", "original/config.json", "original/model.safetensors"),
    *(f"fp8/{INDEX}", "fp8/model-00001-of-00001.safetensors", "onnx/model.onnx", "metal/model.bin"),
    *("original/tokenizer.model", "model-00001-of-00001-extra.safetensors", "optimizer.json"),
]


class Repository:
    """A repository of the hub: what is asked of its client is copied from a folder."""

    def __init__(self, files, folder, commit="0" * 40):
        self.files, self.folder, self.commit = files, folder, commit
        self.asked = []

    def snapshot_download(self, source, *, revision=None, allow_patterns):
        self.asked.append((source, revision))
        snapshot = self.folder / "snapshots" / self.commit
        for name in filter_repo_objects(self.files, allow_patterns=allow_patterns):
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            (snapshot / name).write_bytes(self.files[name])
        return str(snapshot)


def repository(tmp_path, monkeypatch, *, shards, further=()):
    source = plain_checkpoint.write(tmp_path / "source", shards=shards)
    content = {path.name: path.read_bytes() for path in source.iterdir()}
    content = dict.fromkeys([*READ, *ELSE, *further], b"{}") | content
    found = Repository(content, tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", found.snapshot_download)
    return found


@pytest.mark.parametrize(
    ("shards", "further", "weights"),
    [
        (2, (), [INDEX, *SHARDS]),
        (1, (), ["model.safetensors"]),
        # Where there are both, the single file is read.
        (1, (INDEX, *SHARDS), ["model.safetensors", INDEX]),
    ],
)
def test_what_is_read_is_fetched_and_nothing_else(shards, further, weights, tmp_path, monkeypatch):
    hub = repository(tmp_path, monkeypatch, shards=shards, further=further)
    folder = Checkpoint.open("some-org/some-model", revision="v2").folder
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {*READ, *weights}
    # The shards are of the commit that the index came from, even if the branch moves on meanwhile.
    assert hub.asked == [("some-org/some-model", "v2"), ("some-org/some-model", hub.commit)][: len(hub.asked)]
    assert len(hub.asked) == (2 if shards == 2 else 1)


def test_an_index_that_is_none_is_an_error(tmp_path, monkeypatch):
    hub = repository(tmp_path, monkeypatch, shards=2)
    hub.files[INDEX] = b"{}"
    with pytest.raises(JaxmoeError, match=f"{INDEX} does not hold what it should"):
        resolve("some-org/some-model")


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
