"""Options that several commands share, and the configuration they add up to."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from search_space.quantity import read_count

if TYPE_CHECKING:
    from search_space.layout import Layout

StudyOption = Annotated[str | None, typer.Option("--study", metavar="NAME", help="Name of the study.")]
StorageOption = Annotated[
    str | None,
    typer.Option(
        "--storage", metavar="URL", help="Database, such as sqlite:///nas.db or postgresql://host/name."
    ),
]
StorageEnvOption = Annotated[
    str | None,
    typer.Option(
        "--storage-env",
        metavar="NAME",
        help="Environment variable that holds the database's URL where the search runs.",
    ),
]
AddressOption = Annotated[
    str | None,
    typer.Option(
        "--address", metavar="URL", help="Job server of a Ray cluster's head, such as http://head:8265."
    ),
]
JobArgument = Annotated[
    str, typer.Argument(metavar="JOB", help="A job's id, as nas submit and nas jobs print it.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, to standard output.")]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="YAML file; unknown keys are refused.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Set one key, such as target.width=2048. May be repeated."
    ),
]
SpaceOption = Annotated[
    list[str] | None,
    typer.Option(
        "--space",
        metavar="WORDS",
        help="What may stand in a layer: mixers, families or whole layers with blanks between them, or all.",
    ),
]
StarOption = Annotated[
    str | None,
    typer.Option(
        "--star",
        metavar="N",
        help="Prefill full attention by Star Attention, in blocks of N tokens, such as 4k.",
    ),
]
BatchOption = Annotated[str | None, typer.Option(metavar="N", help="Sequences at the same time.")]


def size(name: str, text: str | None) -> int | None:
    """A size such as 32k given to an option; raises ValueError that names the option."""
    if text is None:
        return None
    try:
        return read_count(text)
    except ValueError as error:
        raise ValueError(f"--{name}: {error}") from None


def star_block(text: str | None, layout: "Layout") -> int:
    """What --star gives, 0 where it was not given; raises ValueError where no layer would heed it."""
    block = size("star", text) or 0
    if block and not any(branch.mixer == "full" for layer in layout.layers for branch in layer.branches):
        raise ValueError(
            f"--star: there is no full attention in {layout}, which alone prefills so; leave it out"
        )
    return block


def words(texts: list[str] | None) -> tuple[str, ...] | None:
    """What --space names, split at blanks; None where it was not given."""
    return tuple(word for text in texts for word in text.split()) if texts is not None else None


def storage_of(storage: str | None, variable: str | None) -> str | None:
    """The database's URL, from --storage or from the variable that --storage-env names.

    Raises:
        Refused: both are given, or there is no such variable; its content is never repeated.
    """
    import os

    from nas.errors import Refused

    if variable is None:
        return storage
    if storage is not None:
        raise Refused("--storage and --storage-env are both given: leave one out")
    if not os.environ.get(variable):
        raise Refused(
            f"--storage-env {variable}: there is no such environment variable here, or it is empty; "
            "set it to the database's URL (on Kubernetes from a Secret)"
        )
    return os.environ[variable]


def given_layers(config: Path | None, assignments: list[str] | None, flags: dict[str, Any]) -> dict[str, Any]:
    """What the person gave, in rising order of weight: file, --set, flags; None means not given.

    Raises:
        ValueError: the file or an assignment cannot be read.
    """
    from nas.config import assign, merge, read_file

    below = read_file(config) if config else {}
    return merge(assign(below, assignments or []), without_none(flags))


def without_none(values: dict[str, Any]) -> dict[str, Any]:
    """Nested values that were given."""
    kept = {key: without_none(value) if isinstance(value, dict) else value for key, value in values.items()}
    return {key: value for key, value in kept.items() if value is not None and value != {}}
