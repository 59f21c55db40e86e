"""A model on disk that jaxmoe can run: its spec, and the arrays of one layer at a time.

Originals and factored checkpoints are the same here: the routed experts are always a `CompressedLayer`, of dense terms
or of those that the checkpoint stores. Opening reads headers only and finds everything that is wrong with them.
"""

from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.checkpoint import files, hub
from jaxmoe.checkpoint.decoder import (
    Piece,
    Rows,
    check_all_known,
    check_fit,
    end_pieces,
    expert_biases,
    layer_pieces,
    layer_prefix,
    read,
)
from jaxmoe.checkpoint.factored import CompressedCheckpoint
from jaxmoe.checkpoint.factored_format import is_factored, layer_index
from jaxmoe.checkpoint.families import Family, decoder_config, decoder_spec
from jaxmoe.checkpoint.families.parts.keys import brief
from jaxmoe.checkpoint.names import layer_number
from jaxmoe.checkpoint.quantization import Matrix
from jaxmoe.checkpoint.reader import Checkpoint
from jaxmoe.checkpoint.roles import LinearMap, check_factored, linear_maps, targets_of
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import CompressedLayer, Dense, LayerShape, Term
from jaxmoe.model.compressed_experts import MainExperts, main_experts
from jaxmoe.model.roles import role_sizes
from jaxmoe.model.spec import DecoderSpec, ExpertBlock

if TYPE_CHECKING:
    from jaxmoe.model.nnx_decoder import Decoder


class StoredModel:
    """A checkpoint, original or factored, as something that can be run.

    Args:
        source: a folder or a hub id.
        revision: branch, tag or commit on the hub.
        ignore_config_keys: keys of its config to leave out of account, where jaxmoe does not know what they mean.

    Raises:
        JaxmoeError: it cannot be read, or jaxmoe does not know exactly what its decoder computes.

    Example:
        >>> from jaxmoe.data import demo_checkpoint
        >>> model = StoredModel(demo_checkpoint())
        >>> len(model.spec.layers), model.layer(0)["attention.query.weight"].shape
        (4, (128, 128))
    """

    def __init__(self, source: str | Path, revision: str | None = None, *, ignore_config_keys: Collection[str] = ()):
        self.folder = hub.resolve(source, revision)
        config = files.read_config(self.folder)
        self.checkpoint: Checkpoint | CompressedCheckpoint
        if is_factored(config):
            self.checkpoint = CompressedCheckpoint.open(self.folder)
            original = self.checkpoint.original
            self.matrices: Mapping[str, Matrix] = self.checkpoint.matrices
            shapes = {layer_index(module): shape for module, shape in self.checkpoint.shapes.items()}
        else:
            self.checkpoint = Checkpoint.open(self.folder, ignore_config_keys=ignore_config_keys)
            original = self.checkpoint.config
            self.matrices = self.checkpoint.matrices
            shapes = {layer.index: layer.shape for layer in self.checkpoint.layers}
        family = self.checkpoint.family
        if family is None:
            raise JaxmoeError(
                f"{self.folder}: model_type {brief(original.get('model_type'))} is unknown to jaxmoe, so that it cannot"
                " run it: methods that need the weights alone work, such as svd with --export dense; statistics can be"
                " gathered through PyTorch (`jaxmoe.torch.statistics`)"
            )
        self.config = decoder_config(original)
        self.family: Family = family
        self.ignored = tuple(sorted({*ignore_config_keys} & self.config.keys()))
        self.shapes: Mapping[int, LayerShape] = shapes
        try:
            spec = decoder_spec(self.config, shapes, self.ignored)
            self.spec: DecoderSpec = main_experts(spec, self._main_experts())
            self._check()
        except JaxmoeError as error:
            raise JaxmoeError(str(error) if str(self.folder) in str(error) else f"{self.folder}: {error}") from error

    @property
    def model_type(self) -> str:
        """The architecture's name in the config."""
        return str(self.config["model_type"])

    @property
    def longest(self) -> int | None:
        """Tokens that the model takes at once, None where its config does not say."""
        longest = self.config.get("max_position_embeddings")
        return longest if type(longest) is int else None

    def prefix(self, index: int) -> str:
        """Return what the names of a layer's tensors on disk begin with."""
        return layer_prefix(index, self.family)

    def fingerprint(self) -> str:
        """Return a SHA-256 of the files, see `files.fingerprint`."""
        return self.checkpoint.fingerprint()

    def ends(self, *names: str) -> dict[str, np.ndarray]:
        """Read embedding, last normalisation and head, or those of their arrays that are named."""
        pieces = end_pieces(self.spec, self.family)
        return read({name: pieces[name] for name in names or pieces}, self.matrices)

    def head(self) -> dict[str, np.ndarray | Rows]:
        """Return what the head computes with; what is stored plainly stays on disk, read by the rows asked for."""
        pieces = end_pieces(self.spec, self.family)
        if not self.spec.tied:
            del pieces["embedding.weight"]
        matrices = {name: self.matrices[piece.tensor] for name, piece in pieces.items()}
        rows = {n: Rows(x) for n, x in matrices.items() if not n.startswith("norm.") and len(x.parts) == 1}
        return {**self.ends(*(pieces.keys() - rows.keys())), **rows}

    def layer(self, index: int) -> dict[str, Any]:
        """Return a layer's arrays by the names of `jaxmoe.model`, the routed experts as a `CompressedLayer`."""
        arrays: dict[str, Any] = read(self._dense_pieces(index), self.matrices)
        if isinstance(self.checkpoint, CompressedCheckpoint):
            for own in self.factored_maps(index):
                arrays |= own.parameters(self.checkpoint.linear(own.module))
        block = self.spec.layers[index].feed_forward
        if isinstance(block, ExpertBlock):
            arrays["experts"] = self.experts(index)
            if isinstance(self.checkpoint, CompressedCheckpoint):
                arrays |= self.checkpoint.auxiliary(self.modules[index])
            if block.bias:
                arrays |= expert_biases(self.biases(index), self.matrices, self.family)
        return arrays

    def parameters(self) -> dict[str, Any]:
        """Return all arrays as `jaxmoe.model.forward` takes them, for models that fit into memory."""
        layers = [self.layer(index) for index in range(len(self.spec.layers))]
        return jax.tree.map(jnp.asarray, {**self.ends(), "layers": layers})

    def decoder(self) -> "Decoder":
        """Return the model as a Flax NNX module, for models that fit into memory."""
        from jaxmoe.model.nnx_decoder import Decoder

        return Decoder(self.spec, self.parameters())

    def experts(self, index: int) -> CompressedLayer:
        """Return the routed experts of a layer as they are stored."""
        if isinstance(self.checkpoint, CompressedCheckpoint):
            return self.checkpoint.layer(self.modules[index])
        own = next(layer for layer in self.checkpoint.layers if layer.index == index)
        terms: dict[str, tuple[Term, ...]] = {
            name: (Dense(weight=self.checkpoint.projection(own, name)),) for name in own.shape.projections
        }
        return CompressedLayer(terms=terms, sizes=own.shape)

    def abstract_experts(self, index: int) -> CompressedLayer:
        """Return the routed experts of a layer for counting: dense ones without values, which need not be read."""
        if isinstance(self.checkpoint, CompressedCheckpoint):
            return self.checkpoint.abstract_layer(self.modules[index])
        own = next(layer for layer in self.checkpoint.layers if layer.index == index)
        terms: dict[str, tuple[Term, ...]] = {
            name: (Dense.abstract(own.shape.of(name), own.dtype),) for name in own.shape.projections
        }
        return CompressedLayer(terms=terms, sizes=own.shape)

    @cached_property
    def modules(self) -> dict[int, str]:
        """The paths of the routed experts' modules, by layer."""
        if isinstance(self.checkpoint, CompressedCheckpoint):
            return {layer_index(module): module for module in self.checkpoint.modules}
        return {layer.index: layer.module for layer in self.checkpoint.layers}

    def _main_experts(self) -> dict[int, MainExperts]:
        if not isinstance(self.checkpoint, CompressedCheckpoint):
            return {}
        return {layer_index(module): main for module, main in self.checkpoint.main.items()}

    def pieces(self, index: int) -> dict[str, Piece]:
        """Return what a layer's arrays are read from, the routed experts excepted."""
        return layer_pieces(self.spec.layers[index], self.prefix(index), self.family)

    def linear_maps(self, index: int) -> tuple[LinearMap, ...]:
        """Return a layer's linear maps beside the routed experts."""
        return linear_maps(self.pieces(index), index, self.family)

    def factored_maps(self, index: int) -> tuple[LinearMap, ...]:
        """Return those of a layer's linear maps that terms stand for."""
        if not isinstance(self.checkpoint, CompressedCheckpoint):
            return ()
        linears = self.checkpoint.linears
        return tuple(own for own in self.linear_maps(index) if own.module in linears)

    def _dense_pieces(self, index: int) -> dict[str, Piece]:
        """Return what those of a layer's arrays are read from that no terms stand for."""
        factored = {own.tensor for own in self.factored_maps(index)}
        return {name: piece for name, piece in self.pieces(index).items() if piece.tensor not in factored}

    def linear_sizes(self, index: int) -> dict[str, tuple[int, int]]:
        """Return `(out, in)` of a layer's linear maps beside the routed experts, by role."""
        return role_sizes((name, piece.shape) for name, piece in self.pieces(index).items())

    @property
    def linear_targets(self) -> tuple[str, ...]:
        """What the model's linear maps belong to, of `model.roles.LINEAR_TARGETS`."""
        return targets_of({index: self.linear_maps(index) for index in range(len(self.spec.layers))})

    def biases(self, index: int) -> tuple[str, ...]:
        """Return the tensors that hold the biases of a layer's experts."""
        begin = self.prefix(index)
        return tuple(n for n in self.matrices if n.startswith(begin) and ".experts." in n and n.endswith("_bias"))

    def _check(self) -> None:
        """Raise if tensors are missing, misshapen, or there for something that jaxmoe does not compute."""
        pieces = [*end_pieces(self.spec, self.family).values()]
        biases: set[str] = set()
        for index, layer in enumerate(self.spec.layers):
            pieces += self._dense_pieces(index).values()
            if isinstance(layer.feed_forward, ExpertBlock) and layer.feed_forward.bias:
                biases |= set(self.biases(index))
        check_fit(pieces, {name: matrix.shape for name, matrix in self.matrices.items()})
        wanted = biases | {piece.tensor for piece in pieces}
        check_all_known(self._decoder_tensors(), wanted)
        if isinstance(self.checkpoint, CompressedCheckpoint):
            maps = {own.module: own for index in range(len(self.spec.layers)) for own in self.factored_maps(index)}
            check_factored(maps, self.checkpoint.linears)

    def _decoder_tensors(self) -> set[str]:
        """Return the names that should be the decoder's: all but routed experts and multi-token prediction."""
        if isinstance(self.checkpoint, CompressedCheckpoint):
            names = self.checkpoint.beside()
            depth = len(self.spec.layers)
            return {name for name in names if (at := layer_number(name)) is None or at[1] < depth}
        predicting = set(self.checkpoint.mtp)
        routed = {name for layer in self.checkpoint.layers for name in layer.names}
        return {
            name
            for name, matrix in self.matrices.items()
            if not {part.name for part in matrix.parts} & (predicting | routed)
            and not (self.spec.tied and name == "lm_head.weight")
        }
