"""From what a user names to a folder: a folder is itself, anything else is a repository of the Hugging Face hub.

What is read is fetched, and nothing else: many repositories hold a second copy of the weights, in another form or
another folder. So the small files come first, then the shards that their index names; no code. The token comes from
the environment, as the hub's own client reads it.
"""

from glob import escape
from pathlib import Path

from jaxmoe.checkpoint import files
from jaxmoe.errors import JaxmoeError

PATTERNS = (
    *(files.CONFIG, files.INDEX, files.SINGLE),
    *("generation_config.json", "report.json", "preprocessor_config.json", "processor_config.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("tiktoken.model", "tekken.json", "spiece.model", "sentencepiece.bpe.model"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
    *("LICENSE*", "NOTICE*"),
)
"""The files of a repository that are fetched, beside the shards that its index names; a pattern that began with a
wildcard would reach into every folder."""


def resolve(source: str | Path, revision: str | None = None) -> Path:
    """Return the folder of a checkpoint, fetching it from the hub if need be.

    Args:
        source: an existing folder, or a hub id such as `Qwen/Qwen3-30B-A3B`.
        revision: branch, tag or commit on the hub; its default branch if None.

    Raises:
        JaxmoeError: if there is no such folder or repository, or the hub cannot be reached.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise JaxmoeError(f"{source} is a folder, and a revision is of a hub repository: leave {revision!r} out")
        return folder
    if folder.exists():
        raise JaxmoeError(f"{source} is a file: give the folder that holds config.json and the weights")
    if not _may_be_hub_id(str(source)):
        raise JaxmoeError(f"{source} is no folder, and no hub id such as Qwen/Qwen3-30B-A3B: mend the path")
    return _fetch(str(source), revision)


def _may_be_hub_id(source: str) -> bool:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(source)
    except HFValidationError:
        return False
    return not source.startswith((".", "/", "~"))


def _fetch(source: str, revision: str | None) -> Path:
    # Imported here: it costs a quarter of a second, and folders do not need it.
    import huggingface_hub
    from huggingface_hub import errors

    at = f" at revision {revision!r}" if revision else ""
    try:
        folder = Path(huggingface_hub.snapshot_download(source, revision=revision, allow_patterns=list(PATTERNS)))
        if (folder / files.SINGLE).exists() or not (folder / files.INDEX).exists():
            return folder
        shards = sorted({escape(file) for file in files.read_index(folder).values()})
        # Of the very same commit, whatever is pushed meanwhile.
        commit = folder.name if folder.parent.name == "snapshots" else revision
        return Path(huggingface_hub.snapshot_download(source, revision=commit, allow_patterns=shards))
    except errors.GatedRepoError as error:
        raise JaxmoeError(
            f"{source} on the hub asks for an agreement: accept it on its page and set HF_TOKEN to your token"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise JaxmoeError(
            f"{source} is no folder here and no repository on the hub (or a private one: set HF_TOKEN): mend the name"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise JaxmoeError(f"{source} on the hub has no revision {revision!r}: name a branch, tag or commit") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise JaxmoeError(
            f"{source} is no folder here, not in the hub's cache{at}, and the hub cannot be reached: mend the path, or"
            " fetch it where there is a network"
        ) from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise JaxmoeError(f"{source}{at} could not be fetched from the hub ({error}): try again") from error
