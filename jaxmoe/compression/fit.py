"""Fit what a plan says of one layer: the terms of its routed experts, target by target, and of its linear maps."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.checkpoint import Checkpoint
from jaxmoe.compression.evidence import LayerSums, Sums, evidence
from jaxmoe.compression.evidence import outcomes as calibration_outcomes
from jaxmoe.compression.linear_maps import PlannedLinear, linear_evidence, read_matrix
from jaxmoe.compression.plan import Plan, PlannedLayer
from jaxmoe.compression.svd_fallback import behind_svd, svd_instead
from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import TARGETS, CompressedLayer, CompressedLinear, Dense, Term
from jaxmoe.methods import Evidence, Outcome
from jaxmoe.methods.method import REORDERED, count


class Fitted(NamedTuple):
    """The terms of one target, what happened, and the thinned history of the losses."""

    terms: tuple[Term, ...]
    outcomes: list[Outcome]
    losses: list[float]


def fit_layer(
    checkpoint: Checkpoint, plan: Plan, planned: PlannedLayer, seed: int, sums: LayerSums | None
) -> tuple[CompressedLayer, list[Outcome], dict[str, list[float]]]:
    """Fit the experts of one layer and return them with what happened and the thinned history of the losses."""
    source, template = planned.source, planned.template
    key = _key(seed, source.index)
    outcomes = calibration_outcomes(sums, planned.touched, source.shape) if planned.touched else []
    terms, histories = {}, {}

    def read(target: str) -> jax.Array:
        return jax.device_put(checkpoint.target(source, target), may_alias=True)

    for position, (target, abstract) in enumerate(template.terms.items()):
        if target not in planned.touched:
            terms[target] = (Dense(weight=checkpoint.projection(source, target)),)
            continue
        known = evidence(sums, target, read, gated=source.shape.gated)
        where = f"layer {source.index}, {target}"
        fitted = _fit(plan, read(target), abstract, known, jax.random.fold_in(key, position), where, source.dtype)
        terms[target] = fitted.terms
        outcomes += fitted.outcomes
        if fitted.losses:
            histories[target] = fitted.losses
    return CompressedLayer(terms=terms, sizes=source.shape).check(), outcomes, histories


def fit_linear(
    checkpoint: Checkpoint, plan: Plan, planned: PlannedLinear, seed: int, statistics: Sums | None
) -> tuple[CompressedLinear, list[Outcome]]:
    """Fit one linear map and return it with what happened."""
    source = planned.source
    known, outcomes = linear_evidence(statistics, source)
    # Behind the keys of the experts' targets.
    position = len(TARGETS) + [own.source.name for own in plan.linears[source.index]].index(source.name)
    key = jax.random.fold_in(_key(seed, source.index), position)
    weight = jnp.asarray(read_matrix(checkpoint, source))[None]
    fitted = _fit(
        plan, weight, planned.template.terms, known, key, f"layer {source.index}, {source.name}", planned.dtype
    )
    return CompressedLinear(terms=fitted.terms, sizes=source.shape).check(), outcomes + fitted.outcomes


def _key(seed: int, index: int):
    return jax.random.fold_in(jax.random.key(seed), index)


def _fit(
    plan: Plan, weight: Any, abstract: tuple[Term, ...], known: Evidence, key: Any, where: str, dtype: np.dtype
) -> Fitted:
    """Fit one target, and store truncated SVD instead where the method falls back to it."""
    method, target = plan.method, known.target
    fit = method.fit(weight, abstract, plan.settings, evidence=known, key=key)
    for array in jax.tree_util.tree_leaves(fit.terms):
        if not bool(jnp.isfinite(array.astype(jnp.float32)).all()):
            raise JaxmoeError(
                f"{where}: {method.name} gave factors that {dtype} cannot hold "
                "(NaN or overflow); try another setting or seed"
            )
    if count(fit.terms).bytes > count(abstract).bytes:
        raise RuntimeError(f"{target}: {count(fit.terms)} of {count(abstract)}: a defect of {method.name}")
    terms = fit.terms
    outcomes = [outcome._replace(target=target) for outcome in fit.outcomes]
    if all(outcome.kind != REORDERED for outcome in fit.outcomes):
        behind = behind_svd(weight, fit.terms, known.moment, target)
        falls_back = behind is not None and method.falls_back_to_svd and plan.settings.setting == "improved"
        if behind is not None and falls_back and (closer := svd_instead(weight, fit.terms, known)) is not None:
            terms = closer
            behind = behind._replace(kind="svd_instead", detail=f"{behind.detail}; it is stored instead")
        outcomes += [] if behind is None else [behind]
    losses: list[float] = []
    if len(fit.losses):
        thin = max(1, len(fit.losses) // 50)
        losses = [float(x) for x in (*fit.losses[::thin], fit.losses[-1])]
    return Fitted(terms, outcomes, losses)
