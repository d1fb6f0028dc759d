"""What vLLM calls in each of its processes when it starts: the entry point `kvfold` of the group `vllm.general_plugins`."""

from __future__ import annotations

import os

from ..switch import asked_for

STATE = "KVFOLD_VLLM_STATE"


def load() -> None:
    """Switches kvfold on if `KVFOLD_ENGINES` has vllm. `KVFOLD_VLLM_STATE` is the `state` of `register`, if set."""
    if asked_for("vllm"):
        from .patch import register

        register(os.environ.get(STATE, "window"))
