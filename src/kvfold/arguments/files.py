"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def write_atomically(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a path beside `path` to write to, with the same ending; behind the block the file takes the place of `path`.

    If anything fails, `path` is as it was and nothing is left beside it. Its folder is made if it is missing. A file that was
    there keeps its mode, and a link stays one: the file that it leads to is replaced. What is no regular file, as a device or
    a pipe, is written to straight.

    Raises:
        OSError: with the file's name: it cannot be written, or it is a folder.
    """
    target = Path(os.path.realpath(path))
    with _named(path):
        mode = target.stat().st_mode if target.exists() else None
        if mode is not None and stat.S_ISDIR(mode):
            raise IsADirectoryError(21, "Is a folder, not a file", str(path))
        if mode is not None and not os.access(target, os.W_OK):
            raise PermissionError(13, "Permission denied", str(path))
        if mode is not None and not stat.S_ISREG(mode):
            yield target
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f".{target.stem}.{secrets.token_hex(4)}{target.suffix}")
        try:
            os.close(os.open(beside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            yield beside
            if mode is not None:
                beside.chmod(stat.S_IMODE(mode))
            os.replace(beside, target)
        finally:
            beside.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raises OSError, with the file's name, if `write_atomically` could not begin: to be asked before the work."""
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file() and not target.is_dir():
        return  # a pipe would be ended by being opened and closed
    with suppress(_Fine), write_atomically(path):
        raise _Fine


class _Fine(Exception):
    """Ends a trial."""


@contextmanager
def _named(path: str | os.PathLike[str]) -> Iterator[None]:
    """Errors name this file: that of a full disk names none, others name the file beside it."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise
