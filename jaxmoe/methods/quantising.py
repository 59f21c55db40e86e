"""What a quantising method is: it stores matrices, or the arrays of terms, in fewer bits.

It knows one target of one layer at a time: the terms that stand for its matrices, dense ones where no method replaced
them. Sizes follow from the terms alone, so that a budget in bytes is spent exactly before anything runs. No method of
this kind comes with jaxmoe yet.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxmoe.factors import Term
from jaxmoe.methods.method import Fit, no_requirements


class QuantisingMethod(NamedTuple):
    """A method that stores terms in fewer bits.

    Args:
        name: as the command line spells it.
        summary: one line for the help text.
        settings: a frozen dataclass of keyword-only settings, validated in `__post_init__`.
        abstract: `(terms, settings) -> terms`: what becomes of a target's abstract terms, in exactly the bytes that it
            will take.
        fit: `(terms, settings, *, evidence, key) -> Fit`: the same of real terms; `evidence` is an `Evidence`.
        requires: `(settings) -> {statistic: mend}` as for `Method`; a method that requires some is calibrated on what
            it finds, in a pass of its own.
    """

    name: str
    summary: str
    settings: type
    abstract: Callable[[tuple[Term, ...], Any], tuple[Term, ...]]
    fit: Callable[..., Fit]
    requires: Callable[[Any], Mapping[str, str]] = no_requirements

    kind = "quantise"
