"""Counts machine instructions for each HMMA in the loops of attention kernels: longattn's beside FlashAttention-2's.

The main loop of a kernel holds its products. What is counted is the cheapest way through it that executes all of its
HMMA and fetches the next tile: what an interior tile costs, since masks, unaligned loads and the like lie behind
branches (FlashAttention-2 masks every tile of a window without branches, which counts). Needs a build with CUDA
kernels, cuobjdump, and, for FlashAttention-2, a torch with CUDA.

Usage: cuda_loops.py [HEAD_DIM ...]
"""

from __future__ import annotations

import importlib.util
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cuda_budget import cuobjdump, run

ARCH = "sm_80"
SIZE = 16  # bytes of an instruction
ENDS = ("EXIT", "RET", "BRX")
LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
OURS = r"longattn.*window_attn_(fwd|bwd_query|bwd_key)I.*(ForwardTraits|BackwardTraits).*Bf16ELi{dim}E"
FLASH = (
    # traits, then dropout, causal, local, alibi, even sizes, even head dim, soft cap
    r"flash_fwd_kernelI23Flash_fwd_kernel_traitsILi{dim}E.*bfloat16.*EELb0ELb0ELb1ELb0ELb[01]ELb1ELb0ELb0EEE",
    r"flash_fwd_kernelI23Flash_fwd_kernel_traitsILi{dim}E.*bfloat16.*EELb0ELb1ELb0ELb0ELb[01]ELb1ELb0ELb0EEE",
    r"flash_bwd_dq_dk_dv_loop_seqk_parallel_kernelI23Flash_bwd_kernel_traitsILi{dim}E.*bfloat16"
    r".*EELb0ELb[01]ELb[01]ELb0ELb[01]ELb1ELb0EEE",
)


@dataclass
class Block:
    """Instructions without a jump among them, by their operation."""

    start: int
    operations: list[str] = field(default_factory=list)
    next: list[int] = field(default_factory=list)

    def count(self, operation: str) -> int:
        return sum(name.partition(".")[0] == operation for name in self.operations)


@dataclass(frozen=True)
class Loop:
    """The cheapest way through a loop that executes all that it can of its HMMA."""

    hmma: int
    instructions: int
    operations: tuple[str, ...]

    def count(self, *operations: str) -> int:
        return sum(name.partition(".")[0] in operations for name in self.operations)


def blocks_of(sass: str) -> dict[int, Block]:
    """Basic blocks of one function's disassembly, by address."""
    lines = [(int(m[1], 16), m[2], m[3], m[4]) for m in LINE.finditer(sass)]
    jumps = {}
    for address, _, operation, rest in lines:
        target = re.search(r"0x([0-9a-f]+)\s*$", rest)
        skips = operation.startswith("CALL.REL") and target and int(target[1], 16) == address + 2 * SIZE
        if operation.partition(".")[0] == "BRA" or skips:  # a predicated call past the next instruction is a jump
            jumps[address] = int(target[1], 16) if target else None
    after = {a: b for (a, *_), (b, *_) in zip(lines, lines[1:], strict=False)}
    ends = [address for address, _, operation, _ in lines if operation.partition(".")[0] in ENDS] + list(jumps)
    leaders = {lines[0][0], *(t for t in jumps.values() if t is not None), *(after[e] for e in ends if e in after)}
    blocks: dict[int, Block] = {}
    for address, predicate, operation, rest in lines:
        if address in leaders:
            block = blocks[address] = Block(address)
        block.operations.append(operation)
        following = after.get(address)
        base = operation.partition(".")[0]
        if address in jumps:
            block.next += [jumps[address]] if jumps[address] is not None else []
            if (predicate or ".DIV" in operation or "P" in rest.partition("0x")[0]) and following is not None:
                block.next.append(following)
        elif base in ENDS:
            block.next += [following] if predicate and following is not None else []
        elif following in leaders:
            block.next.append(following)
    reached, waiting = {lines[0][0]}, [lines[0][0]]
    while waiting:
        block = blocks[waiting.pop()]
        block.next = [target for target in block.next if target in blocks]
        waiting += set(block.next) - reached
        reached.update(block.next)
    return {address: blocks[address] for address in sorted(reached)}


def dominators(blocks: dict[int, Block], entry: int) -> dict[int, set[int]]:
    before: dict[int, list[int]] = {address: [] for address in blocks}
    for block in blocks.values():
        for target in block.next:
            before[target].append(block.start)
    found = {address: set(blocks) for address in blocks}
    found[entry] = {entry}
    changed = True
    while changed:
        changed = False
        for address in blocks:
            sets = [found[b] for b in before[address]]
            new = {address} | (set.intersection(*sets) if sets else set())
            if address != entry and new != found[address]:
                found[address], changed = new, True
    return found


def loops_of(sass: str) -> list[Loop]:
    """The innermost loops with HMMA, in the order of their addresses."""
    blocks = blocks_of(sass)
    entry = min(blocks)
    above = dominators(blocks, entry)
    before: dict[int, list[int]] = {address: [] for address in blocks}
    for block in blocks.values():
        for target in block.next:
            before[target].append(block.start)
    bodies: dict[int, set[int]] = {}
    for block in blocks.values():
        for head in block.next:
            if head in above[block.start]:
                body = bodies.setdefault(head, {head})
                waiting = [block.start]
                while waiting:
                    at = waiting.pop()
                    if at not in body:
                        body.add(at)
                        waiting += before[at]
    counting = {head: body for head, body in bodies.items() if any(blocks[b].count("HMMA") for b in body)}
    inner = [head for head, body in counting.items() if not any(other != head and other in body for other in counting)]
    return [cheapest(blocks, above, head, counting[head]) for head in sorted(inner)]


def cheapest(blocks: dict[int, Block], above: dict[int, set[int]], head: int, body: set[int]) -> Loop:
    """From the head to any jump back to it: most HMMA first, then most LDGSTS, then fewest instructions."""
    known: dict[int, tuple[int, ...] | None] = {}  # the blocks of the best way from each on

    def value(way: tuple[int, ...]) -> tuple[int, int, int]:
        through = [blocks[at] for at in way]
        fetched = sum(block.count("LDGSTS") for block in through)
        return sum(block.count("HMMA") for block in through), fetched, -sum(len(b.operations) for b in through)

    def best(at: int) -> tuple[int, ...] | None:
        if at not in known:
            ways = []
            for target in blocks[at].next:
                if target == head:
                    ways.append((at,))
                elif target in body and target not in above[at]:
                    way = best(target)
                    ways += [(at, *way)] if way else []
            known[at] = max(ways, key=value) if ways else None
        return known[at]

    way = best(head) or ()
    hmma, _, instructions = value(way)
    return Loop(hmma, -instructions, tuple(name for at in way for name in blocks[at].operations))


def functions(library: Path, wanted: str) -> Iterator[tuple[str, str]]:
    """(demangled name, disassembly) of the kernels of ARCH in a library whose mangled names match."""
    tool, library = cuobjdump(), library.resolve()
    with tempfile.TemporaryDirectory() as folder:
        run(tool, "-xelf", ARCH, library, cwd=folder)
        for binary in sorted(Path(folder).glob("*.cubin")):
            data = binary.read_bytes().decode("latin-1")
            names = sorted({name for name in re.findall(r"\.text\.(\w+)", data) if re.search(wanted, name)})
            for name in names:
                yield run("c++filt", name).stdout.strip(), run(tool, "-sass", "-fun", name, binary).stdout


def title(name: str) -> str:
    """The kernel and its template arguments, shortened."""
    kernel = re.search(r"\b(window_attn_\w+|flash_\w+kernel)\b", name)
    flags = re.findall(r"\b(?:true|false|\d+)\b", name.partition(">(")[0])
    return f"{kernel[1]} {' '.join({'true': '1', 'false': '0'}.get(f, f) for f in flags)}" if kernel else name


def report(library: Path, wanted: str) -> None:
    for name, sass in functions(library, wanted):
        for loop in loops_of(sass):
            other = {
                "LDSM": loop.count("LDSM"),
                "LDGSTS": loop.count("LDGSTS"),
                "MUFU": loop.count("MUFU"),
                "fp32": loop.count("FMUL", "FADD", "FFMA", "FMNMX", "FSEL", "FSETP"),
                "convert": loop.count("F2F", "F2FP", "PRMT"),
                "integer": loop.count("IADD3", "IMAD", "ISETP", "LEA", "LOP3", "SHF", "MOV", "SEL", "IMNMX", "LOP"),
            }
            text = ", ".join(f"{count} {what}" for what, count in other.items())
            print(
                f"{loop.instructions / loop.hmma:6.2f} = {loop.instructions:5d} / {loop.hmma:3d}  {title(name)}: {text}"
            )


def main() -> None:
    sys.setrecursionlimit(100_000)  # a way through a loop is as deep as it has blocks
    dims = sys.argv[1:] or ["64", "128"]
    module, torch = importlib.util.find_spec("longattn._C"), importlib.util.find_spec("torch")
    if module is None or module.origin is None:
        raise SystemExit("no compiled longattn here: LONGATTN_BUILD=cuda pip install --no-build-isolation .")
    flash = Path(torch.origin).parent / "lib" / "libtorch_cuda.so" if torch and torch.origin else None
    for dim in dims:
        report(Path(module.origin), OURS.replace("{dim}", dim))
    if flash is None or not flash.is_file():
        print("FlashAttention-2: this torch has no CUDA")
        return
    for wanted in FLASH:
        for dim in dims:
            report(flash, wanted.replace("{dim}", dim))


if __name__ == "__main__":
    main()
