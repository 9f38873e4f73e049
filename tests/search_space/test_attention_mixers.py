"""Full and windowed attention with all their settings: equalities, prices by hand, other implementations."""

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from search_space.frame import Frame
from search_space.mixers.full import Full
from search_space.mixers.mla import MLA
from search_space.mixers.window import Window
from search_space.spec import shrink
from search_space.state import KeyValue, append_ring, read_ring, state_bytes
from search_space.vocabulary import mixer_of, read

Far = Callable[[Tensor, Tensor], float]
FRAME = Frame(width=64, train_length=128, context=128, dtype="float32", rotary_base=5e4)
LENGTH = 75


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def built(spec: Any, like: Any = None, frame: Frame = FRAME) -> Any:
    """The spec's mixer; with the weights of another that has them too, and random sink logits."""
    mixer = spec.build(frame)
    if like is not None:
        mixer.load_state_dict(like.state_dict(), strict=False)
    if mixer.sink is not None:
        mixer.sink.copy_(torch.randn_like(mixer.sink))
    return mixer


def stepped(mixer: Any, x: Tensor, max_len: int = LENGTH) -> Tensor:
    state, rows = mixer.start(x.shape[0], max_len), []
    for t in range(x.shape[1]):
        y, state = mixer.step(x[:, t], state)
        rows.append(y)
    return torch.stack(rows, dim=1)


def naive(mixer: Any, x: Tensor, seen: Callable[[int, int, int], bool], cap: float = math.inf) -> Tensor:
    """A layer without positions written out; `seen` is asked for head, query and key."""
    size = mixer.plan.head_dim
    q, k, v = (part(x).unflatten(-1, (-1, size)) for part in (mixer.query, mixer.key, mixer.value))
    shared, length = q.shape[2] // k.shape[2], x.shape[1]
    rows = torch.zeros_like(q)
    for head in range(q.shape[2]):
        scores = q[:, :, head] @ k[:, :, head // shared].mT / size**0.5
        if cap < math.inf:
            scores = cap * torch.tanh(scores / cap)
        mask = torch.tensor([[s <= t and seen(head, t, s) for s in range(length)] for t in range(length)])
        weights = scores.masked_fill(~mask, -torch.inf).exp()
        total = weights.sum(-1, keepdim=True)
        if mixer.sink is not None:
            total = total + mixer.sink[head].exp()
        rows[:, :, head] = weights / total @ v[:, :, head // shared]
    if mixer.gate is not None:
        gate = torch.sigmoid(mixer.gate(x))
        rows = rows * (gate[..., None] if gate.shape[-1] == q.shape[2] else gate.unflatten(-1, (-1, size)))
    wanted: Tensor = mixer.out(rows.flatten(2))
    return wanted


@pytest.mark.parametrize("gate", [False, True, "head"])
@pytest.mark.parametrize("learned_sink", [False, True])
@pytest.mark.parametrize("soft_cap", [0, 30])
def test_full_attention_with_its_settings_is_its_formula(
    gate: bool | str, learned_sink: bool, soft_cap: int, far: Far
) -> None:
    spec = Full(kv_heads=2, heads=4, rotary=0.0, gate=gate, learned_sink=learned_sink, soft_cap=soft_cap)
    mixer = built(spec)
    mixer.query.weight.mul_(12)
    x = torch.randn(2, 30, 64)
    wanted = naive(mixer, x, lambda *_: True, soft_cap or math.inf)
    assert far(mixer(x)[0], wanted) < 1e-4
    assert far(stepped(mixer, x), wanted) < 1e-4
    if soft_cap:
        assert far(naive(mixer, x, lambda *_: True), wanted) > 1e-3


@pytest.mark.parametrize("sinks", [0, 1, 4])
@pytest.mark.parametrize("spans", ["equal", "halving"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_window_with_its_settings_is_its_formula(sinks: int, spans: str, kv_heads: int, far: Far) -> None:
    spec = Window(
        size=16, heads=4, kv_heads=kv_heads, sinks=sinks, spans=spans, rotary=0.0, learned_sink=True
    )
    mixer = built(spec)
    shares = {1: (16,), 2: (16, 4), 4: (16, 8, 4, 4)}[kv_heads] if spans == "halving" else (16,) * kv_heads
    x = torch.randn(2, 50, 64)
    wanted = naive(mixer, x, lambda head, t, s: t - s < shares[head * kv_heads // 4] or s < sinks)
    assert far(mixer(x)[0], wanted) < 1e-5
    assert far(stepped(mixer, x), wanted) < 1e-5


@pytest.mark.parametrize("position", ["rope", "alibi", "xpos", "none"])
def test_a_window_as_long_as_the_text_is_full_attention(position: str, far: Far) -> None:
    common: dict[str, Any] = {
        "heads": 4, "kv_heads": 2, "position": position, "qk_norm": True, "gate": "head", "soft_cap": 30
    }  # fmt: skip
    full = built(Full(**common))
    x = torch.randn(2, LENGTH, 64)
    for more in ({"size": 76}, {"size": 608, "spans": "halving"}, {"size": 76, "sinks": 4}):
        window = built(Window(**common, **more), full)
        assert far(window(x)[0], full(x)[0]) < 1e-5
        assert far(stepped(window, x), full(x)[0]) < 1e-5


@pytest.mark.parametrize("cls", [Full, Window])
def test_special_cases_are_plain_attention(cls: Any, far: Far) -> None:
    plain = built(cls(heads=4))
    x = torch.randn(2, LENGTH, 64)
    y = plain(x)[0]
    sunk = built(cls(heads=4, learned_sink=True), plain)
    assert far(sunk(x)[0], y) > 1e-3
    sunk.sink.fill_(-torch.inf)
    assert far(sunk(x)[0], y) < 5e-6
    assert far(stepped(sunk, x), y) < 1e-5
    for kind, weight in ((True, "gate.weight"), ("head", "gate.weight")):
        gated = built(cls(heads=4, gate=kind), plain)
        dict(gated.named_parameters())[weight].zero_()
        assert far(2 * gated(x)[0], y) < 1e-6
    grouped = built(cls(heads=4, kv_heads=1))
    repeated = {
        name: value.repeat(4, 1) if name in ("key.weight", "value.weight") else value
        for name, value in grouped.state_dict().items()
    }
    plain.load_state_dict(repeated)
    assert far(grouped(x)[0], plain(x)[0]) < 1e-5


@pytest.mark.parametrize("pinned", [0, 1, 3])
@pytest.mark.parametrize("slots", [2, 7, 9])
def test_a_ring_keeps_its_first_slots(slots: int, pinned: int) -> None:
    for cuts in ((1,) * 20, (3, 4, 5, 8), (20,), (2, 18), (7, 13)):
        room = slots + pinned
        ring = KeyValue(keys=torch.zeros(1, room, 1, 1), values=torch.zeros(1, room, 1, 1), length=0)
        for cut in cuts:
            new = torch.arange(ring.length, ring.length + cut, dtype=torch.float32).view(1, -1, 1, 1)
            ring = append_ring(ring, new, -new, slots, pinned)
            kept = [t for t in range(ring.length) if t < pinned or t >= ring.length - slots]
            keys, values = read_ring(ring, pinned)
            assert keys.flatten().tolist() == kept and values.flatten().tolist() == [-t for t in kept]
    with pytest.raises(ValueError, match="larger max_len"):
        append_ring(ring, new, new, slots + 1, pinned)


def test_prices_by_hand() -> None:
    frame = Frame(width=2048, context=10_000, batch=3)
    plain = mixer_of(read("full[kv_heads=4]").layers[0].branches[0]).cost(frame)
    assert plain.params == 2048 * (2 * 2048 + 2 * 512)

    def cost(text: str) -> Any:
        return mixer_of(read(text).layers[0].branches[0]).cost(frame)

    for text, more, flops in (
        ("full[kv_heads=4,gate=true]", 2048 * 2048, 2 * 2048 * 2048),
        ("full[kv_heads=4,gate=head]", 2048 * 16, 2 * 2048 * 16),
        ("full[kv_heads=4,qk_norm=true]", 256, 0),
        ("full[kv_heads=4,learned_sink=true]", 16, 0),
        ("full[kv_heads=4,soft_cap=50]", 0, 0),
        ("full[kv_heads=4,position=alibi]", 0, 0),
    ):
        own = cost(text)
        assert own.params == plain.params + more
        assert own.flops_decode == plain.flops_decode + flops
        assert own.stored_bytes == own.read_bytes == plain.stored_bytes == 3 * 10_000 * 2 * 512 * 2
    # Keys and values of two bytes, three texts, four key heads of 128.
    token, attend = 3 * 2 * 128 * 2, 2 * 2 * 128
    for text, by_head in (
        ("window[kv_heads=4,size=512]", (512,) * 4),
        ("window[kv_heads=4,size=512,sinks=4]", (516,) * 4),
        ("window[kv_heads=4,size=512,spans=halving]", (512, 256, 128, 64)),
        ("window[kv_heads=4,size=512,spans=halving,sinks=1]", (513, 257, 129, 65)),
        ("window[kv_heads=2,size=8,spans=halving,sinks=1]", (9, 5)),
    ):
        own, queries = cost(text), 16 // len(by_head)
        assert own.stored_bytes == own.read_bytes == token * sum(by_head)
        dense = 2 * 2048 * (2 * 2048 + 2 * 128 * len(by_head))
        assert own.flops_decode == dense + attend * queries * sum(by_head)
        seen = sum(min(t + 1, keys) for keys in by_head for t in range(10_000)) / 10_000
        assert own.flops_prefill == pytest.approx(dense + attend * queries * seen)


def test_a_step_reads_only_what_the_window_holds() -> None:
    mixer = built(Window(size=8, sinks=1, spans="halving", heads=4))
    state = mixer.start(1, 10_000)
    assert [ring.keys.shape for ring in state] == [(1, 9, 1, 16), (1, 5, 3, 16)]
    assert state_bytes(state) == 2 * 4 * 16 * (1 * 9 + 3 * 5)


def test_shrinking_keeps_kinds_and_first_tokens() -> None:
    target, proxy = Frame(width=2048, train_length=4096), Frame(width=64, train_length=64)
    small = shrink(Window(size=1024, sinks=4, spans="halving", gate="head", position="alibi"), target, proxy)
    assert (small.size, small.sinks, small.spans, small.gate, small.position) == (
        16,
        4,
        "halving",
        "head",
        "alibi",
    )


def test_older_texts_say_what_they_said() -> None:
    for text in ("full[gate=true,qk_norm=true,rotary=0]", "window[rotary=0.5,size=16]"):
        assert str(read(text)) == text
    spec: Any = mixer_of(read("full[gate=true,rotary=0.25]").layers[0].branches[0])
    assert spec.gate is True and spec.position == "rope" and spec.rotary == 0.25
    assert str(read("full[gate=head,soft_cap=0,position=rope]")) == "full[gate=head]"


def imported(model: str, *names: str) -> Any:
    pytest.importorskip("transformers")
    from importlib import import_module

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        modelling = import_module(f"transformers.models.{model}.modeling_{model}")
        configuration = import_module(f"transformers.models.{model}.configuration_{model}")
    return [getattr(modelling, name) for name in names[:-1]] + [getattr(configuration, names[-1])]


def randomise(module: Any) -> Any:
    for weight in module.parameters():
        weight.copy_(torch.randn_like(weight) * (2 / weight[0].numel() ** 0.5 if weight.dim() == 2 else 1.0))
    return module.eval()


def same_both_ways(
    ours: Any, theirs: Any, rotary: Any, window: int | None, far: Far, bound: float = 1e-5
) -> None:
    for name in ("query", "key", "value", "out"):
        getattr(ours, name).weight.copy_(getattr(theirs, f"{name[0]}_proj").weight)
    x = torch.randn(2, LENGTH, 64)
    seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    if window is not None:
        seen &= ~torch.ones_like(seen).tril(-window)
    mask = torch.zeros(1, 1, LENGTH, LENGTH).masked_fill(~seen, -torch.inf)
    wanted = theirs(x, rotary(x, torch.arange(LENGTH)[None]), mask)[0]
    assert far(ours(x)[0], wanted) < bound
    assert far(stepped(ours, x), wanted) < bound


COMMON = {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 1,
    "attn_implementation": "eager",
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize("scaling", ["none", "yarn"])
def test_learned_sinks_are_gpt_oss(window: int | None, scaling: str, far: Far) -> None:
    attention, rotary, config_class = imported(
        "gpt_oss", "GptOssAttention", "GptOssRotaryEmbedding", "GptOssConfig"
    )
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 5e4}
    if scaling == "yarn":
        rope |= {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "truncate": True}
    config = config_class(
        **COMMON,
        attention_bias=False,
        layer_types=["full_attention" if window is None else "sliding_attention"],
        sliding_window=window,
        rope_parameters=rope,
    )
    theirs = randomise(attention(config, 0))
    frame = FRAME if scaling == "none" else replace(
        FRAME, rotary_scaling="yarn", rotary_factor=8.0, rotary_length=32
    )  # fmt: skip
    common: dict[str, Any] = {"heads": 4, "kv_heads": 2, "learned_sink": True}
    ours: Any = (Full(**common) if window is None else Window(**common, size=window)).build(frame)
    ours.sink.copy_(theirs.sinks)
    same_both_ways(ours, theirs, rotary(config), window, far)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("window", [None, 12])
def test_capped_scores_are_gemma_2s(window: int | None, far: Far) -> None:
    attention, rotary, config_class = imported(
        "gemma2", "Gemma2Attention", "Gemma2RotaryEmbedding", "Gemma2Config"
    )
    config = config_class(
        **COMMON,
        layer_types=["full_attention" if window is None else "sliding_attention"],
        sliding_window=window or 4096,
        query_pre_attn_scalar=16,
        attn_logit_softcapping=30.0,
        rope_parameters={"rope_type": "default", "rope_theta": 5e4},
    )
    theirs = randomise(attention(config, 0))
    theirs.q_proj.weight.mul_(3)
    common: dict[str, Any] = {"heads": 4, "kv_heads": 2, "soft_cap": 30}
    ours = (Full(**common) if window is None else Window(**common, size=window)).build(FRAME)
    same_both_ways(ours, theirs, rotary(config), window, far)
    plain = built(replace(Full(**common), soft_cap=0), ours)
    x = torch.randn(2, LENGTH, 64)
    assert far(plain(x)[0], built(Full(**common), ours)(x)[0]) > 1e-3


@pytest.mark.filterwarnings("ignore")
def test_a_window_with_normalised_heads_is_gemma_3s(far: Far) -> None:
    attention, rotary, config_class = imported(
        "gemma3", "Gemma3Attention", "Gemma3RotaryEmbedding", "Gemma3TextConfig"
    )
    config = config_class(
        **COMMON,
        layer_types=["sliding_attention"],
        sliding_window=12,
        query_pre_attn_scalar=16,
        rope_parameters={"sliding_attention": {"rope_type": "default", "rope_theta": 5e4}},
    )
    theirs = randomise(attention(config, 0))
    ours: Any = Window(heads=4, kv_heads=2, size=12, qk_norm=True).build(FRAME)
    # Their norms count gains from one.
    ours.query_norm.weight.copy_(1 + theirs.q_norm.weight)
    ours.key_norm.weight.copy_(1 + theirs.k_norm.weight)
    turns = rotary(config)
    same_both_ways(ours, theirs, lambda x, at: turns(x, at, "sliding_attention"), 12, far)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_scaled_positions_are_llamas(kind: str, far: Far) -> None:
    attention, rotary, config_class = imported(
        "llama", "LlamaAttention", "LlamaRotaryEmbedding", "LlamaConfig"
    )
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 5e4, "factor": 8.0}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = 32
    config = config_class(**COMMON, rope_parameters=rope, max_position_embeddings=256)
    frame = replace(
        FRAME, rotary_scaling=kind, rotary_factor=8.0, rotary_length=32 if kind == "yarn" else None
    )
    ours = Full(heads=4, kv_heads=2).build(frame)
    same_both_ways(ours, randomise(attention(config, 0)), rotary(config), None, far)


@pytest.mark.filterwarnings("ignore")
def test_yarn_in_latent_attention_is_deepseeks(far: Far) -> None:
    attention, rotary, config_class = imported(
        "deepseek_v3", "DeepseekV3Attention", "DeepseekV3RotaryEmbedding", "DeepseekV3Config"
    )
    config = config_class(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=None,
        kv_lora_rank=24,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        num_hidden_layers=1,
        rope_interleave=False,
        max_position_embeddings=256,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 5e4, "factor": 8.0, "original_max_position_embeddings": 32,
            "mscale": 1.0, "mscale_all_dim": 1.0,
        },
        attn_implementation="eager",
    )  # fmt: skip
    theirs = randomise(attention(config, 0))
    frame = replace(FRAME, rotary_scaling="yarn", rotary_factor=8.0, rotary_length=32)
    ours: Any = MLA(rank=24, shared=8, heads=4, head_dim=16).build(frame)
    for own, other in (
        ("query", "q_proj"), ("down", "kv_a_proj_with_mqa"), ("norm", "kv_a_layernorm"), ("up", "kv_b_proj"),
        ("out", "o_proj"),
    ):  # fmt: skip
        getattr(ours, own).weight.copy_(getattr(theirs, other).weight)
    x = torch.randn(2, LENGTH, 64)
    mask = torch.zeros(LENGTH, LENGTH).masked_fill(~torch.ones(LENGTH, LENGTH).bool().tril(), -torch.inf)
    wanted = theirs(x, rotary(config)(x, torch.arange(LENGTH)[None]), mask[None, None])[0]
    assert far(ours(x)[0], wanted) < 1e-5
    assert far(stepped(ours, x), wanted) < 1e-5
