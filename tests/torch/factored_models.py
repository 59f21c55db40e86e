"""Factored checkpoints of tiny models, made without jaxmoe's reader or pipeline, and their dense twins.

The factors are random: what they approximate does not matter here, only that PyTorch computes with the matrices that
`CompressedLayer.materialize` says.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from jaxmoe.checkpoint.factored_format import experts_modules, factored_config
from jaxmoe.export.remote_code import remote_code
from jaxmoe.factors import (
    CompressedLayer,
    Dense,
    Grouped,
    Hashed,
    LayerShape,
    LowRank,
    Merged,
    Shared,
    SharedBasis,
    Sparse,
)

EXPERT_WEIGHT = re.compile(r"(^|\.)experts\.(?!.*_bias$)|\.block_sparse_moe\.(input|output)_linear\.")
"""The experts' matrices on disk, of every tiny model."""


def stock_experts(model) -> dict[str, torch.nn.Module]:
    """Return the stock experts modules of a model by path."""
    return {name: m for name, m in model.named_modules() if name.split(".")[-1] == "experts"}


def shape_of(native) -> LayerShape:
    """Return a stock module's sizes."""
    experts, hidden, intermediate = native.down_proj.shape
    if native.is_transposed:
        hidden, intermediate = intermediate, hidden
    return LayerShape(experts, hidden, intermediate, hasattr(native, "gate_up_proj"))


class Terms:
    """Random terms of a layer, large enough to move the logits."""

    def __init__(self, sizes: LayerShape, seed: int = 0, dtype="float32"):
        self.sizes, self.random, self.dtype = sizes, np.random.default_rng(seed), dtype

    def draw(self, *shape, scale=1.0):
        return (scale * self.random.normal(size=shape)).astype(self.dtype)

    def dense(self, target):
        return Dense(weight=self.draw(*self.sizes.of(target), scale=0.2))

    def low_rank(self, target, rank=5):
        experts, out, in_ = self.sizes.of(target)
        scale = 0.45 * rank**-0.25
        return LowRank(
            left=self.draw(experts, out, rank, scale=scale), right=self.draw(experts, rank, in_, scale=scale)
        )

    def shared_basis(self, target, activation="silu", bases=3, rank=7, transposed=False, mean=False):
        experts, rows, columns = self.sizes.of(target)
        if transposed:
            rows, columns = columns, rows
        return SharedBasis(
            coefficients=self.draw(experts, rows, rank, scale=0.15),
            bases=self.draw(bases, rank, columns),
            mixing=self.draw(experts, bases),
            mean=self.draw(1, 1, scale=0.05) if mean else None,
            activation=activation,
            transposed=transposed,
        )

    def grouped(self, target, ranks=(4, 0, 7, 3), size=1, *, blended=False, ordered=True, transposed=False, **options):
        """Draw groups of experts whose ranks go round `ranks`."""
        experts, rows, columns = self.sizes.of(target)
        if transposed:
            rows, columns = columns, rows
        groups = -(-experts // size)
        return Grouped.build(
            self.draw(experts, rows, max(ranks), scale=0.15),
            self.draw(groups, max(ranks), columns, scale=0.7),
            [ranks[group % len(ranks)] for group in range(groups)],
            order=self.random.permutation(experts) if ordered else None,
            mixing=self.draw(experts, groups) if blended else None,
            size=size,
            transposed=transposed,
            **options,
        )

    def shared(self, target, kept=None, axis="out", **options):
        experts, out, in_ = self.sizes.of(target)
        parts = 2 if target == "gate_up" else 1
        channels = out // parts if axis == "out" else in_
        chosen = None if kept is None else self.random.permutation(channels)[:kept]
        weight = self.draw(out, in_, scale=0.15)
        return Shared.build(weight, experts=experts, kept=chosen, axis=axis, parts=parts, **options)

    def hashed(self, target, size=1, *, buckets=9, ordered=True, balanced=True):
        shape = self.sizes.of(target)
        term = Hashed.abstract(shape, self.dtype, buckets=buckets, size=size, balanced=balanced, ordered=ordered)
        order = self.random.permutation(shape[0]).astype(np.int32)[None] if ordered else None
        values = self.draw(*term.values.shape, scale=0.1 * (size * shape[1] * shape[2] / buckets) ** 0.5)
        return replace(term, values=values, seed=np.array([[29]], np.int32), order=order)

    def sparse(self, target):
        """Draw entries of all experts but the first, so that one has none."""
        experts, out, in_ = self.sizes.of(target)
        own = np.arange(experts) * 5
        indices = np.concatenate([self.random.permutation(out * in_)[:count] for count in own])
        return Sparse(
            values=self.draw(1, own.sum()),
            indices=indices.astype(np.int32)[None],
            counts=own.astype(np.int32)[None],
            experts=experts,
            out=out,
            in_=in_,
        )

    def merged(self, target, clusters=3):
        experts, out, in_ = self.sizes.of(target)
        labels = self.random.permutation(np.arange(experts) % clusters).astype(np.int32)[None]
        return Merged(weight=self.draw(clusters, out, in_, scale=0.2), labels=labels)

    def layer(self, **terms) -> CompressedLayer:
        return CompressedLayer(terms=terms, sizes=self.sizes).check()


def low_rank_layer(t: Terms) -> CompressedLayer:
    """Return the layer of the plain SVD method."""
    if t.sizes.gated:
        return t.layer(gate_up=(t.low_rank("gate_up"),), down=(t.low_rank("down"),))
    return t.layer(up=(t.low_rank("up"),), down=(t.low_rank("down"),))


def basis_layer(t: Terms) -> CompressedLayer:
    """Return the layer of MoBE: bases of gate and up apart, down along its hidden axis."""
    sides = {"gate": (t.shared_basis("gate"),)} if t.sizes.gated else {}
    up = (t.shared_basis("up", "tanh", mean=True),)
    return t.layer(**sides, up=up, down=(t.shared_basis("down", "silu", transposed=True),))


def grouped_layer(t: Terms) -> CompressedLayer:
    """Return the layer of RFID-MoE without residuals: groups blended and by themselves, and ragged ranks."""
    sides = {"gate": (t.grouped("gate", (5, 2), 3, blended=True, activation="silu"),)} if t.sizes.gated else {}
    up = (t.grouped("up", activation="tanh"),)
    return t.layer(**sides, up=up, down=(t.grouped("down", (3, 6), 4, ordered=False, transposed=True),))


def base_layer(t: Terms) -> CompressedLayer:
    """Return the layer of D2-MoE: a base for all experts, some of its channels missing, and what each adds."""
    first = "gate_up" if t.sizes.gated else "up"
    kept = t.sizes.intermediate - 5
    return t.layer(
        **{first: (t.shared(first, kept), t.grouped(first))},
        down=(t.shared("down", kept, "in"), t.low_rank("down", 3), t.shared("down")),
    )


def residual_layer(t: Terms) -> CompressedLayer:
    """Return groups with what they leave over: values under a hash, single entries, matrices for several experts."""
    sides = {"gate": (t.grouped("gate"), t.hashed("gate", 3))} if t.sizes.gated else {}
    up = (t.grouped("up", ordered=False), t.sparse("up"), t.merged("up"))
    down = (t.shared("down"), t.hashed("down", ordered=False, balanced=False), t.sparse("down"))
    return t.layer(**sides, up=up, down=down)


NEW = {"grouped": grouped_layer, "base": base_layer, "residual": residual_layer}
"""Layers with whole numbers among their tensors."""


def mixed_layer(t: Terms) -> CompressedLayer:
    """Return a layer with every kind of term and sums of them, on a gated architecture."""
    return t.layer(
        gate=(t.low_rank("gate", 3), t.shared_basis("gate", "gelu")),
        gate_up=(t.low_rank("gate_up"), t.dense("gate_up")),
        down=(t.dense("down"), t.low_rank("down", 2)),
    )


@jax.jit
def materialized(layer: CompressedLayer):
    """Return the matrices that a layer stands for, in one program instead of one for every step."""
    return {name: layer.materialize(name) for name in layer.sizes.projections}


def set_dense(native, layer: CompressedLayer) -> None:
    """Write the matrices that a layer stands for into a stock module."""
    dense = {name: torch.tensor(np.asarray(x)) for name, x in materialized(layer).items()}
    if layer.sizes.gated:
        both = torch.cat([dense["gate"], dense["up"]], 1)
        if not native.is_concatenated:
            both[:, 0::2], both[:, 1::2] = dense["gate"], dense["up"]
        first = {"gate_up_proj": both}
    else:
        first = {"up_proj": dense["up"]}
    for name, weight in {**first, "down_proj": dense["down"]}.items():
        getattr(native, name).data.copy_(weight.transpose(1, 2) if native.is_transposed else weight)


def factored_tensors(layers) -> dict[str, torch.Tensor]:
    """Return the tensors of compressed layers by their names on disk."""
    return {
        f"{module}.{name}": torch.tensor(
            np.array(array, np.int32 if array.dtype == np.int32 else np.float32, order="C")
        )
        for module, layer in layers.items()
        for name, array in layer.tensors().items()
    }


def write_factored(source: Path, folder: Path, layers, *, dtype=torch.float32, layouts=None) -> dict:
    """Write a factored checkpoint with the layers in place of a dense one's experts; return its configuration."""
    folder.mkdir(parents=True)
    kept = {name: x for name, x in load_file(source / "model.safetensors").items() if not EXPERT_WEIGHT.search(name)}
    factors = {name: x.to(dtype) if x.is_floating_point() else x for name, x in factored_tensors(layers).items()}
    save_file({**kept, **factors}, folder / "model.safetensors", metadata={"format": "pt"})
    described = {module: (layer.check().sizes, layer.spec()) for module, layer in layers.items()}
    config = factored_config(json.loads((source / "config.json").read_text()), experts_modules(described, layouts))
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for name, text in remote_code(config).items():
        (folder / name).write_text(text)
    return config
