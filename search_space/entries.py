"""The words of a space: mixers with free settings, whole layers, and the channel mixers that may follow them."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from search_space.constraint import families
from search_space.frame import Frame
from search_space.layout import Branch, Layer, Layout
from search_space.notation import nearest
from search_space.setting import Value, settings_of
from search_space.vocabulary import CHANNELS, VOCABULARY, branch_of, check, mixer_of, read

ALL = "all"
"""The word for every mixer of the vocabulary."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One word of the space: a layer text whose mixer may have free settings."""

    name: str
    layer: Layer
    free: tuple[tuple[str, tuple[Value, ...]], ...]
    """Settings of the layer's only branch that the search chooses."""

    def fill(self, values: Sequence[Value], channel: Branch | None) -> Layer:
        """The layer with its free settings chosen, and another channel mixer if one is given."""
        branches = self.layer.branches
        if self.free:
            names = [name for name, _ in self.free]
            spec = mixer_of(
                Branch(branches[0].mixer, (*branches[0].settings, *zip(names, values, strict=True)))
            )
            branches = (branch_of(spec),)
        return replace(self.layer, branches=branches, channel=channel or self.layer.channel)


def make_entries(
    names: Sequence[str], settings: Mapping[str, Mapping[str, Sequence[Value]]], frame: Frame
) -> tuple[Entry, ...]:
    """Entries from mixer names, family names, "all" or whole layer texts; settings say which values the search tries.

    Raises:
        ValueError: a name, setting or value is unknown, or nothing is left.
    """
    wanted: dict[str, None] = {}
    for name in names:
        wanted.update(dict.fromkeys(words_of(name)))
    if not wanted:
        raise ValueError("the space is empty: allow at least one mixer, such as full")
    for name in settings:
        if name not in wanted:
            raise ValueError(
                f"settings are given for {name!r}, which the space does not hold{nearest(name, wanted)}"
            )
    return tuple(_entry(name, settings.get(name, {}), frame) for name in wanted)


def words_of(name: str) -> list[str]:
    """The mixers of a family, the whole vocabulary for "all", and else the name itself."""
    return [spec.name for spec in VOCABULARY.values() if name in (ALL, spec.family)] or [name]


def _entry(name: str, chosen: Mapping[str, Sequence[Value]], frame: Frame) -> Entry:
    if name.isidentifier() and name not in VOCABULARY:
        raise ValueError(f"no mixer or family {name!r}{nearest(name, [*VOCABULARY, *families(), ALL])}")
    layout = read(name)
    check(layout, frame)
    if name not in VOCABULARY:
        if chosen:
            raise ValueError(f"{name!r} is a whole layer: write its settings in the layer itself")
        if len(layout) != 1:
            raise ValueError(f"{name!r} is more than one layer: an entry of the space is one")
        return Entry(name=str(layout), layer=layout.layers[0], free=())
    known = {setting.name: setting for setting in settings_of(VOCABULARY[name])}
    for setting in chosen:
        if setting not in known:
            raise ValueError(f'{name} has no setting "{setting}"{nearest(setting, known)}')
    free = []
    for setting, described in known.items():
        options = chosen.get(setting, described.options if described.searched else ())
        try:
            options = tuple(dict.fromkeys(described.read(option) for option in options))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        usable = tuple(value for value in options if _fits(name, setting, value, frame))
        if options and not usable:
            raise ValueError(f"{name}: no value of {setting} fits width {frame.width}; tried {options}")
        if usable:
            free.append((setting, usable))
    entry = Entry(name=name, layer=layout.layers[0], free=tuple(free))
    for values in itertools.product(*(options for _, options in free)):
        check(Layout((entry.fill(values, None),)), frame)
    return entry


def _fits(name: str, setting: str, value: Value, frame: Frame) -> bool:
    """Whether the value goes with the frame; options such as eight key heads do not go with every width."""
    try:
        mixer_of(Branch(name, ((setting, value),))).sized(frame)
    except ValueError:
        return False
    return True


def make_channels(texts: Sequence[str]) -> tuple[Branch, ...]:
    """Channel mixers from their texts; raises ValueError for an unknown one."""
    made = []
    for text in texts:
        if text.split("[")[0] not in CHANNELS:
            raise ValueError(f"no channel mixer {text!r}{nearest(text, CHANNELS)}")
        layout = read(f"full/{text}")
        if len(layout) != 1:
            raise ValueError(f"{text!r} is not valid: write one channel mixer")
        made.append(layout.layers[0].channel)
    return tuple(dict.fromkeys(made))
