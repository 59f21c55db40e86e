"""An index and the files that it names, where the two do not agree.

Tools that edit checkpoints leave tensors in two files, tensors that the index does not name, and names of tensors that
are gone. The index decides where it can, and where it does not, what transformers does: it opens the files that the
index names and takes from them whatever the model has a place for. Nothing of that is silent: every kind of
disagreement becomes a note.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxmoe.checkpoint.names import layer_number
from jaxmoe.checkpoint.tensor_file import TensorEntry, listing
from jaxmoe.errors import JaxmoeError

_SAMPLES, _SAMPLE_BYTES = 16, 4096
_ENDS = re.compile(
    r"(?:^|\.)(?:embed_tokens|word_embeddings|embeddings|wte|norm|norm_f|embedding_norm|lm_head)\.(?:weight|bias)$"
)


class Weights(NamedTuple):
    """The tensors of a checkpoint, the names that its index gives to none of them, and what was decided, as notes."""

    tensors: dict[str, TensorEntry]
    absent: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def require(self, layers: int | None) -> "Weights":
        """Return self, or raise if a model of so many layers has a place for absent names; experts count their own."""
        kinds = {kind(name) for name in self.tensors}
        missing = [
            name
            for name in self.absent
            if (("expert" not in name and kind(name) in kinds) or _ENDS.search(name))
            and (layers is None or (at := layer_number(name)) is None or at[1] < layers)
        ]
        if missing:
            raise JaxmoeError(
                "the index names tensors that no file holds: fetch the checkpoint again, or the index if it is of"
                f" another version. {listing(missing)}"
            )
        return self


def kind(name: str) -> str:
    """Return a tensor's name without its numbers, which it shares with its like in other layers and experts.

    Example:
        >>> kind("model.layers.3.mlp.experts.7.up_proj.weight")
        'model.layers.#.mlp.experts.#.up_proj.weight'
    """
    return re.sub(r"\d+", "#", name)


def reconcile(weight_map: Mapping[str, str], shards: Mapping[str, Mapping[str, TensorEntry]]) -> Weights:
    """Decide which tensors a checkpoint has, in the order of the files and of their bytes.

    Args:
        weight_map: the file that the index names for each tensor.
        shards: the tensors that each of these files holds, in the order in which transformers reads the files.
    """
    holders: dict[str, list[str]] = {}
    for file, header in shards.items():
        for name in header:
            holders.setdefault(name, []).append(file)
    if len(holders) == len(weight_map) and all(holders.get(name) == [file] for name, file in weight_map.items()):
        return Weights({name: entry for header in shards.values() for name, entry in header.items()})
    kinds = {kind(name) for name in weight_map if name in holders}
    chosen, unnamed, moved, several, differing, dropped = {}, [], [], [], [], []
    for name, files in holders.items():
        named = weight_map.get(name)
        file = chosen[name] = named if named in files else files[-1]
        if named is None:
            has_place = kind(name) in kinds or _ENDS.search(name)
            (unnamed if has_place else dropped).append(name)
        elif named != file:
            moved.append(f"{name} in {file}, not {named}")
        if len(files) > 1:
            copies = [shards[other][name] for other in files]
            several.append(f"{name} of {file}, not of {' and '.join(other for other in files if other != file)}")
            if not all(_equal(copies[-1], copy) for copy in copies):
                differing.append(f"{name} in {files[-1]}")
    absent = tuple(name for name in weight_map if name not in holders)
    notes = [
        _note(several, "tensors lie in more than one file, and the index decides which is read"),
        _note(
            differing, "tensors have other values in the last file that holds them, which is what transformers reads"
        ),
        _note(moved, "tensors lie in another file than the index says, and are read there"),
        _note(unnamed, "tensors are read that the index does not name, since the model has a place for them"),
        _note(dropped, "tensors are ignored, since neither the index names them nor the model has a place for them"),
        _note(absent, "names in the index belong to no tensor in any file, and are ignored"),
    ]
    ignored = set(dropped)
    tensors = {
        name: entry
        for file, header in shards.items()
        for name, entry in header.items()
        if chosen[name] == file and name not in ignored
    }
    return Weights(tensors, absent, tuple(filter(None, notes)))


def _note(which: Sequence[str], what: str) -> str:
    return f"{len(which)} {what}: {listing(which, 5)}." if which else ""


def _equal(one: TensorEntry, other: TensorEntry) -> bool:
    """Tell whether two tensors are alike, almost surely: by their sizes and by evenly spaced blocks of their bytes."""
    if one is other or (one.dtype, one.shape) != (other.dtype, other.shape):
        return one is other
    last = max(0, one.bytes - _SAMPLE_BYTES)
    starts = sorted({last * step // (_SAMPLES - 1) for step in range(_SAMPLES)})
    return all(_block(one, start) == _block(other, start) for start in starts)


def _block(entry: TensorEntry, start: int) -> bytes:
    begin = entry.begin + start
    return entry.shard.read(begin, min(begin + _SAMPLE_BYTES, entry.end)).tobytes()
