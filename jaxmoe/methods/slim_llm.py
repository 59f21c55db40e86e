"""SliM-LLM: one bit more for some groups of columns, one less for as many others, and error feedback over all.

    W_e  =  [ W_e1 | W_e2 | ... ]        each block in N - 1, N or N + 1 bits, N in the mean: the bytes are those of N

setting="paper": groups of 128; a matrix's groups are ranked by salience, as many of the lowest lose a bit as of the
highest get one, as keeps the outputs' distribution closest, and scales count salient numbers apart. The published
choice looks at calibration rows; statistics keep their second moments, of which rows are drawn. setting="improved":
groups of 64; what each group would gain and lose is measured by error feedback at all three widths, and pairs are
formed over all experts of a layer.

At N = 2 groups of one bit have two levels about their mean: zeros are real numbers there, for all three widths.
Source: SliM-LLM, arXiv 2405.14917. Scales are found before the error feedback, on the original groups.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jaxmoe.arrays import AnyArray
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import Dense, Term
from jaxmoe.factors.leaves import values
from jaxmoe.factors.quantised import MixedArray, QuantisedArray
from jaxmoe.factors.store import Rounded, Store
from jaxmoe.methods.method import Evidence, Fit, Outcome
from jaxmoe.methods.pruning import needs
from jaxmoe.methods.quantising import QuantisingMethod, QuantisingSettings
from jaxmoe.methods.stored_terms import abstract_held, hold
from jaxmoe.solvers.bit_shifts import calibrated, group_errors, paired_shifts, ranked_shifts, salience, two_levels
from jaxmoe.solvers.decompositions import cholesky
from jaxmoe.solvers.error_feedback import error_feedback, factored
from jaxmoe.solvers.rounding import Grid, round_nearest

ROWS = 64
"""Rows of inputs that are drawn to compare outputs (paper)."""


@dataclass(frozen=True, kw_only=True)
class SliMLLMSettings(QuantisingSettings):
    """Settings of the method; None takes the setting's own default.

    Args:
        setting: "paper" or "improved".
        bits: N, in the mean over the groups of columns.
        bits_per: see `QuantisingSettings`.
        group: columns that share a width, and their numbers in a row a scale: 128 (paper), 64 (improved).

    Example:
        >>> SliMLLMSettings(setting="paper").group, SliMLLMSettings(bits=3).group
        (128, 64)
    """

    group: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.group is None:
            object.__setattr__(self, "group", 128 if self.setting == "paper" else 64)
        if self.group is not None and (self.group < 32 or self.group % 32):
            raise JaxmoeError(f"group {self.group}: give a multiple of 32, so that shifted bits take as many bytes")

    def store(self, bits: int, mean: int, group: int) -> Store:
        """Return how groups of so many bits are held in matrices of so many in the mean."""
        scale = "float16" if self.setting == "paper" else "quantised"
        return Store(bits=bits, group=group, zero="real" if mean == 2 else "integer", scale=scale)


def widths(settings: SliMLLMSettings) -> tuple[int, ...]:
    """Return the mean widths; published are 2 and 3."""
    return (2, 3, 4)


def block_width(shape: tuple[int, int, int], settings: SliMLLMSettings) -> int:
    """Return the columns of a block, 0 where no bits can be shifted at equal bytes, or there is nothing to pair.

    Example:
        >>> [block_width((8, 64, row), SliMLLMSettings()) for row in (48, 96, 128)]
        [0, 32, 64]
        >>> block_width((8, 64, 128), SliMLLMSettings(setting="paper"))
        0
    """
    experts, out, in_ = shape
    width = settings.store(3, 3, settings.group or 0).fitted(in_).group or in_
    pairs = in_ // width if settings.setting == "paper" else experts * (in_ // width)
    return 0 if width % 32 or out % 32 or pairs < 2 else width


def abstract(terms: tuple[Term, ...], settings: SliMLLMSettings, bits: np.ndarray) -> tuple[Term, ...]:
    """Return the abstract terms as they will be held: the bytes are those of the mean widths, whatever is shifted.

    Raises:
        JaxmoeError: the terms are not matrices.
    """
    shape = _matrices(terms).shape
    width = block_width(shape, settings)
    if not width:
        return (Dense(weight=abstract_held(shape, bits, lambda own: settings.store(own, own, settings.group or 0))),)
    parts = [
        (settings.store(int(own), int(own), width), int(np.sum(bits == own)) * (shape[2] // width))
        for own in np.unique(bits)
    ]
    return (Dense(weight=MixedArray.abstract(shape, parts, width=width)),)


def _matrices(terms: tuple[Term, ...]) -> Dense:
    if len(terms) == 1 and isinstance(terms[0], Dense):
        return terms[0]
    found = " + ".join(term.kind for term in terms)
    raise JaxmoeError(f"slim_llm shifts bits inside of matrices, not of {found}: behind it take gptq, or rtn")


def fit(terms: tuple[Term, ...], settings: SliMLLMSettings, bits: np.ndarray, *, evidence: Evidence, key=None) -> Fit:
    """Return the matrices with their blocks in shifted bits."""
    weight = values(_matrices(terms).weight)
    moment = None if evidence.moment is None else jnp.asarray(evidence.moment, jnp.float32)
    width = block_width(cast(Any, weight.shape), settings)
    if not width:
        held = hold(weight, bits, lambda own: settings.store(own, own, settings.group or 0), _uniform, moment)
        detail = (
            f"matrices {list(weight.shape[1:])} have no groups of {settings.group} columns between which bits could be"
            " shifted at equal bytes: all have the same"
        )
        return Fit((Dense(weight=held),), outcomes=(Outcome("no_shifts", "", detail),))
    cut = _Cut(weight, moment, width, bits, settings)
    rounded = cut.rounded()
    shifts = _published(cut, rounded, evidence, key) if settings.setting == "paper" else _measured(cut, rounded)
    return Fit((Dense(weight=cut.held(rounded, shifts)),))


def _uniform(weight, store: Store, moment) -> Rounded:
    if moment is None:
        return round_nearest(weight, store, search=True)
    return error_feedback(weight, store, moment=moment, order=True)


class _Cut(NamedTuple):
    """Matrices `[expert, out, in]` to be cut into blocks of columns, with mean bits of each expert."""

    weight: Array
    moment: Array | None
    width: int
    bits: np.ndarray
    settings: SliMLLMSettings

    @property
    def order(self) -> bool:
        """Whether the columns worth most are rounded first."""
        return self.settings.setting == "improved"

    def blocks(self, whole: Array) -> Array:
        """Return `[expert, row, in]` as `[expert * block, row, column]`; scales `[expert, row, block]` likewise."""
        experts, rows, _ = whole.shape
        count = self.weight.shape[2] // self.width
        return jnp.swapaxes(whole.reshape(experts, rows, count, -1), 1, 2).reshape(experts * count, rows, -1)

    def whole(self, blocks: Array) -> Array:
        """Undo `blocks`."""
        experts, rows = len(self.weight), blocks.shape[1]
        return jnp.swapaxes(blocks.reshape(experts, -1, rows, blocks.shape[2]), 1, 2).reshape(experts, rows, -1)

    def rounded(self) -> dict[int, Rounded]:
        """Return all blocks one bit below their expert's mean, at it, and one above, each for itself, by that shift."""
        found = {}
        parts = self.blocks(self.weight)
        importance = None
        if self.moment is not None:
            diagonal = jnp.diagonal(self.moment, axis1=1, axis2=2)[:, None]
            importance = self.blocks(jnp.broadcast_to(diagonal, (len(self.weight), 1, diagonal.shape[2])))[:, 0]
        for shift in (-1, 0, 1):
            each = []
            for mean in np.unique(self.bits).tolist():
                store = self.settings.store(mean + shift, mean, self.width)
                if store.bits == 1:
                    scale, zero = two_levels(parts[:, :, None], store)
                    codes, _ = Grid(scale, zero).nearest(parts, store)
                    each.append(Rounded(codes, scale, zero))
                elif self.settings.setting == "paper":
                    each.append(calibrated(parts, store))
                else:
                    each.append(round_nearest(parts, store, search=True, importance=importance))
            places = np.searchsorted(np.unique(self.bits), self.bits)
            found[shift] = _chosen(each, np.repeat(places, len(parts) // len(self.bits)))
        return found

    def fed_back(self, start: Rounded, bits: np.ndarray) -> Rounded:
        """Round the matrices on the scales of blocks of so many bits, `[expert, block]`, with error feedback."""
        if self.moment is None:
            return start
        own = Rounded(*(self.whole(cast(Any, x)) for x in start[:3]))
        # Real zeros hold integer ones too; matrices may have either.
        store = replace(self.settings.store(int(bits.max()), 2, self.width), scale="float32")
        highest = jnp.asarray(2**bits - 1)
        moment = jnp.broadcast_to(self.moment, (len(self.weight), *self.moment.shape[1:]))
        found = error_feedback(self.weight, store, moment=moment, order=self.order, given=own, highest=highest)
        return Rounded(*(self.blocks(cast(Any, x)) for x in found[:3]))

    def of_values(self, rounded: Rounded) -> Array:
        """Return what blocks stand for."""
        codes, scale, zero = (jnp.asarray(cast(Any, x)) for x in rounded[:3])
        return scale * (codes - zero)

    def held(self, rounded: Mapping[int, Rounded], shifts: np.ndarray) -> MixedArray:
        """Return the matrices with shifted bits, `[expert, block]`."""
        bits = self.bits[:, None] + shifts
        start = _chosen([rounded[shift] for shift in (-1, 0, 1)], 1 + shifts.reshape(-1))
        codes, scale, zero, _ = cast(Any, self.fed_back(start, bits))
        means = np.broadcast_to(self.bits[:, None], bits.shape).reshape(-1)
        forms = [self.settings.store(*own, self.width) for own in zip(bits.reshape(-1).tolist(), means.tolist())]
        parts, order = [], []
        for store in sorted(set(forms), key=lambda own: (own.zero, own.bits)):
            own = np.array([place for place, form in enumerate(forms) if form == store])
            parts.append(QuantisedArray.pack(Rounded(codes[own], scale[own], zero[own]), store))
            order.append(own)
        places = jnp.asarray(np.concatenate(order), jnp.int32)[None]
        return MixedArray(parts=tuple(parts), order=places, width=self.width, shape=tuple(self.weight.shape))


def _chosen(options: list[Rounded], which: np.ndarray) -> Rounded:
    """Return for each block what stands at its place of the options."""
    if len(options) == 1:
        return options[0]
    blocks = np.arange(len(which))
    return Rounded(*(jnp.stack([cast(Any, own[field]) for own in options])[which, blocks] for field in range(3)))


def _measured(cut: _Cut, rounded: Mapping[int, Rounded]) -> np.ndarray:
    """Return the shifts that lower the error of all experts most, by what error feedback loses at each width."""
    errors = {}
    factor = None if cut.moment is None else factored(cut.moment, order=cut.order)
    for shift, own in rounded.items():
        bits = np.broadcast_to((cut.bits + shift)[:, None], (len(cut.bits), cut.weight.shape[2] // cut.width))
        rest = cut.weight - cut.whole(cut.of_values(cut.fed_back(own, bits)))
        if factor is None:
            lost = jnp.sum(cut.blocks(rest) ** 2, axis=(1, 2))
        else:
            lost = group_errors(rest, factor, group=cut.width)
        errors[shift] = np.asarray(lost, np.float64).reshape(-1)
    shifts = np.zeros((len(cut.bits), cut.weight.shape[2] // cut.width), int)
    # Zeros of 2 bits are held in another form: only among themselves do shifts take no bytes.
    for alike in (cut.bits == 2, cut.bits > 2):
        gain, loss = ((errors[low] - errors[low + 1]).reshape(shifts.shape)[alike].reshape(-1) for low in (0, -1))
        shifts[alike] = paired_shifts(gain, loss).reshape(-1, shifts.shape[1])
    return shifts


def _published(cut: _Cut, rounded: Mapping[int, Rounded], evidence: Evidence, key) -> np.ndarray:
    """Return each matrix's shifts by salience, as many as keep the distribution of its outputs closest."""
    experts, _, in_ = cut.weight.shape
    moment = jnp.eye(in_)[None] if cut.moment is None else cut.moment
    ranked = np.asarray(salience(cut.weight, moment, group=cut.width))
    rows = _inputs(evidence, moment, experts, jax.random.key(0) if key is None else key)
    blocks = ranked.shape[1]
    outputs = {}
    for shift, own in rounded.items():
        parts = cut.of_values(own).reshape(experts, blocks, -1, cut.width)
        inputs = rows.reshape(experts, ROWS, blocks, cut.width)
        outputs[shift] = jnp.einsum("etki,ekoi->etko", inputs, parts, precision=lax.Precision.HIGHEST)
    exact = jax.nn.log_softmax(jnp.einsum("eti,eoi->eto", rows, cut.weight, precision=lax.Precision.HIGHEST))
    tried, losses = [], []
    for pairs in range(blocks // 2 + 1):
        shifts = np.stack([ranked_shifts(own, pairs) for own in ranked])
        weighed = [outputs[shift] * (shifts == shift)[:, None, :, None] for shift in outputs]
        found = cast(Any, sum(weighed)).sum(2)
        divergence = jnp.sum(jnp.exp(exact) * (exact - jax.nn.log_softmax(found)), axis=2)
        tried.append(shifts)
        losses.append(np.asarray(jnp.mean(divergence, axis=1)))
    best = np.argmin(losses, axis=0)
    return np.stack(tried)[best, np.arange(experts)]


def _inputs(evidence: Evidence, moment: AnyArray, experts: int, key) -> Array:
    """Draw rows of inputs with given second moments, of the size that calibration saw."""
    drawn = jax.random.normal(key, (experts, ROWS, moment.shape[1]))
    root = cholesky(moment + 1e-6 * jnp.eye(moment.shape[1]))
    sums = evidence.statistic("intermediate_moments" if evidence.target == "down" else "input_moments")
    tokens = 0 if evidence.counts is None else np.sum(evidence.counts)
    size = 1.0
    if sums is not None and tokens > 0:
        # Moments as evidence are in units of their mean eigenvalue.
        size = float(np.trace(sums, axis1=1, axis2=2).sum() / (tokens * moment.shape[1])) ** 0.5
    return size * jnp.einsum("eti,eji->etj", drawn, jnp.broadcast_to(root, (experts, *root.shape[1:])))


SLIM_LLM = QuantisingMethod(
    "slim_llm",
    "shift bits between groups of columns at constant bytes",
    SliMLLMSettings,
    widths,
    abstract,
    fit,
    requires=needs("intermediate_moments"),
)
