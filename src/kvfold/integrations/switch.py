"""Which engines kvfold plugs itself into: asked for by the environment variable `KVFOLD_ENGINES`, and done."""

from __future__ import annotations

import os

VARIABLE = "KVFOLD_ENGINES"
ENGINES = ("vllm", "sglang", "tensorrt_llm")

# What a plug-in replaced in this process, in a few words, by its name. It is there if and only if the plug-in is on.
ON: dict[str, str] = {}


def asked_for(engine: str) -> bool:
    """Whether `KVFOLD_ENGINES`, names with commas between them, has this engine; a name of none is a `ValueError`."""
    names = [name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]
    for name in names:
        if name not in ENGINES:
            raise ValueError(f"{VARIABLE} must have names of {', '.join(ENGINES)}, got {name!r}")
    return engine in names
