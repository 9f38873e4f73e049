"""DeepSeek's sparse attention: against transformers and mla, what its index chooses, reads, learns and costs."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from search_space.cost import layout_cost
from search_space.frame import Frame
from search_space.mixers.dsa import DSA, DSAMixer
from search_space.mixers.mla import MLA, MLAMixer
from search_space.spec import Stream
from search_space.vocabulary import mixer_of, read
from trainers.model import Stack

Far = Callable[[Tensor, Tensor], float]
LENGTH = 75
SIZES = {"rank": 24, "query_rank": 40, "shared": 8, "heads": 4, "head_dim": 16}


def x_of(batch: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randn(batch, length, 64)


def built(frame: Frame, **settings: Any) -> DSAMixer:
    mixer = DSA(**{**SIZES, "index_heads": 2, "index_dim": 16, **settings}).build(frame)
    assert isinstance(mixer, DSAMixer)
    return mixer.eval()


def stepped(mixer: DSAMixer, x: Tensor) -> Tensor:
    state, rows = mixer.start(x.shape[0], x.shape[1]), []
    for t in range(x.shape[1]):
        y, state = mixer.step(x[:, t], state)
        rows.append(y)
    return torch.stack(rows, dim=1)


def naive_scores(mixer: DSAMixer, x: Tensor) -> Tensor:
    """[B, T, T], written out from the weights; index queries and keys turn as complex numbers."""
    index = mixer.index
    assert index is not None
    source = mixer.query_down(x)
    source = source / (source.square().mean(-1, keepdim=True) + 1e-6).sqrt() * mixer.query_norm.weight
    key = index.key(x)
    key = (key - key.mean(-1, keepdim=True)) / (key.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    key = key * index.norm.weight + index.norm.bias

    def turn(y: Tensor) -> Tensor:
        pairs = torch.complex(y[..., :4], y[..., 4:8])
        angle = torch.arange(x.shape[1])[:, None] * 1e4 ** (-torch.arange(4) / 4)
        pairs = pairs * torch.polar(torch.ones_like(angle), angle)[:, None]
        return torch.cat([pairs.real, pairs.imag, y[..., 8:]], dim=-1)

    q, k = turn(index.query(source).unflatten(-1, (2, 16))), turn(key[:, :, None])[:, :, 0]
    products = torch.einsum("btji,bsi->btjs", q, k).relu() / 4
    scores = torch.einsum("btj,btjs->bts", index.weight(x) / 2**0.5, products)
    return scores.masked_fill(~torch.ones(x.shape[1], x.shape[1]).tril().bool(), -torch.inf)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("top_k", [4, 16, 76])
def test_it_is_deepseek_v32s_attention(top_k: int, far: Far) -> None:
    pytest.importorskip("transformers")
    from transformers.models.deepseek_v32 import configuration_deepseek_v32 as settings
    from transformers.models.deepseek_v32 import modeling_deepseek_v32 as models

    config = settings.DeepseekV32Config(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=40,
        kv_lora_rank=24,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        num_hidden_layers=1,
        index_topk=top_k,
        index_head_dim=16,
        index_n_heads=4,
        rope_parameters={"rope_type": "default", "rope_theta": 5e4},
        attn_implementation="eager",
    )
    theirs = models.DeepseekV32Attention(config, 0).eval()
    frame = Frame(width=64, train_length=128, context=128, dtype="float32", rotary_base=5e4)
    ours = built(frame, top_k=top_k, index_heads=4)
    assert ours.index is not None
    # Their pairs are neighbours in the attention, and half the width apart in the index, as ours are in both.
    order = torch.cat([torch.arange(0, 8, 2), torch.arange(1, 8, 2)])
    with torch.no_grad():
        for weight in theirs.parameters():
            wide = weight.dim() > 1
            weight.copy_(torch.randn_like(weight) / (weight.shape[1] ** 0.5 if wide else 3) + (not wide))
        query = theirs.q_b_proj.weight.view(4, 24, 40)
        ours.query.weight.copy_(torch.cat([query[:, :16], query[:, 16:][:, order]], dim=1).flatten(0, 1))
        down = theirs.kv_a_proj_with_mqa.weight
        ours.down.weight.copy_(torch.cat([down[:24], down[24:][order]]))
        for own, other in (
            (ours.query_down, theirs.q_a_proj),
            (ours.query_norm, theirs.q_a_layernorm),
            (ours.norm, theirs.kv_a_layernorm),
            (ours.up, theirs.kv_b_proj),
            (ours.out, theirs.o_proj),
            (ours.index.query, theirs.indexer.wq_b),
            (ours.index.key, theirs.indexer.wk),
            (ours.index.norm, theirs.indexer.k_norm),
            (ours.index.weight, theirs.indexer.weights_proj),
        ):
            own.load_state_dict(other.state_dict())
        x = x_of()
        mask = torch.zeros(2, 1, LENGTH, LENGTH).masked_fill(
            ~torch.ones(LENGTH, LENGTH).tril().bool(), -torch.inf
        )
        turns = models.DeepseekV32RotaryEmbedding(config)(x, torch.arange(LENGTH)[None])
        wanted = theirs(x, turns, mask)[0]
        # Theirs leaves open which of equal scores it takes; those rows say nothing.
        looked = ours.look(x, None)[2]
        scores = (looked.queries.flatten(1, 2) @ looked.keys.mT).relu().unflatten(1, (LENGTH, 4))
        scores = (looked.weights[..., None] * scores).sum(2).masked_fill(mask[:, 0].isinf(), -torch.inf)
        ranked = scores.sort(-1, descending=True).values
        clear = torch.ones(2, LENGTH, dtype=torch.bool)
        if top_k < LENGTH:
            clear = (ranked[..., top_k - 1] > ranked[..., top_k]) | ranked[..., top_k].isinf()
        assert clear.float().mean() > 0.9
        assert far(ours(x)[0][clear], wanted[clear]) < 1e-5
        assert far(stepped(ours, x)[clear], wanted[clear]) < 1e-5


@torch.no_grad()
def test_with_room_for_the_whole_text_it_is_latent_attention(
    small: Frame, far: Far, shake: Callable[[nn.Module], None]
) -> None:
    mla = MLA(**SIZES).build(small)
    assert isinstance(mla, MLAMixer)
    shake(mla)
    x, wanted = x_of(), None
    wanted = mla(x)[0]
    for top_k in (72, 76):
        mixer = built(small, top_k=top_k)
        mixer.load_state_dict(mla.state_dict(), strict=False)
        # The first rows read all that they see; with 72 that is the gathered form, with 76 the expanded one.
        for y in (mixer(x)[0], stepped(mixer, x)):
            assert far(y[:, :top_k], wanted[:, :top_k]) < 1e-5
    assert far(mixer(x)[0], wanted) < 1e-5


@torch.no_grad()
def test_it_is_attention_over_the_best_scores(
    small: Frame, far: Far, shake: Callable[[nn.Module], None]
) -> None:
    mixer, x = built(small, top_k=12), x_of()
    shake(mixer)
    _, _, stream = mixer.forward_with(x, None, Stream())
    chosen, scores = stream.values["dsa"], naive_scores(mixer, x)
    # A hair for every token, so that the later of equal ones, which score nought, comes first.
    best = (scores.double() + 1e-12 * torch.arange(LENGTH)).topk(12, dim=-1).indices.sort(-1).values
    assert (chosen[:, 12:] == best[:, 12:]).float().mean() > 0.99
    seen = torch.zeros(2, LENGTH, LENGTH + 1, dtype=torch.bool).scatter(2, chosen + 1, True)[..., 1:]
    new = mixer.project(x, 0)
    keys, values = mixer.expand(new.latents)
    weights = torch.einsum("bthk,bshk->bhts", new.queries, keys) * 24**-0.5
    weights = weights.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    assert far(mixer(x)[0], mixer.out(torch.einsum("bhts,bshk->bthk", weights, values).flatten(2))) < 1e-5


@torch.no_grad()
def test_a_step_reads_what_it_is_priced_for_and_nothing_else(small: Frame) -> None:
    frame = replace(small, context=LENGTH, batch=2)
    mixer, x = built(frame, top_k=12), x_of()
    _, state = mixer(x[:, :-1], mixer.start(2, LENGTH))
    copy = replace(state, latents=state.latents.clone(), index=state.index.clone())
    wanted, _, stream = mixer.step_with(x[:, -1], copy, Stream())
    chosen = stream.values["dsa"]
    poisoned = torch.full_like(state.latents, torch.nan)
    for row, places in enumerate(chosen):
        poisoned[row, places] = state.latents[row, places]
    y, _ = mixer.step(x[:, -1], replace(state, latents=poisoned))
    assert torch.equal(y, wanted)
    priced = {
        tensor.name: tensor
        for tensor in DSA(**SIZES, top_k=12, index_heads=2, index_dim=16).cost(frame).cache
    }
    assert priced["latents"].read_bytes == chosen.numel() * 32 * 4
    assert priced["latents"].stored_bytes == 2 * LENGTH * 32 * 4
    assert priced["index"].read_bytes == priced["index"].stored_bytes == 2 * LENGTH * 16 * 4
    # While all is read the index rests.
    early = DSA(**SIZES, top_k=12, index_heads=2, index_dim=16).cost(replace(frame, context=12)).cache
    assert early[0].read_bytes == early[0].stored_bytes and early[1].read_bytes == 0 < early[1].stored_bytes
    _, state = mixer(x[:, :11], mixer.start(2, LENGTH))
    state.index.fill_(torch.nan)
    assert mixer.step(x[:, 11], state)[0].isfinite().all()


@pytest.mark.parametrize("signal", ["sparse", "dense"])
@pytest.mark.parametrize("top_k", [12, 76])
def test_the_index_learns_from_the_attention_alone(small: Frame, signal: str, top_k: int, far: Far) -> None:
    mixer, x = built(small, top_k=top_k, signal=signal).train(), x_of().requires_grad_()
    y, _, stream = mixer.forward_with(x, None, Stream())
    assert len(stream.losses) == 1 and mixer.index is not None
    stream.losses[0].backward(retain_graph=True)
    assert x.grad is None
    for name, weight in mixer.named_parameters():
        assert (weight.grad is not None) == name.startswith("index."), name
    learnt = {name: weight.grad.clone() for name, weight in mixer.index.named_parameters()}
    y.sum().backward()
    for name, weight in mixer.index.named_parameters():
        assert torch.equal(weight.grad, learnt[name]), name
    assert all(weight.grad is not None for weight in mixer.parameters())
    # The divergence written out, over the chosen tokens or over all, and its gradient softmax(I) − p.
    scores = naive_scores(mixer, x)
    if signal == "sparse" and top_k < LENGTH:
        chosen = stream.values["dsa"]
        seen = torch.zeros(2, LENGTH, LENGTH + 1, dtype=torch.bool).scatter(2, chosen + 1, True)[..., 1:]
        scores = scores.masked_fill(~seen, -torch.inf)
    seen = scores.isfinite()
    with torch.no_grad():
        new = mixer.project(x, 0)
        keys, values = mixer.expand(new.latents)
        weights = torch.einsum("bthk,bshk->bhts", new.queries, keys) * 24**-0.5
        weights = weights.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
        shares, index = weights.sum(1) / 4, scores.softmax(-1)
        loss = (shares * (shares / index).log()).nan_to_num().sum() / (2 * LENGTH)
        assert far(stream.losses[0].detach(), loss.detach()) < 1e-4
        # Training attends to what the signal says.
        wanted = mixer.out(torch.einsum("bhts,bshk->bthk", weights, values).flatten(2))
        assert far(y, wanted) < 1e-5
    mixer.index.zero_grad()
    slope = torch.where(seen, (index - shares) / (2 * LENGTH), 0)
    scores.masked_fill(~seen, 0).backward(slope)
    for name, weight in mixer.index.named_parameters():
        assert far(weight.grad, learnt[name]) < 1e-3, name


def test_only_training_makes_a_loss(small: Frame) -> None:
    mixer, x = built(small, top_k=12), x_of()
    assert mixer.forward_with(x, None, Stream())[2].losses == ()
    with torch.no_grad():
        assert mixer.train().forward_with(x, None, Stream())[2].losses == ()


@torch.no_grad()
def test_layers_share_what_one_chose(small: Frame, far: Far) -> None:
    network = read("dsa[top_k=8] linear 2*dsa[top_k=8,index=shared]")
    stack = Stack(network, small).eval()
    first, later = stack.blocks[0].mixer, stack.blocks[2].mixer
    assert isinstance(first, DSAMixer) and isinstance(later, DSAMixer) and later.index is None
    x = x_of()
    _, _, stream = first.forward_with(x, None, Stream())
    y, _, after = later.forward_with(x, None, stream)
    assert torch.equal(after.values["dsa"], stream.values["dsa"])
    # Alone it takes the latest, as a window of so many tokens.
    alone, _, latest = later.forward_with(x, None, Stream())
    assert latest.values["dsa"][0, 20].tolist() == list(range(13, 21)) and far(alone, y) > 1e-3
    whole, _ = stack(x)
    states, rows = stack.start(2, LENGTH), []
    for t in range(LENGTH):
        row, states = stack.step(x[:, t], states)
        rows.append(row)
    assert far(torch.stack(rows, dim=1), whole) < 1e-4
    with pytest.raises(ValueError, match="same top_k"):
        built(small, top_k=12, index="shared").forward_with(x, None, stream)
    own, shared = (layout_cost(read(f"dsa[{text}]"), small) for text in ("top_k=8", "top_k=8,index=shared"))
    assert shared.params < own.params and [tensor.name for tensor in shared.cache] == ["latents"]


def test_deepseek_v32s_layer_by_hand() -> None:
    text = "dsa[rank=512,query_rank=1536,shared=64,heads=128,head_dim=128,index_heads=64,index_dim=128,top_k=2048]"
    spec, length = mixer_of(read(text).layers[0].branches[0]), 131072
    cost = spec.cost(Frame(width=7168, context=length))
    latents, index = cost.cache
    assert latents.stored_bytes == 1152 * length and latents.read_bytes == 1152 * 2048
    # Two bytes a number; the published cache keeps the index in one, and a scale.
    assert index.stored_bytes == index.read_bytes == 256 * length
    mla = MLA(rank=512, query_rank=1536, shared=64, heads=128, head_dim=128).cost(
        Frame(width=7168, context=length)
    )
    indexer = 1536 * 64 * 128 + 7168 * (128 + 64)
    assert cost.params == mla.params + indexer + 256
    weights = mla.params - 2048 + indexer
    assert cost.flops_decode == 2 * weights + 16_384 * length + 278_528 * 2048
    seen = sum(min(t + 1, 2048) for t in range(length)) / length
    assert cost.flops_prefill == pytest.approx(2 * weights + 16_384 * (length + 1) / 2 + 278_528 * seen)
    defaults = DSA().sized(Frame(width=7168, train_length=16384))
    assert (defaults.query_rank, defaults.rank, defaults.top_k) == (1536, 512, 2048)
    assert defaults.index_heads == defaults.heads // 2
