"""How the package is laid out: imports run down between the levels that DESIGN.md names, and files and calls stay short."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "kvfold"
COMMAND = "kvfold_cli"  # the package beside it, which says `kvfold.` where kvfold itself says `.`
KERNELS = "backend_triton/kernels/"

# From top to bottom, as DESIGN.md has them (Layout). A module belongs to the longest name that its own begins with.
LEVELS = (
    ("__init__", "__main__", "kvfold_cli"),
    ("demo", "verify", "debug", "explain", "testing", "integrations", "parallel", "precompile"),
    ("compress", "store", "restore", "plan", "training"),
    ("ops",),
    ("calls",),
    (
        "backend_torch",
        "backend_triton.again",
        "backend_triton.launch",
        "backend_triton.launch_product",
        "backend_triton.launcher",
        "backend_triton.prepare",
    ),
    ("backend_triton.variants", "backend_triton.keys", "backend_triton.build", "backend_triton.prebuilt"),
    ("backend_triton.kernels",),
    ("backend_triton.args", "backend_triton.table"),
    ("storage",),
    ("spec", "reference", "arguments", "contract", "_version"),
)
MOST_AT_THE_TOP = 12
MOST_LINES = 500
MOST_PARAMETERS = 20
MOST_POSITIONAL = 15
MOST_TIMED = 0.08
PRIVATE = re.compile(r"_(?!_)")

Sources = dict[str, str]  # a file's path inside the package, and its text


class Edge(NamedTuple):
    """Module `source` imports `target`, at `line`; names without `kvfold.`, the package itself as `__init__`."""

    source: str
    target: str
    line: int


def read() -> Sources:
    paths = [path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] != "benchmarks"]
    beside = {f"{COMMAND}/{path.name}": path.read_text() for path in (PACKAGE.parent / COMMAND).glob("*.py")}
    return {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in paths} | beside


def module_of(path: str) -> str:
    name = path.removesuffix(".py").replace("/", ".")
    return name if name == "__init__" else name.removesuffix(".__init__")


def imports_of(path: str, tree: ast.AST) -> Iterator[tuple[ast.ImportFrom, str]]:
    """Every import of kvfold's in a file, wherever it stands, and what it is from; "" for the package itself."""
    folder = path.split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = folder[: len(folder) - node.level + 1]
            yield node, ".".join([*base, *([node.module] if node.module else [])])
        elif isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] in ("kvfold", COMMAND):
            yield node, node.module if node.module.startswith(COMMAND) else node.module[len("kvfold.") :]


def edges(sources: Sources) -> list[Edge]:
    modules = {module_of(path) for path in sources}
    found = []
    for path, text in sources.items():
        for node, base in imports_of(path, ast.parse(text)):
            for alias in node.names:
                whole = f"{base}.{alias.name}".lstrip(".")
                found.append(Edge(module_of(path), whole if whole in modules else base or "__init__", node.lineno))
    return found


def level_of(module: str, levels: tuple[tuple[str, ...], ...] = LEVELS) -> int | None:
    """None for a module that no level names."""
    fits = [(len(name), i) for i, names in enumerate(levels) for name in names if f"{module}.".startswith(f"{name}.")]
    return max(fits)[1] if fits else None


def arrows_up(sources: Sources) -> list[str]:
    found = []
    for source, target, line in edges(sources):
        high, low = level_of(source), level_of(target)
        if high is None or low is None or high > low:
            found.append(f"{source}:{line} imports {target}")
    return found


def circle(arrows: set[tuple[str, str]]) -> list[str]:
    """The names along one circle, or nothing."""
    after: dict[str, list[str]] = {}
    for source, target in sorted(arrows):
        after.setdefault(source, []).append(target)
    done: set[str] = set()

    def follow(name: str, path: list[str]) -> list[str]:
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return []
        found = next(filter(None, (follow(target, [*path, name]) for target in after.get(name, ()))), [])
        done.add(name)
        return found

    return next(filter(None, (follow(name, []) for name in after)), [])


def circles(sources: Sources) -> list[list[str]]:
    """One between modules, and one between the folders and modules at the top, if there are any."""
    arrows = {(source, target) for source, target, _ in edges(sources)}
    tops = {(source.partition(".")[0], target.partition(".")[0]) for source, target in arrows}
    return [found for found in (circle(arrows), circle({(a, b) for a, b in tops if a != b})) if found]


def private_names(sources: Sources) -> list[str]:
    """Names with an underscore that a file takes from another one, also as `module._name`."""
    modules, found = {module_of(path) for path in sources}, []
    for path, text in sources.items():
        tree, held = ast.parse(text), set()
        for node, base in imports_of(path, tree):
            for alias in node.names:
                if PRIVATE.match(alias.name):
                    found.append(f"{path}:{node.lineno} imports {alias.name}")
                if f"{base}.{alias.name}".lstrip(".") in modules:
                    held.add(alias.asname or alias.name)
        for node in ast.walk(tree):
            private = isinstance(node, ast.Attribute) and PRIVATE.match(node.attr)
            if private and isinstance(node.value, ast.Name) and node.value.id in held:
                found.append(f"{path}:{node.lineno} reads {node.value.id}.{node.attr}")
    return found


def long_files(sources: Sources) -> list[str]:
    return [path for path, text in sources.items() if len(text.splitlines()) > MOST_LINES]


def many_at_the_top(sources: Sources) -> list[str]:
    top = sorted(path for path in sources if "/" not in path)
    return top if len(top) > MOST_AT_THE_TOP else []


def many_parameters(sources: Sources) -> list[str]:
    """Functions under kernels/ that are no kernels themselves: those are named `*_kernel`, and take what a launch passes."""
    found = []
    for path, text in sources.items():
        for node in ast.walk(ast.parse(text)) if path.startswith(KERNELS) else ():
            if isinstance(node, ast.FunctionDef) and not node.name.endswith("_kernel"):
                count = len([*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs])
                if count > MOST_PARAMETERS:
                    found.append(f"{path}:{node.lineno} {node.name} takes {count}")
    return found


def many_positional(sources: Sources) -> list[str]:
    found = []
    for path, text in sources.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and len(node.args) > MOST_POSITIONAL:
                found.append(f"{path}:{node.lineno} passes {len(node.args)} by position")
    return found


def blocks(text: str) -> Iterator[str]:
    """Comment blocks: lines of comment below each other, a comment behind code, a paragraph of a docstring."""
    last, lines = -1, []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type != tokenize.COMMENT:
            continue
        row, alone = token.start[0], not token.line[: token.start[1]].strip()
        if lines and not (alone and row == last + 1):
            yield " ".join(lines)
            lines = []
        lines.append(token.string.lstrip("# "))
        last = row if alone else -1
    if lines:
        yield " ".join(lines)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            yield from re.split(r"\n\s*\n", ast.get_docstring(node) or "")


# A block is a measurement if it has a number of microseconds, or a number right before or behind "instead of".
TIMING = re.compile(r"\d\s*(us|µs)\b|\d\S* instead of\b|\binstead of \S*\d")


def timed_share(sources: Sources) -> float:
    """Of all words in comments and docstrings under kernels/, those that stand in a block with a measurement."""
    found = [block for path, text in sources.items() if path.startswith(KERNELS) for block in blocks(text)]
    words = sum(len(block.split()) for block in found)
    return sum(len(block.split()) for block in found if TIMING.search(block)) / max(words, 1)


def test_design_names_the_levels() -> None:
    listed = re.search(r"<!-- levels -->\n(.*?)<!-- end -->", (ROOT / "DESIGN.md").read_text(), re.DOTALL)[1]
    lines = re.findall(r"^\d+\. (.*?)(?:: .*)?$", listed, re.MULTILINE)
    assert tuple(tuple(re.findall(r"`(\S+?)`", line)) for line in lines) == LEVELS


def test_every_module_has_a_level_and_every_level_modules() -> None:
    modules = {module_of(path) for path in read()} - {"backend_triton"}  # an empty `__init__`
    assert not [module for module in modules if level_of(module) is None]
    assert not [name for names in LEVELS for name in names if not any(f"{m}.".startswith(f"{name}.") for m in modules)]


RULES: dict[Callable[[Sources], list], tuple[Sources, Sources]] = {
    arrows_up: (
        {"storage/a.py": "from ..spec import b", "spec.py": "", "kvfold_cli/c.py": "from kvfold.ops import d", "ops.py": ""},
        {"storage/a.py": "if TYPE_CHECKING:\n    from ..calls.run import b", "calls/run.py": "b = 1"},
    ),
    circles: (
        {"a.py": "from .b import x", "b.py": "from .c import x", "c.py": ""},
        {"a.py": "from .b import x", "b.py": "def f():\n    from . import c", "c.py": "from . import a"},
    ),
    private_names: (
        {"a.py": "from ._version import __version__", "_version.py": ""},
        {"a.py": "from . import b\nb._x", "b.py": "_x = 1"},
    ),
    long_files: ({"a.py": "x = 1\n" * 500}, {"a.py": "x = 1\n" * 501}),
    many_at_the_top: (
        {f"{name}.py": "" for name in "abcdefghijkl"} | {"a/m.py": ""},
        {f"{name}.py": "" for name in "abcdefghijklm"},
    ),
    many_parameters: (
        {f"{KERNELS}a.py": f"def x_kernel({', '.join(f'a{i}' for i in range(30))}): ..."},
        {f"{KERNELS}a.py": f"def x({', '.join(f'a{i}' for i in range(21))}): ..."},
    ),
    many_positional: (
        {"a.py": f"f({', '.join('1' * 15)})"},
        {"a.py": f"f({', '.join('1' * 16)})"},
    ),
}  # fmt: skip
each_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)


@each_rule
def test_the_package_keeps_the_rule(rule: Callable[[Sources], list]) -> None:
    found = rule(read())
    assert not found, "\n".join(map(str, found))


@each_rule
def test_a_rule_can_be_kept_and_broken(rule: Callable[[Sources], list]) -> None:
    good, bad = RULES[rule]
    assert not rule(good) and rule(bad)


def test_other_ways_to_break_a_rule() -> None:
    assert private_names({"a.py": "from .b import _x", "b.py": ""})
    assert arrows_up({"nowhere.py": "from .spec import a", "spec.py": ""}), "a module without a level"
    assert arrows_up({"ops.py": "from . import __version__", "__init__.py": ""}), "the package itself is at the top"
    assert arrows_up({"ops.py": "from kvfold_cli.app import app", "kvfold_cli/app.py": ""}), "the command is, too"
    assert circles({"a/x.py": "from ..b.x import y", "b/x.py": "", "b/z.py": "from ..a.w import y", "a/w.py": ""}), "of folders"


def test_measurements_are_notes() -> None:
    assert timed_share(read()) <= MOST_TIMED


def test_measurements_are_found() -> None:
    def share(text: str) -> float:
        return timed_share({f"{KERNELS}a.py": text})

    assert share('"""One two.\n\nThree: 4.5 us here.\n"""\n') == 4 / 6
    assert share("# one two\n# three 8 us\nx = 1  # four five\n") == 5 / 7
    assert share("x = 1  # 16.9 instead of 18.3\n# four words stand here\n") == 4 / 8
    assert share("# one load instead of two; at most 8 rows\n") == 0
    assert timed_share({"a.py": "# 4 us\n"}) == 0
