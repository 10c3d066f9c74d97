"""What a cubin's machine code says of a kernel: its main loop, the mix of instructions there, and the bytes they move.

Everything is counted as if each instruction of a loop ran once a pass, and for a warp unless it says otherwise. Bank
conflicts are not in SASS: addresses are made at run time, so each access to shared memory counts as free of them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

# The first kind whose pattern matches an opcode's first part is an instruction's. What is left is "other".
KINDS: dict[str, re.Pattern[str]] = {
    kind: re.compile(pattern)
    for kind, pattern in {
        "matrix": r"HG?MMA",
        "shared load": r"LDS|LDSM",
        "shared store": r"STS|STSM",
        "async copy": r"LDGSTS",
        "global load": r"LDG?|LD",
        "global store": r"STG?|RED|REDG|ATOM|ATOMG",
        "TMA load": r"UTMALDG|UTMAPF|UBLKCP|UBLKPF",
        "TMA store": r"UTMASTG|UTMAREDG|UTMACMDFLUSH",
        "barrier": r"BAR|DEPBAR|LDGDEPBAR|LDGMBAR|SYNCS|WARPSYNC|WARPGROUP|FENCE|MEMBAR|ERRBAR|ARRIVES|CCTL|NANOSLEEP",
        "branch": r"BRA|BRX|JMP|CALL|RET|EXIT|BSSY|BSYNC|BREAK|BMOV|KILL|BPT|YIELD",
        "convert": r"F2FP?|F2I|I2F|I2FP|FRND|HADD2|HMUL2|HFMA2",
        "float": r"FADD|FMUL|FFMA|FMNMX|FSEL|FSETP?|FCHK|MUFU",
        "integer": r"U?I\w+|V?IADD\w*|VI\w+|VOTEU?|U?LEA|U?LOP3?|U?PLOP3|U?SHF|U?SHL|U?SHR|U?SEL|U?MOV|U?PRMT|U?SGXT|"
        r"U?BMSK|U?FLO|U?POPC|U?BREV|CS2R|S2U?R|R2UR|R2P|P2R|U?LDC|ULDC|ELECT|UP2UR|UR2UP|SHFL|REDUX|MATCH",
    }.items()
}
OTHER = "other"
WARP = 32


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str
    branch_to: int | None = None
    operands: str = ""

    @property
    def kind(self) -> str:
        root = self.opcode.split(".")[0]
        return next((kind for kind, pattern in KINDS.items() if pattern.fullmatch(root)), OTHER)


Loop = list[Instruction]


def read(text: str) -> list[Instruction]:
    """The instructions of `cuobjdump -sass`'s text, predicates left out."""
    pattern = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
    instructions = []
    for address, opcode, operands in pattern.findall(text):
        to = re.search(r"0x([0-9a-f]+)", operands) if opcode.startswith("BRA") else None
        branch_to = int(to[1], 16) if to else None
        instructions.append(Instruction(int(address, 16), opcode, branch_to, operands.strip()))
    return instructions


def loops(sass: Sequence[Instruction]) -> list[Loop]:
    """Loop bodies: what lies between a backward branch and its target. The trap at the end branches to itself."""
    return [
        [inner for inner in sass if branch.branch_to <= inner.address <= branch.address]
        for branch in sass
        if branch.branch_to is not None and branch.branch_to < branch.address
    ]


def innermost(bodies: Sequence[Loop], kind: str) -> list[Loop]:
    """The loops that run instructions of a kind, without those around them.

    A wait that was moved out of line jumps back into its loop, which looks like a longer loop that begins within; so of
    the loops that hold an instruction the shortest is its own, and one that wholly encloses another such is none."""
    holders = {
        (own[0].address, own[-1].address): own
        for address in sorted({i.address for body in bodies for i in body if i.kind == kind})
        for own in [min((b for b in bodies if b[0].address <= address <= b[-1].address), key=len)]
    }
    return [
        body
        for (first, last), body in holders.items()
        if not any((first, last) != (a, b) and first <= a and b <= last for a, b in holders)
    ]


def main_loop(bodies: Sequence[Loop]) -> Loop:
    """The one that multiplies most a pass; the shorter of equals, then the first. Empty if none multiplies."""
    return max(innermost(bodies, "matrix"), key=lambda body: (sum(map(is_mma, body)), -len(body)), default=[])


def is_mma(instruction: Instruction) -> bool:
    return instruction.kind == "matrix"


def mix(body: Sequence[Instruction]) -> dict[str, int]:
    """How many instructions of each kind, the most frequent first."""
    return dict(Counter(i.kind for i in body).most_common())


def products(instruction: Instruction) -> int:
    """Multiplications that a matrix instruction does for a warp; HGMMA is of four warps together."""
    if wide := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", instruction.opcode):
        return int(wide[1]) * int(wide[2]) * int(wide[3]) // 4
    if shape := re.match(r"HMMA\.(\d\d)(8)(\d+)", instruction.opcode):  # .16816 is m16n8k16
        return int(shape[1]) * int(shape[2]) * int(shape[3])
    return 0


def width(instruction: Instruction) -> int:
    """Bytes that a thread loads or stores at a time."""
    widths = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
    return next((widths[part] for part in instruction.opcode.split(".")[1:] if part in widths), 4)


def store_bytes(instruction: Instruction) -> int:
    """Bytes that a thread stores to global memory."""
    return width(instruction) if instruction.opcode.split(".")[0] == "STG" else 0


def shared_bytes(instruction: Instruction) -> int:
    """Bytes that an instruction moves to or from shared memory, for a warp.

    A matrix that ldmatrix reads (.M88) is 8 rows of 16 bytes. HGMMA reads weight's N x 16 for its four warps together,
    and x's 64 x 16 too unless registers hold it.
    """
    root = instruction.opcode.split(".")[0]
    if root in ("LDSM", "STSM"):
        count = instruction.opcode.split(".")[-1]
        return 128 * (int(count) if count in ("2", "4") else 1)
    if root in ("LDS", "STS", "LDGSTS"):
        return WARP * width(instruction)
    if wide := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", instruction.opcode):
        rows, columns, depth = map(int, wide.groups())
        operands = [operand.strip() for operand in instruction.operands.split(",")]
        x_shared = len(operands) > 1 and operands[1].startswith("gdesc")
        return 2 * depth * (columns + rows * x_shared) // 4
    return 0
