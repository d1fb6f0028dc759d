"""How commands fail: one line on stderr and an exit code, at one place for all of them."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import typer
from typer.core import TyperGroup

MOST_SEED = (1 << 63) - 1  # of torch
# Wrong arguments, and files or output that cannot be read or written; the others are what a shell gives for signals.
WRONG, INTERRUPTED, PIPE_CLOSED = 2, 130, 141
OF_OUTPUT = (errno.ENOSPC, errno.EIO, errno.EFBIG, errno.EDQUOT)  # of an error that names no file

# typer may have its own copy of click: the base of its errors is found by name.
ClickError: type[Any] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


class Commands(TyperGroup):
    """The group of all commands."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        with one_line():  # --help and --version print
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: Any) -> Any:
        with one_line(ctx):
            return super().invoke(ctx)

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        try:
            code = super().main(*args, standalone_mode=False, **extra)
        except typer.Exit as left:
            code = left.exit_code
        except typer.Abort:
            code = INTERRUPTED
        except ClickError as error:
            code = error.exit_code
            if type(error).__name__ == "NoArgsIsHelpError":
                error.show()
            else:
                say(error.format_message(), error.ctx.command_path if getattr(error, "ctx", None) else "kvfold")
        if standalone_mode:
            sys.exit(code if isinstance(code, int) else 0)
        return code


@contextmanager
def one_line(ctx: Any = None) -> Iterator[None]:
    """Turns errors of files, of output and of the keyboard into a line and an exit code. Other errors are left alone.

    ctx: click's context of the group, which knows the command when it has begun.
    """
    code = WRONG
    try:
        try:
            yield
        finally:
            _flush()
        return
    except KeyboardInterrupt:
        code, words = INTERRUPTED, "interrupted"
    except BrokenPipeError:
        code, words = PIPE_CLOSED, ""  # nobody is left to read a message
    except SystemExit as left:  # rich ends the process when a pipe is closed, with the exit code of a failed check
        if not isinstance(left.__context__, BrokenPipeError):
            raise
        code, words = PIPE_CLOSED, ""
    except OSError as error:
        where = error.filename or ("standard output" if error.errno in OF_OUTPUT else "")
        words = ": ".join(filter(None, (str(where), error.strerror or str(error))))
    _let_go_of_output()
    if words:
        say(words, " ".join(filter(None, ("kvfold", getattr(ctx, "invoked_subcommand", None)))))
    raise typer.Exit(code)


@contextmanager
def wrong_arguments(*kinds: type[Exception], option: str | None = None) -> Iterator[None]:
    """Errors of these kinds say which argument is wrong; option: where they do not."""
    try:
        yield
    except kinds as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


def say(words: str, command: str = "kvfold") -> None:
    """One line on stderr, if anybody can still read it."""
    with suppress(OSError):
        print(f"{command}: {' '.join(words.split())}", file=sys.stderr, flush=True)


def stop(words: str, command: str) -> typer.Exit:
    """To be raised: says why a command cannot run, by one line on stderr."""
    say(words, command)
    return typer.Exit(WRONG)


def _flush() -> None:
    if sys.stdout is not None and not sys.stdout.closed:
        sys.stdout.flush()


def _let_go_of_output() -> None:
    """Sends output that cannot be written to nowhere: at exit the interpreter would try again and print a traceback."""
    try:
        _flush()
    except OSError:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
