"""The cache of the hub's client on disk: a snapshot is a folder of links to blobs.

    CACHE/models--OWNER--NAME/snapshots/COMMIT/...   links
    CACHE/models--OWNER--NAME/blobs/HASH             files, or links into the store
    CACHE/blobs/XX/HASH                              the store that all repositories share, since huggingface_hub 2

The layout tells them, so that a cache that was moved or mounted elsewhere is known too.
"""

from pathlib import Path

STORE = ".huggingface-shared-blobs"
"""The file that marks the store which repositories share."""


def blob_folders(folder: Path) -> list[Path]:
    """Return the folders of blobs that links of a snapshot, or of a folder in it, may lead to; resolved.

    Example:
        >>> blob_folders(Path("/tmp"))
        []
    """
    for inner in (resolved := folder.resolve(), *resolved.parents):
        repository = inner.parent.parent
        if inner.parent.name == "snapshots" and repository.name.startswith("models--"):
            store = repository.parent / "blobs"
            shared = [store] if (store / STORE).is_file() else []
            return [path.resolve() for path in (repository / "blobs", *shared)]
    return []
