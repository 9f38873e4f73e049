"""`nas db`: how a database stands, bringing it up to date, and whether it is sound."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nas.cli.options import JsonOption, StorageOption

if TYPE_CHECKING:
    from storage.upkeep import Status

NAME = "db"
HELP = "Look after a database: its version, an upgrade, a check."


def status(storage: StorageOption = None, json: JsonOption = False) -> int:
    """Say which version a database has, what is to be done, and what it holds."""
    from nas.cli.output import print_json
    from nas.open_study import storage_url
    from storage.upkeep import status as ask

    found = ask(storage_url(storage))
    if json:
        print_json(
            {
                "storage": found.storage,
                "version": found.version,
                "newest": found.newest,
                "to_do": found.to_do,
                "studies": [
                    {"study": name, "trials": dict(trials)} for name, trials in found.studies.items()
                ],
            }
        )
    else:
        _print_status(found)
    return 0


def _print_status(found: "Status") -> None:
    stands = f"older than {found.newest}, the newest" if found.to_do else "the newest"
    print(f"{found.storage}  schema {found.version}, {stands}")
    print(f"to do    {found.to_do or 'nothing'}")
    print(f"studies  {len(found.studies)}")
    for name, trials in found.studies.items():
        print(f"  {name}: {_counted(trials)}")


def _counted(trials: Mapping[Any, int]) -> str:
    return ", ".join(f"{count} {state}" for state, count in trials.items() if count) or "no trials"


def upgrade(
    storage: StorageOption = None,
    copy: Annotated[
        bool,
        typer.Option(
            help="Keep a copy of a SQLite file beside it. A server's database is for pg_dump to copy."
        ),
    ] = True,
    json: JsonOption = False,
) -> int:
    """Bring a database up to the newest version, all or nothing, while no search writes to it."""
    from nas.cli.output import print_json
    from nas.open_study import storage_url
    from storage.upkeep import upgrade as bring_up

    done = bring_up(storage_url(storage), copy=copy)
    if json:
        copied = None if done.copy is None else str(done.copy)
        print_json({"storage": done.storage, "from": done.before, "to": done.after, "copy": copied})
    elif done.before == done.after:
        print(f"{done.storage} has schema {done.after}, the newest: nothing to do")
    else:
        print(f"{done.storage} went from schema {done.before} to {done.after}")
        if done.copy is not None:
            print(f"as it was before: {done.copy}")
    return 0


def check(storage: StorageOption = None, json: JsonOption = False) -> int:
    """Look for damage: the file, its tables, and what must hold among trials, results and layouts."""
    from nas.cli.output import print_json, say
    from nas.errors import EXIT_STORAGE
    from nas.open_study import storage_url
    from storage.check import check as look

    found = look(storage_url(storage), key_and_text)
    if json:
        print_json(
            {
                "storage": found.storage,
                "version": found.version,
                "newest": found.newest,
                "whole": found.whole,
                "findings": [{"check": one.check, "said": one.said} for one in found.findings],
            }
        )
    else:
        for one in found.findings:
            print(f"{one.check:<10} {one.said}")
        if not found.findings:
            print(f"{found.storage} is sound")
    if not found.whole:
        say("nothing else was looked at: it is read through what was found")
    if found.version < found.newest:
        say(
            f"schema {found.version} is older than {found.newest}: its tables were not compared, its rows were"
        )
    return EXIT_STORAGE if found.findings else 0


def key_and_text(layers: list[Any]) -> tuple[str, str]:
    """What a layout's stored layers say of its key and text; ValueError where they are no layout."""
    from search_space.layout import from_json

    try:
        layout = from_json(layers)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its layers are not those of a layout ({type(error).__name__}: {error})") from None
    return layout.key, layout.text


COMMANDS: Mapping[str, Callable[..., int]] = {"status": status, "upgrade": upgrade, "check": check}
