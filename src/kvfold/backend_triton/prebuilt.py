"""Kernels that were compiled elsewhere: finds and checks packages, and makes of their binaries what Triton's compiler returns.

A package is a folder of data: `prebuilt.json`, and each binary in a file named by its sha256. It is used as a whole or not at
all: only with the same GPU target, number of multiprocessors, Triton, assembler and sources of kvfold's device code. The key of
a kernel in it has all else that its code depends on. What does not fit is compiled.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import tempfile
import threading
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.compiler.compiler import make_backend

from .build import KERNELS, Variant

MANIFEST, FORM = "prebuilt.json", 1
INSTALLED = "kvfold_kernels"  # where wheels of packages put their folders; it has no code, and none of it is imported
MOST_MANIFEST, MOST_BINARY = 1 << 26, 1 << 26  # bytes
DIGEST, NAME = re.compile(r"[0-9a-f]{64}"), re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")
PACKAGE = Path(__file__).parents[1]
# What all device code is made of, and the compiler told, but for what a variant says.
SOURCES = (
    "backend_triton/kernels", "backend_triton/args.py", "backend_triton/table.py", "backend_triton/build.py", "contract.py",
)  # fmt: skip

# Of metadata: what is known where it is loaded. Where libraries lie is of the environment that compiled, which of two that
# share Triton's cache may be the other one; what is in them its cache and `key_of` know.
ELSEWHERE = ("hash", "target", "triton_version", "name", "extern_libs")

loaded = 0  # how many kernels came from packages
_folders: list[Path] = []  # that `use` named
_lock = threading.Lock()
_said: set[str] = set()


class Facts(NamedTuple):
    """What a package is for, in words; all of it must be the same here."""

    target: str
    multiprocessors: int
    triton: str
    assembler: str
    sources: str


WORDS = Facts("the target", "the number of multiprocessors", "Triton", "the assembler", "the sources of kvfold's kernels")


class Damaged(Exception):
    """A file of a package is damaged; the message says which."""


@dataclass(frozen=True)
class Binary:
    """sha256: that of the file, which is its name. name: that of the kernel in it. made: what the compiler said of it, in
    bytes.
    """

    sha256: str
    name: str
    made: dict[str, int]


@dataclass(frozen=True)
class Package:
    """folder: where it is. kernels: by their keys. damaged: why nothing of it can be used, "" if it can be."""

    folder: Path
    facts: Facts | None = None
    kernels: dict[str, Binary] = field(default_factory=dict)
    damaged: str = ""

    def refused(self, here: Facts) -> str:
        """Why this package is not for `here`, "" if it is."""
        if self.facts is None:
            return self.damaged
        differing = [
            f"{name} is {ours!r} here and {theirs!r} there" if name != WORDS.sources else f"{name} are others than here"
            for name, ours, theirs in zip(WORDS, here, self.facts, strict=True)
            if ours != theirs
        ]
        return ", ".join(differing)


def facts_of(target: GPUTarget, multiprocessors: int) -> Facts:
    """The facts of kernels that are compiled here."""
    arch = f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)
    return Facts(arch, multiprocessors, triton.__version__, _assembler(target), sources())


def without_gpu(facts: Facts) -> Facts:
    """The facts here, for a GPU that is taken to be the right one."""
    return facts._replace(triton=triton.__version__, sources=sources())


@cache
def _assembler(target: GPUTarget) -> str:
    """The assembler's version as Triton's own cache has it, without the copyright."""
    words = " ".join(str(make_backend(target).hash()).split())
    return words.partition(" release ")[2] or words


@cache
def sources() -> str:
    """The sha256 of all files of `SOURCES`."""
    return _digest(source_files())


def source_files() -> list[Path]:
    places = [PACKAGE / name for name in SOURCES]
    return [file for place in places for file in (sorted(place.glob("*.py")) if place.is_dir() else [place])]


@cache
def own_sources(kernel: str) -> str:
    """The same for a kernel that is not in `SOURCES`: of its folder and of the one above, which have its device code."""
    return _digest(own_files(kernel))


def own_files(kernel: str) -> list[Path]:
    folder = Path(KERNELS[kernel].fn.__code__.co_filename).parent
    if folder == PACKAGE / SOURCES[0]:
        return []
    return [*sorted(folder.glob("*.py")), *sorted(folder.parent.glob("*.py"))]


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        text = path.read_bytes().replace(b"\r\n", b"\n")
        digest.update(f"{path.relative_to(PACKAGE).as_posix()} {len(text)}\n".encode() + text)
    return digest.hexdigest()


def key_of(variant: Variant, target: GPUTarget) -> str:
    """The key of a variant, with all options and environment variables that the compiler gets for it here."""
    told = make_backend(target).parse_options(variant.options_for(target)).hash()
    environment = sorted(get_cache_invalidating_env_vars().items())
    key = FORM, variant, own_sources(variant.kernel), told, environment
    return hashlib.sha256(repr(key).encode()).hexdigest()


def binary_of(compiled: CompiledKernel, variant: Variant, target: GPUTarget) -> tuple[Binary, bytes]:
    """What a package keeps of a compiled kernel: the binary, and what does not follow from the compiler's options."""
    backend = make_backend(target)
    options = _plain(backend.parse_options(variant.options_for(target)).__dict__)
    made = {
        name: value
        for name, value in _plain(compiled.metadata._asdict()).items()
        if name not in ELSEWHERE and options.get(name, ...) != value
    }
    if made.pop("tensordesc_meta", []) or not all(_is_made(*one) for one in made.items()) or made.keys() & options.keys():
        raise RuntimeError(f"a kernel cannot be kept whose metadata by Triton {triton.__version__} has {made}")
    binary = compiled.asm[backend.binary_ext]
    return Binary(hashlib.sha256(binary).hexdigest(), compiled.metadata.name, made), binary


def manifest_of(facts: Facts, kernels: dict[str, Binary], about: dict[str, object]) -> dict[str, object]:
    """The contents of `MANIFEST`. about: for readers."""
    rows = {key: asdict(one) for key, one in kernels.items()}
    return {"form": FORM, **facts._asdict(), "about": about, "sha256": _digest_of(rows), "kernels": rows}


def _digest_of(rows: dict[str, Any]) -> str:
    """The hash of all that a manifest says of its kernels: a launch would use a number that was changed there."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def read(folder: Path) -> Package:
    """A package, or why it cannot be used; its binaries are read when they are needed."""
    try:
        given = json.loads(_bytes(folder / MANIFEST, MOST_MANIFEST))
        if not isinstance(given, dict) or type(given.get("form")) is not int or given["form"] != FORM:
            raise Damaged(f"{MANIFEST} is not of form {FORM}, which this kvfold reads")
        facts = Facts(*(given.get(name) for name in Facts._fields))
        if not all(_is_fact(*one) for one in facts._asdict().items()):
            raise Damaged(f"{MANIFEST} must say what it is for: {', '.join(Facts._fields)}")
        rows = given.get("kernels")
        if not isinstance(rows, dict) or not all(DIGEST.fullmatch(key) for key in rows):
            raise Damaged(f"{MANIFEST} must have kernels by keys")
        kernels = {key: _binary(key, row) for key, row in rows.items()}
        if given.get("sha256") != _digest_of(rows):
            raise Damaged(f"{MANIFEST} was changed: its kernels are not those that its sha256 is of")
        return Package(folder, facts, kernels)
    except Damaged as error:
        return Package(folder, damaged=str(error))
    except (ValueError, RecursionError) as error:
        return Package(folder, damaged=f"{MANIFEST} is not JSON: {error}")


def _binary(key: str, row: object) -> Binary:
    if isinstance(row, dict) and row.keys() == {"sha256", "name", "made"}:
        sha256, name, made = row["sha256"], row["name"], row["made"]
        named = _matches(DIGEST, sha256) and _matches(NAME, name)
        if named and isinstance(made, dict) and all(_is_made(*one) for one in made.items()):
            return Binary(sha256, name, made)
    raise Damaged(f"{MANIFEST} must say of each kernel its sha256, its name and what was made, kernel {key} does not")


def _is_fact(name: str, value: object) -> bool:
    return type(value) is int if name == "multiprocessors" else isinstance(value, str) and value.isprintable()


def _matches(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _is_made(name: str, value: object) -> bool:
    return _matches(NAME, name) and type(value) is int and 0 <= value < 1 << 31


def _bytes(path: Path, most: int) -> bytes:
    """The bytes of a regular file, or of one behind a link, as environments may be made of links."""
    try:
        if not path.is_file():
            raise Damaged(f"{path.name} is missing")
        with path.open("rb") as file:
            found = file.read(most + 1)
    except OSError as error:
        raise Damaged(f"{path.name} cannot be read: {error.strerror}") from error
    if len(found) > most:
        raise Damaged(f"{path.name} has more than {most} bytes")
    return found


def use(folder: str | os.PathLike[str]) -> Package:
    """Adds a folder for this process; it comes before installed ones."""
    path = Path(os.path.realpath(folder))
    with _lock:
        if path not in _folders:
            _folders.append(path)
    _read_once.cache_clear()  # it may have been damaged, or not all there, when it was named before
    return _read_once(path)


def packages() -> list[Package]:
    """All packages, in the order in which they are asked: those that were named, then those below each place of `INSTALLED`."""
    with _lock:
        folders = list(_folders)
    return [_read_once(folder) for folder in dict.fromkeys((*folders, *_installed()))]


@cache
def _installed() -> tuple[Path, ...]:
    spec = importlib.util.find_spec(INSTALLED)  # of a name without a dot: runs nothing
    places: Iterable[str] = spec.submodule_search_locations or () if spec is not None else ()
    return tuple(path.parent for place in places for path in sorted(Path(place).glob(f"*/{MANIFEST}")))


@cache
def _read_once(folder: Path) -> Package:
    return read(folder)


def fitting(target: GPUTarget, multiprocessors: int) -> list[Package]:
    """The packages whose kernels may be loaded. Warns if there are packages but none fits."""
    found = packages()
    if not found:
        return []
    here = facts_of(target, multiprocessors)
    why = {package.folder: package.refused(here) for package in found}
    for package in found:
        if package.damaged:
            _say(f"prebuilt kernels are not loaded from {package.folder}: {package.damaged}")
    if all(why.values()):
        _say("prebuilt kernels are not loaded: " + "; ".join(f"of {folder} {words}" for folder, words in why.items()))
    return [package for package in found if not why[package.folder]]


def load(variant: Variant, target: GPUTarget) -> CompiledKernel | None:
    """The kernel from a package, not yet on a GPU; None where it must be compiled."""
    global loaded
    if watched():
        return None
    found = fitting(target, variant.multiprocessors)
    if not found:
        return None
    key = key_of(variant, target)
    for package in found:
        if key in package.kernels:
            try:
                compiled = _compiled(package, key, variant, target)
            except Damaged as error:
                _say(f"a prebuilt kernel is not loaded from {package.folder}: {error}")
                continue
            with _lock:
                loaded += 1
            return compiled
    return None


def covers(variant: Variant, target: GPUTarget) -> bool:
    """Whether `load` will find this kernel, unless a file is damaged."""
    found = [] if watched() else fitting(target, variant.multiprocessors)
    return bool(found) and any(key_of(variant, target) in package.kernels for package in found)


def watched() -> bool:
    """Whether somebody wants to see or change what Triton compiles: then it has to compile."""
    knobs = triton.knobs
    hook = getattr(knobs.runtime, "add_stages_inspection_hook", None)
    return bool(knobs.compilation.always_compile or knobs.compilation.override or knobs.compilation.dump_ir or hook)


def _compiled(package: Package, key: str, variant: Variant, target: GPUTarget) -> CompiledKernel:
    """As `triton.compile` makes it from files of its cache; here from copies, so that what was checked is what is read."""
    one, backend = package.kernels[key], make_backend(target)
    options = backend.parse_options(variant.options_for(target)).__dict__
    if taken := sorted(one.made.keys() & {*options, "hash", "target", "name", "triton_version"}):
        raise Damaged(f"{MANIFEST} must not say of a kernel {', '.join(taken)}")
    binary = _bytes(package.folder / one.sha256, MOST_BINARY)
    if hashlib.sha256(binary).hexdigest() != one.sha256:
        raise Damaged(f"{one.sha256} has other bytes than its name says")
    metadata = {"hash": key, "target": target, **options, "triton_version": triton.__version__}
    metadata |= {"name": one.name, "tensordesc_meta": [], **one.made}
    with tempfile.TemporaryDirectory(prefix="kvfold-") as folder:
        files = {end: Path(folder, f"{one.name}.{end}") for end in ("json", backend.binary_ext)}
        files["json"].write_text(json.dumps(metadata, default=vars))
        files[backend.binary_ext].write_bytes(binary)
        try:
            return CompiledKernel(variant.source_for(target), {path.name: str(path) for path in files.values()}, key)
        except (AttributeError, TypeError, ValueError) as error:
            raise Damaged(f"{MANIFEST} does not say of kernel {key} what Triton asks for: {error}") from error


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(values, default=vars))


def _say(words: str) -> None:
    """Warns, once in a process."""
    with _lock:
        if words in _said:
            return
        _said.add(words)
    warnings.warn(f"kvfold: {words}. Kernels are compiled instead.", RuntimeWarning, stacklevel=2)
