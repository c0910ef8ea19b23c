"""Reading a cubin without a GPU: instructions of the decode loop, registers, spills."""

from __future__ import annotations

import re
import subprocess
import sysconfig
from collections import Counter
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class LoopStatistics:
    """The innermost loop that holds matrix products and table lookups.

    instructions: opcode -> count over the whole loop, rare branches (partial pages, a raised
    softmax level) included; local_memory: loads and stores of spilled registers in it.
    """

    instructions: Counter[str]
    local_memory: int

    @property
    def total(self) -> int:
        return self.instructions.total()


def disassembler(name: str) -> Path | None:
    """nvdisasm or cuobjdump of the NVIDIA wheels, if installed."""
    path = Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13" / "bin" / name
    return path if path.is_file() else None


def disassemble(cubin: Path) -> list[str]:
    """Lines of SASS."""
    tool = disassembler("nvdisasm")
    assert tool is not None
    result = subprocess.run([str(tool), "-c", str(cubin)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def registers_of(cubin: Path) -> int:
    tool = disassembler("cuobjdump")
    assert tool is not None
    result = subprocess.run([str(tool), "-res-usage", str(cubin)], capture_output=True, text=True)
    found = re.findall(r"REG:(\d+)", result.stdout + result.stderr)
    assert found, result.stderr
    return max(map(int, found))


def decode_loop(lines: list[str]) -> LoopStatistics:
    """The shortest backward branch over at least 24 HMMA and 20 eight-byte lookups."""
    labels: dict[str, int] = {}
    code: list[str] = []
    for line in lines:
        label = re.match(r"\s*(\.L_x_\d+):", line)
        if label:
            labels[label[1]] = len(code)
        instruction = re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line)
        if instruction:
            code.append(instruction[1])
    best: list[str] | None = None
    for index, text in enumerate(code):
        target = re.search(r"BRA.*`\((\.L_x_\d+)\)", text)
        if not target or labels.get(target[1], index) >= index:
            continue
        body = code[labels[target[1]] : index + 1]
        is_decode = sum("HMMA" in x for x in body) >= 24 and sum("LDS.64" in x for x in body) >= 20
        if is_decode and (best is None or len(body) < len(best)):
            best = body
    assert best is not None, "no decode loop found"
    names = Counter(re.sub(r"^@!?U?P\d+\s+", "", x).split()[0].split(".")[0] for x in best)
    return LoopStatistics(names, names["LDL"] + names["STL"])
