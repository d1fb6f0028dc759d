"""Commands with a time limit that ends all that they started: what outlives its limit would disturb the timings behind it."""

from __future__ import annotations

import os
import signal
import subprocess
from typing import IO


def run(
    command: list[str], seconds: float, *, cwd: os.PathLike | None = None, log: IO[str] | None = None
) -> tuple[int | None, str]:
    """The exit code, None if the time ran out, and what it printed, if not to a `log`."""
    out = subprocess.PIPE if log is None else log
    process = subprocess.Popen(command, cwd=cwd, stdout=out, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try:
        printed, _ = process.communicate(timeout=seconds)
        return process.returncode, printed or ""
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        printed, _ = process.communicate()
        return None, printed or ""
