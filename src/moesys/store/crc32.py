"""CRC-32 of bytes whose parts were hashed apart, in any order: zlib's ``crc32_combine``, which Python does not have.

A CRC is linear over GF(2): appending 2^k zero bytes multiplies it by a matrix that depends on k alone, so
crc(a + b) = shift(crc(a), len(b)) ^ crc(b). Matrices are tuples of 32 columns, column i what bit i becomes.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

_POLYNOMIAL = 0xEDB88320
"""Of CRC-32 as in zlib, bits reversed."""

_Matrix = tuple[int, ...]


def combine_crc32(parts: Iterable[tuple[int, int]]) -> int:
    """Returns the CRC-32 of parts that follow each other, given (CRC-32, bytes) of each; 0 of none."""
    total = 0
    for checksum, num_bytes in parts:
        total = _shift(total, num_bytes) ^ checksum
    return total


def _shift(checksum: int, num_bytes: int) -> int:
    """Appends zero bytes, by the powers of two that their number is made of."""
    exponent = 0
    while checksum and num_bytes:
        if num_bytes & 1:
            checksum = _apply(_make_shift(exponent), checksum)
        num_bytes >>= 1
        exponent += 1
    return checksum


@cache
def _make_shift(exponent: int) -> _Matrix:
    """Returns the matrix that appends 2^exponent zero bytes; a negative exponent stands for bits: 2^-3 bytes is one."""
    if exponent == -3:
        return (_POLYNOMIAL, *(1 << i for i in range(31)))
    half = _make_shift(exponent - 1)
    return tuple(_apply(half, column) for column in half)


def _apply(matrix: _Matrix, vector: int) -> int:
    result = 0
    for column in matrix:
        if vector & 1:
            result ^= column
        vector >>= 1
    return result
