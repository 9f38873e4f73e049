"""The command `nas`: the list of commands, and how every ending becomes a line and an exit code."""

import os
import sys
import traceback
from typing import Annotated

import typer

from nas.cli import (
    cost,
    dashboard,
    db,
    doctor,
    evaluate,
    explain,
    front,
    measure,
    mixers,
    report,
    retry,
    search,
    show,
    space,
    trials,
    tune,
    warm,
)
from nas.cli.output import say
from nas.errors import EXIT_INTERNAL, EXIT_INTERRUPTED, EXIT_STORAGE, EXIT_USAGE, Refused
from nas.redaction import Redactor
from search_space.notation import LayoutError

TYPER_INTERRUPTED = 130

app = typer.Typer(
    name="nas",
    help="Neural architecture search over hybrid layer layouts: which mixer stands in which layer, and how large.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for module in (
    search,
    front,
    trials,
    retry,
    show,
    explain,
    cost,
    measure,
    evaluate,
    mixers,
    space,
    report,
    dashboard,
    doctor,
    warm,
    tune,
):
    app.command(module.NAME)(module.command)
group = typer.Typer(name=db.NAME, help=db.HELP, no_args_is_help=True, rich_markup_mode=None)
for name, command in db.COMMANDS.items():
    group.command(name)(command)
app.add_typer(group)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Neural architecture search over hybrid layer layouts: which mixer stands in which layer, and how large."""
    del debug


def run() -> None:
    """The console script: run a command and leave with its exit code."""
    sys.exit(main(sys.argv[1:]))


def main(arguments: list[str]) -> int:
    """Run a command line; 0 done, 1 internal, 2 usage, 3 storage, 4 nothing valid, 5 interrupted."""
    redactor = Redactor.of(os.environ, arguments)
    try:
        return _run(arguments, redactor)
    except KeyboardInterrupt:
        say("nas: interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away, as `| head` does; what it wanted, it has.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except Exception as error:  # noqa: BLE001  the last line of defence: a bug is named, not hidden
        if "--debug" in arguments:
            # Written here and not by the interpreter, which knows no secrets.
            say(redactor.text(traceback.format_exc()))
        return _ending(error, redactor)


def _ending(error: Exception, redactor: Redactor) -> int:
    """What an error is to the person who asked, and the exit code."""
    if isinstance(error, Refused):
        cause = error.__cause__
        return _complain(cause if isinstance(cause, LayoutError) else error, error.code, redactor)
    if isinstance(error, LayoutError):
        return _complain(error, EXIT_USAGE, redactor)
    if _is_storage_error(error):
        return _complain(error, EXIT_STORAGE, redactor)
    say(redactor.text(f"nas: internal error, {type(error).__name__}: {error}"))
    say("     this is a bug; the same command with nas --debug shows the traceback")
    return EXIT_INTERNAL


def _is_storage_error(error: Exception) -> bool:
    # Imported only now: the database's packages would take half the time of `nas --help`.
    from storage.errors import StorageError

    return isinstance(error, StorageError)


def _run(arguments: list[str], redactor: Redactor) -> int:
    try:
        result = app(args=arguments, prog_name="nas", standalone_mode=False)
    except typer.Exit as ending:
        return ending.exit_code
    except SystemExit:
        # What typer makes of a broken pipe, and below of Ctrl-C.
        raise BrokenPipeError from None
    except typer.TyperException as error:
        say(redactor.text(f"nas: {error.format_message()}"))
        return error.exit_code
    if result == TYPER_INTERRUPTED:
        raise KeyboardInterrupt
    return result if isinstance(result, int) else 0


def _complain(error: BaseException, code: int, redactor: Redactor) -> int:
    """One or two lines; a layout is shown with a mark under the place."""
    first, *rest = redactor.text(str(error)).splitlines() or [type(error).__name__]
    if isinstance(error, LayoutError):
        say(f"nas: layout: {first}")
        # Where something was masked, the mark would stand under another place.
        if len(error.text) <= 200 and redactor.text(error.text) == error.text:
            say(f"     {error.text}")
            say(f"     {' ' * error.position}^")
        return code
    say(f"nas: {first}")
    for line in rest:
        say(f"     {line}")
    return code
