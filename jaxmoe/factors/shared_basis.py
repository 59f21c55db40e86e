"""SharedBasis: every expert is its own thin factor times a function of its own blend of shared bases (MoBE).

    W_e = A_e f(sum_j alpha_ej B_j)  (+ mean)          or the transpose of that

f acts on the blended *weight*, so the bases cannot be applied to activations one by one: `apply` forms f(blend) of
every expert first, [rank, columns] each. Source: MoBE, arXiv 2508.05257.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
import msgspec
from jax import lax
from jaxtyping import Array, Float

from jaxmoe.arrays import AnyArray
from jaxmoe.factors.leaves import EVERY, Abstract, Leaf, count_arrays, plain, pytree, values
from jaxmoe.factors.registry import register
from jaxmoe.factors.spec import Size, TermSpec
from jaxmoe.factors.term import Term, Work, per_expert


def wavelet(x):
    """Return x (1 - x²) / (1 + x²)³: odd, zero at -1, 0 and 1, fading outside.

    A blend that changes sign and size with its expert becomes a different feature for each: at equal stored numbers the
    fit is closer than through any monotone function that was tried, and no exponential is needed.

    Example:
        >>> [round(float(y), 3) for y in wavelet(jnp.array([-0.5, 0.0, 0.5, 1.0]))]
        [-0.192, 0.0, 0.192, 0.0]
    """
    inverse = 1 / (1 + x * x)
    return (x * inverse) * ((1 - x * x) * inverse) * inverse


ACTIVATIONS: dict[str, Callable] = {
    "identity": lambda x: x,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
    "sigmoid": jax.nn.sigmoid,
    "wavelet": wavelet,
}
"""The element-wise functions that may stand between the blend and the coefficients."""

Activation = Annotated[str, msgspec.Meta(pattern=rf"^({'|'.join(ACTIVATIONS)})\Z")]
"""The name of one of them."""


@register
@pytree(static=("activation", "transposed"))
@dataclass(frozen=True, kw_only=True)
class SharedBasis(Term):
    """A_e f(sum_j alpha_ej B_j), optionally plus one constant, optionally transposed.

    Stored numbers: experts * rows * rank + bases * rank * columns + experts * bases (+ 1 for the mean).

    Args:
        coefficients: A, `[expert, row, rank]`.
        bases: B, `[base, rank, column]`.
        mixing: alpha, `[expert, base]`.
        mean: a constant that is added to every entry, `[1, 1]`, or None.
        activation: a name in `ACTIVATIONS`.
        transposed: whether the experts' matrices `[out, in]` are the transposes of `[row, column]`.

    Example:
        >>> term = SharedBasis.abstract((8, 4, 16), "bfloat16", bases=2, rank=4, activation="tanh")
        >>> term.count().numbers == 8 * 4 * 4 + 2 * 4 * 16 + 8 * 2
        True
    """

    class Spec(TermSpec, tag="shared_basis"):
        bases: Size
        rank: Size
        activation: Activation
        transposed: bool
        mean: bool

    kind: ClassVar[str] = "shared_basis"
    coefficients: Float[Leaf, "expert row rank"]
    bases: Float[Leaf, "base rank column"]
    mixing: Float[AnyArray | Abstract, "expert base"]
    mean: Float[AnyArray | Abstract, "1 1"] | None = None
    activation: str = "silu"
    transposed: bool = False

    @classmethod
    def abstract(cls, shape, dtype, *, bases: int, rank: int, activation: str, transposed: bool = False, mean=False):
        """Return the term without values: `shape` is `(experts, out, in)`."""
        experts, rows, columns = (shape[0], *(shape[:0:-1] if transposed else shape[1:]))
        return cls(
            coefficients=Abstract((experts, rows, rank), dtype),
            bases=Abstract((bases, rank, columns), dtype),
            mixing=Abstract((experts, bases), dtype),
            mean=Abstract((1, 1), dtype) if mean else None,
            activation=activation,
            transposed=transposed,
        )

    @property
    def shape(self):
        experts, rows = self.coefficients.shape[:2]
        columns = self.bases.shape[2]
        return (experts, columns, rows) if self.transposed else (experts, rows, columns)

    @property
    def rank(self) -> int:
        return self.bases.shape[1]

    def features(self, experts: slice = EVERY) -> Float[Array, "expert rank column"]:
        """Return f(blend) of all experts, or of some, in float32."""
        mixing, bases = values(self.mixing, experts), values(self.bases)
        blend = jnp.einsum("em,mrc->erc", mixing, bases, precision=lax.Precision.HIGHEST)
        return ACTIVATIONS[self.activation](blend)

    def materialize(self, experts=EVERY):
        coefficients = values(self.coefficients, experts)
        equation = "epr,erq->eqp" if self.transposed else "epr,erq->epq"
        dense = jnp.einsum(equation, coefficients, self.features(experts), precision=lax.Precision.HIGHEST)
        return dense if self.mean is None else dense + jnp.asarray(self.mean, jnp.float32)

    def apply(self, rows, product=per_expert):
        features, coefficients = self.features(), plain(self.coefficients)
        if self.transposed:
            # The matrices are (A f(blend))ᵀ: both factors change sides.
            features, coefficients = jnp.swapaxes(coefficients, 1, 2), jnp.swapaxes(features, 1, 2)
        out = product(product(rows, features), coefficients)
        if self.mean is None:
            return out
        # A constant matrix maps a row to its sum times the constant, for every output.
        return out + jnp.asarray(self.mean, rows.dtype) * jnp.sum(rows, axis=-1, keepdims=True)

    def work(self, chosen):
        experts, out, in_ = self.shape
        own = count_arrays([self.coefficients, self.mixing]).numbers
        shared = self.count().numbers - own
        return Work(own * chosen / experts + shared, 2.0 * chosen * self.rank * (out + in_))

    def described(self):
        return self.Spec(
            bases=self.bases.shape[0],
            rank=self.rank,
            activation=self.activation,
            transposed=self.transposed,
            mean=self.mean is not None,
        )

    @classmethod
    def planned(cls, spec, shape):
        return cls.abstract(shape, jnp.float32, **msgspec.structs.asdict(spec))
