"""`nas doctor`: is everything here that a search needs, and what will it run on?"""

from typing import Annotated

import typer

from nas.cli.options import JsonOption, StorageOption

NAME = "doctor"


def command(
    storage: StorageOption = None,
    ray: Annotated[bool, typer.Option(help="Also start a local Ray and run one task on it.")] = False,
    json: JsonOption = False,
) -> int:
    """Check the installation: versions, devices, database, a tiny trial."""
    from nas.cli.output import print_json
    from nas.doctor import examine
    from nas.open_study import storage_url

    findings = examine(storage_url(storage), with_ray=ray)
    if json:
        print_json([{"check": item.check, "ok": item.ok, "said": item.said} for item in findings])
    else:
        for item in findings:
            print(f"{'ok ' if item.ok else 'BAD'}  {item.check:<10} {item.said}")
    return 0 if all(item.ok for item in findings) else 1
