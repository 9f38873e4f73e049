"""`nas measure`: latency of a layout at the target, layer by layer and end to end, on this machine."""

from typing import Annotated

import typer

from nas.cli.options import BatchOption, ConfigOption, JsonOption, SetOption, StarOption, given_layers

NAME = "measure"


def command(
    layout: Annotated[str, typer.Argument(help="Layout in the notation, in units of the target.")],
    width: Annotated[str | None, typer.Option(metavar="N", help="Width of the network.")] = None,
    context: Annotated[
        str | None, typer.Option(metavar="N", help="Tokens that are visible in decode, such as 32k.")
    ] = None,
    batch: BatchOption = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32.")] = None,
    depth: Annotated[
        str | None, typer.Option(metavar="N", help="Layers; as many as written if left out.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(metavar="N", help="Tokens of the prefill; 512 if left out.")
    ] = None,
    star: StarOption = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …")] = None,
    whole: Annotated[bool, typer.Option(help="Also run all layers end to end.")] = True,
    again: Annotated[
        bool, typer.Option("--again", help="Measure even what is known for this machine.")
    ] = False,
    config: ConfigOption = None,
    assignments: SetOption = None,
    json: JsonOption = False,
) -> int:
    """Measure decode and prefill latency with random weights; no training is needed."""
    from contextlib import closing, nullcontext
    from dataclasses import replace

    from nas.cli.measure_page import measure_rows, print_rows
    from nas.cli.options import size, star_block
    from nas.cli.output import print_json, say
    from nas.config import resolve
    from nas.errors import reading_input
    from nas.prices import LatencyBook, open_machine_table, prefill_frame
    from search_space.cost import at_depth
    from search_space.vocabulary import check, plain, read
    from trainers.measure import check_device, device_name

    with reading_input():
        target = {
            "width": size("width", width),
            "context": size("context", context),
            "batch": size("batch", batch),
            "dtype": dtype,
            "device": device,
        }
        settings = resolve(given_layers(config, assignments, {"target": target}))
        pattern = read(layout)
        wanted = size("depth", depth) or len(pattern)
        settings = resolve(settings.model_dump(mode="json"), {"target": {"depth": wanted}})
        frame = settings.target.frame()
        prompt_frame = replace(
            prefill_frame(frame, size("prompt", prompt)), star_block=star_block(star, pattern)
        )
        check(pattern, frame)
        place = settings.target.device
        check_device(place)
    network = at_depth(plain(pattern, frame), frame, settings.target.fill)
    machine = open_machine_table(settings.latency_cache, say)
    with closing(machine) if machine else nullcontext(), reading_input():
        book = LatencyBook(store=None, machine=machine, device=place, warn=say, again=again)
        answer = measure_rows(network, frame, prompt_frame, book, whole=whole)
    answer["device"] = device_name(place)
    if json:
        print_json(answer)
    else:
        print_rows(answer)
    return 0
