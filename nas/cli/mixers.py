"""`nas mixers`: the vocabulary, with what each mixer lets one choose."""

from typing import Annotated

import typer

from nas.cli.options import JsonOption

NAME = "mixers"


def command(
    channels: Annotated[bool, typer.Option("--channels", help="List the channel mixers instead.")] = False,
    markdown: Annotated[
        bool,
        typer.Option("--markdown", help="Print the README's table of the mixers, with what a layer keeps."),
    ] = False,
    json: JsonOption = False,
) -> int:
    """List the mixers, their settings and their sources."""
    from nas import mixer_table
    from nas.cli.output import console, print_json
    from nas.cli.picture import family_of
    from nas.plan import families
    from search_space.setting import settings_of, show_value
    from search_space.spec import MixerSpec, Spec
    from search_space.vocabulary import CHANNELS, VOCABULARY

    def walks(spec: type[Spec]) -> bool:
        return issubclass(spec, MixerSpec) and spec().sequential

    if markdown and (channels or json):
        raise typer.BadParameter("--markdown stands alone: it prints one table, of the mixers")
    if markdown:
        print(mixer_table.markdown())
        return 0
    listed = list((CHANNELS if channels else VOCABULARY).values())
    rows = [
        {
            "name": spec.name,
            "family": spec.family,
            "about": mixer_table.about(spec),
            "reach": spec.reach if issubclass(spec, MixerSpec) else None,
            "source": spec.source,
            "needs": sorted(spec.needs),
            "sequential": walks(spec),
            "settings": {
                setting.name: {
                    "options": list(setting.options),
                    "unit": setting.unit,
                    "default": setting.default,
                    "searched": setting.searched,
                }
                for setting in settings_of(spec)
            },
        }
        for spec in listed
    ]
    if json:
        print_json(rows)
        return 0
    out = console()
    for spec in listed:
        mark = family_of(spec.name, families())
        shown = f"[{mark.colour}]{mark.mark}[/]" if spec.name in VOCABULARY else "/"
        out.print(
            f"{shown} [bold]{spec.name}[/]  {spec.family}  ({spec.source})", highlight=False, soft_wrap=True
        )
        out.print(f"      {mixer_table.about(spec)}", markup=False, soft_wrap=True)
        if issubclass(spec, MixerSpec):
            notes = [f"reach {spec.reach}"]
            notes += [f"needs the network's {need}" for need in sorted(spec.needs)]
            notes += ["trains token by token"] if walks(spec) else []
            out.print(f"      {', '.join(notes)}", markup=False, soft_wrap=True)
        for setting in settings_of(spec):
            default = "the frame's own" if setting.default is None else show_value(setting.default)
            unit = f", in {setting.unit}" if setting.unit else ""
            options = ", ".join(show_value(option) for option in setting.options)
            out.print(
                f"      {setting.name}: {options}{unit}; default {default}", markup=False, soft_wrap=True
            )
    return 0
