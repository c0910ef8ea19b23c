"""Reading a cubin without a GPU: instructions of the decode loop, registers, spills."""

from __future__ import annotations

import re
import subprocess
import sysconfig
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sphkv_kernels.build import compile_cubin
from sphkv_kernels.variant import Variant, kernel_source


@dataclass(frozen=True)
class Instruction:
    """scoreboard: the one that says when its result is there, or None; waits_for: a bit for each.

    Where the control bits of Volta and later lie: Jia et al. (arXiv 1804.06826), and they have not
    moved since.
    """

    text: str
    scoreboard: int | None
    waits_for: int

    @staticmethod
    def of(text: str, low: int, high: int) -> Instruction:
        """From the disassembly and the two words of the encoding."""
        word = high << 64 | low
        scoreboard = word >> 110 & 7
        return Instruction(text, None if scoreboard == 7 else scoreboard, word >> 116 & 63)


@dataclass(frozen=True)
class LoopStatistics:
    """An innermost loop over pages.

    instructions: opcode -> count over the whole loop, rare branches (partial pages, a raised
    softmax level) included; local_memory: loads and stores of spilled registers in it;
    load_distance: the fewest instructions between a load from global memory and the first that
    waits for the load's scoreboard, be it for that load or for another that was given the same;
    loads_first: every load comes before the first matrix product.
    """

    instructions: Counter[str]
    local_memory: int
    load_distance: int
    loads_first: bool

    @property
    def total(self) -> int:
        return self.instructions.total()


def disassembler(name: str) -> Path | None:
    """nvdisasm or cuobjdump of the NVIDIA wheels, if installed."""
    path = Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13" / "bin" / name
    return path if path.is_file() else None


def built(variant: Variant, capability: int, folder: Path) -> Path:
    """The cubin of a variant, in `folder`."""
    cubin = folder / "kernel.cubin"
    source = kernel_source(variant, capability)
    cubin.write_bytes(compile_cubin(source.text, capability, folder=folder))
    return cubin


def disassemble(cubin: Path) -> list[str]:
    """Lines of SASS, each followed by the rest of its encoding."""
    tool = disassembler("nvdisasm")
    assert tool is not None
    command = [str(tool), "-c", "-hex", str(cubin)]
    result = subprocess.run(command, capture_output=True, text=True)
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
    """The shortest of `decode_loops`."""
    return min(decode_loops(lines), key=lambda loop: loop.total)


def decode_loops(lines: list[str]) -> list[LoopStatistics]:
    """One for every code that the kernel decodes: the innermost loops over at least 24 HMMA and 20
    eight-byte lookups, in which the warps of a block do not wait for each other."""
    return _inner_loops(lines, lambda lookups, products: products >= 24 and lookups >= 20)


def row_loops(lines: list[str]) -> list[LoopStatistics]:
    """One for every tier of rows (int8, dense) and one for the tail, shortest first: likewise,
    without lookups."""
    return _inner_loops(lines, lambda lookups, products: products >= 16 and lookups == 0)


def _inner_loops(lines: list[str], wanted: Callable[[int, int], bool]) -> list[LoopStatistics]:
    code, labels = _parse(lines)
    spans: list[tuple[int, int]] = []
    for end, instruction in enumerate(code):
        target = re.search(r"BRA.*`\((\.L_x_\d+)\)", instruction.text)
        start = labels.get(target[1], end) if target else end
        texts = [x.text for x in code[start : end + 1]]
        counts = (sum(name in x for x in texts) for name in ("LDS.64", "HMMA"))
        if start < end and wanted(*counts) and not any("BAR.SYNC" in x for x in texts):
            spans.append((start, end + 1))
    inner: list[tuple[int, int]] = []  # an outer loop overlaps one of them
    for start, end in sorted(spans, key=lambda span: span[1] - span[0]):
        if all(end <= a or b <= start for a, b in inner):
            inner.append((start, end))
    assert inner, "no such loop found"
    return [_statistics(code[start:end]) for start, end in inner]


def _statistics(loop: list[Instruction]) -> LoopStatistics:
    names = Counter(re.sub(r"^@!?U?P\d+\s+", "", x.text).split()[0].split(".")[0] for x in loop)
    loads = [index for index, x in enumerate(loop) if "LDG" in x.text]
    products = [index for index, x in enumerate(loop) if "HMMA" in x.text]
    loads_first = max(loads, default=0) < min(products)
    return LoopStatistics(names, names["LDL"] + names["STL"], _load_distance(loop), loads_first)


def _parse(lines: list[str]) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions, and which one a label stands before."""
    labels: dict[str, int] = {}
    code: list[Instruction] = []
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        label = re.match(r"\s*(\.L_x_\d+):", line)
        if label:
            labels[label[1]] = len(code)
        found = re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);\s*/\* 0x([0-9a-f]{16}) \*/", line)
        if found:
            high = re.search(r"/\* 0x([0-9a-f]{16}) \*/", after)
            assert high is not None, after
            code.append(Instruction.of(found[1], int(found[2], 16), int(high[1], 16)))
    return code, labels


def _load_distance(loop: list[Instruction]) -> int:
    distances = []
    for index, load in enumerate(loop):
        if "LDG" not in load.text or load.scoreboard is None:
            continue
        after = (loop[index:] + loop[:index])[1:]
        waits = [x.waits_for >> load.scoreboard & 1 for x in after]
        distances.append(waits.index(1) + 1)  # a load that nothing waits for is an error
    return min(distances)
