"""How a hostile call may end: a result, a count, or an error of ours that names the argument; anything else is a fault."""

from __future__ import annotations

import os
import re
import traceback
from typing import NamedTuple

from support.hostile_cases import Case, Spoil
from support.hostile_plain import ALIASES, PLAIN
from support.hostile_world import FUNCTIONS

import kvfold
from kvfold import CompressorSpec

PACKAGE = os.path.dirname(os.path.abspath(kvfold.__file__)) + os.sep


class Outcome(NamedTuple):
    """`word`: ok, counted, refused; or a fault, of which `text` says more."""

    case: Case
    word: str
    text: str = ""

    @property
    def fault(self) -> bool:
        return self.word not in ("ok", "counted", "refused")


# Arguments that state one fact together: where they disagree, the error may name any of them.
RELATED: dict[str, tuple[str, ...]] = {
    "start_pos": ("cu_seqlens", "state_slots", "block_tables", "cache_block_table", "snapshot_table", "pages", "slots"),
    "cu_seqlens": ("start_pos",),
    "state_slots": ("block_tables", "state"),
    "block_tables": ("state_slots", "page_size", "snapshot_table", "state"),
    "page_size": ("state", "snapshots", "plan", "block_tables", "snapshot_table", "rows", "positions", "snapshot_page_size"),
    "snapshot_page_size": ("snapshots", "snapshot_table"),
    "snapshot_table": ("snapshot_page_size", "snapshots"),
    "entry_slots": ("cache_block_table", "rows", "latent", "cache"),
    "cache_block_table": ("entry_slots", "rows_per_page", "cache"),
    "rows_per_page": ("cache", "plan", "storage", "scales", "slots", "slot"),
    "ratio": ("spec", "rows", "latent", "max_new_tokens"),
    "max_new_tokens": ("rows", "latent", "positions", "max_tokens", "ratio"),
    "max_tokens": ("rows", "latent", "max_new_tokens"),
    "rows": ("positions", "kv_score", "snapshots"),
    "latent": ("rows", "norm_weight"),
    "positions": ("rows",),
    "kv": ("score", "plan", "page_size"),
    "score": ("kv", "kv_score"),
    "storage": ("scales", "slots", "slot", "cache"),
    "scales": ("storage", "fmt"),
    "fmt": ("storage", "scales", "format", "head_dim", "rope_dim", "scale"),
    "kv_score": ("state", "rows", "packing", "ape", "norm_weight", "d_entries"),
    "hidden": ("weight", "kv_score"),
    "weight": ("hidden",),
    "codes": ("hidden",),
    "round_kv_score": ("kv_score", "state"),
    "state": ("plan", "kv_score", "snapshots", "spec"),
    "cache": ("plan", "entry_slots", "slots", "slot"),
    "snapshots": ("plan", "state"),
    "slots": ("pages", "start_pos"),
    "backend": ("kv_score", "rows", "state"),
    "packing": ("kv_score", "rope"),
    "tokens": ("packing", "cu_seqlens", "kv_score"),
    "max_seqlen": ("packing", "rope", "tokens"),
    "pieces": ("packing",),
    "d_entries": ("out_dtype", "kv_score"),
    "d_latent": ("out_dtype", "latent", "d_entries"),
    "out_dtype": ("d_entries", "d_latent"),
    "fake_quant": ("cache_scale", "out_dtype", "fmt", "head_dim", "rope_dim"),
    "cache_scale": ("fake_quant",),
}  # fmt: skip
ANY = ("spec",)  # which everything else is made for; and where tensors are of two kinds, either may be the wrong one


def names_for(case: Case, spoil: Spoil) -> set[str]:
    """What an error may call the argument."""
    if case.function in PLAIN:
        return {spoil.target, *ALIASES.get(spoil.target, ())}
    parts = [part for part in spoil.target.split(".") if not part.isdigit()]
    found = {*parts, "things"} if case.function == "mark_static" else set(parts)
    for part in parts:
        found |= set(RELATED.get(part, ()))
    if parts[-1] in ANY or spoil.what in ("on meta", "on a CPU", "fake"):
        found |= _all_words(case)
    if spoil.how == "inside":  # all that is made there is of the transform, and the whole call is refused
        found |= {"plan", "items", "storage", "transforms"}
    if spoil.how in ("memory of", "argument"):
        found |= {part for part in spoil.what.split(".") if not part.isdigit()}
    return found


def _all_words(case: Case) -> set[str]:
    words = {part for name in FUNCTIONS[case.function].arguments for part in name.split(".")}
    fields = set(CompressorSpec.__dataclass_fields__)
    return words | fields | {"storage", "scales", "rows", "kv", "score", "positions", "fmt", "format", "page_size"}


def judge(case: Case, error: Exception) -> Outcome:
    """An error must be ours, of a type that is promised, and name the argument."""
    text = last_line(error)
    if type(error) is RuntimeError and case.function.startswith(("check", "dump")) and "must be called outside of" in text:
        return Outcome(case, "refused", text)  # as their documents say
    if not isinstance(error, (TypeError, ValueError)):
        return Outcome(case, f"unnamed {type(error).__name__}", text)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    if not os.path.abspath(frame.filename).startswith(PACKAGE) or not (frame.line or "").startswith("raise"):
        return Outcome(case, f"{type(error).__name__} of torch", text)
    words = set(re.findall(r"\w+", str(error)))
    accepted = set().union(*(names_for(case, spoil) for spoil in case.spoils))
    if not words & accepted:
        return Outcome(case, "other name", text)
    return Outcome(case, "refused", text)


def last_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()] or [""]
    frames = [f for f in traceback.extract_tb(error.__traceback__) if os.path.abspath(f.filename).startswith(PACKAGE)]
    where = f" [{os.path.relpath(frames[-1].filename, PACKAGE)}:{frames[-1].name}]" if frames else ""
    return f"{type(error).__name__}: {lines[0][:200]}{where}"
