"""Processes that compile or verify beside this one: they end when it does, and leave it to say that all were interrupted."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from multiprocessing.process import BaseProcess
from typing import Any

_working = _interrupted = False  # of a worker


def processes(workers: int) -> ProcessPoolExecutor:
    """Spawned: forked, they would have the locks of a caller's threads, and its CUDA."""
    return _Pool(workers, get_context("spawn"), initializer=_begin)


class _Pool(ProcessPoolExecutor):
    def submit(self, job: Callable[..., Any], /, *args: Any, **named: Any) -> Future[Any]:
        with _held():  # a process that begins now inherits it
            return super().submit(_do, job, *args, **named)


@contextmanager
def _held() -> Iterator[None]:
    """Interrupts, which a terminal sends to all processes, come behind this."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin() -> None:
    signal.signal(signal.SIGINT, _interrupt)
    # Who waits for work holds both ends of its pipe, and so never hears of a parent that was killed.
    threading.Thread(target=_end_with, args=(parent_process(),), daemon=True).start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _end_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _interrupt(*_of: object) -> None:
    """Ends a job, which is told to the parent. Who waits for one goes on waiting: there it would be a traceback."""
    global _interrupted
    _interrupted = True
    if _working:
        raise KeyboardInterrupt


def _do(job: Callable[..., Any], *args: Any, **named: Any) -> Any:
    global _working
    _working = True
    try:
        if _interrupted:
            raise KeyboardInterrupt
        return job(*args, **named)
    finally:
        _working = False
