"""A packed weight as torch tensors on a device, and how the kernels read its rows."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import torch

from jpq_export.numerics.affine import QuantizedWeight
from jpq_export.numerics.levels import NORMAL_WIDTHS
from jpq_export.numerics.scheme import KERNEL_NORMAL, KERNEL_TERNARY, from_kernel_bits, kernel_bits, row_bytes

NORMAL = tuple(kernel_bits(bits, normal=True) for bits in NORMAL_WIDTHS)
WIDTHS = (
    *range(1, 9),
    KERNEL_TERNARY,
    *NORMAL,
)  # what kernels unpack; what a plan may choose is the scheme's business


@dataclass(frozen=True, slots=True)
class Unit:
    """The smallest run of whole elements that holds whole codes: how many bits, elements and codes."""

    element_bits: int
    elements: int
    codes: int


def unit_of(bits: int, element_bits: int) -> Unit:
    """Unit of codes of `bits` bits (not ternary) read in elements of `element_bits`."""
    shared = gcd(bits, element_bits)
    return Unit(element_bits, bits // shared, element_bits // shared)


@dataclass(frozen=True, slots=True)
class Layout:
    """What a kernel must know of a weight when it is compiled."""

    bits: int
    group_size: int
    symmetric: bool
    unit: Unit

    def constants(self) -> dict[str, int | bool]:
        """The kernels' constants."""
        unit = {"ELEMENT_BITS": self.unit.element_bits, "UNIT_ELEMENTS": self.unit.elements}
        scheme = {"BITS": self.bits, "GROUP_SIZE": self.group_size, "SYMMETRIC": self.symmetric}
        return scheme | unit | {"UNIT_CODES": self.unit.codes}


def layout_of(bits: int, group_size: int, *, symmetric: bool, word_aligned: bool = True) -> Layout:
    """Words where a group is made of whole words and rows start at one; else bytes (slower, the same numbers).

    ValueError where a group would not be made of whole bytes either. Ternary codes are read a byte at a time.
    """
    if bits == KERNEL_TERNARY:
        return Layout(bits, group_size, symmetric, Unit(element_bits=8, elements=4, codes=gcd(group_size, 16)))
    width = int(from_kernel_bits(bits))
    words, octets = unit_of(width, 32), unit_of(width, 8)
    if group_size % octets.codes:
        raise ValueError(
            f"group_size {group_size} is not made of whole bytes at {width} bits; "
            f"use a multiple of {octets.codes}, or the CPU kernels"
        )
    use_words = word_aligned and group_size % words.codes == 0
    return Layout(bits, group_size, symmetric, words if use_words else octets)


@dataclass(frozen=True, slots=True, eq=False)
class DeviceWeight:
    """A weight [N, K] as stored (`QuantizedWeight`), in torch tensors of one device.

    `bits` as the operators state it: 16 means ternary, 36 normal levels of 4 bits. packed: uint8 [N, row_bytes(K, b)]
    of codes of b bits; scales: float16 [N, K/g];
    zeros: None when symmetric, else packed integer zero points uint8 [N, row_bytes(K/g, bits)].
    """

    bits: int
    group_size: int
    shape: tuple[int, int]
    packed: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None

    def __post_init__(self) -> None:
        """Check: tensors that do not fit the scheme, or a group no unit divides, are a ValueError."""
        n, k = self.shape
        if self.bits not in WIDTHS:
            raise ValueError(f"bits {self.bits} is not one of {WIDTHS}")
        if self.group_size < 1 or k % self.group_size:
            raise ValueError(f"in_features {k} is not a multiple of group_size {self.group_size}")
        if min(self.shape) < 1:
            raise ValueError(f"shape {self.shape} has no weights")
        if self.bits > KERNEL_NORMAL and self.zeros is not None:
            raise ValueError("zeros: normal levels are symmetric, got zero points")
        width = from_kernel_bits(self.bits)
        expect("packed", self.packed, torch.uint8, (n, row_bytes(k, width)), self.packed.device)
        expect("scales", self.scales, torch.float16, (n, self.groups), self.packed.device)
        if self.zeros is not None:
            expect("zeros", self.zeros, torch.uint8, (n, row_bytes(self.groups, width)), self.packed.device)
        _ = self.layout  # refuses what the kernels cannot read

    @classmethod
    def of(cls, weight: QuantizedWeight, device: torch.device | str) -> DeviceWeight:
        """Copy a stored weight to `device`."""
        tensors = (weight.packed, weight.scales, weight.zeros)
        packed, scales, zeros = (None if a is None else torch.from_numpy(a.copy()).to(device) for a in tensors)
        assert packed is not None
        assert scales is not None
        bits = kernel_bits(weight.scheme.bits, normal=weight.scheme.normal)
        return cls(bits, weight.scheme.group_size, weight.shape, packed, scales, zeros)

    @property
    def groups(self) -> int:
        """Groups in a row."""
        return self.shape[1] // self.group_size

    @property
    def layout(self) -> Layout:
        """How the kernels read the rows."""
        aligned = self.packed.data_ptr() % 4 == 0
        return layout_of(self.bits, self.group_size, symmetric=self.zeros is None, word_aligned=aligned)

    def elements(self) -> torch.Tensor:
        """`packed` as what the kernels load: int32 or uint8, [N, row elements]."""
        return self.packed.view(torch.int32) if self.layout.unit.element_bits == 32 else self.packed

    def zero_row_bytes(self) -> int:
        """Bytes of a row of `zeros`; 0 when symmetric."""
        return 0 if self.zeros is None else self.zeros.shape[1]


def divide_up(count: int, size: int) -> int:
    """How many parts of `size` hold `count`."""
    return -(-count // size)


def expect(
    name: str,
    tensor: torch.Tensor,
    dtype: torch.dtype | tuple[torch.dtype, ...],
    shape: tuple[int, ...],
    device: torch.device,
) -> None:
    """ValueError unless `tensor` is a contiguous one of this type, shape and device."""
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    if tensor.dtype not in dtypes or tuple(tensor.shape) != shape or tensor.device != device:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        got = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)} on {tensor.device}"
        raise ValueError(f"{name}: expected {wanted} {shape} on {device}, got {got}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: strides {tensor.stride()} are not those of a contiguous tensor; call .contiguous()")
