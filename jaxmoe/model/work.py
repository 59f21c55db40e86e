"""What a token costs in a model: the stored numbers that it uses, and the operations of its routed experts.

Where only the main experts of a token run, it costs these, the vectors of its auxiliary experts, and their average,

    main / E of the experts' numbers + k_auxiliary (2D + F),    operations of the main experts + 2 E (2D + F)

with E experts of hidden size D and intermediate size F (arXiv 2503.00634 counts 3 (2D + F) numbers of vectors, which is
the same to five digits). The average is one product with the vectors of all experts. Terms of gate and up together are
applied to the inputs of each.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from jaxmoe.factors import CompressedLayer, Work
from jaxmoe.model.compressed_experts import vector_shapes
from jaxmoe.model.spec import ExpertBlock


class Activity(NamedTuple):
    """A model in three columns, which no method moves alike.

    stored: numbers in the files; active: those of them that one token uses, in the mean over all choices of experts;
    operations: of the routed experts' products for one token.
    """

    stored: int
    active: int
    operations: int


def block_work(block: ExpertBlock, experts: CompressedLayer) -> Work:
    """Return what a token costs in the routed experts of one layer.

    Args:
        block: how many run.
        experts: their terms; dense ones may be abstract.

    Example:
        >>> from jaxmoe.factors import Dense, LayerShape
        >>> from jaxmoe.model.spec import Router
        >>> sizes = LayerShape(experts=4, hidden=8, intermediate=2)
        >>> terms = {name: (Dense.abstract(sizes.of(name), "float32"),) for name in sizes.projections}
        >>> block = ExpertBlock(shape=sizes, router=Router(experts=4, top_k=2), main=1)
        >>> block_work(block, CompressedLayer(terms=terms, sizes=sizes))
        Work(numbers=66.0, operations=240.0)
    """
    work = experts.work(block.running)
    auxiliary = block.router.top_k - block.running
    if not auxiliary:
        return work
    stacked = replace(experts, terms={"gate_up": experts.terms.get("gate_up", ())})
    again = stacked.work(block.running).operations
    vectors = sum(size for _, size in vector_shapes(block.shape).values())
    return work + Work(auxiliary * vectors, again + 2.0 * block.shape.experts * vectors)


def activity(other: int, blocks: Iterable[tuple[ExpertBlock, CompressedLayer]]) -> Activity:
    """Count a model.

    Args:
        other: its numbers outside of routed experts and their vectors, all of which every token uses.
        blocks: the layers with experts, and their terms.
    """
    stored, total = other, Work(float(other), 0.0)
    for block, experts in blocks:
        stored += experts.count().numbers
        if block.running < block.router.top_k:
            stored += sum(rows * size for rows, size in vector_shapes(block.shape).values())
        total += block_work(block, experts)
    return Activity(stored, round(total.numbers), round(total.operations))
