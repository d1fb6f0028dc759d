"""What a compiled kernel takes of a GPU, read from its binary: no GPU is needed."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.tools.disasm import path_to_cuobjdump

from .report import Resources


def resources(compiled: CompiledKernel, target: GPUTarget) -> Resources:
    """Raises RuntimeError where the assembler's or Triton's output is not as known: a number is never guessed."""
    return _nvidia(compiled, target) if target.backend == "cuda" else _amd(compiled)


def _nvidia(compiled: CompiledKernel, target: GPUTarget) -> Resources:
    """By cuobjdump, which every Triton brings along: what is in the cubin, whichever options made it."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _cuobjdump("-res-usage", cubin)
        found = re.findall(r"Function \w+:\s+REG:(\d+) STACK:(\d+)", usage)
        if len(found) != 1:
            raise RuntimeError(f"cuobjdump -res-usage must name one kernel with REG and STACK, said {usage!r}")
        registers, stack = map(int, found[0])
        spilled = 0
        if stack:  # without one there is nothing to store to
            try:
                spilled = _stored(_cuobjdump("-sass", cubin))
            except RuntimeError as error:
                if "Cannot decode architecture" not in str(error):  # sm_103, of the disassembler in Triton 3.6
                    raise
                spilled = _assembled_again(compiled, target, (registers, stack), Path(folder))
    return Resources(registers, spilled, stack, compiled.metadata.shared, compiled.metadata.num_warps)


def _stored(sass: str) -> int:
    """Bytes that instructions store to the stack: of 32 bits, or what a suffix says (STL.64, STL.S16)."""
    found = re.findall(r"\bSTL((?:\.\w+)*) \[", sass)
    widths = [re.search(r"\.[SU]?(8|16|64|128)\b", suffix) for suffix in found]
    return sum(int(width[1]) if width else 32 for width in widths) // 8


def _assembled_again(compiled: CompiledKernel, target: GPUTarget, known: tuple[int, int], folder: Path) -> int:
    """What ptxas says of it when it is made again. `known`: registers and stack of the one that is there."""
    from triton.backends.nvidia.compiler import get_ptxas

    tool, ptx, source = get_ptxas(target.arch), compiled.asm["ptx"], folder / "kernel.ptx"
    source.write_text(ptx)
    path = tool[0] if isinstance(tool, tuple) else tool.path
    (arch,) = re.findall(r"^\.target (\w+)", ptx, re.MULTILINE)
    fused = [] if compiled.metadata.enable_fp_fusion else ["--fmad=false"]
    command = [path, "-lineinfo", *fused, "-v", f"--gpu-name={arch}", str(source), "-o", str(folder / "again.cubin")]
    said = subprocess.run(command, capture_output=True, text=True).stderr
    found = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores.*?Used (\d+) registers", said, re.DOTALL)
    if found is None or (int(found[3]), int(found[1])) != known:
        raise RuntimeError(f"ptxas must make a binary with registers and stack of {known} again, said {said!r}")
    return int(found[2])


def _cuobjdump(option: str, cubin: Path) -> str:
    done = subprocess.run([path_to_cuobjdump(), option, str(cubin)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"cuobjdump {option} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def _amd(compiled: CompiledKernel) -> Resources:
    """From the metadata that the compiler writes behind the assembly."""
    _, _, metadata = compiled.asm["amdgcn"].partition("amdhsa.kernels:")

    def field(name: str) -> int:
        found = re.findall(rf"^\s+(?:- )?\.{name}:\s+(\d+)$", metadata, re.MULTILINE)
        if len(found) != 1:
            raise RuntimeError(f"metadata of an AMD kernel must have .{name} once, has it {len(found)} times")
        return int(found[0])

    return Resources(
        registers=field("vgpr_count"),
        spilled=4 * field("vgpr_spill_count"),
        stack=field("private_segment_fixed_size"),
        shared=compiled.metadata.shared,
        warps=compiled.metadata.num_warps,
        scalar_registers=field("sgpr_count"),
        scalar_spilled=field("sgpr_spill_count"),
    )
