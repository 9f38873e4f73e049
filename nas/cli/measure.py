"""`nas measure`: latency of a layout at the target, layer by layer and end to end, on this machine."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from nas.cli.options import (
    BatchOption,
    ConfigOption,
    JsonOption,
    SetOption,
    StarOption,
    StorageOption,
    StudyOption,
    given_layers,
)

if TYPE_CHECKING:
    from storage.records import StudyRecord
    from storage.store import Store

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
    study: StudyOption = None,
    storage: StorageOption = None,
    config: ConfigOption = None,
    assignments: SetOption = None,
    json: JsonOption = False,
) -> int:
    """Measure decode and prefill latency with random weights; no training is needed.

    With --study or --storage at a study's target, for its dashboard: what is new is kept in the study's database too.
    """
    from contextlib import ExitStack, closing
    from dataclasses import replace

    from nas.cli.measure_page import measure_rows, print_rows
    from nas.cli.options import size, star_block
    from nas.cli.output import print_json, say
    from nas.config import of_study, resolve
    from nas.errors import Refused, reading_input
    from nas.objectives import Quantity
    from nas.open_study import open_study, storage_url
    from nas.prices import LatencyBook, open_machine_table, prefill_frame
    from search_space.cost import at_depth
    from search_space.vocabulary import check, plain, read
    from storage.events import MEASURED
    from storage.store import Store
    from trainers.measure import check_device, device_name

    kept = study is not None or storage is not None
    if kept and again:
        raise Refused(
            "--again would replace what trials of the study were priced with: leave it out, or --study and --storage"
        )
    record = None
    if kept:
        with open_study(storage, study) as (_, record):
            pass
    with reading_input():
        moved = Quantity(base="latency_ms", context=size("context", context), batch=size("batch", batch))
        sizes = {"width": size("width", width), "dtype": dtype, "device": device}
        below = of_study(record.config) if record else {}
        settings = resolve(below, given_layers(config, assignments, {"target": sizes}))
        pattern = read(layout)
        wanted = size("depth", depth) or (settings.target.depth if record else len(pattern))
        settings = resolve(settings.model_dump(mode="json"), {"target": {"depth": wanted}})
        frame = moved.frame(settings.target.frame())
        prompt_frame = replace(
            prefill_frame(frame, size("prompt", prompt)), star_block=star_block(star, pattern)
        )
        check(pattern, frame)
        place = settings.target.device
        check_device(place)
    network = at_depth(plain(pattern, frame), frame, settings.target.fill)
    here = device_name(place)
    with ExitStack() as opened, reading_input():
        machine = open_machine_table(settings.latency_cache, say)
        if machine:
            opened.enter_context(closing(machine))
        store = None
        if record is not None:
            store = opened.enter_context(Store.open(storage_url(storage)))
            for warning in _warnings(store, record, here):
                say(warning)
        book = LatencyBook(store=store, machine=machine, device=place, warn=say, again=again)
        answer = measure_rows(network, frame, prompt_frame, book, whole=whole)
        if store:
            about = {"device": here, "context": frame.context, "batch": frame.batch}
            store.log(record, MEASURED, about)
    answer["device"] = here
    if json:
        print_json(answer)
    else:
        print_rows(answer)
    return 0


def _warnings(store: "Store", record: "StudyRecord", here: str) -> Iterator[str]:
    """What those who look at a study's latencies should know of what is measured here and now."""
    from storage.events import PLANNED

    for event in store.last_events(record, {PLANNED}, 0, 1):
        there = event.payload.get("device")
        if there not in (None, here):
            yield f"study {record.name!r} was measured on {there}, and its pages show that: this is {here}"
    if store.counts(record)["running"]:
        yield f"study {record.name!r} is being searched: a machine that trains measures too much"
