"""Which engines kvfold plugs itself into: asked for by the environment variable `KVFOLD_ENGINES`, and done.

`KVFOLD_ENGINES=vllm`, or with the state that `register` takes after the name: `KVFOLD_ENGINES=vllm:fold,sglang`.
"""

from __future__ import annotations

import os

VARIABLE = "KVFOLD_ENGINES"
ENGINES = ("vllm", "sglang", "tensorrt_llm")

# What a plug-in replaced in this process, in a few words, by its name. It is there if and only if the plug-in is on.
ON: dict[str, str] = {}


def asked_for(engine: str) -> bool:
    """Whether `KVFOLD_ENGINES`, names separated by commas, has this engine; an unknown name is a `ValueError`."""
    return engine in _asked()


def state_for(engine: str, states: tuple[str, ...]) -> str:
    """The state that `KVFOLD_ENGINES` has after the engine's name; the first of `states` if it has none.

    Raises:
        ValueError: it is none of `states`.
    """
    state = _asked().get(engine) or states[0]
    if state not in states:
        raise ValueError(f"{VARIABLE} must have one of {', '.join(states)} behind {engine}:, got {state!r}")
    return state


def _asked() -> dict[str, str]:
    """The state after each engine's name, "" for none."""
    asked = [name.strip().partition(":") for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]
    for name, _, _ in asked:
        if name not in ENGINES:
            raise ValueError(f"{VARIABLE} must have names of {', '.join(ENGINES)}, got {name!r}")
    return {name: state for name, _, state in asked}
