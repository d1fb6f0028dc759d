"""Adapters that let other people's models and engines run on kvfold. Import the one you need; `status` tells of all."""

from __future__ import annotations

from importlib import metadata
from typing import NamedTuple

from .switch import ENGINES, ON, VARIABLE, asked_for

# By the name of an integration: the group of entry points through which the engine finds kvfold, if it looks for any.
GROUPS = {"vllm": "vllm.general_plugins", "sglang": "sglang.srt.plugins", "tensorrt_llm": None, "transformers": None}


class Status(NamedTuple):
    """How an integration stands in this process.

    Attributes:
        version: of the engine, or "not installed".
        entry_point: whether the engine finds kvfold by itself: "found", "missing", or "none" where the engine looks for none.
        on: what was replaced, "off", or why it is not on although `KVFOLD_ENGINES` asks for it.
    """

    name: str
    version: str
    entry_point: str
    on: str


def status(*, load: bool = False) -> list[Status]:
    """Of every integration.

    load: whether to call the entry points of the engines that `KVFOLD_ENGINES` names, as these do when they start: only that
        tells whether they take kvfold. It imports the engine.
    """
    return [_status(name, load) for name in GROUPS]


def _status(name: str, load: bool) -> Status:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        version = "not installed"
    group = GROUPS[name]
    points = [point for point in metadata.entry_points(group=group) if point.name == "kvfold"] if group else []
    found = "none" if group is None else "found" if points else "missing"
    on = ON.get(name, "off")
    try:
        if on == "off" and name in ENGINES and asked_for(name):
            on = f"asked for by {VARIABLE}, not loaded in this process"
            if load and points:
                points[0].load()()
                on = ON.get(name, on)
    except Exception as error:  # of an engine's import, whatever it is: the caller asked why it is not on
        on = f"not on: {error}"
    return Status(name, version, found, on)
