"""`nas evaluate`: train one layout on proxy tasks, here and now."""

from pathlib import Path
from typing import Annotated

import typer

from nas.cli.options import BatchOption, ConfigOption, JsonOption, SetOption, given_layers

NAME = "evaluate"


def command(
    layout: Annotated[str, typer.Argument(help="Layout in the notation, in units of the target.")],
    task: Annotated[
        list[str] | None, typer.Option(help="mqar or bytes. May be repeated; all if left out.")
    ] = None,
    steps: Annotated[str | None, typer.Option(metavar="N", help="Training steps of each task.")] = None,
    width: Annotated[str | None, typer.Option(metavar="N", help="Width of the proxy.")] = None,
    length: Annotated[str | None, typer.Option(metavar="N", help="Length of the proxy's sequences.")] = None,
    batch: BatchOption = None,
    learning_rate: Annotated[
        list[float] | None, typer.Option(help="May be repeated; the best one counts.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the weights and the data.")] = None,
    data: Annotated[Path | None, typer.Option(metavar="PATH", help="Text for the task bytes.")] = None,
    literal: Annotated[
        bool, typer.Option("--literal", help="Take the layout as the proxy's own, without shrinking it.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …")] = None,
    config: ConfigOption = None,
    assignments: SetOption = None,
    json: JsonOption = False,
) -> int:
    """Train a layout on proxy tasks and print its scores."""
    from nas.cli.evaluate_page import evaluate_layout, show_outcome
    from nas.cli.options import size
    from nas.errors import reading_input

    with reading_input():
        flags = {
            "seed": seed,
            "data": None if data is None else str(data),
            "proxy": {"width": size("width", width), "length": size("length", length), "device": device},
        }
        given = given_layers(config, assignments, flags)
        changes = {
            "steps": size("steps", steps),
            "batch": size("batch", batch),
            "learning_rates": tuple(learning_rate) if learning_rate else None,
        }
    answer = evaluate_layout(layout, given, task, changes, literal=literal)
    return show_outcome(answer, json_output=json)
