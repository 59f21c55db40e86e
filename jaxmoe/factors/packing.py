"""Codes of few bits as streams of bits: code i of a row fills bits i b to (i + 1) b, the low bits of a word first.

Where b does not divide 32, codes cross from one word to the next; a row's last word ends in zero bits. It is the layout
of `compressed_tensors` from version 0.20 on.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int32, Integer, UInt8

from jaxmoe.arrays import AnyArray


def words(codes: int, bits: int) -> int:
    """Return how many words of 32 bits a row of codes takes.

    Example:
        >>> words(11, 3)
        2
    """
    return -(-codes * bits // 32)


def pack(codes: Integer[AnyArray, "row code"], bits: int) -> Int32[Array, "row word"]:
    """Return rows of codes as rows of words.

    Args:
        codes: 0 to 2^bits - 1.
        bits: of a code, 1 to 8.

    Example:
        >>> hex(pack(jnp.arange(8)[None], 4).item())
        '0x76543210'
    """
    return _packed(codes, bits)


@partial(jax.jit, static_argnames="bits")
def _packed(codes, bits):
    rows, count = codes.shape
    # 32 codes take as many words as a code has bits.
    parts = -(-count // 32)
    own = jnp.pad(jnp.asarray(codes).astype(jnp.uint32), ((0, 0), (0, 32 * parts - count))).reshape(rows, parts, 32)
    found = [jnp.zeros((rows, parts), jnp.uint32)] * bits
    for place in range(32):
        word, first = divmod(place * bits, 32)
        found[word] |= own[..., place] << first
        if first + bits > 32:
            found[word + 1] |= own[..., place] >> (32 - first)
    packed = jnp.stack(found, axis=-1).reshape(rows, parts * bits)[:, : words(count, bits)]
    return packed.view(jnp.int32)


def unpack(packed: Int[AnyArray, "row word"], bits: int, count: int) -> UInt8[Array, "row code"]:
    """Return the codes that `pack` packed.

    Args:
        packed: rows of words, int32.
        bits: of a code, 1 to 8.
        count: codes of a row.

    Example:
        >>> unpack(jnp.array([[0x39 << 5 | 7]], jnp.int32), 5, 3).tolist()
        [[7, 25, 1]]
    """
    places = np.arange(count) * bits
    word, first = places // 32, (places % 32).astype(np.uint32)
    own = jnp.pad(jnp.asarray(packed).astype(jnp.int32), ((0, 0), (0, 1))).view(jnp.uint32)
    codes = own[:, word] >> first
    if 32 % bits:
        # A shift by all 32 bits is not defined.
        codes |= jnp.where(first > 0, own[:, word + 1] << (32 - first) % 32, 0)
    return (codes & np.uint32(2**bits - 1)).astype(jnp.uint8)
