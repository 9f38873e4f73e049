"""Published models whose layers hold several mixers side by side, or take a cache or a scan from another layer."""

from search_space.preset import Preset, published_frame

_FALCON = "full[heads={heads},kv_heads=2,head_dim=128]|mamba2[heads={scans},head_dim={wide},state=256]&sum"
_FALCON_NOTE = "its multipliers are learned factors here, and its scan has a norm that the release leaves out"

_HYMBA = "heads=25,kv_heads=5,head_dim=64,value_ratio=2,meta=128"
_HYMBA_A = f"cross_layer[{_HYMBA},every=1]|mamba/swiglu[hidden=5504]"
_HYMBA_W = f"cross_layer[{_HYMBA},every=2,size=1024]|mamba/swiglu[hidden=5504]"
_HYMBA_T = f"cross_layer[{_HYMBA},every=3,size=1024]|mamba/swiglu[hidden=5504]"

_PHI_D = "swiglu[hidden=10240]"
_PHI_M, _PHI_G = f"mamba/{_PHI_D}", f"gmu/{_PHI_D}"
_PHI_W = f"window[heads=40,kv_heads=20,head_dim=64,size=512,rotary=0]/{_PHI_D}"
_PHI_A = f"cross_layer[heads=40,kv_heads=20,head_dim=64,every=0,rotary=0]/{_PHI_D}"

PARALLEL: tuple[Preset, ...] = (
    Preset(
        name="falcon-h1-1.5b",
        title="Falcon-H1-1.5B",
        network=f"24*{_FALCON.format(heads=8, scans=48, wide=64)}/swiglu[hidden=4608]",
        frame=published_frame(2048, 65537, rotary_base=1e11),
        pattern="full[kv_heads={quarter}]|mamba2&sum",
        source="Falcon-H1, arXiv:2507.22448",
        note=_FALCON_NOTE,
    ),
    Preset(
        name="falcon-h1-7b",
        title="Falcon-H1-7B",
        network=f"44*{_FALCON.format(heads=12, scans=24, wide=128)}/swiglu[hidden=12288]",
        frame=published_frame(3072, 130048, rotary_base=1e11),
        pattern="full[kv_heads={quarter}]|mamba2&sum",
        source="Falcon-H1, arXiv:2507.22448",
        note=_FALCON_NOTE,
    ),
    Preset(
        name="hymba-1.5b",
        title="Hymba-1.5B",
        network=f"{_HYMBA_A} 14*{_HYMBA_W} {_HYMBA_A} 3*{_HYMBA_T} 12*{_HYMBA_W} {_HYMBA_A}",
        frame=published_frame(1600, 32001, train_length=2048),
        pattern="cross_layer[kv_heads={quarter},size={half}]|mamba",
        source="Hymba, arXiv:2411.13676",
        tied=True,
        note="each mixer projects the input for itself; the tokens before the text are keys and values of each layer",
    ),
    Preset(
        name="phi-4-mini-flash",
        title="Phi-4-mini-flash",
        network=f"8*({_PHI_M} {_PHI_W}) {_PHI_M} {_PHI_A} 7*({_PHI_G} {_PHI_A})",
        frame=published_frame(2560, 200064),
        pattern="mamba window[size={half}] mamba cross_layer[every=0] gmu cross_layer[every=0]",
        source="SambaY, arXiv:2507.06607",
        tied=True,
        note="its attention is not differential here, which changes no byte",
    ),
)
