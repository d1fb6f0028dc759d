"""Packages of prebuilt kernels: what `prebuild` writes is what calls load, and what is not as it must be is refused by name."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import triton
from test_aot import python

import kvfold
from kvfold import V4_INDEXER, V41_MAIN_R1
from kvfold.backend_triton import launcher, prebuilt
from kvfold.backend_triton.build import INTERPRETED, KERNELS, Variant
from kvfold.backend_triton.keys import RestoreKey, plan_key
from kvfold.backend_triton.variants import variant_of
from kvfold.precompile.combinations import TARGETS
from kvfold.precompile.sets import SETS

TARGET = TARGETS["sm_90"]
SMALL = {"specs": (V4_INDEXER,), "formats": (None,), "max_new_tokens": (), "states": ("fold",)}  # the plan's kernels alone
STORE = {
    "specs": (V41_MAIN_R1,), "formats": ("bf16",), "max_new_tokens": (), "states": (), "plans": (), "rows": (torch.bfloat16,),
    "norm_weight_dtypes": (None,), "slot_dtypes": (torch.int64,), "pdl": False,
}  # fmt: skip
VARIANT = variant_of(plan_key(4, 1, False, False), True, False)

compiles = pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted: see test_where_kernels_compile")


@pytest.mark.skipif(not INTERPRETED, reason="they run in this process")
def test_where_kernels_compile(tmp_path: Path) -> None:
    """The tests of this file that need Triton's compiler, in a process that does not interpret: no GPU is needed."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "--noconftest",
        "-p",
        "no:cacheprovider",
        __file__,
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    passed, skipped = (int(re.search(rf"(\d+) {word}", done.stdout)[1]) for word in ("passed", "skipped"))
    assert passed > 40 and skipped == 1


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of plans' kernels."""
    folder = tmp_path_factory.mktemp("package")
    said = []
    count = kvfold.prebuild("sm_90", folder, [SMALL], workers=1, progress=lambda *words: said.append(words))
    assert count == 8 == len(said) and said[-1] == (8, 8, "plan") and sorted(done for done, _, _ in said) == [*range(1, 9)]
    return folder


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No package is known, and nothing was said."""
    monkeypatch.setattr(prebuilt, "_folders", [])
    monkeypatch.setattr(prebuilt, "_said", set())
    monkeypatch.setattr(prebuilt, "_installed", tuple)
    prebuilt._read_once.cache_clear()
    yield
    prebuilt._read_once.cache_clear()


@pytest.fixture
def package(made: Path, tmp_path: Path, alone: None) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(made, tmp_path / "package"))


def silently(variant: Variant = VARIANT, target: object = TARGET) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return prebuilt.load(variant, target)


@compiles
def test_what_is_loaded_is_what_is_compiled(package: Path) -> None:
    assert kvfold.use_prebuilt(package) == 8
    loaded = silently()
    compiled = VARIANT.compile(TARGET)
    assert loaded.kernel == compiled.kernel and len(loaded.kernel) > 2000
    ours, theirs = loaded.metadata._asdict(), compiled.metadata._asdict()
    assert ours.pop("hash") != theirs.pop("hash")  # a name in Triton's cache, and one in the package
    assert ours == theirs and loaded.packed_metadata == compiled.packed_metadata
    assert loaded.src.signature == compiled.src.signature and loaded.src.constants.keys() == compiled.src.constants.keys()
    assert loaded.name == compiled.name == "plan_kernel"


@compiles
def test_nothing_is_compiled_where_a_package_has_it(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kvfold.use_prebuilt(package)
    monkeypatch.setattr(triton, "compile", lambda *_, **__: pytest.fail("compiled"))
    before = prebuilt.loaded
    assert launcher.make(VARIANT, TARGET).kernel[:4] == b"\x7fELF" and prebuilt.loaded == before + 1
    assert prebuilt.covers(VARIANT, TARGET)


@compiles
def test_what_a_package_has_not_is_compiled(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kvfold.use_prebuilt(package)
    compiled = []
    monkeypatch.setattr(Variant, "compile", lambda variant, target=None: compiled.append(variant) or "compiled")
    other = variant_of(RestoreKey(V4_INDEXER, torch.float32, 4), True, False)
    assert launcher.make(other, TARGET) == "compiled" and compiled == [other]
    assert not prebuilt.covers(other, TARGET)


@compiles
def test_the_key_knows_all_that_a_kernel_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    key = prebuilt.key_of(VARIANT, TARGET)
    others = [
        variant_of(plan_key(4, 1, False, False), False, False),
        variant_of(plan_key(4, 1, False, False), True, True),
        variant_of(plan_key(8, 1, False, False), True, False),
        variant_of(plan_key(4, 1, False, False), True, False, 114),
    ]
    keys = {key, *(prebuilt.key_of(other, TARGET) for other in others)}
    assert len(keys) == 5 and key == prebuilt.key_of(VARIANT, TARGET)
    monkeypatch.setattr(prebuilt, "get_cache_invalidating_env_vars", lambda: {"DISABLE_LLVM_OPT": "true"})
    assert prebuilt.key_of(VARIANT, TARGET) not in keys
    assert " at 0x" not in repr(VARIANT)


@compiles
def test_keys_are_those_of_another_process(tmp_path: Path) -> None:
    code = """
from kvfold.backend_triton import prebuilt
from kvfold.backend_triton.keys import plan_key
from kvfold.backend_triton.variants import variant_of
from kvfold.precompile.combinations import TARGETS
print(prebuilt.key_of(variant_of(plan_key(4, 1, False, False), True, False), TARGETS["sm_90"]), prebuilt.sources())
"""
    assert python(tmp_path, code).split() == [prebuilt.key_of(VARIANT, TARGET), prebuilt.sources()]


@compiles
@pytest.mark.parametrize("kernel", KERNELS)
def test_sources_are_all_that_device_code_imports(kernel: str) -> None:
    """Of kvfold, however far away, but for specs and their checks, which are no device code."""
    hashed = {*prebuilt.source_files(), *prebuilt.own_files(kernel)}
    waiting = [Path(KERNELS[kernel].fn.__code__.co_filename)]
    seen = set(waiting)
    while waiting:
        path = waiting.pop()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
                for found in (base.with_suffix(".py"), *(base / f"{alias.name}.py" for alias in node.names)):
                    if found.is_file() and found not in seen:
                        seen.add(found)
                        waiting.append(found)
    assert {path.relative_to(prebuilt.PACKAGE).as_posix() for path in seen - hashed} <= {"spec.py", "arguments/checks.py"}
    assert Path(KERNELS[kernel].fn.__code__.co_filename) in hashed
    assert kernel.startswith("train_") == bool(prebuilt.own_files(kernel))


@compiles
@pytest.mark.parametrize(
    "change, words",
    [
        ({"triton": "3.4.0"}, f"Triton is '{triton.__version__}' here and '3.4.0' there"),
        ({"target": "sm_100"}, "the target is 'sm_90' here and 'sm_100' there"),
        ({"multiprocessors": 114}, "the number of multiprocessors is 132 here and 114 there"),
        ({"sources": "0" * 64}, "the sources of kvfold's kernels are others than here"),
        ({"assembler": "another"}, "and 'another' there"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_a_package_for_something_else_is_refused(package: Path, change: dict, words: str) -> None:
    """Once, and kernels are compiled."""
    edit(package, lambda manifest: manifest | change)
    kvfold.use_prebuilt(package)
    with pytest.warns(RuntimeWarning, match="Kernels are compiled instead") as caught:
        assert prebuilt.load(VARIANT, TARGET) is None
    assert len(caught) == 1 and words in str(caught[0].message) and str(package) in str(caught[0].message)
    assert silently() is None and not prebuilt.covers(VARIANT, TARGET)


@compiles
def test_one_of_several_fits(package: Path, tmp_path: Path) -> None:
    """Then nobody need hear of the others."""
    other = Path(shutil.copytree(package, tmp_path / "another"))
    edit(other, lambda manifest: manifest | {"triton": "3.4.0"})
    assert kvfold.use_prebuilt(other) == kvfold.use_prebuilt(package) == 8
    assert silently() is not None


BROKEN: dict[str, tuple[Callable[[dict], object], str]] = {
    "form": (lambda m: m | {"form": 2}, "form 1"),
    "list": (lambda m: [m], "form 1"),
    "facts": (lambda m: m | {"multiprocessors": "132"}, "what it is for"),
    "escape": (lambda m: m | {"triton": "\x1b[31m"}, "what it is for"),
    "no target": (lambda m: {k: v for k, v in m.items() if k != "target"}, "what it is for"),
    "kernels": (lambda m: m | {"kernels": [*m["kernels"].values()]}, "kernels by keys"),
    "key": (lambda m: m | {"kernels": {f"../{key}": row for key, row in m["kernels"].items()}}, "kernels by keys"),
    "row": (lambda m: rows(m, lambda row: row | {"more": 1}), "of each kernel"),
    "path": (lambda m: rows(m, lambda row: row | {"sha256": "../../etc/passwd"}), "of each kernel"),
    "name": (lambda m: rows(m, lambda row: row | {"name": "../plan_kernel"}), "of each kernel"),
    "number": (lambda m: rows(m, lambda row: row | {"made": row["made"] | {"shared": "16"}}), "of each kernel"),
    "negative": (lambda m: rows(m, lambda row: row | {"made": row["made"] | {"shared": -1}}), "of each kernel"),
    "form is true": (lambda m: m | {"form": True}, "form 1"),
    "another number": (lambda m: rows(m, lambda row: row | {"made": row["made"] | {"shared": 8}}), "was changed"),
    "a number less": (lambda m: rows(m, lambda row: row | {"made": {"tmem_size": 0}}), "was changed"),
    "swapped": (lambda m: m | {"kernels": dict(zip(m["kernels"], [*m["kernels"].values()][::-1], strict=True))}, "was changed"),
    "no sha256": (lambda m: {k: v for k, v in m.items() if k != "sha256"}, "was changed"),
}


def rows(manifest: dict, change: Callable[[dict], dict]) -> dict:
    return manifest | {"kernels": {key: change(row) for key, row in manifest["kernels"].items()}}


def edit(package: Path, change: Callable[[dict], object]) -> None:
    path = package / prebuilt.MANIFEST
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def signed(manifest: dict) -> dict:
    """As if it had been made so."""
    return manifest | {"sha256": prebuilt._digest_of(manifest["kernels"])}


@compiles
@pytest.mark.parametrize("case", BROKEN)
def test_a_manifest_that_is_not_as_it_must_be(package: Path, case: str) -> None:
    change, words = BROKEN[case]
    edit(package, change)
    with pytest.raises(ValueError, match=rf"folder must be a package.*{words}"):
        kvfold.use_prebuilt(package)
    with pytest.warns(RuntimeWarning, match=words):
        assert prebuilt.load(VARIANT, TARGET) is None


@compiles
@pytest.mark.parametrize("text", ["", "{", "[" * 200_000, "\udcff", None], ids=["empty", "cut", "deep", "bytes", "none"])
def test_a_manifest_that_cannot_be_read(package: Path, text: str | None) -> None:
    path = package / prebuilt.MANIFEST
    path.unlink() if text is None else path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"folder must be a package.*prebuilt\.json"):
        kvfold.use_prebuilt(package)


@compiles
def test_a_manifest_that_is_too_long(package: Path) -> None:
    with (package / prebuilt.MANIFEST).open("r+b") as file:
        file.truncate(prebuilt.MOST_MANIFEST + 1)
    with pytest.raises(ValueError, match=r"prebuilt\.json has more than"):
        kvfold.use_prebuilt(package)


@compiles
@pytest.mark.parametrize("how", ["changed", "cut", "empty", "missing", "folder", "other"])
def test_a_binary_that_is_not_as_its_name_says(package: Path, how: str) -> None:
    """It alone is refused, by name."""
    one = prebuilt.read(package).kernels[prebuilt.key_of(VARIANT, TARGET)]
    path, other = package / one.sha256, next(p for p in package.iterdir() if len(p.name) == 64 and p.name != one.sha256)
    whole = path.read_bytes()
    path.unlink()
    match how:
        case "changed":
            path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        case "cut":
            path.write_bytes(whole[: len(whole) // 2])
        case "empty":
            path.touch()
        case "folder":
            path.mkdir()
        case "other":
            path.write_bytes(other.read_bytes())
    kvfold.use_prebuilt(package)
    with pytest.warns(RuntimeWarning, match=one.sha256):
        assert prebuilt.load(VARIANT, TARGET) is None
    assert silently(variant_of(plan_key(4, 1 << 20, False, False), True, False)) is not None


@compiles
@pytest.mark.parametrize("name", ["num_warps", "target", "name", "hash", "triton_version", "extern_libs"])
def test_a_package_says_nothing_that_is_known_here(package: Path, name: str) -> None:
    edit(package, lambda m: signed(rows(m, lambda row: row | {"made": row["made"] | {name: 1}})))
    kvfold.use_prebuilt(package)
    with pytest.warns(RuntimeWarning, match=rf"must not say of a kernel {name}"):
        assert prebuilt.load(VARIANT, TARGET) is None


@compiles
def test_environments_may_share_tritons_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that another one compiled says where its libraries lie there; it is found by what is in them."""
    there = str(tmp_path / "libdevice.10.bc")
    shutil.copy(Path(triton.__file__).parent / "backends/nvidia/lib/libdevice.10.bc", there)
    alone = prebuilt.binary_of(VARIANT.compile(TARGET), VARIANT, TARGET)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "shared"))
    with monkeypatch.context() as other:
        own = Variant.options_for
        other.setattr(Variant, "options_for", lambda *of: {**own(*of), "extern_libs": {"libdevice": there}})
        VARIANT.compile(TARGET)
    compiled = VARIANT.compile(TARGET)
    assert there in repr(compiled.metadata)
    assert prebuilt.binary_of(compiled, VARIANT, TARGET) == alone


@compiles
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Triton's __del__ of what it did not make
@pytest.mark.parametrize("said", [{}, {"shared": 16, "_x": 1}, {"shared": 16, "class": 1}], ids=["none", "_x", "class"])
def test_what_triton_cannot_read_is_compiled(package: Path, said: dict) -> None:
    edit(package, lambda m: signed(rows(m, lambda row: row | {"made": said})))
    kvfold.use_prebuilt(package)
    with pytest.warns(RuntimeWarning, match=rf"does not say of kernel {prebuilt.key_of(VARIANT, TARGET)}"):
        assert prebuilt.load(VARIANT, TARGET) is None


@compiles
def test_a_package_that_is_whole_now_is_taken(package: Path) -> None:
    """A folder that was looked at too early, as while it was copied."""
    path = package / prebuilt.MANIFEST
    whole = path.read_text()
    path.write_text(whole[:100])
    with pytest.raises(ValueError, match="is not JSON"):
        kvfold.use_prebuilt(package)
    path.write_text(whole)
    assert kvfold.use_prebuilt(package) == 8 and silently() is not None


@compiles
@pytest.mark.parametrize("knob", ["always_compile", "override", "dump_ir"])
def test_who_looks_into_the_compiler_gets_it(package: Path, knob: str) -> None:
    kvfold.use_prebuilt(package)
    with triton.knobs.compilation.scope():
        setattr(triton.knobs.compilation, knob, True)
        assert silently() is None and not prebuilt.covers(VARIANT, TARGET)
    assert silently() is not None


@compiles
def test_installed_packages_are_found_and_none_of_their_code_runs(made: Path, tmp_path: Path) -> None:
    """Of several wheels, which put their folders into one; a module there is not imported."""
    for i, place in enumerate(("one", "two")):
        shutil.copytree(made, tmp_path / place / prebuilt.INSTALLED / f"sm_90-{i}")
    code = """
import sys
sys.path[:0] = sys.argv[1:]
from kvfold.backend_triton import prebuilt
from kvfold.precompile.combinations import TARGETS
from kvfold.backend_triton.keys import plan_key
from kvfold.backend_triton.variants import variant_of
print([p.folder.name for p in prebuilt.packages()])
print(prebuilt.load(variant_of(plan_key(4, 1, False, False), True, False), TARGETS["sm_90"]).name)
print(prebuilt.INSTALLED in sys.modules)
"""
    assert python(tmp_path, code, tmp_path / "one", tmp_path / "two").split("\n")[:3] == [
        "['sm_90-0', 'sm_90-1']", "plan_kernel", "False",
    ]  # fmt: skip


@compiles
def test_a_package_is_replaced(tmp_path: Path, made: Path) -> None:
    """Binaries of the earlier one that are as they were go, and what a killed run left; other files stay."""
    folder = Path(shutil.copytree(made, tmp_path / "package"))
    (folder / ".prebuild-left").mkdir()
    (folder / ".prebuild-left" / ("0" * 64)).write_bytes(b"half")
    (folder / "notes.txt").write_text("mine")
    changed = next(p for p in folder.iterdir() if len(p.name) == 64)
    changed.write_bytes(b"mine")
    with pytest.raises(ValueError, match="calls must have one kernel at least"):
        kvfold.prebuild("sm_90", folder, [], workers=1)
    kernels = kvfold.prebuild("sm_90", folder, [STORE], workers=1)
    names = {one.sha256 for one in prebuilt.read(folder).kernels.values()}
    assert kernels == len(prebuilt.read(folder).kernels)
    assert {p.name for p in folder.iterdir()} == names | {prebuilt.MANIFEST, "notes.txt", changed.name}
    assert all(hashlib.sha256((folder / name).read_bytes()).hexdigest() == name for name in names - {changed.name})


@compiles
def test_a_failure_leaves_the_folder_as_it_was(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "package"))
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    compile_one, count = Variant.compile, []

    def broken(variant: Variant, target: object = None) -> object:
        count.append(variant)
        if len(count) == 3:
            raise RuntimeError("ptxas")
        return compile_one(variant, target)

    monkeypatch.setattr(Variant, "compile", broken)
    with pytest.raises(RuntimeError, match="ptxas"):
        kvfold.prebuild("sm_90", folder, [SMALL | {"specs": (kvfold.V4_HCA,)}], workers=1)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


@compiles
@pytest.mark.parametrize(
    "arguments, words",
    [
        (("sm_91", "x", [SMALL]), "target must be one of"),
        ((90, "x", [SMALL]), "target"),
        (("sm_90", 5, [SMALL]), "out_dir must be a path"),
        (("sm_90", "x", SMALL), r"calls\[0\] must have arguments of warmup by name"),
        (("sm_90", "x", [SMALL | {"device": 0}]), r"calls\[0\] must say what calls will be, and not device"),
        (("sm_90", "x", [SMALL | {"formatz": 0}]), r"calls\[0\].*formatz"),
        (("sm_90", "x", [SMALL | {"states": ("folds",)}]), "states must be among"),
    ],
)
def test_wrong_arguments(arguments: tuple, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((TypeError, ValueError), match=words):
        kvfold.prebuild(*arguments)
    assert not os.listdir(tmp_path)


@compiles
def test_a_manifest_of_another_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / prebuilt.MANIFEST).write_text("{}")
    with pytest.raises(ValueError, match=r"out_dir must be a folder without other prebuilt\.json"):
        kvfold.prebuild("sm_90", tmp_path, [SMALL], workers=1)
    with pytest.raises(TypeError, match="folder must be a path"):
        kvfold.use_prebuilt(3)
    with pytest.raises(ValueError, match="folder must be a path, got one with a zero character"):
        kvfold.use_prebuilt("a\0b")
    assert (tmp_path / prebuilt.MANIFEST).read_text() == "{}"


@compiles
def test_sets_are_calls_of_warmup(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the first one is the example of its documentation."""
    given: list = []
    monkeypatch.setattr(
        "kvfold.backend_triton.prepare.prepare", lambda keys, device, dependent, workers, progress: given.append(set(keys)) or 1
    )
    monkeypatch.setattr(sys.modules["kvfold.precompile.warmup"], "_gpu", lambda device, interpreted: torch.device("cuda", 0))
    example = kvfold.warmup.__doc__.partition("        kvfold.warmup(")[2].partition("\n        )")[0]
    for calls in SETS.values():
        for call in calls:
            kvfold.warmup(**call)
    exec(f"kvfold.warmup({example})", {"kvfold": kvfold, "torch": torch})
    assert given[0] == given[-1] and len(given[0]) > 10


@compiles
def test_progress_of_warmup(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvfold.backend_triton import prepare

    monkeypatch.setattr(prebuilt, "covers", lambda variant, target: variant.aligned)
    two = [VARIANT, variant_of(plan_key(4, 1, False, False), False, False)]
    assert prepare.expected(two[:1], TARGET, 2) == "1 kernels, 1 of them prebuilt"
    assert prepare.expected(two, TARGET, 2).startswith("2 kernels, 1 of them prebuilt; the others take about 1 s")
    with pytest.raises(TypeError, match="progress must be a function"):
        kvfold.warmup([], [], progress=3)
