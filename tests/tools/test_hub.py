"""The package under other names: relative imports, operators that do not collide, and the layout of the Hugging Face Hub."""

from __future__ import annotations

import ast
import base64
import hashlib
import importlib
import json
import re
import shutil
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.helpers import bits

import kvfold

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "kvfold"
HUB = ROOT / "packaging" / "hub.py"
# What a module may import beside the standard library. All of it is there after `pip install kvfold`, except behind an extra.
EVERYWHERE = {"torch", "triton"}
EXTRAS = {
    "__main__.py": {"kvfold_cli"},
    "debug/file.py": {"numpy", "safetensors"},
    "demo/run.py": {"transformers"},
    "demo/model.py": {"transformers"},
    "demo/plot.py": {"PIL", "matplotlib"},  # matplotlib needs PIL itself
    "demo/show.py": {"rich"},
    "demo/train.py": {"matplotlib", "rich"},
    "integrations/transformers/": {"transformers"},
    "integrations/vllm/": {"vllm"},  # engines are there when they load their plug-ins
    "integrations/sglang/": {"numpy", "sglang"},
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "repository"
    done = subprocess.run([sys.executable, str(HUB), str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def load():
    """Loads a package from its `__init__.py` under a name of its own, as `kernels` does."""
    loaded: list[str] = []

    def from_file(name: str, init: Path) -> ModuleType:
        spec = spec_from_file_location(name, init)
        sys.modules[name] = module = module_from_spec(spec)
        loaded.append(name)
        spec.loader.exec_module(module)
        return module

    layers = sys.modules.get("transformers.cache_utils")
    kept = dict(layers.DYNAMIC_LAYER_TYPE_MAPPING) if layers else {}
    yield from_file
    if layers:  # where a copy has put its own
        layers.DYNAMIC_LAYER_TYPE_MAPPING.update(kept)
    for key in [key for key in sys.modules if key.partition(".")[0] in loaded]:
        del sys.modules[key]


def imports(path: Path) -> set[str]:
    """The packages that a module imports by their own name, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.partition(".")[0])
    return found


def extras(name: str) -> set[str]:
    """Of a module by its path in the package: of its own, and of the folder that it is in."""
    return set().union(*(packages for start, packages in EXTRAS.items() if name.startswith(start)))


def test_the_command_imports_kvfold_by_its_name_and_nothing_new() -> None:
    for path in (PACKAGE.parent / "kvfold_cli").glob("*.py"):
        foreign = imports(path) - sys.stdlib_module_names
        assert foreign <= {"kvfold", "torch", "triton", "typer", "rich"}, f"{path.name} imports {sorted(foreign)}"


def test_imports_are_relative_and_of_declared_packages() -> None:
    paths = [path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] != "benchmarks"]
    assert len(paths) > 40
    for path in paths:
        name = path.relative_to(PACKAGE)
        foreign = imports(path) - sys.stdlib_module_names
        assert foreign <= EVERYWHERE | extras(name.as_posix()), f"{name} imports {sorted(foreign)}"


def run_readme(copy: ModuleType) -> dict:
    """What the README's example leaves, where `import kvfold` gives this copy."""
    example = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    torch.manual_seed(0)
    scope: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "kvfold", copy)
        exec(example, scope)
    assert scope["kvfold"] is copy
    return scope


def test_a_vendored_copy_runs_beside_the_package(tmp_path: Path, load, capsys) -> None:
    """Copied into somebody's project under another name: the README's example and the operators, to the bit."""
    mine = run_readme(kvfold)["cache"].storage
    folder = tmp_path / "engine_fold"
    shutil.copytree(PACKAGE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    copy = load("engine_fold", folder / "__init__.py")
    assert copy.compress is not kvfold.compress
    assert torch.equal(run_readme(copy)["cache"].storage, mine)

    results = [traced(package) for package in (kvfold, copy)]
    assert torch.equal(bits(results[0][0]), bits(results[1][0])) and float(results[0][0].abs().sum()) > 0
    assert results[0][1] == ["kvfold.update", "kvfold.compress"]
    assert results[1][1] == ["engine_fold.update", "engine_fold.compress"]


def traced(package: ModuleType) -> tuple[torch.Tensor, list[str]]:
    """Pooled rows of a compiled step, and the operators in its graph."""
    spec = package.CompressorSpec(head_dim=16, ratio=4, rope_dim=4)
    zero, cu_seqlens = torch.zeros(1, dtype=torch.int32), torch.tensor([0, 4], dtype=torch.int32)
    plan = package.StepPlan.build(4, zero, cu_seqlens, 4, state_slots=zero, entry_slots=zero.long())
    state, rows, ape = package.FoldState.allocate(spec, 1, 4), torch.zeros(1, 16), torch.zeros(4, 16)
    seen: list[str] = []

    def keep(graph: torch.fx.GraphModule, inputs: list) -> object:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    def step(kv_score: torch.Tensor) -> None:
        plan.update(zero, cu_seqlens)
        package.compress(kv_score, plan, state, None, spec=spec, ape=ape, norm_weight=None, rope=None, rows=rows)

    kv_score = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    torch.compile(step, backend=keep, fullgraph=True)(kv_score)
    return rows, seen


def test_hub_layout(hub: Path) -> None:
    assert {path.name for path in (hub / "build").iterdir()} == {"torch-cpu", "torch-cuda", "torch-rocm"}
    build = (hub / "build.toml").read_text()
    assert 'name = "kvfold"' in build and "[torch-noarch]" in build and '"cpu", "cuda", "rocm"' in build
    ids = set()
    for variant in (hub / "build").iterdir():
        metadata = json.loads((variant / "metadata.json").read_text())
        assert re.fullmatch(rf"_kvfold_{variant.name.removeprefix('torch-')}_[0-9a-f]{{10}}", metadata["id"])
        ids.add(metadata["id"])
        assert (metadata["name"], metadata["license"], metadata["version"]) == ("kvfold", "Apache-2.0", 0)
        assert metadata["backend"]["type"] == variant.name.removeprefix("torch-")
        files = {p.relative_to(variant).as_posix(): p for p in variant.rglob("*") if p.is_file() and p.name != "metadata.json"}
        digests = {name: base64.b64encode(hashlib.sha256(p.read_bytes()).digest()).decode() for name, p in files.items()}
        assert metadata["digest"] == {"algorithm": "sha256", "files": digests}
        source = {path.relative_to(hub / "torch-ext/kvfold").as_posix() for path in (hub / "torch-ext/kvfold").rglob("*.py")}
        assert set(files) == source | {"kvfold/__init__.py"}
        for name, path in files.items():
            assert imports(path) - sys.stdlib_module_names <= EVERYWHERE | extras(name), name
    assert len(ids) == 3


@pytest.mark.parametrize("init", ["__init__.py", "kvfold/__init__.py"])
def test_hub_variant_runs(hub: Path, load, capsys, init: str) -> None:
    """As `kernels` loads it, in its present and its former way: all of it is the one copy."""
    name = "_kvfold_cpu_" + init.partition("/")[0].strip("_.py")
    copy = load(name, hub / "build" / "torch-cpu" / init)
    run_readme(copy)
    assert hasattr(getattr(torch.ops, name), "compress")
    assert sys.modules[f"{name}.plan"].StepPlan is copy.StepPlan
    pytest.importorskip("transformers")
    assert callable(importlib.import_module(f"{name}.integrations.transformers").patch)


def test_hub_command_refuses_other_folders(tmp_path: Path, hub: Path) -> None:
    (tmp_path / "build").mkdir()
    (tmp_path / "build.toml").write_text('[general]\nname = "other"\n')
    for arguments, words in (([], "usage"), (["--help"], "usage"), ([str(tmp_path)], "must be new")):
        done = subprocess.run([sys.executable, str(HUB), *arguments], capture_output=True, text=True)
        assert done.returncode == 1 and words in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["build", "build.toml"]
    stale = hub / "build" / "torch-cpu" / "gone.py"
    stale.touch()
    again = subprocess.run([sys.executable, str(HUB), str(hub)], capture_output=True, text=True)
    assert again.returncode == 0 and not stale.exists()
