"""Sizes as the publication of D²-MoE counts them: what every batch masks anew counts as removed, though it is stored.

Source: D²-MoE, arXiv 2502.17298.
"""

from math import ceil

from jaxmoe.errors import JaxmoeError
from jaxmoe.factors import Term
from jaxmoe.methods.method import Outcome, count


def published_size(template: tuple[Term, ...], masked: int) -> Outcome:
    """Return the size that the publication would state, which takes masked channels for removed ones.

    Args:
        template: the terms of a target, of which the first is the base.
        masked: input channels of the base that every batch masks anew.
    """
    experts, out, in_ = template[0].shape
    dense, stored = experts * out * in_, count(template).numbers
    honest, published = (1 - numbers / dense for numbers in (stored, stored - masked * out))
    detail = (
        f"removed {honest:.4f} of the target; the publication would say {published:.4f}, counting {masked} input"
        " channels of the base that every batch masks anew and storage holds"
    )
    return Outcome("published_size", "", detail)


def published_keep(
    total: float, *, model: float, layers: int, experts: int, hidden: int, intermediate: int, sparsity: float
) -> float:
    """Return the fraction of every deviation that the publication keeps to remove a fraction of the whole model.

        3 L E D F - 3 L D F (1 - sparsity) - 3 L E r (D + F)  =  total * model,        keep = r (D + F) / (D F)

    with r the next whole rank. All of `sparsity` counts as removed here, also what every batch masks and storage holds:
    `Term.count` says what is stored.

    Args:
        total: removed fraction of the model.
        model: numbers in the whole model.
        layers: that have routed experts (gate, up and down).
        experts: routed experts in a layer.
        hidden: hidden size D.
        intermediate: expert intermediate size F.
        sparsity: of the base, in [0, 1).

    Raises:
        JaxmoeError: no rank of at least 1 removes as much, or the base alone is too large to remove as little.

    Source:
        D²-MoE, arXiv 2502.17298: the hyper-parameters of its appendix, which are ranks rounded up.

    Example:
        >>> mixtral = dict(model=46_702_792_704, layers=32, experts=8, hidden=4096, intermediate=14336)
        >>> round(published_keep(0.4, **mixtral, sparsity=0.1), 4)
        0.4734
    """
    unit = 3 * layers * experts * hidden * intermediate / model
    least, full = 1 - (1 - sparsity) / experts, hidden * intermediate / (hidden + intermediate)
    rank = ceil((least - total / unit) * full - 1e-9)
    if not 1 <= rank <= full * least:
        low, high = max(0.0, (least - int(full * least) / full) * unit), (least - 1 / full) * unit
        raise JaxmoeError(f"total {total}: deviations of rank 1 or more remove {low:.4f} to {high:.4f} of this model")
    return rank / full
