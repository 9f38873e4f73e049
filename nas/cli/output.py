"""Where words go: data to standard output, messages to standard error."""

import json
import os
import sys
from typing import TYPE_CHECKING, Any

from nas.redaction import Redactor

if TYPE_CHECKING:
    from rich.console import Console

WIDTH_OFF_TERMINAL = 160


def say(text: str) -> None:
    """A message for the person, on standard error, without the secrets that it may repeat."""
    print(Redactor.of(os.environ, sys.argv[1:]).text(text), file=sys.stderr, flush=True)


def print_openly(text: str) -> None:
    """A line of standard output as it is: for the one address that is meant to carry its token."""
    print(text, flush=True)


def print_json(value: Any) -> None:
    """One JSON value on standard output; numbers that are not finite are a bug."""
    print(json.dumps(value, allow_nan=False, indent=2 if sys.stdout.isatty() else None), flush=True)


def console(*, to_stderr: bool = False) -> "Console":
    """A console that draws on a terminal and writes plain lines elsewhere."""
    from rich.console import Console

    stream = sys.stderr if to_stderr else sys.stdout
    return Console(
        file=stream, width=None if stream.isatty() else WIDTH_OFF_TERMINAL, highlight=False, soft_wrap=False
    )
