"""Processes that compile end with the one that asked for it, however that ends, and say nothing of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

WAITING = """
import os
import time
from kvfold.precompile.workers import processes

if __name__ == "__main__":
    with processes(2) as pool:
        print(*{pool.submit(os.getpid).result() for _ in range(4)}, flush=True)
        time.sleep(600)
"""


def alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"  # in a container nobody may wait for it


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes as Linux has them")
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_of_a_run_that_was_ended(how: signal.Signals, tmp_path: Path) -> None:
    script = tmp_path / "waiting.py"
    script.write_text(WAITING)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, str(script)], env=environment, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        workers = [int(pid) for pid in run.stdout.readline().split()]
        try:
            assert workers and all(map(alive, workers))
            run.send_signal(how)
            assert run.wait(60) == -how
            for _ in range(100):
                if not any(map(alive, workers)):
                    break
                time.sleep(0.1)
            assert not [pid for pid in workers if alive(pid)]
        finally:
            run.kill()
            for pid in filter(alive, workers):
                os.kill(pid, signal.SIGKILL)


BUSY = """
import os
import time
from kvfold.precompile.workers import processes

if __name__ == "__main__":
    try:
        with processes(2) as pool:
            if {begun}:
                print("ready", *{{pool.submit(os.getpid).result() for _ in range(4)}}, flush=True)
            jobs = pool.map(time.sleep, [300] * 9)
            print("ready", flush=True)
            list(jobs)
    except KeyboardInterrupt:
        print("interrupted")
"""


@pytest.mark.parametrize("begun", [True, False], ids=["at work", "beginning"])
def test_a_terminal_interrupts_all_of_them_and_one_says_so(begun: bool, tmp_path: Path) -> None:
    """As ctrl-C does: at work, and while they begin."""
    script = tmp_path / "busy.py"
    script.write_text(BUSY.format(begun=begun))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, str(script)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background inherits that it is ignored
    ) as run:  # fmt: skip
        try:
            for _ in range(1 + begun):
                assert run.stdout is not None and run.stdout.readline().startswith("ready")
            os.killpg(run.pid, signal.SIGINT)
            said, errors = run.communicate(timeout=60)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)
    assert (said, errors) == ("interrupted\n", "")
