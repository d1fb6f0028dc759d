"""Compares the machine code (PTX) of two trees of this repository, kernel by kernel: did a change of the sources change any?

python -m benchmarks.run.ptx BASE --out FILE.jsonl
                             [--target sm_90] [--only WORDS,WORDS] [--formats fp8_ds_mla,indexer_mxfp4,bf16]
                             [--base-ptx FILE.json.gz] [--workers 16] [--timeout 300]

BASE is another checkout, of the same layout or of the one before (`kvfold.kernels.aot`). Every kernel that
`combinations` names for these formats and for pooled rows is compiled in both trees, without a GPU and without ptxas. What is
no code is left out: line numbers, debug sections, comments, names. Each line of FILE is a kernel: `same`, lines of PTX before
and after, and where they differ which instructions there are more or fewer of. Exits with 1 where any differ.

Kernels are matched by name, and those whose name only one tree has by what they are (kind, spec, format, warps, ahead) and
their order; `matched` says which. `--base-ptx` keeps what BASE gave: the file is written if it is not there, else read.
"""

from __future__ import annotations

import argparse
import gzip
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict, deque
from multiprocessing.connection import wait
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
FORMATS = "fp8_ds_mla,indexer_mxfp4,bf16"
OPTIONS = ("num_warps", "num_stages", "shared", "maxnreg", "launch_pdl", "enable_fp_fusion", "global_scratch_size")
SPEC = ("head_dim", "ratio", "overlap", "hadamard", "has_ape", "rope_dim", "norm_eps")
DROPPED = re.compile(r"\.loc\b|\.file\b|\$L__(?:tmp|func_begin|func_end|pc|info_string|debug)\w*:")
REGISTER = re.compile(r"%[a-z]+\d+")
OPCODE = re.compile(r"(?:@!?%p\d+\s+)?([a-z][\w.]*)")


# What runs in a process of one tree. It may have nothing of this tree's package, so it stands alone.


def code_of(ptx: str) -> list[str]:
    """The lines of PTX that are code, with neutral names of functions."""
    lines, depth, skipping = [], 0, False
    for line in ptx.splitlines():
        line = line.partition("//")[0].strip()
        if line.startswith(".section"):
            skipping, depth = True, 0
        if skipping:
            depth += line.count("{") - line.count("}")
            skipping = not ("}" in line and depth == 0)
        elif line and not DROPPED.match(line):
            lines.append(line)
    text = "\n".join(lines)
    names = re.findall(r"\.(?:entry|func)\s+(?:\([^)]*\)\s*)?([\w$]+)", text)
    numbers = {name: f"function{i}" for i, name in enumerate(dict.fromkeys(names))}
    for name in sorted(numbers, key=len, reverse=True):
        text = re.sub(rf"(?<![\w$]){re.escape(name)}(?=_param_|[^\w$]|$)", numbers[name], text)
    return text.split("\n")


def kernels_of() -> ModuleType:
    """The module with `combinations` and `compile_one`, where this tree has it."""
    try:
        return importlib.import_module("kvfold.precompile.combinations")
    except ModuleNotFoundError:
        return importlib.import_module("kvfold.kernels.aot")


def kind_of(one: object) -> list:
    """What a kernel is, apart from its name and the bounds of its row."""

    def of(what: object, *names: str) -> list:
        return [str(getattr(what, name, None)) for name in names]

    spec, fmt = getattr(one, "other", None) or (None, None)
    return [
        *of(one, "kind", "page_size", "snapshots", "dtype"),
        *of(one.spec, *SPEC),
        *of(one.fmt, "name"),
        *of(spec, *SPEC),
        *of(fmt, "name"),
        *of(one.config, "num_warps", "ahead"),
    ]


def compile_in_child(kernels: ModuleType, one: object, target: str, end: multiprocessing.connection.Connection) -> None:
    try:
        made = kernels.compile_one(one, target)
        options = {name: getattr(made.metadata, name, None) for name in OPTIONS}
        text = made.asm["ptx" if "ptx" in made.asm else "amdgcn"]
        found = {"code": code_of(text), "options": options}
    except BaseException as error:  # whatever a compiler raises: the others are worth having
        found = {"error": f"{type(error).__name__}: {error}"[:2000]}
    end.send(found)
    end.close()


def compile_all(kernels: ModuleType, wanted: list, target: str, workers: int, timeout: float, say: str) -> list[dict]:
    """Each in a process of its own, so that one that crashes or hangs takes no other with it."""
    fork = multiprocessing.get_context("fork")
    waiting, running, found = deque(enumerate(wanted)), {}, [{} for _ in wanted]
    done, start = 0, time.monotonic()
    while waiting or running:
        while waiting and len(running) < workers:
            i, one = waiting.popleft()
            here, there = fork.Pipe(duplex=False)
            process = fork.Process(target=compile_in_child, args=(kernels, one, target, there))
            process.start()
            there.close()
            running[here] = (i, process, time.monotonic())
        for here in wait(list(running), timeout=1):
            i, process, _ = running.pop(here)
            try:
                found[i] = here.recv()
                process.join()
            except (EOFError, OSError):  # ended before it said all
                process.join()
                found[i] = {"error": f"the process ended with {process.exitcode}"}
            here.close()
            done += 1
            if done % 25 == 0 or done == len(wanted):
                print(f"{say}: {done} of {len(wanted)} in {time.monotonic() - start:.0f} s", flush=True)
        for i, process, began in running.values():
            if time.monotonic() - began > timeout and process.is_alive():
                print(f"{say}: {wanted[i].name} is ended after {timeout:.0f} s", flush=True)
                process.kill()
    return found


def work(root: Path, out: Path, target: str, formats: str, only: str, workers: int, timeout: float) -> None:
    """Compiles the kernels of one tree and writes them into a file."""
    sys.path[:] = [str(root / "src"), *(p for p in sys.path if p and Path(p).resolve() != Path(__file__).resolve().parent)]
    import kvfold

    if root / "src" not in Path(kvfold.__file__).resolve().parents:
        raise SystemExit(f"kvfold of {root} is wanted, got that of {kvfold.__file__}")
    import triton

    kernels = kernels_of()
    if target.startswith("sm_"):
        from triton.backends.nvidia.compiler import CUDABackend

        CUDABackend.make_cubin = lambda self, *_, **__: b"no ptxas"  # the cache is of this run alone
    chosen = (None, *(kernels.FORMATS[name] for name in formats.split(",")))
    wanted = [one for one in kernels.combinations(formats=chosen) if matches(one.name, only)]
    print(f"{root}: {len(wanted)} kernels by Triton {triton.__version__}", flush=True)
    found = compile_all(kernels, wanted, target, workers, timeout, str(root))
    rows = [{"name": one.name, "kind": kind_of(one), **row} for one, row in zip(wanted, found, strict=True)]
    about = {"target": target, "formats": formats, "only": only, "triton": triton.__version__}
    beside = out.with_name(out.name + ".part")
    with gzip.open(beside, "wt", compresslevel=3) as file:
        json.dump({"about": about, "kernels": rows}, file)
    os.replace(beside, out)


def matches(name: str, only: str) -> bool:
    """Whether a name has any of the words, which are separated by commas."""
    return any(words in name for words in only.split(","))


# What compares.


def read(path: Path, args: argparse.Namespace) -> list[dict]:
    with gzip.open(path, "rt") as file:
        made = json.load(file)
    about = made["about"]
    for name in ("target", "formats"):
        if about[name] != getattr(args, name):
            raise SystemExit(f"{path} has kernels of {name} {about[name]}, not {getattr(args, name)}: remove it")
    if about["only"] not in ("", args.only):
        raise SystemExit(f"{path} has only kernels of {about['only']!r}: remove it")
    args.triton.add(about["triton"])
    return [row for row in made["kernels"] if matches(row["name"], args.only)]


def pairs(before: list[dict], after: list[dict]) -> list[tuple[dict | None, dict | None, str]]:
    """Kernels of both trees, and how they were matched; None where a tree has none."""
    named = {row["name"]: row for row in before}
    found = [(named.pop(row["name"]), row, "name") for row in after if row["name"] in named]
    groups: dict[str, tuple[list, list]] = defaultdict(lambda: ([], []))
    taken = {row["name"] for _, row, _ in found}
    for side, rows in ((0, named.values()), (1, (row for row in after if row["name"] not in taken))):
        for row in rows:
            groups[json.dumps(row["kind"])][side].append(row)
    for old, new in groups.values():
        for row in list(new):  # the same code first: rows may have gone from between
            same = next((one for one in old if row.get("code") and code_and_options(one) == code_and_options(row)), None)
            if same:
                old.remove(same)
                new.remove(row)
                found.append((same, row, "code"))
        both = min(len(old), len(new))
        found += [(one, row, "order") for one, row in zip(old, new, strict=False)]
        found += [(one, None, "") for one in old[both:]] + [(None, row, "") for row in new[both:]]
    return found


def code_and_options(row: dict) -> tuple:
    return row.get("code"), row.get("options")


def compare(before: dict | None, after: dict | None, matched: str) -> dict:
    """One line of the result."""
    row = {"name": (after or before)["name"], "matched": matched}
    if before and after and before["name"] != after["name"]:
        row["name_before"] = before["name"]
    if before is None or after is None:
        return row | {"same": False, "why": f"only in {'the base' if after is None else 'this tree'}"}
    errors = {f"error_{side}": one["error"] for side, one in (("before", before), ("after", after)) if "error" in one}
    if errors:
        return row | {"same": False, "why": "does not compile", **errors}
    old, new = before["code"], after["code"]
    row |= {"same": code_and_options(before) == code_and_options(after), "lines_before": len(old), "lines_after": len(new)}
    if row["same"]:
        return row
    if old == new:
        return row | {"why": "options", "options": [before["options"], after["options"]]}
    counts = [Counter(match[1] for line in lines if (match := OPCODE.match(line))) for lines in (old, new)]
    row["opcodes"] = {name: n for name in sorted({*counts[0], *counts[1]}) if (n := counts[1][name] - counts[0][name])}
    at = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    row["first"] = [at, old[at] if at < len(old) else "", new[at] if at < len(new) else ""]
    row["why"] = "registers alone" if renumbered(old) == renumbered(new) else "code"
    return row


def renumbered(lines: list[str]) -> list[str]:
    """With registers numbered as they appear, and without their declarations."""
    numbers: dict[str, str] = {}
    return [
        REGISTER.sub(lambda m: numbers.setdefault(m[0], f"%{len(numbers)}"), line)
        for line in lines
        if not line.startswith(".reg")
    ]


def run_trees(jobs: list[tuple[Path, Path]], args: argparse.Namespace) -> None:
    """A process for each tree; all at once."""
    running = []
    for root, out in jobs:
        cache = tempfile.mkdtemp(prefix="ptx-", dir=args.place)
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        env |= {"TRITON_CACHE_DIR": cache, "PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, __file__, "--worker", str(root), str(out), args.target, args.formats, args.only]
        command += [str(args.workers), str(args.timeout)]
        running.append((root, subprocess.Popen(command, env=env, cwd=args.place)))
    ended = [(root, process.wait()) for root, process in running]
    if any(code for _, code in ended):
        raise SystemExit("; ".join(f"the process of {root} ended with {code}" for root, code in ended if code))


def main() -> int:
    if sys.argv[1:2] == ["--worker"]:
        root, out, target, formats, only, workers, timeout = sys.argv[2:]
        work(Path(root), Path(out), target, formats, only, int(workers), float(timeout))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="the other checkout")
    parser.add_argument("--out", type=Path, required=True, help="file of the JSON lines, written anew")
    parser.add_argument("--target", default="sm_90")
    parser.add_argument("--only", default="", help="kernels whose name has one of these, separated by commas, in it")
    parser.add_argument("--formats", default=FORMATS, help="besides pooled rows (default: %(default)s)")
    parser.add_argument("--base-ptx", type=Path, help="what the base gave: written if it is not there, else read")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="of each tree")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one kernel")
    args = parser.parse_args()
    args.triton = set()
    with tempfile.TemporaryDirectory(prefix="kvfold-ptx-") as place:
        args.place = place
        old = (args.base_ptx or Path(place, "base.json.gz")).resolve()
        new = Path(place, "this.json.gz")
        run_trees([(ROOT, new)] + ([] if old.is_file() else [(args.base.resolve(), old)]), args)
        before, after = read(old, args), read(new, args)
    if len(args.triton) > 1:
        raise SystemExit(f"the two were compiled by Triton {' and '.join(sorted(args.triton))}: remove {old}")
    rows = [compare(*pair) for pair in pairs(before, after)]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    differing = [row for row in rows if not row["same"]]
    for row in differing:
        lines = f"{row.get('lines_before', '-')} -> {row.get('lines_after', '-')}"
        print(f"{row['name']:80s} {row['why']:20s} {lines:>16s}  {json.dumps(row.get('opcodes', ''))[:120]}")
    ways = Counter(row["matched"] or "not at all" for row in rows)
    print(f"{len(rows)} kernels, matched by {dict(ways)}: {len(differing)} differ")
    return 1 if differing or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
