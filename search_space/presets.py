"""Known models as layouts: at their published size, so that prices can be checked, and as patterns for any frame.

Sizes are from the models' own configurations and papers, named in `source`. What differs from the published network is
said in `note`; the bytes of its cache do not depend on it.
"""

from search_space.frame import Frame
from search_space.layout import Layout, stack
from search_space.preset import Preset, published_frame
from search_space.presets_attention import ATTENTION
from search_space.presets_parallel import PARALLEL
from search_space.vocabulary import read

_KDA, _MLA = "kda[heads=32,head_dim=128]", "mla[heads=32,head_dim=128,rank=512,shared=64,rotary=0]"
_KIMI_E = "moe[experts=256,top_k=8,shared=1,hidden=1024,router=sigmoid,scale=2.446]"
_KIMI_K, _KIMI_A = f"{_KDA}/{_KIMI_E}", f"{_MLA}/{_KIMI_E}"
_KIMI = f"{_KDA}/swiglu[ratio=4] 2*{_KIMI_K} {_KIMI_A} 5*(3*{_KIMI_K} {_KIMI_A}) 2*{_KIMI_K} {_KIMI_A}"

_QWEN_E = "moe[experts=512,top_k=10,shared=1,hidden=512,shared_gate=true]"
_QWEN_D = f"gated_delta[heads=16,head_dim=128,value_heads=2,value_ratio=1]/{_QWEN_E}"
_QWEN_A = f"full[heads=16,head_dim=256,kv_heads=2,rotary=0.25,gate=true,qk_norm=true]/{_QWEN_E}"

_OLMO_D = "gated_delta[heads=30,head_dim=96,value_heads=1,value_ratio=2,negative=true]/swiglu[hidden=11008]"
_OLMO_A = "full[heads=30,head_dim=128,rotary=0,qk_norm=true]/swiglu[hidden=11008]"

_MINIMAX_E = "moe[experts=32,top_k=2,hidden=9216]"
_MINIMAX_L = f"lightning[heads=64,head_dim=128]/{_MINIMAX_E}"
_MINIMAX_A = f"full[heads=64,head_dim=128,kv_heads=8,rotary=0.5]/{_MINIMAX_E}"

_RING_E = "moe[experts=256,top_k=8,shared=1,hidden=512,router=sigmoid]"
_RING_L, _RING_A = (
    "lightning[heads=16,head_dim=128]",
    f"full[heads=16,head_dim=128,kv_heads=4,rotary=0.5]/{_RING_E}",
)
_RING_F = "moe[experts=256,top_k=8,shared=1,hidden=1024,router=sigmoid]"
_RINGF_L = "lightning[heads=32,head_dim=128]"
_RINGF_A = f"full[heads=32,head_dim=128,kv_heads=4,rotary=0.5]/{_RING_F}"

_MAMBA2 = "64*mamba2[state=128,head_dim=64]/none"
_NEMOTRON_M = "mamba2[state=128,heads=128,head_dim=64,groups=8]"
_M, _N, _A = (
    f"{_NEMOTRON_M}/relu2[ratio=5.25]",
    f"{_NEMOTRON_M}/none",
    "full[kv_heads=8,rotary=0]/relu2[ratio=5.25]",
)
_NANO_SSM = "mamba2[state=128,heads=128,head_dim=80,groups=8]"
_NM, _NN = f"{_NANO_SSM}/relu2[hidden=15680]", f"{_NANO_SSM}/none"
_NA = "full[heads=40,head_dim=128,kv_heads=8,rotary=0]/relu2[hidden=15680]"
_NANO = f"3*{_NM} {_NN} 3*{_NM} {_NN} {_NA} 2*{_NM} {_NN} {_NA} 2*(3*{_NM} {_NN} {_NA}) {_NM} {_NN} 6*{_NM}"

_GRANITE_E = "moe[experts=72,top_k=10,shared=2,hidden=768]"
_GRANITE_M = f"mamba2[state=128,heads=128,head_dim=64]/{_GRANITE_E}"
_GRANITE_A = f"full[heads=32,head_dim=128,kv_heads=8,rotary=0]/{_GRANITE_E}"
_TINY_E = "moe[experts=64,top_k=6,shared=2,hidden=512]"
_TINY_M = f"mamba2[state=128,heads=48,head_dim=64]/{_TINY_E}"
_TINY_A = f"full[heads=12,head_dim=128,kv_heads=4,rotary=0]/{_TINY_E}"

_JAMBA_E = "moe[experts=16,top_k=2,hidden=14336]"
_JM, _JA, _JD = "mamba[norms=true]", "full[heads=32,head_dim=128,kv_heads=8,rotary=0]", "swiglu[ratio=3.5]"
_JAMBA = f"4*({_JM}/{_JD} {_JM}/{_JAMBA_E} {_JM}/{_JD} {_JM}/{_JAMBA_E} {_JA}/{_JD} {_JM}/{_JAMBA_E} {_JM}/{_JD} {_JM}/{_JAMBA_E})"
_SAMBA = "12*(mamba/swiglu[ratio=4] window[heads=32,head_dim=64,kv_heads=4,size=2048]/swiglu[ratio=4])"

_ZM = "mamba2[state=64,heads=80,head_dim=64]/none"
_ZA = f"full[heads=32,head_dim=160]/geglu[hidden=10240] {_ZM}"

_GEGLU = "geglu[ratio=3]"
_RG_W = f"window[heads=10,head_dim=256,kv_heads=1,size=2048,rotary=0.5]/{_GEGLU}"
_RG9_W = f"window[heads=16,head_dim=256,kv_heads=1,size=2048,rotary=0.5]/{_GEGLU}"
_GRIFFIN_R = f"rglru[heads=22]/{_GEGLU}"
_GRIFFIN_W = f"window[heads=32,head_dim=128,kv_heads=1,size=1024,rotary=0.5]/{_GEGLU}"

_LFM_C, _LFM_A = (
    "shortconv/swiglu[ratio=4]",
    "full[heads=32,head_dim=64,kv_heads=8,qk_norm=true]/swiglu[ratio=4]",
)
_STRIPED_H = "hyena[filter=modal,modes=2,groups=4]/swiglu[ratio=3.5]"
_STRIPED_A = "full[heads=32,head_dim=128,kv_heads=8]/swiglu[ratio=3.5]"
_EVO_H, _EVO_A = "hyena[filter=modal,modes=8]", "full[heads=32,head_dim=128]"

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        *ATTENTION,
        *PARALLEL,
        Preset(
            name="kimi-linear",
            title="Kimi-Linear-48B-A3B",
            network=_KIMI,
            frame=published_frame(2304, 163840),
            pattern="3*kda mla[rotary=0]",
            source="Kimi Linear, arXiv:2510.26692",
        ),
        Preset(
            name="mamba-2",
            title="Mamba2-2.7B",
            network=_MAMBA2,
            frame=published_frame(2560, 50288, train_length=2048),
            pattern="mamba2/none",
            source="Mamba-2, arXiv:2405.21060",
            tied=True,
        ),
        Preset(
            name="nemotron-h",
            title="Nemotron-H-8B",
            network=f"3*{_M} {_N} {_A} 3*(4*{_M} {_N} {_A}) 5*{_M}",
            frame=published_frame(4096, 131072, train_length=8192),
            pattern="mamba2 mamba2/none full[kv_heads={quarter},rotary=0] mamba2",
            source="Nemotron-H, arXiv:2504.03624",
        ),
        Preset(
            name="nemotron-nano",
            title="Nemotron-Nano-9B-v2",
            network=_NANO,
            frame=published_frame(4480, 131072, train_length=8192),
            pattern="2*mamba2 mamba2/none full[kv_heads={quarter},rotary=0]",
            source="Nemotron Nano 2, arXiv:2508.14444",
        ),
        Preset(
            name="qwen3-next",
            title="Qwen3-Next-80B-A3B",
            network=f"12*(3*{_QWEN_D} {_QWEN_A})",
            frame=published_frame(2048, 151936, rotary_base=1e7),
            pattern="3*gated_delta full[kv_heads={quarter},gate=true,rotary=0.25]",
            source="Qwen3-Next, configuration in transformers 5.23; gated delta rule, arXiv:2412.06464",
            note="without the layer that predicts a second token",
        ),
        Preset(
            name="olmo-hybrid",
            title="Olmo-Hybrid-7B",
            network=f"8*(3*{_OLMO_D} {_OLMO_A})",
            frame=published_frame(3840, 100352),
            pattern="3*gated_delta[negative=true] full[rotary=0]",
            source="Olmo-Hybrid, configuration in transformers 5.23; negative eigenvalues, arXiv:2411.12537",
        ),
        Preset(
            name="minimax-01",
            title="MiniMax-Text-01",
            network=f"10*(7*{_MINIMAX_L} {_MINIMAX_A})",
            frame=published_frame(6144, 200064, train_length=8192, rotary_base=1e7),
            pattern="7*lightning full[kv_heads={quarter},rotary=0.5]",
            source="MiniMax-01, arXiv:2501.08313",
        ),
        Preset(
            name="ring-mini-linear",
            title="Ring-mini-linear-2.0",
            network=f"{_RING_L}/swiglu[hidden=5120] 3*{_RING_L}/{_RING_E} {_RING_A} 3*(4*{_RING_L}/{_RING_E} {_RING_A})",
            frame=published_frame(2048, 157184),
            pattern="4*lightning full[kv_heads={quarter},rotary=0.5]",
            source="Ring-linear, arXiv:2510.19338",
        ),
        Preset(
            name="ring-flash-linear",
            title="Ring-flash-linear-2.0",
            network=f"{_RINGF_L}/swiglu[hidden=9216] 6*{_RINGF_L}/{_RING_F} {_RINGF_A} 3*(7*{_RINGF_L}/{_RING_F} {_RINGF_A})",
            frame=published_frame(4096, 157184),
            pattern="7*lightning full[kv_heads={quarter},rotary=0.5]",
            source="Ring-linear, arXiv:2510.19338",
        ),
        Preset(
            name="granite-4-h-small",
            title="Granite-4.0-H-Small",
            network=f"5*{_GRANITE_M} {_GRANITE_A} 3*(9*{_GRANITE_M} {_GRANITE_A}) 4*{_GRANITE_M}",
            frame=published_frame(4096, 100352),
            pattern="5*mamba2 full[kv_heads={quarter},rotary=0] 4*mamba2",
            source="Granite 4.0, configuration in transformers; Mamba-2, arXiv:2405.21060",
            tied=True,
        ),
        Preset(
            name="granite-4-h-tiny",
            title="Granite-4.0-H-Tiny",
            network=f"5*{_TINY_M} {_TINY_A} 3*(9*{_TINY_M} {_TINY_A}) 4*{_TINY_M}",
            frame=published_frame(1536, 100352),
            pattern="5*mamba2 full[kv_heads={quarter},rotary=0] 4*mamba2",
            source="Granite 4.0, configuration in transformers; Mamba-2, arXiv:2405.21060",
            tied=True,
        ),
        Preset(
            name="jamba",
            title="Jamba-v0.1",
            network=_JAMBA,
            frame=published_frame(4096, 65536),
            pattern="4*mamba full[kv_heads={quarter},rotary=0] 3*mamba",
            source="Jamba, arXiv:2403.19887",
        ),
        Preset(
            name="samba",
            title="Samba-1.7B",
            network=_SAMBA,
            frame=published_frame(2048, 50304),
            pattern="mamba window[kv_heads={quarter},size={half}]",
            source="Samba, arXiv:2406.07522",
            tied=True,
            note="hidden width 8192 where the paper says 8196",
        ),
        Preset(
            name="zamba2",
            title="Zamba2-2.7B",
            network=f"6*{_ZM} {_ZA} 6*(5*{_ZM} {_ZA}) 4*{_ZM} {_ZA} 3*{_ZM} {_ZA} 2*{_ZM}",
            frame=published_frame(2560, 32000),
            pattern="5*mamba2/none full",
            source="Zamba2, arXiv:2411.15242",
            tied=True,
            note="its attention layers share two sets of weights and read the embedding too; here each has weights of its own",
        ),
        Preset(
            name="mamba",
            title="Mamba-2.8B",
            network="64*mamba/none",
            frame=published_frame(2560, 50280, train_length=2048),
            pattern="mamba/none",
            source="Mamba, arXiv:2312.00752",
            tied=True,
        ),
        Preset(
            name="recurrent-gemma-2b",
            title="RecurrentGemma-2B",
            network=f"8*(2*rglru/{_GEGLU} {_RG_W}) 2*rglru/{_GEGLU}",
            frame=published_frame(2560, 256000, train_length=8192),
            pattern="2*rglru window[kv_heads={quarter},size={half}]",
            source="RecurrentGemma, arXiv:2404.07839",
            tied=True,
        ),
        Preset(
            name="recurrent-gemma-9b",
            title="RecurrentGemma-9B",
            network=f"12*(2*rglru/{_GEGLU} {_RG9_W}) 2*rglru/{_GEGLU}",
            frame=published_frame(4096, 256000, train_length=8192),
            pattern="2*rglru window[kv_heads={quarter},size={half}]",
            source="RecurrentGemma, arXiv:2404.07839",
            tied=True,
        ),
        Preset(
            name="griffin-7b",
            title="Griffin-7B",
            network=f"10*(2*{_GRIFFIN_R} {_GRIFFIN_W}) 2*{_GRIFFIN_R}",
            frame=published_frame(4096, 256000, train_length=2048),
            pattern="2*rglru window[kv_heads={quarter},size={half}]",
            source="Griffin, arXiv:2402.19427",
            tied=True,
            note="the vocabulary is that of its code, which the paper does not name",
        ),
        Preset(
            name="lfm2",
            title="LFM2-1.2B",
            network=f"3*(2*{_LFM_C} {_LFM_A}) 3*({_LFM_C} {_LFM_A}) {_LFM_C}",
            frame=published_frame(2048, 65536, rotary_base=1e6),
            pattern="2*shortconv full[kv_heads={quarter}]",
            source="LFM2, configuration of LFM2-1.2B; report, arXiv:2511.23404",
            tied=True,
        ),
        Preset(
            name="retnet",
            title="RetNet XL",
            network="24*retnet[heads=8,head_dim=256,value_dim=432]/geglu[hidden=3456]",
            frame=published_frame(2048, 50304, train_length=2048),
            pattern="retnet",
            source="RetNet, arXiv:2307.08621; sizes of torchscale",
            tied=True,
            note="the vocabulary is not published with the sizes; the head is tied as in torchscale's examples",
        ),
        Preset(
            name="retnet-7b",
            title="RetNet 7B",
            network="32*retnet[heads=16,head_dim=256,value_dim=432]/geglu[hidden=6912]",
            frame=published_frame(4096, 50304, train_length=2048),
            pattern="retnet",
            source="RetNet, arXiv:2307.08621; sizes of torchscale",
            tied=True,
            note="the vocabulary is not published with the sizes; the head is tied as in torchscale's examples",
        ),
        Preset(
            name="rwkv-7",
            title="RWKV-7 2.9B",
            network="32*rwkv7/relu2[ratio=4,shift=true]",
            frame=published_frame(2560, 65536),
            pattern="rwkv7/relu2[shift=true]",
            source="RWKV-7, arXiv:2503.14456",
        ),
        Preset(
            name="striped-hyena",
            title="StripedHyena-7B",
            network=f"16*({_STRIPED_H} {_STRIPED_A})",
            frame=published_frame(4096, 32000, rotary_base=5e5),
            pattern="hyena[filter=modal] full[kv_heads={quarter}]",
            source="StripedHyena, configuration of StripedHyena-Hessian-7B; Hyena, arXiv:2302.10866",
        ),
        Preset(
            name="evo",
            title="Evo-1",
            network=f"8*{_EVO_H} {_EVO_A} 2*(7*{_EVO_H} {_EVO_A}) 7*{_EVO_H}",
            frame=published_frame(4096, 512),
            pattern="7*hyena[filter=modal] full",
            source="Evo, configuration of Evo-1; Hyena, arXiv:2302.10866",
            tied=True,
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
