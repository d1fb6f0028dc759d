"""What Triton's IR of a kernel says of its loops."""

from __future__ import annotations

import re

from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend

from kvfold.backend_triton.build import Variant

_NAME = re.compile(r"%[\w.-]+(?:#\d+)?")
_LOOP = re.compile(r"scf\.for (%[\w.-]+) = (%[\w.-]+(?:#\d+)?) to (%[\w.-]+(?:#\d+)?) step (%[\w.-]+(?:#\d+)?)")
_CARRIED = re.compile(r"(%[\w.-]+) = (%[\w.-]+(?:#\d+)?)")
_PURE = re.compile(r"= (arith|math|tt\.(?!store|elementwise|atomic)|tt\.elementwise_inline_asm.*pure = true)")


def lost_bounds(ttir: str) -> list[str]:
    """Bounds of inner loops that Triton up to 3.6 may take for what they were before the loop around them began.

    It drops what a loop carries if it finds no use of it, and does not look at the bounds of loops inside. ttir: of a kernel.
    """
    sources: dict[str, set[str]] = {}  # of each value, what it is made of
    needed: set[str] = set()
    carried: set[str] = set()
    bounds: list[tuple[str, ...]] = []
    regions: list[tuple[str, list[str], list[str]]] = []  # the operation, its results, and what it carries
    for line in ttir.splitlines():
        text = re.sub(r" loc\(.*", "", line).strip()
        made, _, rest = text.partition(" = ")
        results = []
        if made.startswith("%") and rest:
            name, _, many = made.partition(":")
            results = [f"{name}#{i}" for i in range(int(many))] if many else [x.strip() for x in made.split(",")]
        if text.startswith("}"):
            if text.startswith(("} else", "} do")):
                continue
            if regions:
                regions.pop()
        elif loop := _LOOP.search(text):
            pairs = _CARRIED.findall(text[loop.end() :])
            own = [own for own, _ in pairs]
            for value, init in pairs:
                sources.setdefault(value, set()).add(init)
            carried.update(own)
            bounds.append(loop.groups()[1:])
            regions.append(("for", results, own))
        elif text.startswith("scf.yield"):
            kind, outs, own = regions[-1]
            for i, value in enumerate(_NAME.findall(text)):
                for to in (outs[i : i + 1] or []) + (own[i : i + 1] if kind == "for" else []):
                    sources.setdefault(to, set()).add(value)
        elif text.endswith("{"):
            operands = _NAME.findall(rest if results else text)
            needed.update(operands)  # conditions; and of reductions what they are of
            for result in results:
                sources.setdefault(result, set()).update(operands)
            regions.append(("if", results, []))
        elif results and _PURE.search(text):
            for result in results:
                sources.setdefault(result, set()).update(_NAME.findall(rest))
        else:
            needed.update(_NAME.findall(rest if results else text))
            for result in results:
                sources.setdefault(result, set()).update(_NAME.findall(rest))
    alive = _all_of(needed, sources)
    return sorted({bound for some in bounds for bound in some if (_all_of({bound}, sources) & carried) - alive})


def _all_of(values: set[str], sources: dict[str, set[str]]) -> set[str]:
    found, left = set(), list(values)
    while left:
        value = left.pop()
        if value not in found:
            found.add(value)
            left.extend(sources.get(value, ()))
    return found


def ttir_of(variant: Variant, target: GPUTarget) -> str:
    """What Triton's passes for a GPU begin with."""
    source, backend = variant.source_for(target), make_backend(target)
    options = backend.parse_options({**variant.options_for(target), **source.parse_options()})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    module = source.make_ir(target, options, functions, modules, context)
    stages: dict = {}
    backend.add_stages(stages, options, source.language)
    return str(stages["ttir"](module, {}))
