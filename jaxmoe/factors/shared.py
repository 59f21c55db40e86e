"""Shared: one matrix for all experts, such as the base of which they are deviations, with or without all its channels.

    W_e = W        y = W x,  or without some channels of y or of x

A model applies it once for every token, not once for every expert of a token: what such a term gives does not depend on
the expert (`for_all`). Channels may be missing in storage (`kept`), and further input channels may be masked in every
call, those that contribute least to it: ||W[:, j]||_2 ||x_j||_2 over the rows of the call. The mask saves no storage.
Source: D2-MoE, arXiv 2502.17298, equation 8 and the semi-dynamic pruning of its section 3.3.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar

import jax.numpy as jnp
import msgspec
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxmoe.arrays import AnyArray
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors.leaves import EVERY, Abstract, Leaf, plain, pytree, values
from jaxmoe.factors.registry import register
from jaxmoe.factors.spec import Number, Size, TermSpec, shortened
from jaxmoe.factors.term import Term, Work, per_expert

AXES = ("out", "in")
"""The axes along which channels may be missing."""


@register
@pytree(static=("experts", "out", "in_", "axis", "parts", "dynamic"))
@dataclass(frozen=True, kw_only=True)
class Shared(Term):
    """The same matrix for every expert, zero in the channels that are not kept.

    Stored numbers: kept outputs * kept inputs (+ the kept channels' numbers).

    Args:
        weight: the kept part, `[kept out, kept in]`.
        kept: the channels of `axis` that it has, ascending, int32, `[1, channel]`; None for all.
        experts: for how many experts it stands.
        out: all outputs.
        in_: all inputs.
        axis: "out" or "in", the axis along which channels are missing.
        parts: equal parts of the outputs to which `kept` applies alike where `axis` is "out": 2 for `gate_up`, of which
            an intermediate channel takes one row of each half.
        dynamic: further input channels that `apply` masks, chosen anew from its rows.

    Example:
        >>> term = Shared.build(jnp.arange(12.0).reshape(3, 4), experts=2, kept=[0, 2])
        >>> term.materialize()[1].tolist()
        [[0.0, 1.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0], [8.0, 9.0, 10.0, 11.0]]
        >>> term.count()
        Count(numbers=10, bytes=40)
    """

    class Spec(TermSpec, tag="shared"):
        kept: Size | None
        axis: str
        parts: Size
        dynamic: Number

    kind: ClassVar[str] = "shared"
    for_all: ClassVar[bool] = True
    weight: Float[Leaf, "kept_out kept_in"]
    kept: Int[AnyArray | Abstract, "1 channel"] | None = None
    experts: int
    out: int
    in_: int
    axis: str = "out"
    parts: int = 1
    dynamic: int = 0

    @classmethod
    def abstract(
        cls, shape, dtype, *, kept: int | None = None, axis: str = "out", parts: int = 1, dynamic: int = 0
    ) -> "Shared":
        """Return the term without values: `shape` is `(experts, out, in)`, `kept` the number of channels."""
        experts, out, in_ = shape
        _check(out, in_, kept, axis, parts, dynamic)
        stored = {"out": out, "in": in_}
        if kept is not None:
            stored[axis] = kept * parts if axis == "out" else kept
        return cls(
            weight=Abstract((stored["out"], stored["in"]), dtype),
            kept=None if kept is None else Abstract((1, kept), jnp.int32),
            experts=experts,
            out=out,
            in_=in_,
            axis=axis,
            parts=parts,
            dynamic=dynamic,
        )

    @classmethod
    def build(
        cls,
        weight: Float[AnyArray, "out in"],
        *,
        experts: int,
        kept: Sequence[int] | np.ndarray | None = None,
        axis: str = "out",
        parts: int = 1,
        dynamic: int = 0,
        dtype=None,
    ) -> "Shared":
        """Cut the kept channels, known on the host, out of a whole matrix.

        Raises:
            JaxmoeError: the channels are not different ones of the axis, or sizes do not fit together.
        """
        out, in_ = weight.shape
        weight = weight if dtype is None else weight.astype(dtype)
        if kept is not None:
            kept = np.sort(np.asarray(kept, np.int64).reshape(-1))
            channels = out // parts if axis == "out" else in_
            if len(set(kept.tolist())) < len(kept) or ((kept < 0) | (kept >= channels)).any():
                raise JaxmoeError(f"kept channels {kept.tolist()} are not different ones of 0 to {channels - 1}")
        _check(out, in_, None if kept is None else len(kept), axis, parts, dynamic)
        if kept is not None:
            weight = weight[:, kept] if axis == "in" else weight[_rows(kept, parts, out)]
        return cls(
            weight=weight,
            kept=None if kept is None else kept.astype(np.int32)[None],
            experts=experts,
            out=out,
            in_=in_,
            axis=axis,
            parts=parts,
            dynamic=dynamic,
        )

    @property
    def shape(self):
        return self.experts, self.out, self.in_

    @property
    def rank(self) -> int:
        return min(self.weight.shape)

    def materialize(self, experts=EVERY):
        dense = values(self.weight)
        if self.kept is not None:
            whole = jnp.zeros((self.out, self.in_), jnp.float32)
            index = self._kept_rows() if self.axis == "out" else (slice(None), jnp.asarray(self.kept)[0])
            dense = whole.at[index].set(dense)
        return jnp.broadcast_to(dense, (len(range(self.experts)[experts]), self.out, self.in_))

    def apply(self, rows: Float[AnyArray, "*row in"], product=per_expert) -> Float[Array, "*row out"]:
        """Multiply rows in whatever order they come, once each; `product` is of no use to a matrix of all experts."""
        own = self.masked(rows)
        read = rows if own.kept is None or own.axis == "out" else rows[..., jnp.asarray(own.kept)[0]]
        weight = jnp.asarray(plain(own.weight)).astype(rows.dtype)
        y = jnp.einsum("...i,oi->...o", read, weight, precision=lax.Precision.HIGHEST)
        if own.kept is None or own.axis == "in":
            return y
        return jnp.zeros((*y.shape[:-1], self.out), y.dtype).at[..., own._kept_rows()].set(y)

    def masked(self, rows: Float[AnyArray, "*row in"]) -> "Shared":
        """Return the term with zeros in place of the `dynamic` input channels that contribute least to these rows."""
        if not self.dynamic:
            return self
        weight = jnp.asarray(plain(self.weight))
        read = rows if self.kept is None or self.axis == "out" else rows[..., jnp.asarray(self.kept)[0]]
        # Squares of the norms are in the same order as the norms.
        energy = jnp.sum(jnp.square(read.astype(jnp.float32)), axis=tuple(range(read.ndim - 1)))
        scores = lax.stop_gradient(energy * jnp.sum(jnp.square(weight.astype(jnp.float32)), axis=0))
        _, alive = lax.top_k(scores, weight.shape[1] - self.dynamic)
        mask = jnp.zeros(weight.shape[1], weight.dtype).at[alive].set(1)
        return replace(self, weight=weight * mask, dynamic=0)

    def work(self, chosen):
        # Applied once for a token, however many experts it chooses.
        numbers = prod(self.weight.shape)
        return Work(float(numbers), 2.0 * numbers)

    def _kept_rows(self):
        return _rows(jnp.asarray(self.kept)[0], self.parts, self.out)

    def described(self):
        return self.Spec(
            kept=None if self.kept is None else self.kept.shape[1],
            axis=self.axis,
            parts=self.parts,
            dynamic=self.dynamic,
        )

    @classmethod
    def planned(cls, spec, shape):
        return cls.abstract(shape, jnp.float32, **msgspec.structs.asdict(spec))

    def checked(self):
        if self.kept is not None:
            kept = np.asarray(self.kept, np.int64)[0]
            channels = self.out // self.parts if self.axis == "out" else self.in_
            if (np.diff(kept) <= 0).any() or not 0 <= kept[0] <= kept[-1] < channels:
                raise JaxmoeError(f"kept channels {shortened(kept)} are not ascending ones of 0 to {channels - 1}")
        return self


def _rows(kept, parts: int, out: int):
    """Return the rows of all parts, in the order in which the weight has them."""
    return (np.arange(parts)[:, None] * (out // parts) + kept).reshape(-1)


def _check(out: int, in_: int, kept: int | None, axis: str, parts: int, dynamic: int) -> None:
    """Raise if the sizes do not fit together; all faults are listed."""
    faults = []
    if axis not in AXES:
        raise JaxmoeError(f"axis {axis!r} of a shared matrix: choose one of {', '.join(AXES)}")
    if parts < 1 or out % parts:
        faults.append(f"{out} outputs do not fall into {parts} equal parts")
    channels = out // max(parts, 1) if axis == "out" else in_
    if kept is not None and not 1 <= kept <= channels:
        faults.append(f"{kept} kept channels of {channels}: keep 1 to {channels}")
    inputs = kept if kept is not None and axis == "in" else in_
    if not 0 <= dynamic < inputs:
        faults.append(f"{dynamic} masked channels of {inputs} inputs: mask 0 to {inputs - 1}")
    if faults:
        raise JaxmoeError("; ".join(faults))
