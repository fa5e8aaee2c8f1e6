"""What can be said of a compiled kernel by looking at its machine code."""

from __future__ import annotations

import functools
import re
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

_EXECUTABLE = 4  # SHF_EXECINSTR
_REGISTER = re.compile(r"%[xyz]mm(\d+)")
_STACK = re.compile(r"\(%rsp\b")
_FRAME = re.compile(r"\(%rbp\b")
_SECONDS = 20


def facts(code: bytes) -> dict[str, float]:
    """Of an ELF object: ``code_bytes``, and where objdump is there ``vector_registers`` used and ``spills``.

    A spill is an instruction that moves a vector register to or from the stack, counted where it stands, not how often it
    runs.
    """
    found = {"code_bytes": float(code_bytes(code))}
    listing = disassembly(code)
    return found if listing is None else {**found, **registers(listing)}


def code_bytes(code: bytes) -> int:
    """Bytes of the executable sections of a 64-bit ELF object."""
    (table,) = struct.unpack_from("<Q", code, 0x28)
    size, count = struct.unpack_from("<HH", code, 0x3A)
    total = 0
    for i in range(count):
        flags, _, _, length = struct.unpack_from("<QQQQ", code, table + i * size + 8)
        total += length if flags & _EXECUTABLE else 0
    return total


@functools.cache
def _objdump() -> str | None:
    return shutil.which("objdump") or shutil.which("llvm-objdump")


def disassembly(code: bytes) -> str | None:
    """The instructions of an object in AT&T syntax; None without a disassembler that understands it."""
    tool = _objdump()
    if tool is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "k.o"
        path.write_bytes(code)
        try:
            done = subprocess.run([tool, "-d", "--no-show-raw-insn", str(path)], capture_output=True, text=True,
                                  check=False, timeout=_SECONDS)  # fmt: skip
        except (OSError, subprocess.TimeoutExpired):
            return None
    return None if done.returncode else done.stdout


def registers(listing: str) -> dict[str, float]:
    """``vector_registers`` and ``spills`` of a disassembly."""
    used: set[str] = set()
    spills, framed = 0, False
    for line in listing.splitlines():
        if line.endswith(">:"):
            framed = False  # the next function
        elif "%rsp,%rbp" in line:
            framed = True  # from here on %rbp is where the stack was
        found = _REGISTER.findall(line)
        used.update(found)
        spills += bool(found and (_STACK.search(line) or (framed and _FRAME.search(line))))
    return {"vector_registers": float(len(used)), "spills": float(spills)}
