"""Known models as layouts: at their published size, so that prices can be checked, and as patterns for any frame.

Sizes are from the models' own configurations and papers, named in `source`. A channel mixer that this vocabulary
does not have is spelled as SwiGLU and said so in `note`; caches do not depend on it.
"""

from dataclasses import dataclass

from search_space.frame import Frame
from search_space.layout import Layout, stack
from search_space.vocabulary import read


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A published model: its network at its own frame, and the repeating idea of it in the frame's own sizes."""

    name: str
    title: str
    network: str
    frame: Frame
    pattern: str
    source: str
    note: str = ""

    @property
    def layout(self) -> Layout:
        """The published network, layer by layer."""
        return read(self.network)


_LLAMA = "32*full[kv_heads=8]/swiglu[ratio=3.5]"
_MISTRAL = "32*window[kv_heads=8,size=4096]/swiglu[ratio=3.5]"
_KDA, _MLA = "kda[heads=32,head_dim=128]", "mla[heads=32,head_dim=128,rank=512,shared=64,rotary=0]"
_KIMI = f"{_KDA}/swiglu[ratio=4] 2*{_KDA} {_MLA} 5*(3*{_KDA} {_MLA}) 2*{_KDA} {_MLA}"
_MAMBA = "64*mamba2[state=128,head_dim=64]/none"
_M, _N, _A = (
    "mamba2[state=128,heads=128,head_dim=64,groups=8]/swiglu[ratio=5.25]",
    "mamba2[state=128,heads=128,head_dim=64,groups=8]/none",
    "full[kv_heads=8,rotary=0]/swiglu[ratio=5.25]",
)
_NEMOTRON = f"3*{_M} {_N} {_A} 3*(4*{_M} {_N} {_A}) 5*{_M}"

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            name="llama-3",
            title="Llama-3-8B",
            network=_LLAMA,
            frame=Frame(width=4096, train_length=8192, context=8192, vocabulary=128256, rotary_base=5e5),
            pattern="full[kv_heads={quarter}]",
            source="Llama 3, arXiv:2407.21783",
        ),
        Preset(
            name="mistral",
            title="Mistral-7B v0.1",
            network=_MISTRAL,
            frame=Frame(width=4096, train_length=8192, context=8192, vocabulary=32000),
            pattern="window[kv_heads={quarter},size={half}]",
            source="Mistral 7B, arXiv:2310.06825",
        ),
        Preset(
            name="kimi-linear",
            title="Kimi-Linear-48B-A3B",
            network=_KIMI,
            frame=Frame(width=2304, train_length=4096, context=131072, vocabulary=163840),
            pattern="3*kda mla[rotary=0]",
            source="Kimi Linear, arXiv:2510.26692",
            note="its channel mixers after the first layer are experts, spelled here as SwiGLU",
        ),
        Preset(
            name="mamba-2",
            title="Mamba2-2.7B",
            network=_MAMBA,
            frame=Frame(width=2560, train_length=2048, context=8192, vocabulary=50288),
            pattern="mamba2/none",
            source="Mamba-2, arXiv:2405.21060",
        ),
        Preset(
            name="nemotron-h",
            title="Nemotron-H-8B",
            network=_NEMOTRON,
            frame=Frame(width=4096, train_length=8192, context=8192, vocabulary=131072),
            pattern="mamba2 mamba2/none full[kv_heads={quarter},rotary=0] mamba2",
            source="Nemotron-H, arXiv:2504.03624",
            note="its channel mixers are squared ReLU, spelled here as SwiGLU of the same hidden width",
        ),
    )
}


def pattern_for(preset: Preset, frame: Frame, layers: int) -> Layout | None:
    """The preset's idea at another frame as a pattern of so many layers, or None if it does not repeat evenly in them."""
    heads = max(1, frame.width // frame.head_size(128, frame.width))
    # The published models share each key head among four query heads, or as near as the heads allow.
    quarter = max(size for size in range(1, heads + 1) if heads % size == 0 and size <= max(1, heads // 4))
    half = max(4, frame.train_length // 2 // 4 * 4)
    idea = read(preset.pattern.format(quarter=quarter, half=half))
    return stack(idea, layers) if layers % len(idea) == 0 else None
