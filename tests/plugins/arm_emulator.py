"""Runs a static aarch64 Linux program, as qemu-aarch64 does: `python arm_emulator.py PROGRAM` (package unicorn).

Enough of Linux for a program that reads stdin, computes and writes stdout: memory, reading, writing, exit.
"""

from __future__ import annotations

import os
import select
import struct
import sys
from pathlib import Path

from unicorn import UC_ARCH_ARM64, UC_HOOK_INTR, UC_MODE_ARM, Uc, UcError
from unicorn import arm64_const as reg

PAGE, BASE, HEAP, STACK = 4096, 0x400000, 0x10_0000_0000, 0x7F_0000_0000
STACK_BYTES = 8 << 20
LOAD, DYNAMIC, ENTRY_SIZE = 1, 3, 56  # a program header's type, a file's type, bytes of a program header
FP_ENABLED = 3 << 20
SVC = 2
NOT_A_TERMINAL, NO_SEEK, UNKNOWN = -25, -29, -38


def pages(size: int) -> int:
    """Rounded up to whole pages."""
    return -(-size // PAGE) * PAGE


class Machine:
    """A processor, its memory and the system calls of a program."""

    def __init__(self, program: bytes) -> None:
        self.cpu = Uc(UC_ARCH_ARM64, UC_MODE_ARM)
        self.cpu.reg_write(reg.UC_ARM64_REG_CPACR_EL1, FP_ENABLED)
        self.status, self.free, self.brk = None, HEAP, 0
        self.calls = {
            63: self.read,
            64: self.write,
            65: self.readv,
            66: self.writev,
            93: self.exit,
            94: self.exit,
            214: self.move_brk,
            215: self.munmap,
            222: self.mmap,
        }
        self.calls |= dict.fromkeys((98, 99, 226, 233), lambda *_: 0)  # futex, robust list, mprotect, madvise
        self.calls |= {29: lambda *_: NOT_A_TERMINAL, 62: lambda *_: NO_SEEK, 96: lambda *_: 1}
        self.cpu.hook_add(UC_HOOK_INTR, self.interrupt)
        self.entry = self.load(program)

    def load(self, program: bytes) -> int:
        """Map the segments and the stack; where to begin."""
        kind, entry, table = *struct.unpack_from("<H", program, 16), *struct.unpack_from("<QQ", program, 24)
        count = struct.unpack_from("<H", program, 56)[0]
        base = BASE if kind == DYNAMIC else 0
        segments = [struct.unpack_from("<IIQQQQQQ", program, table + ENTRY_SIZE * i) for i in range(count)]
        loaded = [s for s in segments if s[0] == LOAD]
        first = min(s[3] for s in loaded) // PAGE * PAGE
        end = pages(max(s[3] + s[6] for s in loaded))
        self.cpu.mem_map(base + first, end - first)
        for _, _, offset, address, _, size, _, _ in loaded:
            self.cpu.mem_write(base + address, program[offset : offset + size])
        self.brk = base + end
        self.cpu.mem_map(STACK - STACK_BYTES, STACK_BYTES)
        name, noise = STACK - 64, STACK - 48
        self.cpu.mem_write(name, b"program\0")
        auxiliary = {3: base + first + table, 4: ENTRY_SIZE, 5: count, 6: PAGE, 7: 0, 9: base + entry, 16: 3, 25: noise}
        words = [1, name, 0, 0, *(word for pair in auxiliary.items() for word in pair), 0, 0]
        top = (STACK - 64 - 8 * len(words)) // 16 * 16
        self.cpu.mem_write(top, struct.pack(f"<{len(words)}Q", *words))
        self.cpu.reg_write(reg.UC_ARM64_REG_SP, top)
        return base + entry

    def run(self) -> int:
        """The program's exit status; UcError where it does what no processor may."""
        self.cpu.emu_start(self.entry, 0)
        return self.status or 0

    def interrupt(self, _cpu: Uc, number: int, _data: object) -> None:
        """A system call."""
        if number != SVC:
            raise SystemExit(f"arm_emulator: exception {number} at {self.cpu.reg_read(reg.UC_ARM64_REG_PC):#x}")
        arguments = [self.cpu.reg_read(reg.UC_ARM64_REG_X0 + i) for i in range(6)]
        call = self.calls.get(self.cpu.reg_read(reg.UC_ARM64_REG_X8), lambda *_: UNKNOWN)
        self.cpu.reg_write(reg.UC_ARM64_REG_X0, call(*arguments) & (1 << 64) - 1)

    def read(self, _file: int, address: int, size: int, *_: int) -> int:
        """From stdin, as much as there is now."""
        data = os.read(sys.stdin.fileno(), size)
        self.cpu.mem_write(address, data)
        return len(data)

    def readv(self, file: int, vectors: int, count: int, *_: int) -> int:
        """The same, into several pieces; once something has come, nothing is waited for."""
        pieces, total = struct.unpack(f"<{2 * count}Q", self.cpu.mem_read(vectors, 16 * count)), 0
        for address, size in zip(pieces[::2], pieces[1::2], strict=True):
            if not size:
                continue
            if total and not select.select([sys.stdin], [], [], 0)[0]:
                break
            got = self.read(file, address, size)
            total += got
            if got < size:
                break
        return total

    def write(self, file: int, address: int, size: int, *_: int) -> int:
        """To stdout or stderr."""
        to = sys.stdout.buffer if file == 1 else sys.stderr.buffer
        to.write(bytes(self.cpu.mem_read(address, size)))
        to.flush()
        return size

    def writev(self, file: int, vectors: int, count: int, *_: int) -> int:
        """The same, of several pieces."""
        pieces = struct.unpack(f"<{2 * count}Q", self.cpu.mem_read(vectors, 16 * count))
        return sum(self.write(file, *pieces[i : i + 2]) for i in range(0, 2 * count, 2) if pieces[i + 1])

    def exit(self, status: int, *_: int) -> int:
        """The end."""
        self.status = status & 255
        self.cpu.emu_stop()
        return 0

    def move_brk(self, wanted: int, *_: int) -> int:
        """The end of data."""
        if wanted > self.brk:
            self.cpu.mem_map(self.brk, pages(wanted - self.brk))
            self.brk += pages(wanted - self.brk)
        return self.brk

    def mmap(self, _address: int, size: int, *_: int) -> int:
        """New memory; a page is left out behind it, so that what reads on stops."""
        at = self.free
        self.cpu.mem_map(at, pages(size))
        self.free += pages(size) + PAGE
        return at

    def munmap(self, address: int, size: int, *_: int) -> int:
        """Give it back."""
        self.cpu.mem_unmap(address, pages(size))
        return 0


if __name__ == "__main__":
    machine = Machine(Path(sys.argv[1]).read_bytes())
    try:
        code = machine.run()
    except UcError as error:
        place = machine.cpu.reg_read(reg.UC_ARM64_REG_PC)
        raise SystemExit(f"arm_emulator: {error} at {place:#x}") from error
    raise SystemExit(code)
