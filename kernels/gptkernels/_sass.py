"""Reads NVIDIA's machine code (SASS) with the tools in the triton wheel: instructions, loops, registers.

`disassemble` takes a kernel's cubin (``triton.compile(...).asm["cubin"]``); no GPU is needed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

_LABEL = re.compile(r"^(\.L_\w+):")
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_TARGET = re.compile(r"`\((\.L_\w+)\)")


@dataclass(frozen=True)
class Instruction:
    """One line of the disassembly, such as ``@!P0 BRA `(.L_x_1)``."""

    address: int  # bytes from the function's first instruction
    opcode: str  # with its modifiers: "HGMMA.64x64x16.F32.BF16"
    operands: str
    predicate: str = ""  # "@P0" or "@!P0" of a conditional instruction

    @property
    def kind(self) -> str:
        """The opcode without modifiers; MUFU, the special function unit's, keeps the function: "MUFU.EX2"."""
        name, _, modifiers = self.opcode.partition(".")
        return f"{name}.{modifiers.split('.')[0]}" if name == "MUFU" else name


def count_kinds(instructions: Iterable[Instruction]) -> Counter[str]:
    """The number of instructions of each kind: HGMMA, HMMA, FFMA, MUFU.EX2, LDG, LDS, STS, LDL, STL, UTMALDG, ..."""
    return Counter(instruction.kind for instruction in instructions)


@dataclass(frozen=True)
class Loop:
    """A loop. Its instructions include those of the loops nested in it."""

    start: int  # address of its first instruction
    end: int  # address of the last branch back to the start
    depth: int  # 0 for an outermost loop
    instructions: tuple[Instruction, ...]  # by address

    @property
    def counts(self) -> Counter[str]:
        return count_kinds(self.instructions)


@dataclass(frozen=True)
class Disassembly:
    """The machine code of a kernel."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]  # the address of each label

    @property
    def counts(self) -> Counter[str]:
        return count_kinds(self.instructions)

    @property
    def spills(self) -> int:
        """The number of loads from and stores to local memory."""
        counts = self.counts
        return counts["LDL"] + counts["STL"]

    @property
    def wgmma_serialised(self) -> bool:
        """Whether ptxas made each wgmma wait for the one before it (its message C7515).

        The products of a tile are a chain of HGMMA on one accumulator. Only the last of them signals a barrier (``gsb0``),
        for which the code waits. Serialised code has such a signal and a wait after each HGMMA.
        """
        alone = None  # the accumulator of the last HGMMA, if that was a chain of one
        within = False  # whether the last HGMMA continues in the next
        for instruction in self.instructions:
            if instruction.kind != "HGMMA":
                continue
            operands = [operand.strip() for operand in instruction.operands.split(",")]
            signals = "gsb0" in operands
            if signals and not within and alone is not None and operands[0] == alone and operands[0] in operands[1:]:
                return True
            alone = operands[0] if signals and not within else None
            within = not signals
        return False

    @cached_property
    def loops(self) -> tuple[Loop, ...]:
        """The loops by address, an outer loop before those nested in it."""
        blocks = self._blocks()
        successors = [list(self._successors(blocks, i)) for i in range(len(blocks))]
        reached = _reachable([0], successors)
        predecessors: list[list[int]] = [[] for _ in blocks]
        for block in reached:
            for successor in successors[block]:
                predecessors[successor].append(block)
        # For each header the blocks that lead to a branch back to it without passing through it.
        bodies: dict[int, set[int]] = {}
        for header in reached:
            for latch in (block for block in predecessors[header] if block >= header):
                body = _reachable([latch], predecessors, {header})
                if header == 0 or 0 not in body:  # otherwise it is no loop: the blocks are entered elsewhere
                    bodies.setdefault(header, set()).update(body)
        loops = []
        for header, body in bodies.items():
            within = tuple(instruction for block in sorted(body) for instruction in blocks[block])
            last = max(block for block in predecessors[header] if block in body)
            depth = sum(header in other for outer, other in bodies.items() if outer != header)
            loops.append(Loop(blocks[header][0].address, blocks[last][-1].address, depth, within))
        return tuple(sorted(loops, key=lambda loop: (loop.start, loop.depth)))

    def _blocks(self) -> list[tuple[Instruction, ...]]:
        """The basic blocks: runs of instructions that are entered at the first and left at the last."""
        starts = set(self.labels.values())
        blocks: list[list[Instruction]] = []
        for instruction in self.instructions:
            if not blocks or instruction.address in starts or _leaves(blocks[-1][-1]):
                blocks.append([])
            blocks[-1].append(instruction)
        return [tuple(block) for block in blocks]

    def _successors(self, blocks: list[tuple[Instruction, ...]], index: int) -> Iterator[int]:
        last = blocks[index][-1]
        target = _TARGET.search(last.operands)
        if last.kind == "BRA" and target:
            yield bisect_left(blocks, self.labels[target.group(1)], key=lambda block: block[0].address)
        # A branch may also depend on a predicate among its operands: "BRA.DIV ~URZ, `(.L_x_1)".
        conditional = last.predicate or (last.kind == "BRA" and target and not last.operands.startswith("`"))
        if (conditional or not _leaves(last)) and index + 1 < len(blocks):
            yield index + 1


def _leaves(instruction: Instruction) -> bool:
    return instruction.kind in ("BRA", "EXIT", "RET")


def _reachable(start: Iterable[int], edges: list[list[int]], without: Iterable[int] = ()) -> set[int]:
    """The nodes that `edges` lead to from `start` without passing through `without`; `start` and `without` included."""
    found = {*without}
    waiting = [node for node in start if node not in found]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += edges[node]
    return found


def parse(text: str) -> Disassembly:
    """Parses the output of ``nvdisasm -c`` for a cubin with one kernel."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []  # labels of the next instruction
    for line in text.splitlines():
        if label := _LABEL.match(line):
            waiting.append(label.group(1))
        elif found := _INSTRUCTION.match(line):
            address, predicate, opcode, operands = found.groups()
            instructions.append(Instruction(int(address, 16), opcode, operands, predicate or ""))
            labels |= dict.fromkeys(waiting, instructions[-1].address)
            waiting.clear()
    return Disassembly(tuple(instructions), labels)


def _run_tool(tool: str, *options: str, cubin: bytes) -> str:
    import triton.backends.nvidia as nvidia

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [Path(nvidia.__path__[0]) / "bin" / tool, *options, file]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resources(cubin: bytes) -> tuple[int, int]:
    """``(registers a thread, bytes of stack a thread)``. A kernel without a stack spills nothing."""
    usage = re.search(r"REG:(\d+) STACK:(\d+)", _run_tool("cuobjdump", "-res-usage", cubin=cubin))
    assert usage is not None
    registers, stack = map(int, usage.groups())
    return registers, stack


def disassemble(cubin: bytes) -> Disassembly:
    """The machine code of a cubin. Takes about as long as compiling it."""
    return parse(_run_tool("nvdisasm", "-c", cubin=cubin))
