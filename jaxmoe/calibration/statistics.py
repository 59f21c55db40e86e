"""What one MoE layer sees and does on real tokens: sums, so that two records of different tokens add up to one.

For the tokens t that an expert e is chosen for, with the row x_t that its module receives, the router's weight w_te as
the model uses it, h = act(gate x) * up x and the output f_e(x) = down h (biases included), not multiplied by w:

    input_moments[e] = sum_t x x'        intermediate_moments[e] = sum_t h h'      (neither weighted by w)
    weighted_input_moments[e] = sum_t w^2 x x', and so of h: an error's square in them is that of the layer's output
    output_norms[e] = sum_t |f_e(x)|     weighted_output_norms[e] = sum_t w |f_e(x)|       (REAP, arXiv 2510.13999)
    channel_energies[e] = sum_t (w h)^2  channel_peaks[e] = max_t (w h)^2                  (CAMERA, arXiv 2508.02322)

The Fisher information is the sum over sequences of the squared gradient of a sequence's mean next-token loss. All sums
are float64, whatever computed their summands; the record does no I/O and knows no model.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import LayerShape

MOMENTS = ("none", "pooled", "expert", "weighted")
"""Which second moments a record keeps: none, those of all tokens together, those of every expert as well, or also those
that weigh a token by the square of its router weight."""


class Field(NamedTuple):
    """How an array of the record is shaped, stored and merged.

    Args:
        axes: names of `LayerShape`'s sizes.
        dtype: in memory.
        stored: in files.
        group: "always", or what has to be asked for: "pooled", "expert" and "weighted" moments, "fisher".
        signed: whether the numbers can be negative.
    """

    axes: tuple[str, ...]
    dtype: str = "float64"
    stored: str = "float64"
    group: str = "always"
    signed: bool = False

    def possible(self, row: np.ndarray) -> bool:
        """Tell whether numbers that were read can be such sums.

        Example:
            >>> FIELDS["counts"].possible(np.array([3, -1])), FIELDS["input_sums"].possible(np.array([3.0, -1.0]))
            (False, True)
        """
        return bool(np.isfinite(row).all() and (self.signed or np.min(row, initial=0) >= 0))

    def shape(self, sizes: LayerShape) -> tuple[int, ...]:
        return tuple(getattr(sizes, axis) for axis in self.axes)


_E, _D, _F = "experts", "hidden", "intermediate"

FIELDS: dict[str, Field] = {
    "counts": Field((_E,), "int64", "int64"),
    "weight_sums": Field((_E,), signed=True),
    "coactivation": Field((_E, _E), "int64", "int64"),
    "input_sums": Field((_E, _D), signed=True),
    "output_sums": Field((_E, _D), signed=True),
    "output_norms": Field((_E,)),
    "weighted_output_norms": Field((_E,), signed=True),
    "channel_energies": Field((_E, _F)),
    "channel_peaks": Field((_E, _F)),
    "input_moment": Field((_D, _D), stored="float32", group="pooled", signed=True),
    "input_moments": Field((_E, _D, _D), stored="float32", group="expert", signed=True),
    "intermediate_moments": Field((_E, _F, _F), stored="float32", group="expert", signed=True),
    "weighted_input_moments": Field((_E, _D, _D), stored="float32", group="weighted", signed=True),
    "weighted_intermediate_moments": Field((_E, _F, _F), stored="float32", group="weighted", signed=True),
    "fisher_gate": Field((_E, _F, _D), stored="float32", group="fisher"),
    "fisher_up": Field((_E, _F, _D), stored="float32", group="fisher"),
    "fisher_down": Field((_E, _D, _F), stored="float32", group="fisher"),
}
"""The arrays of a record, in the order of its fields."""


def kept(shape: LayerShape, *, moments: str = "weighted", gradients: bool = False) -> tuple[str, ...]:
    """Return the names of the arrays that a record keeps.

    Args:
        shape: of the layer.
        moments: one of `MOMENTS`.
        gradients: whether it keeps the Fisher information.

    Example:
        >>> kept(LayerShape(experts=2, hidden=4, intermediate=3), moments="pooled")[-2:]
        ('channel_peaks', 'input_moment')
    """
    if moments not in MOMENTS:
        raise JaxmoeError(f"moments {moments!r}: give one of {', '.join(MOMENTS)}")
    groups = {"always", *MOMENTS[: MOMENTS.index(moments) + 1], *(["fisher"] if gradients else [])}
    return tuple(
        name for name, field in FIELDS.items() if field.group in groups and (shape.gated or name != "fisher_gate")
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerStatistics:
    """Sums over real tokens of one MoE layer; E experts, hidden size D, expert intermediate size F.

    Args:
        shape: sizes of the layer.
        tokens: tokens behind the sums, whatever experts they chose.
        sequences: sequences behind them.
        counts: tokens that chose an expert, `[E]`.
        weight_sums: router weights, `[E]`.
        coactivation: tokens that chose both experts, `[E, E]`; its diagonal is `counts`.
        input_sums: rows that an expert received, `[E, D]`.
        output_sums: what it made of them, not weighted, `[E, D]`.
        output_norms: their Euclidean norms, `[E]`.
        weighted_output_norms: the norms times the router weights, `[E]`.
        channel_energies: squares of the weighted intermediate activations, `[E, F]`.
        channel_peaks: the largest of those squares, `[E, F]`; merged by the maximum.
        input_moment: x x' of every token once, `[D, D]`; None if it was not kept.
        input_moments: x x' of an expert's tokens, `[E, D, D]`, for gate and up alike; None if not kept.
        intermediate_moments: h h' of an expert's tokens, `[E, F, F]`, for down; None if not kept.
        weighted_input_moments: w² x x' of an expert's tokens, `[E, D, D]`; None if not kept.
        weighted_intermediate_moments: w² h h' of an expert's tokens, `[E, F, F]`; None if not kept.
        fisher_gate: squared gradients, `[E, F, D]`; None if not kept, or if the layer has no gate.
        fisher_up: the same of up, `[E, F, D]`.
        fisher_down: the same of down, `[E, D, F]`.

    Example:
        >>> empty = LayerStatistics.zeros(LayerShape(experts=2, hidden=4, intermediate=3), moments="none")
        >>> (empty + empty).never_routed
        (0, 1)
    """

    shape: LayerShape
    tokens: int
    sequences: int
    counts: np.ndarray
    weight_sums: np.ndarray
    coactivation: np.ndarray
    input_sums: np.ndarray
    output_sums: np.ndarray
    output_norms: np.ndarray
    weighted_output_norms: np.ndarray
    channel_energies: np.ndarray
    channel_peaks: np.ndarray
    input_moment: np.ndarray | None = None
    input_moments: np.ndarray | None = None
    intermediate_moments: np.ndarray | None = None
    weighted_input_moments: np.ndarray | None = None
    weighted_intermediate_moments: np.ndarray | None = None
    fisher_gate: np.ndarray | None = None
    fisher_up: np.ndarray | None = None
    fisher_down: np.ndarray | None = None

    def __post_init__(self):
        wrong = []
        for name, array in self.arrays().items():
            if array.shape != FIELDS[name].shape(self.shape) or array.dtype != FIELDS[name].dtype:
                wanted = f"{FIELDS[name].dtype} {FIELDS[name].shape(self.shape)}"
                wrong.append(f"{name} is {array.dtype} {array.shape}, not {wanted}")
        if wrong:
            raise JaxmoeError(f"not the statistics of a layer of {self.shape}: {'; '.join(wrong)}")

    @classmethod
    def zeros(cls, shape: LayerShape, *, moments: str = "weighted", gradients: bool = False) -> "LayerStatistics":
        """Return the record of no tokens.

        Args:
            shape: of the layer.
            moments: which second moments it keeps, one of `MOMENTS`.
            gradients: whether it keeps the Fisher information.
        """
        names = kept(shape, moments=moments, gradients=gradients)
        arrays = {name: np.zeros(FIELDS[name].shape(shape), FIELDS[name].dtype) for name in names}
        return cls(shape=shape, tokens=0, sequences=0, **arrays)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays that were kept, by name."""
        return {name: array for name in FIELDS if (array := getattr(self, name)) is not None}

    def __add__(self, other: "LayerStatistics") -> "LayerStatistics":
        """Return the record of the tokens of both.

        Raises:
            JaxmoeError: if they are of different shapes, or one keeps what the other does not.
        """
        mine, others = self.arrays(), other.arrays()
        if self.shape != other.shape:
            raise JaxmoeError(f"statistics of layers of {self.shape} and {other.shape} do not add up")
        if differing := sorted(mine.keys() ^ others.keys()):
            raise JaxmoeError(
                f"only one of two statistics has {', '.join(differing)}: gather both with equal moments and gradients"
            )
        return LayerStatistics(
            shape=self.shape,
            tokens=self.tokens + other.tokens,
            sequences=self.sequences + other.sequences,
            **{name: merge_arrays(name, array, others[name]) for name, array in mine.items()},
        )

    @property
    def frequency(self) -> np.ndarray:
        """The fraction of the tokens that chose each expert, `[E]`, in [0, 1]; sums to top-k."""
        return self.counts / max(1, self.tokens)

    @property
    def mean_inputs(self) -> np.ndarray:
        """The mean row that each expert received, `[E, D]`; zero where none did."""
        return self.input_sums / np.maximum(1, self.counts)[:, None]

    @property
    def mean_outputs(self) -> np.ndarray:
        """The mean output of each expert, not weighted, `[E, D]`; zero where it never worked."""
        return self.output_sums / np.maximum(1, self.counts)[:, None]

    @property
    def never_routed(self) -> tuple[int, ...]:
        """The experts that no token chose."""
        return self.starved(1)

    def starved(self, least: int) -> tuple[int, ...]:
        """Return the experts that fewer than `least` tokens chose."""
        return tuple(int(expert) for expert in np.flatnonzero(self.counts < least))


def merge_arrays(name: str, first: np.ndarray, second: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Merge one array of two records: the sum, or for `channel_peaks` the maximum; a new array unless `out` is given.

    Example:
        >>> merge_arrays("channel_peaks", np.array([1.0, 5.0]), np.array([2.0, 3.0])).tolist()
        [2.0, 5.0]
    """
    return (np.maximum if name == "channel_peaks" else np.add)(first, second, out=out)
