"""Snapshots of the hub's cache, whose files are links, and links that lead elsewhere."""

import os

import plain_checkpoint
import pytest

from jaxmoe.checkpoint import Checkpoint
from jaxmoe.checkpoint.hub_cache import STORE
from jaxmoe.errors import JaxmoeError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def link(path, target):
    path.symlink_to(os.path.relpath(target, path.parent))


def snapshot(cache, *, store=False, below="", name="models--some--model"):
    """Write a checkpoint as the hub's client leaves it: links to blobs, and these perhaps links into the store."""
    repository = cache / name
    folder = plain_checkpoint.write(repository / "snapshots" / COMMIT / below)
    (repository / "blobs").mkdir()
    if store:
        (cache / "blobs" / "ab").mkdir(parents=True)
        (cache / "blobs" / STORE).write_text("1\n")
    for path in list(folder.iterdir()):
        blob = repository / "blobs" / path.name[::-1]
        path.rename(blob)
        link(path, blob)
        if store:
            blob.rename(cache / "blobs" / "ab" / blob.name)
            link(blob, cache / "blobs" / "ab" / blob.name)
    return folder


@pytest.mark.parametrize("store", [False, True])
@pytest.mark.parametrize("below", ["", "part/of"])
def test_snapshots_are_read(tmp_path, store, below):
    folder = snapshot(tmp_path / "cache", store=store, below=below)
    assert len(Checkpoint.open(folder).layers) == 2
    # Also through a link to the snapshot, and where the whole cache lies behind one.
    (tmp_path / "model").symlink_to(folder)
    (tmp_path / "linked").symlink_to(tmp_path / "cache")
    for other in (tmp_path / "model", tmp_path / "linked" / folder.relative_to(tmp_path / "cache")):
        assert len(Checkpoint.open(other).layers) == 2


def test_blobs_on_another_disk_are_read(tmp_path):
    folder = snapshot(tmp_path / "cache")
    blobs = tmp_path / "cache" / "models--some--model" / "blobs"
    blobs.rename(tmp_path / "disk")
    blobs.symlink_to(tmp_path / "disk")
    assert len(Checkpoint.open(folder).layers) == 2


def test_the_client_writes_what_is_read(tmp_path):
    """The layout is that of the installed client, where it knows the store."""
    shared = pytest.importorskip("huggingface_hub.utils._shared_blobs")
    assert shared.SHARED_BLOBS_MARKER_NAME == STORE
    folder = snapshot(tmp_path)
    blob = (folder / "model.safetensors").resolve()
    assert shared.publish_blob_to_shared_store(
        blob_path=str(blob), xet_hash="0" * 64, cache_dir=str(tmp_path), expected_size=blob.stat().st_size
    )
    assert blob.is_symlink()
    assert len(Checkpoint.open(folder).layers) == 2


def other_repository(cache):
    return cache / "models--other--model" / "blobs" / "secret"


def beside_the_cache(cache):
    return cache.parent / "elsewhere"


def unmarked_store(cache):
    (cache / "blobs" / STORE).unlink(missing_ok=True)
    return cache / "blobs" / "ab" / "secret"


@pytest.mark.parametrize("place", [other_repository, beside_the_cache, unmarked_store])
def test_links_to_elsewhere_are_refused(tmp_path, place):
    folder = snapshot(tmp_path / "cache", store=place is not unmarked_store)
    target = place(tmp_path / "cache")
    target.parent.mkdir(parents=True, exist_ok=True)
    shard = folder / "model.safetensors"
    shard.resolve().rename(target)
    shard.unlink()
    link(shard, target)
    with pytest.raises(JaxmoeError, match=r"is a link out of the checkpoint's folder.*secret|elsewhere"):
        Checkpoint.open(folder)


def test_a_folder_that_only_looks_like_a_snapshot_is_refused(tmp_path):
    with pytest.raises(JaxmoeError, match="is a link out of"):
        Checkpoint.open(snapshot(tmp_path, name="some-model"))


@pytest.mark.parametrize("chain", [("model.safetensors",), ("b", "c", "model.safetensors"), ("nowhere",)])
def test_links_that_lead_nowhere(tmp_path, chain):
    folder = plain_checkpoint.write(tmp_path / "checkpoint")
    (folder / "model.safetensors").unlink()
    for name, target in zip(("model.safetensors", *chain), chain):
        (folder / name).symlink_to(target)
    with pytest.raises(JaxmoeError, match=r"model\.safetensors") as caught:
        Checkpoint.open(folder)
    assert "\n" not in str(caught.value)
