"""`nas cost`: what a layout costs in a frame, exactly and at once."""

from typing import Annotated

import typer

from nas.cli.options import BatchOption, JsonOption, StarOption

NAME = "cost"


def command(
    layout: Annotated[
        str, typer.Argument(help="Layout in the notation, or a preset's name such as kimi-linear.")
    ],
    width: Annotated[
        str | None, typer.Option(metavar="N", help="Width of the network; 1024 if left out.")
    ] = None,
    context: Annotated[
        list[str] | None,
        typer.Option(metavar="N", help="Tokens that are visible, such as 32k. May be repeated."),
    ] = None,
    batch: BatchOption = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    depth: Annotated[
        str | None, typer.Option(metavar="N", help="Stack the layout to so many layers.")
    ] = None,
    fill: Annotated[str, typer.Option(help="stack or stretch, for --depth.")] = "stack",
    vocabulary: Annotated[
        str | None, typer.Option(metavar="N", help="Tokens of the embedding and the head.")
    ] = None,
    train_length: Annotated[
        str | None, typer.Option(metavar="N", help="Tokens of a text in training; 4k if left out.")
    ] = None,
    longest: Annotated[
        str | None,
        typer.Option(
            metavar="N", help="Tokens that the network is made for; the longest context if left out."
        ),
    ] = None,
    star: StarOption = None,
    json: JsonOption = False,
) -> int:
    """Price a layout: parameters, FLOPs a token, cache bytes at one or more contexts."""
    from dataclasses import replace

    from dashboards import quantities
    from nas.cli.options import size, star_block
    from nas.cli.output import console, print_json
    from nas.config import TargetConfig
    from nas.errors import reading_input
    from nas.prices import cost_json
    from search_space.cost import embedding_params
    from search_space.frame import Frame
    from search_space.presets import PRESETS
    from search_space.vocabulary import check, read

    default = TargetConfig()
    with reading_input():
        preset = PRESETS.get(layout)
        read_layout = preset.layout if preset else read(layout)
        base = preset.frame if preset else Frame(width=default.width)
        contexts = [size("context", text) or 0 for text in context or []] or [base.context]
        trained = size("train-length", train_length) or base.train_length
        frame = replace(
            base,
            train_length=trained,
            width=size("width", width) or base.width,
            depth=size("depth", depth),
            context=contexts[0],
            batch=size("batch", batch) or 1,
            dtype=dtype,
            vocabulary=size("vocabulary", vocabulary) or base.vocabulary,
            max_length=size("longest", longest) or max(trained, *contexts),
            star_block=star_block(star, read_layout),
        )
        check(read_layout, frame)
        answer = cost_json(read_layout, frame, contexts, fill)
    answer["embedding_params"] = embedding_params(frame)
    answer["star_block"] = frame.star_block
    if json:
        print_json(answer)
        return 0
    out = console()
    flops = answer["flops_per_token"]
    out.print(answer["layout"], markup=False, highlight=False, soft_wrap=True)
    out.print(
        f"{answer['layers']} layers of width {frame.width}: {quantities.count(answer['params'])} parameters "
        f"(and {quantities.count(answer['embedding_params'])} in embedding and head)",
        highlight=False,
        soft_wrap=True,
    )
    if answer["active_params"] < answer["params"]:
        out.print(
            f"{quantities.count(answer['active_params'])} of them are read by a decode step of batch {frame.batch}, on average",
            highlight=False,
            soft_wrap=True,
        )
    if answer["serial_steps"]:
        out.print(
            f"training walks the tokens one by one: {answer['serial_steps']} dependent steps for a text of "
            f"{quantities.tokens(frame.context)}",
            highlight=False,
            soft_wrap=True,
        )
    out.print(
        f"{quantities.count(flops['prefill'])}FLOP a token in prefill, {quantities.count(flops['decode'])}FLOP in decode "
        f"at {quantities.tokens(frame.context)}",
        highlight=False,
        soft_wrap=True,
    )
    if frame.star_block:
        out.print(
            f"full attention is prefilled by Star Attention, in blocks of {quantities.tokens(frame.star_block)}",
            highlight=False,
            soft_wrap=True,
        )
    for entry in answer["cache"]:
        out.print(
            f"cache at {quantities.tokens(entry['context'])}: {quantities.size(entry['stored_bytes'])} stored, "
            f"{quantities.size(entry['read_bytes'])} read a step  ({entry['stored_bytes']} bytes, batch {frame.batch}, "
            f"{frame.dtype})",
            highlight=False,
            soft_wrap=True,
        )
        kinds = {(item["layer"], item["stored_bytes"]): 0 for item in entry["by_layer"]}
        for item in entry["by_layer"]:
            kinds[item["layer"], item["stored_bytes"]] += 1
        for (name, stored), count in kinds.items():
            line = f"  {count:>3} × {quantities.size(stored):>10}  {name}"
            out.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0
