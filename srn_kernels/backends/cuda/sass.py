"""What the assembler made of the kernels' inner loops: instructions for each unit of a weight.

A unit is what a thread takes at a time: four neighbouring elements, of float64 two. So it is 16
bytes of W in float32 and float64, 8 bytes in the 16-bit types. Loops are found in the machine code
itself: a branch backwards closes one, and an inner one holds no other.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# Of a unit at most; "slab" is the two loops of a slab together.
LIMITS = {"slab": 28.0, "rescale": 28.0, "gather": 40.0, "gradient": 40.0}
# Where that is missed in a slab: elements of 16 bits are converted in both loops, and a row's own
# instructions weigh more on one unit a thread.
MISSED = {"float64": 1.5, "bfloat16": 7.5, "float16": 7.5}
GLOBAL_LOADS = 1.0
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)([^;]*);")


class Instruction(NamedTuple):
    address: int
    name: str  # with its modifiers
    operands: str

    @property
    def opcode(self) -> str:
        return self.name.split(".")[0]


class Loop(NamedTuple):
    """One inner loop, or in forward the two of a slab."""

    kernel: str  # mangled
    phase: str  # one of LIMITS
    types: str  # of what is loaded from shared memory
    units: int  # of an iteration
    instructions: int
    global_loads: int

    @property
    def each(self) -> float:
        return self.instructions / self.units

    @property
    def limit(self) -> float:
        return LIMITS[self.phase] + (MISSED.get(self.types, 0.0) if self.phase == "slab" else 0.0)

    @property
    def faults(self) -> list[str]:
        limit = self.limit
        faults = [f"more than {limit:g} instructions"] if self.each > limit else []
        if self.global_loads / self.units > GLOBAL_LOADS:
            faults.append("global loads")
        return faults


def find_disassembler() -> str | None:
    """cuobjdump of the toolkit, or the one that comes with Triton."""
    if found := shutil.which("cuobjdump") or shutil.which("cuobjdump", path="/usr/local/cuda/bin"):
        return found
    try:
        import triton
    except ImportError:
        return None
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(bundled) if bundled.exists() else None


def disassemble(tool: str, cubin: Path) -> str:
    return subprocess.run(
        [tool, "-sass", str(cubin)], capture_output=True, text=True, check=True
    ).stdout


def functions(sass: str) -> Iterator[tuple[str, list[Instruction]]]:
    for block in re.split(r"^\s*Function : ", sass, flags=re.MULTILINE)[1:]:
        name, *lines = block.splitlines()
        found = (_INSTRUCTION.match(line) for line in lines)
        yield (
            name.strip(),
            [Instruction(int(m[1], 16), m[2], m[3].strip()) for m in found if m],
        )


def inner_loops(code: list[Instruction]) -> list[list[Instruction]]:
    """The bodies of loops that hold no other, by address; the branch at their end included."""
    spans = []
    for i in code:
        target = re.search(r"0x([0-9a-f]+)", i.operands) if i.opcode == "BRA" else None
        if target and int(target[1], 16) < i.address:
            spans.append((int(target[1], 16), i.address))
    inner = [
        (begin, end)
        for begin, end in spans
        if not any((b, e) != (begin, end) and begin <= b and e <= end for b, e in spans)
    ]
    return [[i for i in code if begin <= i.address <= end] for begin, end in sorted(set(inner))]


def _types(body: list[Instruction]) -> str:
    names = Counter(i.name for i in body if i.opcode == "LDS")
    wide = sum(n for name, n in names.items() if ".128" in name)
    narrow = sum(n for name, n in names.items() if ".64" in name)
    if any(i.opcode == "DFMA" for i in body):
        return "float64"
    half = "float16" if any(i.opcode == "HADD2" for i in body) else "bfloat16"
    return "+".join(["float32"] * bool(wide) + [half] * bool(narrow))


def _wide(body: list[Instruction], opcode: str) -> int:
    """Loads of whole units."""
    widths = (".128",) if _has(body, "DFMA", "DMUL", "DADD") else (".128", ".64")
    return sum(i.opcode == opcode and any(w in i.name for w in widths) for i in body)


def _has(body: list[Instruction], *opcodes: str) -> bool:
    return any(i.opcode in opcodes for i in body)


def _follows(first: list[Instruction], second: list[Instruction]) -> bool:
    """Whether both loops read the same units; the second multiplies each element once."""
    multiplied = sum(i.opcode in ("FFMA", "DFMA") for i in second)
    return multiplied == _wide(first, "LDS") * (2 if _types(first) == "float64" else 4)


def loops(sass: str) -> list[Loop]:
    """The inner loops over vectors of W, G or both of every kernel."""
    found = []
    for kernel, code in functions(sass):
        waiting: list[Instruction] | None = None  # the first loop of a slab
        for body in inner_loops(code):
            if _has(body, "SHFL") and _has(body, "STG"):
                continue  # around the loops of a slab
            if not _wide(body, "LDS") or not _has(body, "FFMA", "DFMA", "FFMA2"):
                continue
            count, ahead, first = sum(i.opcode != "NOP" for i in body), 0, []
            if "backward" in kernel:
                phase = "gradient" if _has(body, "STG", "ST") else "gather"
                units = _wide(body, "LDS") // 2
            elif _has(body, "STG", "ST"):
                phase, units = "rescale", _wide(body, "LDS")
            elif _has(body, "SHFL"):
                waiting = body
                continue
            elif waiting is not None and _follows(waiting, body):
                phase, units = "slab", _wide(waiting, "LDS")
                ahead = sum(i.opcode != "NOP" for i in waiting)
                first, waiting = waiting, None
            else:
                continue
            loads = sum(i.opcode in ("LDG", "LD") for i in body + first)
            found.append(Loop(kernel, phase, _types(first or body), units, count + ahead, loads))
    return found
