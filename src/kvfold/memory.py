"""What an object remembers of the calls that it was in, so that the next one like them is cheap."""

from __future__ import annotations


class Remembering:
    """Base of states and plans. What they remember is of their own tensors, by address: a copy begins without it."""

    def _forget(self) -> None:
        """Sets everything remembered to what it is before the first call; all of it, and nothing else."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, object]:
        """What copies and pickles take."""
        blank = object.__new__(type(self))
        blank._forget()
        return {**self.__dict__, **blank.__dict__}


class RememberingState(Remembering):
    """A state, over which calls of one layer are made again and again."""

    def _forget(self) -> None:
        self._last: tuple = (None,)  # what the last call asked for, and its launcher: kernels/launch.py
        self._packed: tuple | None = None  # what a launch takes of its layer: kernels/launch.py
        self._checked: tuple = ()  # what the last call's tensors were: compress.py
        self._bounds: list[int] = []  # of those in memory, and the room between them in which kv_score and rows were
        self._rooms: list[tuple[int, int]] = []
        self._pair: tuple = (None, None)  # `_checked` of both states of the last launch of two
        self._workspaces: list = []  # scratch of the kernels, made once and kept for the next call: kernels/launch.py
        self._recorded: list = []  # the same for calls that made theirs while they were recorded in a CUDA graph
