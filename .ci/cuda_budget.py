"""Compiles the CUDA kernels for each architecture and holds them to csrc/budgets.json.

A budget is registers, spills, shared memory, resident warps and machine instructions of a kernel. Needs nvcc, g++ and
cuobjdump (pip: nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm).

Usage: cuda_budget.py [--write]
"""

from __future__ import annotations

import collections
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
BUDGETS = CSRC / "budgets.json"
ARCHS = {"sm_80": ("80", 164 << 10), "sm_90a": ("90a", 228 << 10)}  # nvcc's name, shared memory of a multiprocessor
COUNTED = ("HMMA", "HGMMA", "LDSM", "LDGSTS", "UTMALDG", "UTMASTG", "MUFU", "STL", "LDL")
LOWER_IS_WORSE = ("warps",)
TENSOR_CORES = re.compile(r"window_attn_(fwd|decode|bwd_query|bwd_key) ")
NARROW_STORE = re.compile(r"\bSTG\.E(?!\.128)")
WIDE_STORES_ONLY = re.compile(r"rope_kernel \w+ (4|8) ")  # every access of these kernels moves 16 bytes
WARPGROUPS = re.compile(r"window_attn_\w+_sm90 ")  # kernels that are built for sm_90a alone
ROW_SPILLS = {192: 16, 256: 96}  # bytes of those, by head dim, between two tiles of rows
SERIALISED = re.compile(r"\(C75\d\d\)")  # ptxas: products wait for each other, or registers are not moved
Kernels = dict[str, dict[str, int]]


def run(*command: str | Path, cwd: str | None = None) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=cwd)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stderr}")
    return done


def short_name(name: str) -> str:
    """`window_attn_fwd Bf16 64 ...` of a kernel's demangled name, or of g++'s description of one."""
    found = re.search(r"\b(window_attn_\w+|rope_\w+)", name.partition("kKernel = ")[2] or name)
    assert found, name
    rest = name[name.index(found[1]) + len(found[1]) :]
    arguments = rest.partition(">(")[0] if "kKernel = " not in name else rest.rpartition("]")[0].partition("(")[0]
    return " ".join([found[1], *re.findall(r"\b(?:Float32|BFloat16|Float16|Bf16|Fp16|true|false|\d+)\b", arguments)])


def cuobjdump() -> str:
    found = shutil.which("cuobjdump")
    if found:
        return found
    inside = next(Path(sysconfig.get_path("purelib"), "nvidia").glob("*/bin/cuobjdump"), None)
    if inside is None:
        raise SystemExit("cuobjdump is missing: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    os.environ["PATH"] = f"{inside.parent}:{os.environ['PATH']}"  # where it looks for nvdisasm
    return str(inside)


def launches(folder: Path) -> Kernels:
    """Threads and shared bytes of every kernel, as its launcher gives them."""
    program = folder / "list_launches"
    source = ROOT / "tests" / "emulator" / "list_launches.cpp"
    run("g++", "-std=c++20", "-O0", "-w", f"-I{CSRC}", f"-I{ROOT / 'tests'}", "-x", "c++", source, "-o", program)
    found: Kernels = {}
    for line in run(program).stdout.splitlines():
        threads, shared, name = line.split(" ", 2)
        found[short_name(name)] = {"threads": int(threads), "shared": int(shared)}
    return found


def compiled(arch: str, folder: Path) -> Kernels:
    """Registers, spills and instruction counts of every kernel of an architecture."""
    nvcc = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc")
    target = ARCHS[arch][0]
    found: Kernels = collections.defaultdict(dict)
    for source in sorted(CSRC.glob("*.cu")):
        binary = folder / f"{source.stem}.{arch}.o"
        flags = ("-O3", "-std=c++20", f"-gencode=arch=compute_{target},code=sm_{target}", "-Xptxas", "-v")
        log = run(nvcc, "-c", *flags, source, "-o", binary).stderr
        blocks = re.findall(
            r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) reg", log, re.S
        )
        names = run("c++filt", *(block[0] for block in blocks)).stdout.splitlines()
        by_symbol = {block[0]: short_name(name) for block, name in zip(blocks, names, strict=True)}
        if SERIALISED.search(log):
            raise SystemExit(f"{source.name}, {arch}:\n{log}")
        for symbol, stores, loads, registers in blocks:
            found[by_symbol[symbol]].update(registers=int(registers), spills=int(stores) + int(loads))
        for function in run(cuobjdump(), "-sass", binary).stdout.split("Function : ")[1:]:
            operations = re.findall(r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", function)
            counts = collections.Counter(operations)
            found[by_symbol[function.split(None, 1)[0]]].update(
                instructions=len(operations),
                narrow_stores=len(NARROW_STORE.findall(function)),
                **{name: counts[name] for name in COUNTED},
            )
    return {name: kernel for name, kernel in found.items() if is_built_for(name, arch)}


def is_built_for(name: str, arch: str) -> bool:
    return arch == "sm_90a" or not WARPGROUPS.match(name)


def resident_warps(arch: str, kernel: dict[str, int]) -> int:
    """Warps that a multiprocessor holds, by registers and by shared memory (1 KiB a block is reserved)."""
    warps = kernel["threads"] // 32
    by_registers = 65536 // (-(-kernel["registers"] // 8) * 8 * 32 * warps)
    by_shared = ARCHS[arch][1] // (kernel["shared"] + 1024)
    return min(64 // warps, by_registers, by_shared) * warps


def measure() -> dict[str, Kernels]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = launches(folder)
        measured = {arch: compiled(arch, folder) for arch in ARCHS}
    for arch, kernels in measured.items():
        expected = {name for name in sizes if is_built_for(name, arch)}
        assert kernels.keys() == expected, f"{arch}: {kernels.keys() ^ expected}"
        for name, kernel in kernels.items():
            kernel.update(sizes[name])
            kernel["warps"] = resident_warps(arch, kernel)
    return measured


def faults(measured: dict[str, Kernels], budgets: dict[str, Kernels]) -> list[str]:
    """What is past a budget, and what no budget may allow."""
    found = []
    for arch, kernels in measured.items():
        found += [f"{arch} {name}: not in {BUDGETS.name}, or gone" for name in kernels.keys() ^ budgets[arch].keys()]
        for name, kernel in kernels.items():
            tiled = TENSOR_CORES.match(name)
            head_dim = int(name.split()[2]) if tiled or WARPGROUPS.match(name) else 0
            if kernel["spills"] > (64 if tiled and head_dim > 128 else ROW_SPILLS.get(head_dim, 0)):
                found.append(f"{arch} {name}: {kernel['spills']} bytes of spills")
            found += [f"{arch} {name}: no {op}" for op in ("HMMA", "LDSM", "LDGSTS") if tiled and not kernel[op]]
            if WIDE_STORES_ONLY.match(name) and kernel["narrow_stores"]:
                found.append(f"{arch} {name}: {kernel['narrow_stores']} stores of less than 16 bytes")
            if WARPGROUPS.match(name):
                found += [f"{arch} {name}: no {op}" for op in ("HGMMA", "UTMALDG", "UTMASTG") if not kernel[op]]
            for key, value in budgets[arch].get(name, {}).items():
                if kernel[key] < value if key in LOWER_IS_WORSE else kernel[key] > value:
                    found.append(f"{arch} {name}: {key} {kernel[key]}, budget {value}")
    return found


def main() -> None:
    measured = measure()
    if sys.argv[1:] == ["--write"]:
        lines = (
            f'"{arch}": {{\n'
            + ",\n".join(f"{json.dumps(name)}: {json.dumps(kernel)}" for name, kernel in sorted(kernels.items()))
            + "\n}"
            for arch, kernels in measured.items()
        )
        BUDGETS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    found = faults(measured, json.loads(BUDGETS.read_text()))
    print("\n".join(found) or f"{sum(map(len, measured.values()))} kernels are within {BUDGETS.name}")
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()
