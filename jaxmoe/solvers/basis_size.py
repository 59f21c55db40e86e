"""How many bases a mixture should have, and how its matrices should lie, to be closest for the numbers that it stores.

A term stores E P r + M r Q + E M numbers: more bases cost rank. The balance was measured on one layer of one small
checkpoint (16 experts; 8 and 32 experts and other shapes and layers confirmed it):

    M / E = 0.24 + P / Q (0.32 - 0.38 kept)         and at least kept - P / Q, where the rank is full

The optimum is flat: a quarter more or fewer bases change the error by one or two percent; experts that have very much
in common want fewer. What matters more: bases lie on the longer side, P <= Q (5 to 35 % less error than on the other),
and gate and up are stacked, `[2 F, D]`, before they are fitted (5 to 12 % less error than apart).
"""

FEWER = 0.72
"""Factor on the number of bases where second moments weigh the axis along which they lie.

Few directions then matter, and rank gains more than bases do. With about 0.72 times the bases, gate and up compressed
alone added 7 to 9 % less loss (16.6 and 40 % removed on one model, 25 and 60 % on two layers of another); half as many
were worse than that in three of these four cases. Compressed with down, the whole added 1 to 5 % less on the first and
as much as before on the second, at 60 %.
"""


def lies_transposed(out: int, in_: int) -> bool:
    """Return whether matrices `[out, in]` are to be fitted transposed, so that the bases lie on the longer side.

    Example:
        >>> lies_transposed(768, 2048), lies_transposed(2048, 768)
        (False, True)
    """
    return out > in_


def choose_bases(shape: tuple[int, int, int], kept: float, *, weighted: bool = False) -> int:
    """Return the number of bases M for a kept fraction of `[expert, out, in]`, in either orientation.

    Args:
        shape: of the target.
        kept: stored numbers over dense ones.
        weighted: whether second moments weigh the axis along which the bases lie.

    Example:
        >>> [choose_bases((16, 128, 128), kept) for kept in (0.834, 0.6, 0.2)]
        [4, 5, 8]
    """
    experts, out, in_ = shape
    ratio = min(out, in_) / max(out, in_)
    share = (0.24 + ratio * (0.32 - 0.38 * kept)) * (FEWER if weighted else 1.0)
    # With fewer bases even the full rank would not spend what may be stored.
    needed = -(-experts * (kept - ratio) // 1)
    return int(min(experts, max(1, round(experts * share), needed)))
