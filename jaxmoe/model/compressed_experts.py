"""Compressed Experts: of a token's k chosen experts the main ones run, and vectors compensate for the auxiliary ones.

Each expert e has a vector for what each of its matrices c reads (gate, up and down). Those of the token's auxiliary
experts are averaged by their router weights w, and scale the inputs of its main experts:

    theta_c(t) = sum_{e auxiliary} w_te / (sum_{j auxiliary} w_tj) theta_ce
    h_te = act( gate_e (x_t * theta_gate(t)) ) * ( up_e (x_t * theta_up(t)) ),      e main
    y_t  = sum_{e main} w_te down_e ( h_te * theta_down(t) )

With vectors of ones that is the model without its auxiliary experts. Router, shared experts and residual stream read
the plain x. Everything is float32, and one product of `[token, expert]` with all vectors of the layer: rows of vectors
are never gathered. What it saves is work, not storage, which grows by the vectors. Experts without a gate have no
vector for it.
Source: Compressed Experts, arXiv 2503.00634; the weights are not scaled up there (`renorm="none"`).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import LayerShape
from jaxmoe.model.routing import Routes
from jaxmoe.model.spec import DecoderSpec, ExpertBlock

RENORMS = ("none", "main")
"""What becomes of the main experts' weights: nothing, or they are scaled to the sum of all chosen experts' weights."""

PREFIX = "auxiliary."
"""Of the vectors' names among a layer's arrays and, behind the experts' module, in files."""


class MainExperts(NamedTuple):
    """Which of a token's experts run: the `count` of largest weight, these as they are or scaled (`RENORMS`).

    Example:
        >>> MainExperts(2).as_json()
        {'main_experts': 2}
    """

    count: int
    renorm: str = "none"

    def as_json(self) -> dict[str, Any]:
        """Return what stands in a layer's record; the usual is left out."""
        return {"main_experts": self.count, **({} if self.renorm == "none" else {"renorm": self.renorm})}


class Divided(NamedTuple):
    """Routes of the experts that run, and of those that vectors compensate for."""

    main: Routes
    auxiliary: Routes


def check_main(main: int, top_k: int, renorm: str = "none") -> None:
    """Raise unless so many main experts leave at least one auxiliary one.

    Example:
        >>> check_main(4, 4)
        Traceback (most recent call last):
        ...
        jaxmoe.errors.JaxmoeError: 4 main experts: a token chooses 4, so give 1 to 3
    """
    if top_k < 2:
        raise JaxmoeError(f"{main} main experts: a token chooses a single expert, so that there is none to spare")
    if not 1 <= main < top_k:
        raise JaxmoeError(f"{main} main experts: a token chooses {top_k}, so give 1 to {top_k - 1}")
    if renorm not in RENORMS:
        raise JaxmoeError(f"renorm {renorm!r}: give {' or '.join(RENORMS)}")


def main_experts(spec: DecoderSpec, main: Mapping[int, MainExperts]) -> DecoderSpec:
    """Return what a decoder computes where only the main experts of some layers run.

    Args:
        spec: of the decoder.
        main: which run, by the index of the layer.

    Raises:
        JaxmoeError: a layer's router chooses too few experts.
    """
    layers = list(spec.layers)
    for index, (count, renorm) in main.items():
        block = layers[index].feed_forward
        assert isinstance(block, ExpertBlock)
        check_main(count, block.router.top_k, renorm)
        layers[index] = replace(layers[index], feed_forward=replace(block, main=count, renorm=renorm))
    return replace(spec, layers=tuple(layers))


def by_weight(routes: Routes) -> Routes:
    """Return routes in descending order of their weights; of equal weights the lower expert index comes first.

    Example:
        >>> routes = Routes(jnp.array([[3, 1, 0]]), jnp.array([[0.2, 0.6, 0.2]]))
        >>> by_weight(routes).experts
        Array([[1, 0, 3]], dtype=int32)
    """
    order = jnp.lexsort((routes.experts, -routes.weights), axis=-1)
    return Routes(*(jnp.take_along_axis(array, order, -1) for array in routes))


def divide(routes: Routes, main: int, renorm: str = "none") -> Divided:
    """Divide routes into those that run and the others.

    Args:
        routes: as `by_weight` orders them.
        main: how many run.
        renorm: one of `RENORMS`.

    Example:
        >>> routes = Routes(jnp.array([[1, 0, 3]]), jnp.array([[0.5, 0.25, 0.25]]))
        >>> divide(routes, 1, "main").main.weights, divide(routes, 1).auxiliary.experts
        (Array([[1.]], dtype=float32), Array([[0, 3]], dtype=int32))
    """
    first, rest = (Routes(*(array[:, part] for array in routes)) for part in (slice(main), slice(main, None)))
    if renorm == "main":
        own, total = (jnp.sum(weights, -1, keepdims=True) for weights in (first.weights, routes.weights))
        first = first._replace(weights=first.weights * (total / jnp.maximum(own, _LEAST)))
    return Divided(first, rest)


def mixing(auxiliary: Routes, experts: int) -> Float[Array, "token expert"]:
    """Return the weights by which the vectors are averaged, which sum to one for every token.

    Where the router's weights vanish, all auxiliary experts of the token count equally.

    Example:
        >>> mixing(Routes(jnp.array([[2, 0]]), jnp.array([[0.3, 0.1]])), 3)
        Array([[0.25, 0.  , 0.75]], dtype=float32)
    """
    weights = auxiliary.weights.astype(jnp.float32)
    total = jnp.sum(weights, -1, keepdims=True)
    # A single expert has all the say, and rounding must not give the router a gradient where there is none.
    enough = (total > _LEAST) & (weights.shape[-1] > 1)
    share = jnp.where(enough, weights / jnp.where(enough, total, 1), 1 / weights.shape[-1])
    rows = jnp.arange(len(weights))[:, None]
    return jnp.zeros((len(weights), experts), jnp.float32).at[rows, auxiliary.experts].add(share)


def input_scales(auxiliary: Routes, parameters: Mapping[str, Any]) -> dict[str, Float[Array, "token _"]]:
    """Return by what the inputs of each projection are multiplied, token by token, in float32.

    Args:
        auxiliary: routes of the experts that do not run.
        parameters: of the layer; `auxiliary.gate` and `auxiliary.up` `[expert, hidden]`, `auxiliary.down`
            `[expert, intermediate]`.
    """
    names = [name for name in ("gate", "up", "down") if PREFIX + name in parameters]
    vectors = [parameters[PREFIX + name] for name in names]
    together = jnp.concatenate(vectors, axis=1, dtype=jnp.float32)
    averaged = jnp.matmul(mixing(auxiliary, len(together)), together, precision=lax.Precision.HIGHEST)
    ends = [sum(vector.shape[1] for vector in vectors[: i + 1]) for i in range(len(vectors) - 1)]
    return dict(zip(names, jnp.split(averaged, ends, axis=1), strict=True))


def vector_shapes(shape: LayerShape) -> dict[str, tuple[int, int]]:
    """Return the shapes of a layer's vectors by their names.

    Example:
        >>> vector_shapes(LayerShape(experts=8, hidden=4, intermediate=3))
        {'auxiliary.gate': (8, 4), 'auxiliary.up': (8, 4), 'auxiliary.down': (8, 3)}
    """
    return {PREFIX + name: (shape.experts, shape.of(name)[2]) for name in shape.projections}


def ones(shape: LayerShape) -> dict[str, Float[Array, "expert _"]]:
    """Return the vectors with which the auxiliary experts are just left out."""
    return {name: jnp.ones(own, jnp.float32) for name, own in vector_shapes(shape).items()}


_LEAST = 1e-12
"""Sums of router weights below this are taken for nothing: their reciprocals would drown all gradients."""
