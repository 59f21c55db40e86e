"""Vectors that stand in for experts, learned from what the layer gave when all chosen experts ran.

For the tokens t of some text, with the vectors theta as the only unknowns, minimise

    sum_t | y_t - y_t(theta) |^2 / sum_t | y_t |^2

where y_t is the weighted sum of all experts of the token and y_t(theta) that of the main ones with scaled inputs. The
experts themselves stay as they are. Vectors start at one: the error then is that of leaving the auxiliary experts out.
Each step follows the gradient of one batch (Adam, the rate falling along a cosine). An expert that is never auxiliary
has no gradient and keeps its ones. This is not in the paper (arXiv 2503.00634), which trains the whole model.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from jaxmoe.model.auxiliary import ones
from jaxmoe.model.layer import routed
from jaxmoe.model.routing import Routes
from jaxmoe.model.spec import ExpertBlock

Vectors = dict[str, Array]


class Examples(NamedTuple):
    """What a layer's experts read and gave together when all chosen ones ran.

    Args:
        inputs: the tokens, as the router sees them.
        experts: those of each token, in descending order of their weights.
        weights: the router's.
        outputs: the weighted sums of the experts' outputs.
    """

    inputs: Float[Array | np.ndarray, "token hidden"]
    experts: Int[Array | np.ndarray, "token choice"]
    weights: Float[Array | np.ndarray, "token choice"]
    outputs: Float[Array | np.ndarray, "token hidden"]


class Learner(NamedTuple):
    """Where learning stands: the vectors, and the optimiser's memory."""

    vectors: Vectors
    memory: Any


def schedule(rate: float, steps: int) -> optax.GradientTransformation:
    """Return Adam with a rate that falls to nothing along a cosine."""
    return optax.adam(optax.cosine_decay_schedule(rate, steps), b2=0.99)


def begin(block: ExpertBlock, optimizer: optax.GradientTransformation) -> Learner:
    """Return a learner whose vectors are ones."""
    vectors = ones(block.shape)
    return Learner(vectors, optimizer.init(vectors))


def squares(
    vectors: Mapping[str, Array], examples: Examples, parameters: Mapping[str, Any], block: ExpertBlock
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return the sum of the squared errors and that of the squared outputs.

    Args:
        vectors: by their names, as `model.auxiliary.ones` has them.
        examples: some tokens.
        parameters: of the layer; `experts`, and biases where it has them.
        block: how many experts run.
    """
    inputs, experts, weights, outputs = map(jnp.asarray, examples)
    found, _ = routed(inputs, Routes(experts, weights), {**parameters, **vectors}, block)
    return jnp.sum((found.combined - outputs) ** 2), jnp.sum(outputs**2)


def learn(
    learner: Learner,
    examples: Examples,
    parameters: Mapping[str, Any],
    block: ExpertBlock,
    optimizer: optax.GradientTransformation,
) -> tuple[Learner, Float[Array, ""]]:
    """Take one step, and return the relative squared error of the batch before it; arguments as of `squares`."""

    def loss(vectors):
        wrong, whole = squares(vectors, examples, parameters, block)
        return wrong / jnp.maximum(whole, jnp.finfo(jnp.float32).tiny)

    value, gradient = jax.value_and_grad(loss)(learner.vectors)
    updates, memory = optimizer.update(gradient, learner.memory)
    return Learner(jax.tree.map(jnp.add, learner.vectors, updates), memory), value
