"""The open list of mixers, and what can be done with a layout once its words are known: read, check, plain, shrink."""

from dataclasses import replace
from functools import cache

from search_space.channel.geglu import GeGLU
from search_space.channel.mlp import MLP
from search_space.channel.moe import MoE
from search_space.channel.none import NoChannel
from search_space.channel.relu2 import ReLU2
from search_space.channel.swiglu import SwiGLU
from search_space.frame import Frame
from search_space.layout import Branch, Layer, Layout
from search_space.mixers.bigbird import BigBird
from search_space.mixers.clockwork import Clockwork
from search_space.mixers.compressive import Compressive
from search_space.mixers.cross_layer import CrossLayer
from search_space.mixers.deltanet import DeltaNet
from search_space.mixers.differential import Differential
from search_space.mixers.dsa import DSA
from search_space.mixers.fixed import Fixed
from search_space.mixers.full import Full
from search_space.mixers.gated_delta import GatedDelta
from search_space.mixers.gla import GLA
from search_space.mixers.gmu import GMU
from search_space.mixers.hgrn2 import HGRN2
from search_space.mixers.hyena import Hyena
from search_space.mixers.infini import Infini
from search_space.mixers.kda import KDA
from search_space.mixers.lightning import Lightning
from search_space.mixers.linear import Linear
from search_space.mixers.linformer import Linformer
from search_space.mixers.loglinear import LogLinear
from search_space.mixers.lolcats import LoLCATs
from search_space.mixers.longformer import Longformer
from search_space.mixers.lstm import LSTM
from search_space.mixers.mamba import Mamba
from search_space.mixers.mamba2 import Mamba2
from search_space.mixers.mamba3 import Mamba3
from search_space.mixers.memory_tokens import MemoryTokens
from search_space.mixers.mingru import MinGRU
from search_space.mixers.mla import MLA
from search_space.mixers.mlstm import MLSTM
from search_space.mixers.moba import MoBA
from search_space.mixers.mosa import MoSA
from search_space.mixers.nsa import NSA
from search_space.mixers.performer import Performer
from search_space.mixers.qla import QLA
from search_space.mixers.retnet import RetNet
from search_space.mixers.retrieval import Retrieval
from search_space.mixers.rglru import RGLRU
from search_space.mixers.rwkv6 import RWKV6
from search_space.mixers.rwkv7 import RWKV7
from search_space.mixers.s4 import S4
from search_space.mixers.s4d import S4D
from search_space.mixers.shortconv import ShortConv
from search_space.mixers.sru import SRU
from search_space.mixers.strided import Strided
from search_space.mixers.transformer_xl import TransformerXL
from search_space.mixers.tree import Tree
from search_space.mixers.window import Window
from search_space.notation import Word, Words, nearest, parse
from search_space.setting import settings_of
from search_space.spec import ChannelSpec, MixerSpec, Spec, shrink

WIDTH_STEP = 8
"""Every width is a multiple of it."""

VOCABULARY: dict[str, type[MixerSpec]] = {
    spec.name: spec
    for spec in (
        Full,
        Differential,
        CrossLayer,
        Window,
        Strided,
        Fixed,
        Longformer,
        BigBird,
        MoBA,
        NSA,
        MoSA,
        Linformer,
        MLA,
        DSA,
        TransformerXL,
        Compressive,
        Infini,
        MemoryTokens,
        Retrieval,
        Tree,
        Linear,
        Performer,
        LoLCATs,
        RetNet,
        Lightning,
        GLA,
        HGRN2,
        RWKV6,
        QLA,
        LogLinear,
        S4,
        S4D,
        Mamba,
        Mamba2,
        Mamba3,
        GMU,
        DeltaNet,
        GatedDelta,
        KDA,
        RWKV7,
        MLSTM,
        RGLRU,
        MinGRU,
        SRU,
        LSTM,
        Clockwork,
        Hyena,
        ShortConv,
    )
}
CHANNELS: dict[str, type[ChannelSpec]] = {
    spec.name: spec for spec in (SwiGLU, GeGLU, ReLU2, MLP, MoE, NoChannel)
}


@cache
def words() -> Words:
    """What the notation may hold."""

    def word(spec: type[Spec]) -> Word:
        return Word(name=spec.name, settings={setting.name: setting for setting in settings_of(spec)})

    return Words(
        mixers={name: word(spec) for name, spec in VOCABULARY.items()},
        channels={name: word(spec) for name, spec in CHANNELS.items()},
    )


def read(text: str) -> Layout:
    """The layout that the notation says.

    Raises:
        LayoutError: it cannot be read; the error knows the position.
    """
    return parse(text, words())


def mixer_of(branch: Branch) -> MixerSpec:
    """The spec that a branch names.

    Raises:
        ValueError: an unknown mixer, setting or value.
    """
    if branch.mixer not in VOCABULARY:
        raise ValueError(f'no mixer "{branch.mixer}"{nearest(branch.mixer, VOCABULARY)}')
    return VOCABULARY[branch.mixer](**_known(VOCABULARY[branch.mixer], branch))


def channel_of(branch: Branch) -> ChannelSpec:
    """The spec of a channel mixer that a branch names; raises ValueError as `mixer_of`."""
    if branch.mixer not in CHANNELS:
        raise ValueError(f'no channel mixer "{branch.mixer}"{nearest(branch.mixer, CHANNELS)}')
    return CHANNELS[branch.mixer](**_known(CHANNELS[branch.mixer], branch))


def _known(spec: type[Spec], branch: Branch) -> dict[str, object]:
    known = {setting.name for setting in settings_of(spec)}
    for name, _ in branch.settings:
        if name not in known:
            raise ValueError(f'{branch.mixer} has no setting "{name}"{nearest(name, known)}')
    return dict(branch.settings)


def branch_of(spec: Spec) -> Branch:
    """The branch that names a spec; what equals its default is left out."""
    return Branch(spec.name, spec.written)


def branch_frames(layer: Layer, frame: Frame) -> tuple[Frame, ...]:
    """The frame of each of a layer's mixers: the layer's own, or as wide as the mixer's share, in multiples of 8.

    Raises:
        ValueError: the layer is too narrow, or a mixer reads a value as wide as the network.
    """
    shares = [branch.share for branch in layer.branches]
    if not any(shares):
        return (frame,) * len(shares)
    for branch in layer.branches:
        if "width" in VOCABULARY[branch.mixer].needs:
            raise ValueError(f"{branch.mixer} reads a value as wide as the network: write it without a share")
    whole = frame.width // WIDTH_STEP
    if whole < len(shares):
        raise ValueError(
            f"width {frame.width} cannot be shared by {len(shares)} mixers: each has at least {WIDTH_STEP}"
        )
    exact = [share * whole / sum(shares) for share in shares]
    parts = [max(1, int(part)) for part in exact]
    # What is left over goes where most is missing, and comes from where most is too much, so that the parts add up.
    while sum(parts) < whole:
        parts[max(range(len(parts)), key=lambda index: exact[index] - parts[index])] += 1
    while sum(parts) > whole:
        spare = [index for index, part in enumerate(parts) if part > 1]
        parts[min(spare, key=lambda index: exact[index] - parts[index])] -= 1
    return tuple(replace(frame, width=part * WIDTH_STEP) for part in parts)


def check(layout: Layout, frame: Frame) -> None:
    """Raise ValueError if a layer's sizes do not fit together in the frame."""
    for layer in dict.fromkeys(layout.layers):
        for branch, own in zip(layer.branches, branch_frames(layer, frame), strict=True):
            mixer_of(branch).sized(own)
        channel_of(layer.channel).sized(frame)


def plain(layout: Layout, frame: Frame) -> Layout:
    """The same network in this frame, with every size left out that the frame would choose anyway: one text a network."""
    done = {layer: _plain_layer(layer, frame) for layer in dict.fromkeys(layout.layers)}
    return Layout(tuple(done[layer] for layer in layout.layers))


def _plain_layer(layer: Layer, frame: Frame) -> Layer:
    branches = zip(layer.branches, branch_frames(layer, frame), strict=True)
    return replace(
        layer,
        branches=tuple(
            replace(branch_of(_plain_spec(mixer_of(branch), own)), share=branch.share)
            for branch, own in branches
        ),
    )


def _plain_spec(spec: MixerSpec, frame: Frame) -> MixerSpec:
    # From all sizes down, so that heads=32 and head_dim=64 come out the same where they mean the same.
    full = short = spec.sized(frame)
    for setting in settings_of(type(spec)):
        if setting.default is None:
            shorter = replace(short, **{setting.name: None})
            if _same_sizes(shorter, full, frame):
                short = shorter
    return short


def _same_sizes(spec: MixerSpec, full: MixerSpec, frame: Frame) -> bool:
    try:
        return spec.sized(frame) == full
    except ValueError:
        # Without this size the others do not fit together.
        return False


def shrink_layout(layout: Layout, target: Frame, proxy: Frame) -> Layout:
    """The layout as it is trained in the proxy frame: every size by its unit's law; sources in `spec.shrink`."""

    def smaller(layer: Layer) -> Layer:
        frames = zip(branch_frames(layer, target), branch_frames(layer, proxy), strict=True)
        return replace(
            layer,
            branches=tuple(
                replace(branch_of(shrink(mixer_of(branch), large, small)), share=branch.share)
                for branch, (large, small) in zip(layer.branches, frames, strict=True)
            ),
            channel=branch_of(shrink(channel_of(layer.channel), target, proxy)),
        )

    done = {layer: smaller(layer) for layer in dict.fromkeys(layout.layers)}
    return plain(Layout(tuple(done[layer] for layer in layout.layers)), proxy)
