"""`nas space`: how large a space is, what stands in it, and a few layouts from it."""

from typing import Annotated

import typer

from nas.cli.options import ConfigOption, JsonOption, SetOption, SpaceOption, given_layers, words

NAME = "space"


def command(
    layers: Annotated[int | None, typer.Option(help="Layers of the pattern.")] = None,
    space: SpaceOption = None,
    constraint: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RULE", help="full>=1, full not first, kv_bytes<=64MiB, params=1.3B+-5%. May be repeated."
        ),
    ] = None,
    draw: Annotated[int, typer.Option(min=0, help="Print so many random layouts.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random layouts.")] = 0,
    config: ConfigOption = None,
    assignments: SetOption = None,
    json: JsonOption = False,
) -> int:
    """Describe the search space that a configuration gives."""
    import random

    from nas.cli.output import console, print_json
    from nas.config import resolve
    from nas.errors import reading_input
    from nas.plan import PRESET_EVERY, make_plan
    from search_space.setting import show_value

    with reading_input():
        flags = {
            "space": {
                "layers": layers,
                "mixers": words(space),
                "constraints": tuple(constraint) if constraint else None,
            }
        }
        plan = make_plan(resolve(given_layers(config, assignments, flags)))
    rng = random.Random(seed)
    drawn = [str(plan.space.sample(rng)) for _ in range(draw)]
    if json:
        print_json(
            {
                "layers": plan.space.layers,
                "size": plan.size.count,
                "exact": plan.size.exact,
                "entries": {
                    entry.name: {name: list(options) for name, options in entry.free}
                    for entry in plan.space.entries
                },
                "channels": [str(channel) for channel in plan.space.channels],
                "sharing": plan.space.sharing,
                "constraints": list(plan.config.space.constraints),
                "starts": [{"layout": str(start.layout), "origin": start.origin} for start in plan.starts],
                "drawn": drawn,
            }
        )
        return 0
    out = console()

    def line(text: str) -> None:
        out.print(text, markup=False, highlight=False, soft_wrap=True)

    at_most = "" if plan.size.exact else "at most "
    line(f"{at_most}{plan.size.count:,} patterns of {plan.space.layers} layers")
    for entry in plan.space.entries:
        free = "; ".join(f"{name}: {', '.join(map(show_value, options))}" for name, options in entry.free)
        line(f"  {entry.name}  {free}")
    for rule in plan.config.space.constraints:
        line(f"  with {rule}")
    for heading, first in (("tried first", True), (f"tried too, one in {PRESET_EVERY} trials", False)):
        starts = [start for start in plan.starts if start.at_once == first]
        if starts:
            line(f"{heading}: " + ", ".join(f"{start.layout} ({start.origin})" for start in starts))
    for text in drawn:
        line(f"  e.g. {text}")
    return 0
