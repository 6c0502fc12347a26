"""How the command line fails: a JpqError becomes one line and an exit code; and its default command."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from jpq_export import ranks
from jpq_export.errors import JpqError, StorageError, UsageError

DEFAULT = "export"
TOGETHER = ("export", "plan")  # what several processes of torchrun can do
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EPERM)
OUT_OF_MEMORY = ("can't allocate memory", "CUDA out of memory")  # how torch says it, in a RuntimeError


class Sentinel(click.ClickException):
    """A JpqError on its way through click: one line on stderr, its own exit code."""

    def __init__(self, error: JpqError) -> None:
        super().__init__(str(error).replace("\n", " "))
        self.exit_code = error.exit_code  # pyright: ignore[reportAttributeAccessIssue] click reads the instance


class Commands(click.Group):
    """The command group: export is the default command; errors a user can cause become one line."""

    ignore_unknown_options = True  # `jpq-export --target jetson`: an option of the default command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The named command, or export with all arguments."""
        if self.get_command(ctx, args[0]) is None:
            self._check_misspelt(ctx, args)
            args = [DEFAULT, *args]
        if ranks.launched() and args[0] not in TOGETHER:
            raise UsageError(f"{args[0]}: works in one process; start it without torchrun, which is for an export")
        return super().resolve_command(ctx, args)

    def _check_misspelt(self, ctx: click.Context, args: list[str]) -> None:
        """UsageError for `jpq-export verfy bundle`: no export, for want of --target or with two models."""
        close = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1, cutoff=0.7)
        exports = any(arg.startswith("--target") for arg in args) and not (args[1:] and args[1][0:1] not in ("", "-"))
        if close and not args[0].startswith("-") and not exports and not Path(args[0]).exists():
            raise UsageError(f"{args[0]!r}: no such command; did you mean {close[0]!r}? See `jpq-export --help`.")

    def invoke(self, ctx: click.Context) -> Any:
        """Run, translating errors."""
        try:
            with one_voice():
                return super().invoke(ctx)
        except JpqError as error:
            raise Sentinel(error) from error
        except click.UsageError as error:
            path = (error.ctx or ctx).command_path
            raise Sentinel(UsageError(f"{error.format_message()} See `{path} --help`.")) from error
        except KeyboardInterrupt:
            click.echo(
                "Interrupted; the same command goes on after the last finished stage (statistics, rounded matrices and "
                "prices are one).",
                err=True,
            )
            raise click.exceptions.Exit(130) from None
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # the reader of a pipe went away: click ends quietly
            if error.errno in DISK_ERRORS:
                where = error.filename or "the output"
                raise Sentinel(
                    StorageError(f"{where}: {error.strerror}; free space or write to another place")
                ) from error
            if error.errno is not None:
                raise Sentinel(
                    JpqError(f"{error.filename or 'file'}: {error.strerror}; choose another path")
                ) from error
            raise
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, MemoryError) or any(text in str(error) for text in OUT_OF_MEMORY):
                remedy = "use a smaller model or a machine with more memory"
                raise Sentinel(JpqError(f"out of memory; {remedy}")) from error
            raise


def given(ctx: click.Context, *, but: tuple[str, ...]) -> list[str]:
    """The options the user typed, as typed, but some."""
    typed = [name for name in ctx.params if ctx.get_parameter_source(name) == ParameterSource.COMMANDLINE]
    return ["--" + name.replace("_", "-") for name in typed if name not in but]


@contextmanager
def one_voice() -> Iterator[None]:
    """Under torchrun: the processes work together, and of a failure only the first tells; the others just end."""
    if not ranks.launched():
        yield
        return
    from jpq_export.compress import parallel

    code = 0
    try:
        parallel.start()
        try:
            yield
        except click.exceptions.Exit as done:
            code = done.exit_code
        parallel.wait_for_all()
    except BaseException as error:
        first = parallel.first_to_fail()
        parallel.part_in_failure()
        if not first:
            raise click.exceptions.Exit(getattr(error, "exit_code", 1)) from error
        raise
    parallel.leave(code)
