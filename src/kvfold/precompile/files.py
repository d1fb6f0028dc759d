"""Files in the folders of `aot` and `prebuild`: in the making, and of earlier runs."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def unfinished(folder: Path, prefix: str, ours: re.Pattern[str]) -> Iterator[Path]:
    """A new folder in `folder`, removed at the end with what is still in it; and before, those that killed runs left.

    Each run holds a shared lock on `folder`, which ends with its process: who gets the lock alone knows that no run lives.

    ours: names of files that a run makes. A folder with anything else in it is left alone.
    """
    import fcntl  # which Windows has not, where kvfold can be imported all the same

    lock = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # another run lives, or this file system has no locks, so nothing is removed
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for left in folder.glob(f"{prefix}*"):
                if left.is_dir() and not left.is_symlink() and all(ours.fullmatch(name) for name in os.listdir(left)):
                    shutil.rmtree(left)
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_SH)
        made = Path(tempfile.mkdtemp(prefix=prefix, dir=folder))
        try:
            yield made
        finally:
            shutil.rmtree(made, ignore_errors=True)
    finally:
        os.close(lock)


def is_file(path: Path) -> bool:
    """Whether it is a regular file, and no link to one."""
    return path.is_file() and not path.is_symlink()


def has_digest(path: Path, sha256: str) -> bool:
    """Whether it is a regular file of that digest."""
    return is_file(path) and hashlib.sha256(path.read_bytes()).hexdigest() == sha256
