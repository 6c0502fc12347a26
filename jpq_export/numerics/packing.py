"""THE bit layout of packed codes. No other file states one; golden bytes in the tests pin every implementation to it.

A row of codes is one little-endian bit stream: code j occupies bits j*b .. j*b + b - 1, bit i of the stream is bit
i % 8 of byte i // 8, and each row is padded with zero bits to a whole byte. So 8 codes always fill exactly b bytes:

    b = 3   byte 0          byte 1          byte 2
            22111000        5 4 4 4 3 3 3 2 7 7 7 6 6 6 5 5      (most significant bit first, digits name the code)

At b = 2, 4 and 8 this is the order of ONNX's UINT2, UINT4 and UINT8 tensors and of MatMulNBits' blocks.

Ternary codes (0, 1, 2) come five to a byte. Their number in base 3, first code first and missing codes zero,
v = 81 c0 + 27 c1 + 9 c2 + 3 c3 + c4, is stored as the fraction v / 243 in units of 1/256, rounded up:

    q = ceil(256 v / 243)        c_d = ((q * 3^d mod 256) * 3) >> 8,     so that no division takes it apart
"""

from __future__ import annotations

import numpy as np

from jpq_export.numerics.scheme import TERNARY, levels, row_bytes

PLACES = np.array([81, 27, 9, 3, 1], np.uint16)  # of the five ternary codes of a byte


def pack_codes(codes: np.ndarray, bits: float) -> np.ndarray:
    """Pack codes: uint8 [N, K], each < 2**bits (ternary: < 3) -> uint8 [N, row_bytes(K, bits)]."""
    if codes.dtype != np.uint8 or codes.ndim != 2:
        raise ValueError(f"codes must be uint8 [N, K], got {codes.dtype} {codes.shape}")
    if codes.size and int(codes.max()) >= levels(bits):
        raise ValueError(f"code {int(codes.max())} does not fit {bits} bits")
    n, k = codes.shape
    if bits == 8:
        return codes.copy()
    if bits == TERNARY:
        return _pack_ternary(codes)
    width = int(bits)
    stream = np.unpackbits(codes[:, :, None], axis=2, bitorder="little")[:, :, :width]  # [N, K, b]
    packed = np.packbits(stream.reshape(n, k * width), axis=1, bitorder="little")
    return np.ascontiguousarray(packed)  # numpy keeps the order of a stream of single bits, which is by column


def unpack_codes(packed: np.ndarray, bits: float, count: int) -> np.ndarray:
    """Undo `pack_codes`: uint8 [N, row_bytes(count, bits)] -> uint8 [N, count]."""
    if packed.dtype != np.uint8 or packed.ndim != 2 or packed.shape[1] != row_bytes(count, bits):
        raise ValueError(
            f"packed must be uint8 [N, {row_bytes(count, bits)}] for {count} codes of {bits} bits, "
            f"got {packed.dtype} {packed.shape}"
        )
    if bits == 8:
        return packed.copy()
    if bits == TERNARY:
        return _unpack_ternary(packed, count)
    n, width = packed.shape[0], int(bits)
    padded = np.zeros((n, -(-count // 8) * width + 1), np.uint16)
    padded[:, : packed.shape[1]] = packed
    start = np.arange(count) * width
    low, shift = start >> 3, (start & 7).astype(np.uint16)
    word = padded[:, low] | (padded[:, low + 1] << np.uint16(8))  # a code spans at most two bytes
    return ((word >> shift) & np.uint16((1 << width) - 1)).astype(np.uint8)


def _pack_ternary(codes: np.ndarray) -> np.ndarray:
    n, k = codes.shape
    padded = np.zeros((n, row_bytes(k, TERNARY), 5), np.uint16)
    padded.reshape(n, -1)[:, :k] = codes
    return ((256 * (padded @ PLACES) + 242) // 243).astype(np.uint8)  # at most 256 * 242 + 242 < 2**16


def _unpack_ternary(packed: np.ndarray, count: int) -> np.ndarray:
    rest = packed[:, :, None] * PLACES[::-1].astype(np.uint8)  # q * 3^d modulo 256: [N, bytes, 5]
    codes = (rest.astype(np.uint16) * 3 >> 8).astype(np.uint8)
    return np.ascontiguousarray(codes.reshape(len(packed), -1)[:, :count])
