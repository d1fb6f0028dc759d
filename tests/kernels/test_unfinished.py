"""What is in the making in a folder of `aot` or `prebuild` does not stay there, however a run ends."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kvfold.precompile.files import unfinished

OURS = re.compile(r"\d")
KILLED = """
import os, re, signal, sys
from pathlib import Path
from kvfold.precompile.files import unfinished

with unfinished(Path(sys.argv[1]), ".made-", re.compile("x")) as made:
    (made / "1").touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_is_interrupted_is_removed(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), unfinished(tmp_path, ".made-", OURS) as made:
        (made / "1").touch()
        assert left_in(tmp_path) == {made.name}
        raise KeyboardInterrupt
    assert not left_in(tmp_path)


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    assert subprocess.run(command, env={"PYTHONPATH": ":".join(sys.path)}).returncode == -signal.SIGKILL
    (left,) = left_in(tmp_path)
    with unfinished(tmp_path, ".made-", OURS) as made:
        assert left_in(tmp_path) == {made.name} != {left}


def test_a_run_that_lives_keeps_its_folder(tmp_path: Path) -> None:
    """Whichever began first, and whichever ends first."""
    with unfinished(tmp_path, ".made-", OURS) as first:
        with unfinished(tmp_path, ".made-", OURS) as second:
            assert left_in(tmp_path) == {first.name, second.name}
        with unfinished(tmp_path, ".made-", OURS) as third:
            assert left_in(tmp_path) == {first.name, third.name}


def test_what_no_run_made_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / ".made-link").symlink_to(tmp_path / "other")
    (tmp_path / ".made-notes").mkdir()
    (tmp_path / ".made-notes" / "notes.txt").touch()
    for name in ("a", "z"):  # in whichever order they are found
        (tmp_path / f".made-{name}-file").touch()
        (tmp_path / f".made-{name}-left").mkdir()
    before = left_in(tmp_path)
    with unfinished(tmp_path, ".made-", OURS):
        pass
    assert left_in(tmp_path) == before - {".made-a-left", ".made-z-left"} and (tmp_path / ".made-notes" / "notes.txt").exists()
