"""Published models of attention alone: full, windowed, latent and sparse."""

from search_space.preset import Preset, published_frame

_LLAMA = "32*full[kv_heads=8]/swiglu[ratio=3.5]"
_MISTRAL = "32*window[kv_heads=8,size=4096]/swiglu[ratio=3.5]"

_GEMMA2 = "heads=16,kv_heads=8,head_dim=256,soft_cap=50"
_GEMMA2_W = f"window[{_GEMMA2},size=4096]/geglu[hidden=14336]"
_GEMMA2_A = f"full[{_GEMMA2}]/geglu[hidden=14336]"


def _gemma3(heads: int, kv_heads: int, hidden: int) -> tuple[str, str]:
    """Windowed and full layers."""
    inside = f"heads={heads},kv_heads={kv_heads},head_dim=256,qk_norm=true"
    return f"window[{inside},size=1024]/geglu[hidden={hidden}]", f"full[{inside}]/geglu[hidden={hidden}]"


_GEMMA3_W, _GEMMA3_A = _gemma3(8, 4, 10240)
_GEMMA12_W, _GEMMA12_A = _gemma3(16, 8, 15360)

_OSS = "heads=64,kv_heads=8,head_dim=64,learned_sink=true"
_OSS_E = "moe[experts=32,top_k=4,hidden=2880]"

_LATENT = "heads=128,head_dim=128,rank=512,query_rank=1536,shared=64"
_DEEPSEEK_E = "moe[experts=256,top_k=8,shared=1,hidden=2048,router=sigmoid,scale=2.5]"
_V3, _V32 = f"mla[{_LATENT}]", f"dsa[{_LATENT},top_k=2048,index_heads=64,index_dim=128]"
_YARN = (40.0, 4096)
_GROUPS = (
    "its router's choice of groups of experts first is left out, as is the layer that predicts a second token"
)

_ENCODER = "an encoder, here its causal half, with rotary positions in place of learned ones; one that generates keeps this cache"

ATTENTION: tuple[Preset, ...] = (
    Preset(
        name="gpt-2",
        title="GPT-2 small",
        network="12*full[heads=12,head_dim=64]/mlp[hidden=3072]",
        frame=published_frame(768, 50257, train_length=1024, context=1024),
        pattern="full",
        source="Radford et al. 2019, Language Models are Unsupervised Multitask Learners",
        tied=True,
        note="rotary positions in place of 1,024 learned ones; without the biases of its projections",
    ),
    Preset(
        name="transformer-xl",
        title="Transformer-XL large",
        network="18*transformer_xl[heads=16,head_dim=64,segment=128,memory=1600]/mlp[hidden=4096,activation=relu]",
        frame=published_frame(1024, 267735, train_length=2048),
        pattern="transformer_xl",
        source="Transformer-XL, arXiv:1901.02860",
        tied=True,
        note="keeps keys and values, twice the bytes of the release's hidden states; one width for all of its words, "
        "where the release narrows the rare ones",
    ),
    Preset(
        name="sparse-transformer",
        title="Sparse Transformer of Enwik8",
        network="30*fixed[heads=8,head_dim=64,stride=128,summary=32]/mlp[hidden=2048]",
        frame=published_frame(512, 256, train_length=12288),
        pattern="fixed",
        source="Sparse Transformers, arXiv:1904.10509",
        tied=True,
        note="rotary positions in place of learned ones",
    ),
    Preset(
        name="longformer",
        title="Longformer-base",
        network="12*longformer[heads=12,head_dim=64,size=256,prefix=4]/mlp[hidden=3072]",
        frame=published_frame(768, 50265),
        pattern="longformer",
        source="Longformer, arXiv:2004.05150",
        tied=True,
        note=_ENCODER,
    ),
    Preset(
        name="bigbird",
        title="BigBird-base",
        network="12*bigbird[heads=12,head_dim=64,block=64,random=3]/mlp[hidden=3072]",
        frame=published_frame(768, 50358),
        pattern="bigbird",
        source="BigBird, arXiv:2007.14062",
        tied=True,
        note=_ENCODER,
    ),
    Preset(
        name="llama-3",
        title="Llama-3-8B",
        network=_LLAMA,
        frame=published_frame(4096, 128256, train_length=8192, rotary_base=5e5),
        pattern="full[kv_heads={quarter}]",
        source="Llama 3, arXiv:2407.21783",
    ),
    Preset(
        name="mistral",
        title="Mistral-7B v0.1",
        network=_MISTRAL,
        frame=published_frame(4096, 32000, train_length=8192),
        pattern="window[kv_heads={quarter},size={half}]",
        source="Mistral 7B, arXiv:2310.06825",
    ),
    Preset(
        name="gemma-2-9b",
        title="Gemma-2-9B",
        network=f"21*({_GEMMA2_W} {_GEMMA2_A})",
        frame=published_frame(3584, 256000, train_length=8192),
        pattern="window[kv_heads={quarter},size={half},soft_cap=50] full[kv_heads={quarter},soft_cap=50]",
        source="Gemma 2, arXiv:2408.00118",
        tied=True,
        note="its logits are capped too, and its norms stand behind the layers as well",
    ),
    Preset(
        name="gemma-3-4b",
        title="Gemma-3-4B",
        network=f"5*(5*{_GEMMA3_W} {_GEMMA3_A}) 4*{_GEMMA3_W}",
        frame=published_frame(2560, 262144, train_length=32768, rotary_base=1e6),
        pattern="5*window[kv_heads={quarter},size={half},qk_norm=true] full[kv_heads={quarter},qk_norm=true]",
        source="Gemma 3, arXiv:2503.19786",
        tied=True,
        note="its windowed layers turn by a base of 10,000, and its norms stand behind the layers as well",
    ),
    Preset(
        name="gemma-3-12b",
        title="Gemma-3-12B",
        network=f"8*(5*{_GEMMA12_W} {_GEMMA12_A})",
        frame=published_frame(3840, 262144, train_length=32768, rotary_base=1e6),
        pattern="5*window[kv_heads={quarter},size={half},qk_norm=true] full[kv_heads={quarter},qk_norm=true]",
        source="Gemma 3, arXiv:2503.19786",
        tied=True,
        note="its windowed layers turn by a base of 10,000, and its norms stand behind the layers as well",
    ),
    Preset(
        name="gpt-oss-20b",
        title="gpt-oss-20b",
        network=f"12*(window[{_OSS},size=128]/{_OSS_E} full[{_OSS}]/{_OSS_E})",
        frame=published_frame(2880, 201088, rotary_base=150000, yarn=(32.0, 4096)),
        pattern="window[kv_heads={quarter},size={half},learned_sink=true] full[kv_heads={quarter},learned_sink=true]",
        source="gpt-oss, arXiv:2508.10925",
        note="without the biases of its projections",
    ),
    Preset(
        name="deepseek-v3",
        title="DeepSeek-V3",
        network=f"3*{_V3}/swiglu[hidden=18432] 58*{_V3}/{_DEEPSEEK_E}",
        frame=published_frame(7168, 129280, yarn=_YARN),
        pattern="mla",
        source="DeepSeek-V3, arXiv:2412.19437",
        note=_GROUPS,
    ),
    Preset(
        name="deepseek-v3.2",
        title="DeepSeek-V3.2",
        network=f"3*{_V32}/swiglu[hidden=18432] 58*{_V32}/{_DEEPSEEK_E}",
        frame=published_frame(7168, 129280, yarn=_YARN),
        pattern="dsa",
        source="DeepSeek-V3.2, arXiv:2512.02556",
        note=f"{_GROUPS}; the index keeps its keys in the cache's type, where the release rounds them to eight bits",
    ),
)
