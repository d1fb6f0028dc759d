"""What vLLM calls in each of its processes when it starts: the entry point `kvfold` of the group `vllm.general_plugins`."""

from __future__ import annotations

from ..switch import asked_for, state_for


def load() -> None:
    """Switches kvfold on if `KVFOLD_ENGINES` has vllm; `vllm:fold` is `register("fold")`."""
    if asked_for("vllm"):
        from .patch import STATES, register

        register(state_for("vllm", STATES))
