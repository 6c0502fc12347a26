"""THE bit layout of packed codes. No other file states one; golden bytes in the tests pin every implementation to it.

A row of codes is one little-endian bit stream: code j occupies bits j*b .. j*b + b - 1, bit i of the stream is bit
i % 8 of byte i // 8, and each row is padded with zero bits to a whole byte. So 8 codes always fill exactly b bytes:

    b = 3   byte 0          byte 1          byte 2
            22111000        5 4 4 4 3 3 3 2 7 7 7 6 6 6 5 5      (most significant bit first, digits name the code)

At b = 2, 4 and 8 this is the order of ONNX's UINT2, UINT4 and UINT8 tensors and of MatMulNBits' blocks.
"""

from __future__ import annotations

import numpy as np

from jpq_export.numerics.scheme import row_bytes


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack codes: uint8 [N, K], each < 2**bits -> uint8 [N, ceil(K*bits/8)]."""
    if codes.dtype != np.uint8 or codes.ndim != 2:
        raise ValueError(f"codes must be uint8 [N, K], got {codes.dtype} {codes.shape}")
    if codes.size and int(codes.max()) >> bits:
        raise ValueError(f"code {int(codes.max())} does not fit {bits} bits")
    n, k = codes.shape
    if bits == 8:
        return codes.copy()
    stream = np.unpackbits(codes[:, :, None], axis=2, bitorder="little")[:, :, :bits]  # [N, K, b]
    return np.packbits(stream.reshape(n, k * bits), axis=1, bitorder="little")


def unpack_codes(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Undo `pack_codes`: uint8 [N, ceil(count*bits/8)] -> uint8 [N, count]."""
    if packed.dtype != np.uint8 or packed.ndim != 2 or packed.shape[1] != row_bytes(count, bits):
        raise ValueError(
            f"packed must be uint8 [N, {row_bytes(count, bits)}] for {count} codes of {bits} bits, "
            f"got {packed.dtype} {packed.shape}"
        )
    if bits == 8:
        return packed.copy()
    n = packed.shape[0]
    padded = np.zeros((n, -(-count // 8) * bits + 1), np.uint16)
    padded[:, : packed.shape[1]] = packed
    start = np.arange(count) * bits
    low, shift = start >> 3, (start & 7).astype(np.uint16)
    word = padded[:, low] | (padded[:, low + 1] << np.uint16(8))  # a code spans at most two bytes
    return ((word >> shift) & np.uint16((1 << bits) - 1)).astype(np.uint8)
