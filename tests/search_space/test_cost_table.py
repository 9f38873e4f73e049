"""What a layer of each attention keeps, reads and computes, as the papers' formulas say: `nas cost` gives the same numbers.

The formulas are written out here, in the letters of the papers: L tokens visible, H heads, G key heads, K head width, d width
of the network, b bytes of a cached number, κ = 2bGK bytes of a token, A(n) = 4HKn FLOPs over n keys. A mixer that is no
copy of its formula says why, and by how much to the byte.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from nas.cli.main import main

Array = Any
BYTES = 2
"""b, in bfloat16."""
CHUNK = 64
"""Tokens that prefills of running sums take at once."""
LONG = 131072


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Bytes of one layer and text; FLOPs of a token without its projections, at the end of the text and on average."""

    stored: float = 0
    read: float = 0
    decode: float = 0
    prefill: float = 0


@dataclass(frozen=True, kw_only=True)
class Row:
    """A layer at a size that was published, what its formula says, and how ours differs from that, by reason."""

    layout: str
    width: int
    context: int = LONG
    weights: float
    """Those of the projections, which a token meets once and the formulas leave out."""
    says: Figures
    each: Callable[[Array], Array] | None = None
    """FLOPs of a prefill's token that sees n tokens, itself among them; None where chance decides."""
    apart: Mapping[str, Figures] = field(default_factory=dict)


@dataclass(frozen=True)
class Grouped:
    """H heads of width K over G key heads."""

    heads: int
    groups: int
    dim: int

    @property
    def kappa(self) -> int:
        return BYTES * 2 * self.groups * self.dim

    @property
    def matrix(self) -> int:
        """Numbers of one matrix a head."""
        return self.heads * self.dim * self.dim

    def attend(self, keys: Any) -> Any:
        return 4 * self.heads * self.dim * keys

    def weights(self, width: int) -> int:
        return 2 * width * self.dim * (self.heads + self.groups)


def softmax(
    layout: str,
    width: int,
    heads: Grouped,
    *,
    context: int = LONG,
    stored: float,
    read: float,
    seen: float,
    each: Callable[[Array], Array],
    apart: Mapping[str, Figures] | None = None,
) -> Row:
    """A row of tokens: what is stored, what is read, what is seen at the end and by the n-th token."""
    return Row(
        layout=layout,
        width=width,
        context=context,
        weights=heads.weights(width),
        says=Figures(stored=heads.kappa * stored, read=heads.kappa * read, decode=heads.attend(seen)),
        each=lambda n: heads.attend(each(n)),
        apart=apart or {},
    )


def latent(width: int, heads: int, query_rank: int) -> tuple[int, int]:
    """Weights of DeepSeek's and Kimi's latent attention, 512 + 64 cached, 128 + 64 a head; and FLOPs over a latent."""
    query = query_rank * (width + heads * 192) if query_rank else width * heads * 192
    return query + width * 576 + 512 * heads * 256 + heads * 128 * width, 2 * heads * (2 * 512 + 64)


def blocks(n: Array, size: int, most: int) -> Array:
    """Keys of the own block up to itself and of most - 1 earlier ones."""
    return np.minimum((n - 1) // size, most - 1) * size + (n - 1) % size + 1


def segments(n: Array, size: int, memory: int) -> Array:
    """Keys of the own segment up to itself and of the tokens before it."""
    return (n - 1) % size + 1 + np.minimum(memory, (n - 1) // size * size)


LLAMA, GPT_OSS, SPARSE = Grouped(32, 8, 128), Grouped(64, 8, 64), Grouped(8, 8, 64)
LONGFORMER, BIGBIRD, NSA = Grouped(8, 8, 64), Grouped(12, 12, 64), Grouped(64, 4, 128)
XL, INFINI, KATHAROPOULOS = Grouped(16, 16, 64), Grouped(8, 8, 128), Grouped(8, 8, 32)
VISTA, MOSA = Grouped(2, 2, 128), Grouped(16, 4, 64)
V3_WEIGHTS, V3_LATENT = latent(7168, 128, 1536)
KIMI_WEIGHTS, KIMI_LATENT = latent(2304, 32, 0)
V32_INDEX = 1536 * 64 * 128 + 7168 * (128 + 64)
MILLION = 2**20
FEATURES = 256
LOG_LENGTH, LOG_MATRIX, LOG_LIVE = 98304, 64 * 64 * 128, 17
"""A text whose last position, 98,303, has 16 bits set."""
SEGMENT, XL_LENGTH, RAE_LENGTH = 384, 384 * 340, 500 * 260

WRITES = "what a step reads is counted, and not what it writes, which is as much again"
NORMALISER = "the sum of the keys is one more column of values, which is written and read as they are"


TABLE: tuple[Row, ...] = (
    softmax("full[kv_heads=8]", 4096, LLAMA, stored=LONG, read=LONG, seen=LONG, each=lambda n: n),
    Row(
        layout="mla[heads=128,head_dim=128,rank=512,query_rank=1536,shared=64]", width=7168,
        weights=V3_WEIGHTS,
        says=Figures(stored=1152 * LONG, read=1152 * LONG, decode=V3_LATENT * LONG),
        each=lambda n: 2 * 128 * (128 + 64 + 128) * n,
    ),
    Row(
        layout="mla[heads=32,head_dim=128,rank=512,shared=64,rotary=0]", width=2304, weights=KIMI_WEIGHTS,
        says=Figures(stored=1152 * LONG, read=1152 * LONG, decode=KIMI_LATENT * LONG),
        each=lambda n: 2 * 32 * (128 + 64 + 128) * n,
    ),
    softmax(
        "window[kv_heads=8,size=4096]", 4096, LLAMA, stored=4096, read=4096, seen=4096,
        each=lambda n: np.minimum(n, 4096),
    ),
    softmax(
        "window[heads=64,kv_heads=8,head_dim=64,size=128,sinks=4,learned_sink=true]", 2880, GPT_OSS,
        stored=132, read=132, seen=132, each=lambda n: np.minimum(n, 132),
    ),
    # Spans by head, as in MoA: a quarter of the heads see all of the window, a quarter a half of it, and so on.
    softmax(
        "window[kv_heads=8,size=4096,spans=halving]", 4096, LLAMA, stored=1920, read=1920, seen=1920,
        each=lambda n: sum(np.minimum(n, span) for span in (4096, 2048, 1024, 512)) / 4,
    ),
    softmax(
        "strided[stride=128,heads=8,head_dim=64]", 512, SPARSE, context=12288,
        stored=12288, read=128 + 96, seen=128 + 96, each=lambda n: np.minimum(n, 128) + (n - 1) // 128,
        apart={
            "a token is in both of its own patterns, and is read once":
                Figures(read=-SPARSE.kappa, decode=-SPARSE.attend(1))
        },
    ),
    softmax(
        "fixed[stride=128,summary=32,heads=8,head_dim=64]", 512, SPARSE, context=12288,
        stored=32 * 96 + 128, read=32 * 96 + 128, seen=32 * 96 + 128,
        each=lambda n: (n - 1) % 128 + 1 + (n - 1) // 128 * 32,
        apart={
            "the last token of a block reads that block's summary in the block itself":
                Figures(read=-32 * SPARSE.kappa, decode=-SPARSE.attend(32))
        },
    ),
    softmax(
        "longformer[size=512,dilation=1,prefix=16,heads=8,head_dim=64]", 512, LONGFORMER, context=32768,
        stored=512 + 16, read=512 + 16, seen=512 + 16,
        each=lambda n: np.where(n <= 16, n, 16 + np.minimum(512, n - 16)),
        apart={
            "the prefix's keys and values by its own projections stay, so that a prefill may be cut inside it":
                Figures(stored=16 * LONGFORMER.kappa),
            "the prefix's own projections": Figures(prefill=2 * 16 / 32768 * 3 * 512 * 512),
        },
    ),
    softmax(
        "longformer[size=512,dilation=4,prefix=0,heads=8,head_dim=64]", 512, LONGFORMER, context=32768,
        # One half of the heads has gaps.
        stored=(512 + 4 * 512) / 2, read=512, seen=512,
        each=lambda n: (np.minimum(512, n) + np.minimum(512, (n - 1) // 4 + 1)) / 2,
        apart={
            "behind the oldest token that is read no gap is kept": Figures(stored=-3 * LONGFORMER.kappa / 2)
        },
    ),
    softmax(
        "bigbird[block=64,first=1,near=3,random=3]", 768, BIGBIRD, context=4096,
        stored=4096, read=64 * 7, seen=64 * 7, each=lambda n: blocks(n, 64, 7),
    ),
    Row(
        layout="nsa[block=64,stride=16,selected=1024,window=512,heads=64,kv_heads=4,head_dim=128]",
        width=2560,
        # Keys and values of its own for each of three branches, three gates a head.
        weights=2560 * (2 * 64 * 128 + 6 * 4 * 128 + 3 * 64),
        says=Figures(
            stored=NSA.kappa * (LONG + LONG // 16 + 512), read=NSA.kappa * (LONG // 16 + 16 * 64 + 512),
            decode=NSA.attend(LONG // 16 + 16 * 64 + 512),
        ),
        each=lambda n: NSA.attend(np.maximum(0, (n - 32) // 16 + 1) + blocks(n, 64, 16) + np.minimum(n, 512)),
        apart={
            "a first slot is whole after 32 tokens, not after 16":
                Figures(stored=-NSA.kappa, read=-NSA.kappa, decode=-NSA.attend(1)),
            "the 32 tokens of the slot to come are kept, and a step that ends one reads them":
                Figures(stored=32 * NSA.kappa, read=32 * NSA.kappa),
            "the network that makes slots of 32 keys and values, once in 16 tokens":
                Figures(decode=2 * 2 * 4 * 33 * 128**2 / 16, prefill=2 * 2 * 4 * 33 * 128**2 / 16),
        },
    ),
    *(
        Row(
            layout=f"moba[block=4096,top_k=12,kv_heads=8{text}]", width=4096, context=MILLION,
            weights=LLAMA.weights(4096),
            says=Figures(
                stored=LLAMA.kappa * MILLION + BYTES * 8 * 128 * 256,
                read=LLAMA.kappa * 12 * 4096 + BYTES * 8 * 128 * 256,
                decode=LLAMA.attend(12 * 4096) + 2 * choosers * 128 * 256,
            ),
            each=lambda n, choosers=choosers: LLAMA.attend(blocks(n, 4096, 12)) + 2 * choosers * 128 * n / 4096,
            apart={
                "sums of keys are float32 in any frame":
                    Figures(stored=(4 - BYTES) * 8 * 128 * 256, read=(4 - BYTES) * 8 * 128 * 256),
                "the own block is read unasked": Figures(decode=-2 * choosers * 128),
                **apart,
            },
        )
        for text, choosers, apart in (
            (",shared=true", 8, {}),
            # What the formula leaves to the kernel: heads of a group choose apart.
            ("", 32, {"four heads of a group may choose apart": Figures(read=LLAMA.kappa * 3 * 11 * 4096)}),
        )
    ),
    Row(
        layout="dsa[heads=128,head_dim=128,rank=512,query_rank=1536,shared=64,top_k=2048,index_heads=64,index_dim=128]",
        width=7168, weights=V3_WEIGHTS + V32_INDEX,
        # As released: index keys of eight bits each, and a scale of four bytes.
        says=Figures(
            stored=(1152 + 132) * LONG, read=132 * LONG + 1152 * 2048,
            decode=2 * 64 * 128 * LONG + V3_LATENT * 2048,
        ),
        each=lambda n: 2 * 64 * 128 * n + V3_LATENT * np.minimum(n, 2048),
        apart={
            "index keys are kept in the type of the cache":
                Figures(stored=(256 - 132) * LONG, read=(256 - 132) * LONG)
        },
    ),
    Row(
        layout="performer[heads=8,head_dim=64,features=256]", width=512, weights=4 * 512 * 512,
        says=Figures(
            stored=4 * 8 * (FEATURES * 64 + FEATURES), read=2 * 4 * 8 * (FEATURES * 64 + FEATURES),
            decode=4 * 8 * FEATURES * (64 + 64),
        ),
        each=lambda _: 4 * 8 * FEATURES * (64 + 64) + 2 * 8 * (FEATURES + 64) * CHUNK / 2,
        apart={
            WRITES: Figures(read=-4 * 8 * (FEATURES * 64 + FEATURES)),
            NORMALISER: Figures(decode=4 * 8 * FEATURES, prefill=4 * 8 * FEATURES + 2 * 8 * CHUNK / 2),
            "the largest exponent so far, one a head": Figures(stored=4 * 8, read=4 * 8),
        },
    ),
    Row(
        layout="linear[heads=8,head_dim=32]", width=256, weights=4 * 256 * 256,
        says=Figures(
            stored=4 * 8 * (32 * 32 + 32), read=2 * 4 * 8 * (32 * 32 + 32), decode=4 * KATHAROPOULOS.matrix
        ),
        each=lambda _: 4 * KATHAROPOULOS.matrix + KATHAROPOULOS.attend(CHUNK / 2),
        apart={
            WRITES: Figures(read=-4 * 8 * (32 * 32 + 32)),
            NORMALISER: Figures(decode=4 * 8 * 32, prefill=4 * 8 * 32 + 2 * 8 * CHUNK / 2),
        },
    ),
    Row(
        layout="qla[heads=2,head_dim=128,block=64,gate=false]", width=256, weights=4 * 256 * 256,
        says=Figures(
            stored=4 * VISTA.matrix + VISTA.kappa * 64, read=2 * (4 * VISTA.matrix + VISTA.kappa * 64),
            decode=4 * VISTA.matrix + VISTA.attend(64 / 2),
        ),
        each=lambda _: 4 * VISTA.matrix + VISTA.attend(64 / 2) + VISTA.matrix / 64,
        apart={
            WRITES: Figures(read=-(4 * VISTA.matrix + VISTA.kappa * 64)),
            "a block of 64 shows its tokens 32½ on average, their own among them":
                Figures(decode=VISTA.attend(1 / 2), prefill=VISTA.attend(1 / 2)),
            "a step activates the matrix anew": Figures(decode=VISTA.matrix),
        },
    ),
    Row(
        layout="loglinear[state=128,heads=64,head_dim=64]", width=2048, context=LOG_LENGTH,
        # Values, gate and output, one key and query, a rate a head and weights of 18 levels; a convolution of four taps.
        weights=2048 * (3 * 4096 + 2 * 128 + 64 + 64 * 18) + 4 * (4096 + 256),
        says=Figures(
            stored=4 * LOG_MATRIX * (math.ceil(math.log2(LOG_LENGTH)) + 1), read=4 * LOG_MATRIX * LOG_LIVE,
            decode=2 * LOG_MATRIX * LOG_LIVE,
        ),
        # Every tile is computed whole; each level above the tile is written and read.
        each=lambda _: 2 * 64 * 192 * CHUNK + 4 * LOG_MATRIX * math.ceil(math.log2(LOG_LENGTH / CHUNK)),
        apart={
            "all levels but the fresh one fade": Figures(decode=(LOG_LIVE - 1) * LOG_MATRIX),
            "a write, and two additions where levels join": Figures(decode=3 * LOG_MATRIX),
            "a tile is read and written into the first level": Figures(prefill=4 * LOG_MATRIX),
            "the convolution's last three tokens":
                Figures(stored=3 * BYTES * (4096 + 256), read=3 * BYTES * (4096 + 256)),
        },
    ),
    *(
        Row(
            layout="transformer_xl[segment=384,memory=384,heads=16,head_dim=64]", width=1024, context=context,
            weights=4 * 1024 * 1024,
            says=Figures(
                stored=XL.kappa * 2 * SEGMENT, read=XL.kappa * 2 * SEGMENT,
                # A score by position doubles the product of queries and keys.
                decode=XL.attend(2 * SEGMENT) + 2 * 16 * 64 * 2 * SEGMENT,
            ),
            each=lambda n: (XL.attend(1) + 2 * 16 * 64) * segments(n, SEGMENT, SEGMENT),
            apart={
                "the map of all distances, once a prefill":
                    Figures(prefill=2 * 2 * SEGMENT * 1024 * 1024 / context),
                **apart,
            },
        )
        for context, apart in (
            (XL_LENGTH, {}),
            (XL_LENGTH + 128, {
                "a segment that is 128 tokens long shows no more; its ring is kept for the whole":
                    Figures(read=-256 * XL.kappa, decode=-256 * (XL.attend(1) + 2 * 16 * 64))
            }),
        )
    ),
    Row(
        layout="compressive[segment=500,memory=500,slots=1500,compression=4,heads=16,head_dim=64]",
        width=1024, context=RAE_LENGTH, weights=4 * 1024 * 1024,
        says=Figures(
            stored=XL.kappa * 2500, read=XL.kappa * 2500, decode=(XL.attend(1) + 2 * 16 * 64) * 2500
        ),
        each=lambda n: (XL.attend(1) + 2 * 16 * 64)
        * (segments(n, 500, 500) + np.minimum(1500, np.maximum(0, (n - 1) // 500 * 500 - 500) // 4)),
        apart={
            "the 1,000 tokens at hand have their slots already, which nobody reads yet":
                Figures(stored=XL.kappa * 250),
            "inputs that wait for the fourth": Figures(stored=3 * BYTES * 1024, read=3 * BYTES * 1024),
            "a quarter of a slot a token: the convolution, and key and value of what it makes":
                Figures(decode=2 * (1024**2 + 2 * 1024**2 / 4), prefill=2 * (1024**2 + 2 * 1024**2 / 4)),
            "the map of all distances, once a prefill": Figures(prefill=2 * 2500 * 1024**2 / RAE_LENGTH),
        },
    ),
    *(
        Row(
            layout=f"infini[segment=2048,heads=8,head_dim=128,update={update}]", width=1024,
            weights=4 * 1024 * 1024,
            says=Figures(
                stored=INFINI.kappa * 2048 + 4 * 8 * (128 * 128 + 128),
                read=INFINI.kappa * 2048 + 4 * 8 * (128 * 128 + 128),
                decode=INFINI.attend(2048) + 4 * INFINI.matrix,
            ),
            each=lambda n: INFINI.attend(segments(n, 2048, 0)) + 4 * INFINI.matrix,
            apart={NORMALISER: Figures(decode=4 * 8 * 128, prefill=4 * 8 * 128), **apart},
        )
        for update, apart in (
            ("linear", {}),
            ("delta", {
                "the delta rule reads before it writes":
                    Figures(decode=2 * 8 * 129 * 128, prefill=2 * 8 * 129 * 128)
            }),
        )
    ),
    # Not tabled by their papers: what routed heads keep, and two patterns over the same values.
    Row(
        layout="mosa[size=1024,heads=16,kv_heads=4,head_dim=64]", width=1024,
        weights=MOSA.weights(1024) + 4 * 1024,
        says=Figures(stored=MOSA.kappa * 1024, read=MOSA.kappa * 1024, decode=MOSA.attend(1024)),
        apart={"how many tokens each group took, an int64": Figures(stored=8 * 4, read=8 * 4)},
    ),
    Row(
        layout="differential[heads=16,kv_heads=4,head_dim=128]", width=4096,
        weights=2 * 4096 * 256 * (16 + 4),
        # Keys and values of 8 ordinary key heads; of 32 ordinary heads the scores once and the values twice.
        says=Figures(stored=LLAMA.kappa * LONG, read=LLAMA.kappa * LONG, decode=1.5 * LLAMA.attend(LONG)),
        each=lambda n: 1.5 * LLAMA.attend(n),
    ),
)  # fmt: skip


def cost(capsys: pytest.CaptureFixture[str], layout: str, *arguments: object) -> Any:
    """What `nas cost --json` answers."""
    assert main(["cost", layout, "--json", *(str(argument) for argument in arguments)]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.layout}@{row.context}")
def test_a_layer_costs_what_its_formula_says(row: Row, capsys: pytest.CaptureFixture[str]) -> None:
    answer = cost(capsys, f"{row.layout}/none", "--width", row.width, "--context", row.context)
    entry, more = answer["cache"][0], row.apart.values()
    assert entry["stored_bytes"] == row.says.stored + sum(one.stored for one in more)
    assert entry["read_bytes"] == row.says.read + sum(one.read for one in more)
    mixing = {phase: flops - 2 * row.weights for phase, flops in entry["flops_per_token"].items()}
    assert mixing["decode"] == pytest.approx(row.says.decode + sum(one.decode for one in more), rel=1e-12)
    if row.each:
        seen = np.mean(row.each(np.arange(1, row.context + 1)))
        assert mixing["prefill"] == pytest.approx(seen + sum(one.prefill for one in more), rel=1e-9)


@pytest.mark.parametrize(
    ("preset", "word", "layers", "stored", "read"),
    [
        ("deepseek-v3", "mla", 61, 1152 * LONG, 1152 * LONG),
        ("deepseek-v3.2", "dsa", 61, (1152 + 256) * LONG, 256 * LONG + 1152 * 2048),
        ("kimi-linear", "mla", 7, 1152 * LONG, 1152 * LONG),
        ("mistral", "window", 32, 4096 * 4096, 4096 * 4096),
        ("llama-3", "full", 32, 4096 * LONG, 4096 * LONG),
        # Of 24 layers every other one is full.
        ("gpt-oss-20b", "window", 12, 2048 * 128, 2048 * 128),
        ("gpt-oss-20b", "full", 12, 2048 * LONG, 2048 * LONG),
    ],
)
def test_published_models_keep_that_a_layer_at_128k(
    preset: str, word: str, layers: int, stored: int, read: int, capsys: pytest.CaptureFixture[str]
) -> None:
    own = [
        layer
        for layer in cost(capsys, preset, "--context", "128k")["cache"][0]["by_layer"]
        if layer["layer"].startswith(word)
    ]
    assert [(layer["stored_bytes"], layer["read_bytes"]) for layer in own] == [(stored, read)] * layers
