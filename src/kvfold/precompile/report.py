"""What `aot` says of the kernels that it compiled; no triton is needed to read it."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path

COLUMNS = ("kernel", "warps", "registers", "spilled", "allowed", "stack", "shared", "bytes")


@dataclass(frozen=True)
class Resources:
    """Of one kernel.

    Attributes:
        registers: of a thread; on AMD its vector registers, accumulation registers among them.
        spilled: bytes that the code of a thread moves out of registers to its stack, by instructions, not by how often they
            run: `ptxas -v` calls it spill stores. On AMD, 4 for each vector register that was spilled.
        stack: bytes of memory that a thread has of its own. A kernel may have some and spill nothing: the compiler set them
            aside and did without.
        shared: bytes of shared memory (LDS) of a program.
        warps: of a program.
        scalar_registers, scalar_spilled: on AMD, of a wavefront, the second counted in registers; they go to lanes of vector
            registers. On NVIDIA 0.
    """

    registers: int
    spilled: int
    stack: int
    shared: int
    warps: int
    scalar_registers: int = 0
    scalar_spilled: int = 0


@dataclass(frozen=True)
class AotKernel:
    """A kernel that was compiled and written.

    Attributes:
        name: kind, spec, format and row of the table, in words.
        file: in the folder of the report. sha256, bytes: of the file.
        entry: the name that the binary has it under.
        resources: what it takes.
        allowed: bytes that it may spill; None where spills are reported only.
        constants: arguments that it was compiled for, None for those left out. signature: types of the others, in order.
        options: of the compiler; `aligned`: addresses and strides are multiples of 16.
    """

    name: str
    file: str
    sha256: str
    bytes: int
    entry: str
    resources: Resources
    allowed: int | None
    constants: dict[str, object]
    signature: dict[str, str]
    options: dict[str, object]

    @property
    def passed(self) -> bool:
        return self.allowed is None or self.resources.spilled <= self.allowed

    def cells(self) -> tuple[str, ...]:
        """Under `COLUMNS`."""
        r, allowed = self.resources, "any" if self.allowed is None else str(self.allowed)
        numbers = (r.warps, r.registers, r.spilled, allowed, r.stack, r.shared, self.bytes)
        return self.name, *map(str, numbers)


@dataclass(frozen=True)
class AotReport:
    """What `aot` did; true if `passed`. `folder/kernels.json` has all of it, `folder/kernels.txt` is `table()`.

    Attributes:
        target: as it was asked for.
        folder: where the files are.
        versions: of kvfold, torch, triton and, for NVIDIA, ptxas.
        kernels: compiled, in the order of the table.
        failed: by the name of a kernel that did not compile, why.
        kept: files of an earlier report that were changed since, and so left alone.
    """

    target: str
    folder: Path
    versions: dict[str, str]
    kernels: tuple[AotKernel, ...]
    failed: dict[str, str]
    kept: tuple[str, ...] = ()

    @property
    def spilling(self) -> tuple[AotKernel, ...]:
        """Kernels that spill more than they may."""
        return tuple(kernel for kernel in self.kernels if not kernel.passed)

    @property
    def passed(self) -> bool:
        """Whether every kernel compiled and none spills more than it may."""
        return not self.failed and not self.spilling

    def __bool__(self) -> bool:
        return self.passed

    def table(self) -> str:
        """One line for each kernel, the failed ones behind."""
        rows = [COLUMNS, *(kernel.cells() for kernel in self.kernels)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]
        return "\n".join([*lines, *(f"{name}  failed: {why}" for name, why in self.failed.items())])

    def __str__(self) -> str:
        """What is wrong, or that nothing is."""
        total, spill = len(self.kernels) + len(self.failed), [k for k in self.kernels if k.resources.spilled]
        judged = f"{len(self.spilling)} of them more than they may"
        if self.kernels and all(kernel.allowed is None for kernel in self.kernels):
            judged = "which fails nothing here"
        lines = [f"{self.target}: {len(self.kernels)} of {total} kernels compiled, {len(spill)} spill, {judged}"]
        lines += [f"{name} failed: {why}" for name, why in self.failed.items()]
        lines += [f"{k.name} spills {k.resources.spilled} bytes, {k.allowed} are allowed" for k in self.spilling]
        lines += [f"{name} was changed since aot wrote it, and was kept" for name in self.kept]
        return "\n".join(lines)

    def to_json(self) -> dict[str, object]:
        """Plain values; the same for the same kernels, so that two reports can be compared as text."""
        digest = hashlib.sha256((self.table() + "\n").encode()).hexdigest()
        about = {"target": self.target, "versions": self.versions, "passed": self.passed,
                 "table": {"file": "kernels.txt", "sha256": digest}}  # fmt: skip
        return about | {"kernels": [asdict(kernel) for kernel in self.kernels], "failed": self.failed}
