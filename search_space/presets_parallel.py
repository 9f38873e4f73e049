"""Published models whose layers hold several mixers side by side."""

from search_space.preset import Preset, published_frame

_FALCON = "full[heads={heads},kv_heads=2,head_dim=128]|mamba2[heads={scans},head_dim={wide},state=256]&sum"
_FALCON_NOTE = "its multipliers are learned factors here, and its scan has a norm that the release leaves out"

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
)
