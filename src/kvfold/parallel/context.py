"""`ContextParallel`: the calls that every rank makes."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ..arguments.checks import check_memory, check_shape, check_type, usable_device
from ..calls.checks import compressor_of
from ..contract import UnsupportedError
from ..spec import CompressorSpec, check_spec
from ..storage.fold_state import FoldState
from ..storage.formats import RecordFormat
from ..storage.step import Compressor
from .eager import eager
from .exchange import How, Part, Scratch, exchange, run
from .gather import gather, put_ends
from .halo import CutPacking
from .plan import ParallelPlan
from .schedule import Reads
from .shards import LAYOUTS, Shards
from .training import AllEntries, Call, Entries
from .transport import Transport
from .weights import WEIGHTS


class ContextParallel:
    """A group of processes over which sequences are cut; one object in each process.

    Attributes:
        rank, size: of this process in the group, and how many there are.
        layout: the layout that `split` uses: "contiguous" or "zigzag".
    """

    def __init__(
        self,
        group: dist.ProcessGroup | DeviceMesh | None = None,
        layout: str = "contiguous",
        *,
        timeout: timedelta | None = None,
    ) -> None:
        """Sends nothing.

        Args:
            group: the processes: a group of torch.distributed, or a device mesh of one dimension. None means all processes, or
                this one alone if torch.distributed is not initialized.
            layout: "contiguous" or "zigzag"; see `Shards.build`.
            timeout: how long to wait for another rank. Default, and always with NCCL: the timeout of the group.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                raise ValueError(f"group must be a mesh of one dimension, as mesh['cp'], got {group.ndim} dimensions")
            group = group.get_group()
        if group is None and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"group must be a process group or a DeviceMesh that this rank is in, got {type(group).__name__}")
        if layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
        if timeout is not None:
            check_type("timeout", timeout, timedelta)
        self.layout, self._transport = layout, Transport(group, timeout)
        self._agreed: set[str] = set()
        self._scratch: weakref.WeakKeyDictionary[FoldState, Scratch] = weakref.WeakKeyDictionary()

    @property
    def rank(self) -> int:
        return self._transport.rank

    @property
    def size(self) -> int:
        return self._transport.size

    @eager
    def split(
        self,
        lengths: Sequence[int],
        *,
        start_pos: Sequence[int] | None = None,
        each: bool = False,
        cuts: Sequence[int] | None = None,
    ) -> Shards:
        """`Shards.build` for this group; first all ranks check that they have the same arguments. Waits for them.

        Args: as for `Shards.build`.

        Raises:
            TypeError, ValueError: naming the argument. RankError: naming the argument that differs on other ranks, or the rank
                that does not answer.
        """
        shards = Shards.build(lengths, self.size, layout=self.layout, start_pos=start_pos, each=each, cuts=cuts)
        self._transport.agree(layout=self.layout, lengths=shards.lengths, start_pos=shards.start_pos, cuts=shards.segments)
        return shards

    def _check(self, shards: Shards, spec: CompressorSpec) -> None:
        check_type("shards", shards, Shards)
        check_spec("spec", spec)
        if shards.ranks != self.size:
            raise ValueError(f"shards must be for {self.size} ranks, got {shards.ranks}")

    @eager
    def plan(
        self,
        shards: Shards,
        spec: CompressorSpec,
        *,
        device: torch.device | str | None = None,
        state_slots: Sequence[int] | None = None,
        entry_slots: torch.Tensor | None = None,
        cache_block_table: torch.Tensor | None = None,
        rows_per_page: int | None = None,
        errors: torch.Tensor | None = None,
    ) -> ParallelPlan:
        """This rank's part of a step, for all compressors of one ratio and overlap. Sends nothing.

        Slots and tables cover all sequences of the step, in this rank's own states and caches; other ranks may have other
        numbers. They are read here once.

        Args:
            shards: those of the step.
            spec: any of the compressors; only its ratio, its overlap and whether it has a gate matter.
            device: of the tokens; default that of the slots or the table, else torch's.
            state_slots: the slot of each sequence in the states, on the host, all different; default 0, 1, ...
            entry_slots: int32 or int64 `[E]`: the cache slot of each entry of the step, in the order of one process: by
                sequence, then by window. -1 drops the entry, and must be -1 on all ranks.
            cache_block_table: int32 or int64 `[B, Q]`, instead: as for `StepPlan.build`.
            rows_per_page: with `cache_block_table`: entries per page, the same as the cache's.
            errors: int32 `[1]`, to count in; default a new one.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        self._check(shards, spec)
        given = next((x for x in (entry_slots, cache_block_table, errors) if x is not None), None)
        if device is None and isinstance(given, torch.Tensor):
            device = given.device
        return ParallelPlan(
            shards,
            self.rank,
            spec,
            torch.empty(0, device=usable_device("device", device)).device,
            state_slots=state_slots,
            entry_slots=entry_slots,
            cache_block_table=cache_block_table,
            rows_per_page=rows_per_page,
            errors=errors,
        )

    @eager
    def compress(
        self,
        compressors: Sequence[Compressor | tuple],
        plan: ParallelPlan,
        *,
        backend: str | None = None,
        pdl: bool | None = None,
    ) -> None:
        """`kvfold.compress` of a step that is cut over the ranks, for one compressor or more; every rank calls it.

        Writes the entries that this rank owns to its caches, with the bits of one process. Writes to its states what the next
        step needs of the sequences that end on this rank. `gather` gives both to all ranks. One message between two ranks
        carries all these compressors. On a GPU results follow the order of the stream; gloo makes the host wait.

        Args:
            compressors: `(kv_score, state, cache, spec, ape, norm_weight, rope)` for each, in the same order on every rank.
                `kv_score` holds the rank's own tokens in the order of `plan.shards`. `state` is a `FoldState`, or None without
                a gate. Two compressors with states are one launch, as in `compress_many`. Snapshots are refused.
            plan: the plan of this step, for their ratio and overlap.
            backend, pdl: as for `kvfold.compress`.

        Raises:
            TypeError, ValueError: naming the argument, `compressors[i]` before it.
            RankError: naming the ranks that did not answer. No entry and no state has been written then, as the exchange comes
                first. (With NCCL the group's watchdog ends the process instead.) Or naming compressors that differ on other
                ranks; that is checked when a list is first seen.
        """
        made = self._checked(compressors, plan)
        self._agree(made)
        how = How(backend, pdl)
        count = len(plan.shards.segments[self.rank])
        parts = [Part(c, self._scratch_of(c.state, count)) for c in made if c.spec.gate]
        with torch.inference_mode():
            ends = exchange(parts, plan, self._transport, how) if parts else []
        mains = iter(parts)
        if plan.step is not None:
            run([c._replace(state=next(mains).scratch.main) if c.spec.gate else c for c in made], plan.step, how)
        with torch.inference_mode():
            for part, carry in zip(parts, ends, strict=True):
                put_ends(part.c.state, plan, self.rank, carry)

    @eager
    def gather(self, compressors: Sequence[Compressor | tuple], plan: ParallelPlan) -> None:
        """Gives every rank the entries and the states that `compress` made, in one all-gather; every rank calls it.

        Records are sent as bytes. Each rank stores them at the slots of its own plan. `plan.errors` then counts what any
        rank refused.

        Args:
            compressors, plan: as `compress` had them. Mutated: caches and states.

        Raises:
            TypeError, ValueError: naming the argument. RankError: naming the ranks that did not answer; nothing has been
                written then.
        """
        made = self._checked(compressors, plan)
        self._agree(made)
        gather(made, plan, self._transport)

    @eager
    def packing(self, shards: Shards, spec: CompressorSpec, *, device: torch.device | str | None = None) -> CutPacking:
        """For training: this rank's part of packed sequences, for all compressors of one ratio and overlap. Sends nothing.

        Args:
            shards: those of whole sequences, without `start_pos`.
            spec: any of the compressors; only its ratio and its overlap matter.
            device: of the tokens; default torch's.

        Raises:
            TypeError, ValueError: naming the argument.
        """
        self._check(shards, spec)
        return CutPacking(shards, self.rank, spec, torch.empty(0, device=usable_device("device", device)).device)

    @eager
    def entries(
        self,
        kv_score: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        packing: CutPacking,
        *,
        spec: CompressorSpec,
        ape: torch.Tensor | None,
        norm_weight: torch.Tensor,
        rope: torch.Tensor | None,
        round_rows: bool | None = None,
        out_dtype: torch.dtype | None = None,
        fake_quant: str | RecordFormat | None = None,
        cache_scale: torch.Tensor | None = None,
        weights: str = "gather",
        backend: str | None = None,
    ) -> torch.Tensor:
        """`kvfold.training.compress` of sequences that are cut over the ranks; every rank calls it, and its backward.

        Entries and gradients have the bits of one process. Second derivatives are refused.

        Args:
            kv_score: the rank's own tokens in the order of `packing.shards`, otherwise as for `training.compress`.
            packing: for `spec`.
            spec, ape, norm_weight, rope, round_rows, out_dtype, fake_quant, cache_scale, backend: as for `training.compress`,
                the same on all ranks.
            weights: how the gradients of ape and norm_weight are summed over ranks. "gather": in the order of one process, with
                its bits. "reduce": by an all-reduce, which is cheaper and agrees to rounding. "own": not at all, for trainers
                that reduce over the group themselves.

        Returns:
            `[packing.entries, head_dim]`: the entries of the windows that end in the rank's tokens, by segment, then by window.
            To autograd it depends on all inputs, even if it is empty.

        Raises:
            TypeError, ValueError: naming the argument. RankError: naming the ranks that did not answer.
        """
        check_type("packing", packing, CutPacking)
        check_spec("spec", spec)
        if (spec.ratio, spec.overlap) != (packing.ratio, packing.overlap):
            want = f"of ratio {packing.ratio} and overlap {packing.overlap} like packing"
            raise ValueError(f"spec must be {want}, got ratio {spec.ratio} and overlap {spec.overlap}")
        if weights not in WEIGHTS:
            raise ValueError(f"weights must be one of {WEIGHTS}, got {weights!r}")
        if spec.rope_dim and isinstance(rope, torch.Tensor) and rope.shape[0] <= packing.last_start:
            raise ValueError(
                f"rope must have {packing.last_start + 1} rows for the positions of rank {self.rank}, got {rope.shape[0]}"
            )
        tokens = kv_score if isinstance(kv_score, tuple) else (kv_score,)
        options = {"round_rows": round_rows, "out_dtype": out_dtype, "fake_quant": fake_quant, "backend": backend}
        call = Call(packing, self._transport, spec, options, cache_scale, weights)
        return Entries.apply(call, ape, norm_weight, rope, *tokens)

    @eager
    def all_entries(self, entries: torch.Tensor, packing: CutPacking) -> torch.Tensor:
        """The entries of all ranks, where attention wants them; every rank calls it, and its backward.

        Args:
            entries: the result of `entries`.
            packing: the same as there.

        Returns:
            `[E, head_dim]` in the order of one process: by sequence, then by window. The gradient of an entry is the sum of its
            gradients on all ranks, added in fp32 in the order of ranks.

        Raises:
            TypeError, ValueError: naming the argument. RankError: naming the ranks that did not answer.
        """
        check_type("packing", packing, CutPacking)
        check_type("entries", entries, torch.Tensor)
        if entries.dim() != 2 or entries.shape[0] != packing.entries:
            raise ValueError(f"entries must be the {packing.entries} of rank {self.rank}, got shape {list(entries.shape)}")
        return AllEntries.apply(packing, self._transport, entries)

    def _checked(self, compressors: Sequence[Compressor | tuple], plan: ParallelPlan) -> list[Compressor]:
        check_type("plan", plan, ParallelPlan)
        if not isinstance(compressors, Sequence) or isinstance(compressors, Compressor) or not len(compressors):
            raise TypeError(f"compressors must be a sequence of one or more, got {type(compressors).__name__}")
        made = []
        for i, one in enumerate(compressors):
            name = f"compressors[{i}]"
            c = compressor_of(name, one)
            made.append(c)
            check_spec(f"{name}: spec", c.spec)
            if Reads.of(c.spec) != plan.reads:
                raise ValueError(f"{name}: spec must be of {plan.reads} like plan, got {Reads.of(c.spec)}")
            if c.snapshots is not None:
                raise UnsupportedError(f"{name}: snapshots must be None, as each rank has only some of a page's rows")
            if c.spec.gate and not isinstance(c.state, FoldState):
                what = type(c.state).__name__
                raise UnsupportedError(f"{name}: state must be a FoldState, whose carry can be sent, got {what}")
            if c.spec.gate and max(plan.state_slots, default=0) >= c.state.num_slots:
                most = max(plan.state_slots)
                raise ValueError(f"{name}: state must have slot {most} of plan.state_slots, got {c.state.num_slots} slots")
            for part, x in _parts(name, c):
                if x.shape[0] != plan.shards.tokens(self.rank):
                    own = f"the {plan.shards.tokens(self.rank)} tokens of rank {self.rank}"
                    raise ValueError(f"{name}: {part} must have {own}, got {x.shape[0]}")
        return made

    def _agree(self, compressors: Sequence[Compressor]) -> None:
        """Checks once, for each list of compressors, that all ranks have the same: a message of another size never arrives."""
        what = repr([(c.spec, c.state and c.state.rows.dtype, c.cache and c.cache.format) for c in compressors])
        if what not in self._agreed:
            self._transport.agree(compressors=what)
            self._agreed.add(what)

    def _scratch_of(self, state: FoldState, count: int) -> Scratch:
        """Kept with the state, so that a layer's calls meet the same objects in every step."""
        known = self._scratch.get(state)
        if known is None or known.main.num_slots < count or known.main.rows.dtype != state.rows.dtype:
            known = self._scratch[state] = Scratch.like(state, count)
        return known


def _parts(name: str, c: Compressor) -> tuple[tuple[str, torch.Tensor], ...]:
    """The tokens of a compressor of this name."""
    try:
        found = c.parts()
        for part, x in found:
            check_memory(part, x)
            check_shape(part, x, (None, None))
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None
    return found
