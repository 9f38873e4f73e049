"""Channel mixers against independent implementations, formulas written out, published sizes and by-hand prices."""

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search_space.channel.moe import MoE, MoEChannel, choose
from search_space.frame import Frame
from search_space.spec import Channel, Cost, Stream, shrink
from search_space.vocabulary import channel_of, read

Far = Callable[[Tensor, Tensor], float]
FRAME = Frame(width=64, train_length=64, context=64, dtype="float32")
BOUND = 1e-5


def imported(model: str, *names: str) -> list[Any]:
    """Classes of one of the package's models, which its own configuration class follows."""
    pytest.importorskip("transformers")
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    return [getattr(module, name) for name in names]


def randomise(module: nn.Module) -> Any:
    for weight in module.parameters():
        nn.init.normal_(weight, std=0.2)
    return module.requires_grad_(False).eval()


def channel(text: str, frame: Frame = FRAME) -> Any:
    return channel_of(read(f"full/{text}").layers[0].channel).build(frame).requires_grad_(False).eval()


def price(text: str, frame: Frame) -> Cost:
    return channel_of(read(f"full/{text}").layers[0].channel).cost(frame)


def copy_experts(ours: MoEChannel, theirs: Any) -> None:
    ours.experts.gate_up.copy_(theirs.gate_up_proj)
    ours.experts.down.copy_(theirs.down_proj)


def copy_shared(ours: MoEChannel, theirs: Any) -> None:
    assert ours.shared_up is not None and ours.shared_down is not None
    ours.shared_up.weight.copy_(torch.cat([theirs.gate_proj.weight, theirs.up_proj.weight]))
    ours.shared_down.weight.copy_(theirs.down_proj.weight)


def same_both_ways(ours: Channel, wanted: Tensor, x: Tensor, far: Far) -> None:
    assert far(ours(x), wanted) < BOUND
    rows = [ours.step_with(x[:, t], (), Stream())[0] for t in range(x.shape[1])]
    assert far(torch.stack(rows, dim=1), wanted) < BOUND


@pytest.mark.parametrize("scale", [1.0, 2.446])
@pytest.mark.parametrize("renormalise", [True, False])
def test_sigmoid_router_is_kimi_linears(scale: float, renormalise: bool, far: Far) -> None:
    theirs_class, config_class = imported("kimi_linear", "KimiLinearMoE", "KimiLinearConfig")
    config = config_class(
        hidden_size=64,
        moe_intermediate_size=24,
        num_local_experts=16,
        num_experts_per_tok=4,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        norm_topk_prob=renormalise,
        routed_scaling_factor=scale,
        num_hidden_layers=1,
        layer_types=["full_attention"],
    )
    theirs = randomise(theirs_class(config))
    theirs.gate.e_score_correction_bias.normal_(std=0.3)
    said = str(renormalise).lower()
    ours = channel(
        f"moe[experts=16,top_k=4,shared=1,hidden=24,router=sigmoid,scale={scale},renormalise={said}]"
    )
    ours.router.weight.copy_(theirs.gate.weight)
    ours.bias.copy_(theirs.gate.e_score_correction_bias)
    copy_experts(ours, theirs.experts)
    copy_shared(ours, theirs.shared_experts)
    x = torch.randn(2, 30, 64)
    same_both_ways(ours, theirs(x), x, far)


def test_softmax_router_with_a_gated_shared_expert_is_qwen3_nexts(far: Far) -> None:
    theirs_class, config_class, loss_of = imported(
        "qwen3_next", "Qwen3NextSparseMoeBlock", "Qwen3NextConfig", "load_balancing_loss_func"
    )
    config = config_class(
        hidden_size=64,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
        num_experts=32,
        num_experts_per_tok=10,
        norm_topk_prob=True,
        num_hidden_layers=1,
        layer_types=["full_attention"],
    )
    theirs = randomise(theirs_class(config))
    ours = channel("moe[experts=32,top_k=10,shared=1,shared_gate=true,hidden=24,balance=0.01]")
    ours.router.weight.copy_(theirs.gate.weight)
    copy_experts(ours, theirs.experts)
    copy_shared(ours, theirs.shared_expert)
    ours.shared_gate.weight.copy_(theirs.shared_expert_gate.weight)
    x = torch.randn(2, 30, 64)
    same_both_ways(ours, theirs(x), x, far)
    # Their loss adds up the k choices of a token, ours takes their mean.
    _, _, stream = ours.train().forward_with(x, None, Stream())
    expected = loss_of((theirs.gate(x)[0],), 32, 10) / 10
    torch.testing.assert_close(stream.losses[0], 0.01 * expected)


def test_weights_that_are_not_renormalised_are_jambas(far: Far) -> None:
    theirs_class, config_class = imported("jamba", "JambaSparseMoeBlock", "JambaConfig")
    config = config_class(hidden_size=64, intermediate_size=40, num_experts=16, num_experts_per_tok=2)
    theirs = randomise(theirs_class(config))
    ours = channel("moe[experts=16,top_k=2,hidden=40,renormalise=false]")
    ours.router.weight.copy_(theirs.router.weight)
    copy_experts(ours, theirs.experts)
    x = torch.randn(2, 30, 64)
    same_both_ways(ours, theirs(x), x, far)


def test_two_shared_experts_are_granites_wider_one(far: Far) -> None:
    moe_class, mlp_class, config_class = imported(
        "granitemoehybrid", "GraniteMoeHybridMoE", "GraniteMoeHybridMLP", "GraniteMoeHybridConfig"
    )
    config = config_class(
        hidden_size=64,
        intermediate_size=24,
        shared_intermediate_size=48,
        num_local_experts=72,
        num_experts_per_tok=10,
        num_hidden_layers=1,
        layer_types=["attention"],
    )
    routed, common = randomise(moe_class(config)), randomise(mlp_class(config))
    ours = channel("moe[experts=72,top_k=10,shared=2,hidden=24]")
    ours.router.weight.copy_(routed.router.weight)
    copy_experts(ours, routed.experts)
    ours.shared_up.weight.copy_(common.input_linear.weight)
    ours.shared_down.weight.copy_(common.output_linear.weight)
    x = torch.randn(2, 30, 64)
    same_both_ways(ours, routed(x) + common(x), x, far)


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_mlp_is_two_matrices_around_its_activation(activation: str, far: Far) -> None:
    made: Any = channel_of(read(f"full/mlp[hidden=40,activation={activation}]").layers[0].channel).build(
        Frame(width=16)
    )
    made.requires_grad_(False)
    x = torch.randn(3, 5, 16)
    inside = x @ made.up.weight.T
    # GELU is x times the share of the normal distribution below x.
    gain = (1 + torch.erf(inside / 2**0.5)) / 2 if activation == "gelu" else (inside > 0).float()
    assert far(made(x), (inside * gain) @ made.down.weight.T) < 1e-5


@pytest.mark.parametrize(("text", "model"), [("swiglu", "llama"), ("geglu", "gemma")])
def test_gated_networks_are_llamas_and_gemmas(text: str, model: str, far: Far) -> None:
    theirs_class, config_class = imported(model, f"{model.title()}MLP", f"{model.title()}Config")
    theirs = randomise(theirs_class(config_class(hidden_size=64, intermediate_size=104)))
    ours = channel(f"{text}[hidden=104]")
    ours.gate_up.weight.copy_(torch.cat([theirs.gate_proj.weight, theirs.up_proj.weight]))
    ours.down.weight.copy_(theirs.down_proj.weight)
    x = torch.randn(2, 30, 64)
    same_both_ways(ours, theirs(x), x, far)


def test_squared_relu_is_nemotron_hs(far: Far) -> None:
    theirs_class, config_class = imported("nemotron_h", "NemotronHMLP", "NemotronHConfig")
    config = config_class(hidden_size=64, intermediate_size=336, mlp_hidden_act="relu2", mlp_bias=False)
    theirs = randomise(theirs_class(config))
    ours = channel("relu2[ratio=5.25]")
    ours.up.weight.copy_(theirs.up_proj.weight)
    ours.down.weight.copy_(theirs.down_proj.weight)
    x = torch.randn(2, 30, 64)
    same_both_ways(ours, theirs(x), x, far)


def test_a_shift_blends_each_token_with_the_one_before(far: Far) -> None:
    ours = channel("relu2[shift=true]")
    ours.share.uniform_(0, 1)
    x, wanted = torch.randn(2, 10, 64), []
    for t in range(10):
        before = x[:, t - 1] if t else torch.zeros(2, 64)
        blended = ours.share * before + (1 - ours.share) * x[:, t]
        wanted.append(F.linear(F.linear(blended, ours.up.weight).clamp(min=0) ** 2, ours.down.weight))
    assert far(ours(x), torch.stack(wanted, dim=1)) < BOUND
    assert price("relu2[shift=true]", replace(FRAME, batch=3)).stored_bytes == 3 * 64 * 4


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("renormalise", ["true", "false"])
def test_experts_are_a_loop_over_all_of_them(router: str, top_k: int, renormalise: str, far: Far) -> None:
    """Every expert on every token, weighed by nought where it was not chosen; gradients as well."""
    text = f"moe[experts=8,top_k={top_k},router={router},renormalise={renormalise},scale=2.5,hidden=16]"
    ours = channel(text).requires_grad_(True)
    with torch.no_grad():
        ours.bias.normal_(std=0.3)
        ours.router.weight.normal_()
    x = torch.randn(40, 64)

    def written_out() -> Tensor:
        logits = x @ ours.router.weight.T
        scores = torch.softmax(logits, -1) if router == "softmax" else torch.sigmoid(logits)
        rank = scores + (0 if router == "softmax" else ours.bias)
        kept = scores * (rank >= rank.sort(-1, descending=True).values[:, top_k - 1 : top_k])
        if renormalise == "true" and top_k > 1:
            kept = kept / kept.sum(-1, keepdim=True)
        total = torch.zeros(40, 64)
        for e in range(8):
            gate, up = (x @ ours.experts.gate_up[e].T).chunk(2, -1)
            total = total + 2.5 * kept[:, e : e + 1] * ((F.silu(gate) * up) @ ours.experts.down[e].T)
        return total

    y, wanted = ours(x), written_out()
    assert far(y.detach(), wanted.detach()) < BOUND
    weights, kick = list(ours.parameters()), torch.randn_like(y)
    actual = torch.autograd.grad((y * kick).sum(), weights)
    expected = torch.autograd.grad((wanted * kick).sum(), weights)
    for a, b in zip(actual, expected, strict=True):
        assert b.any() and far(a, b) < 1e-4


def test_of_equal_scores_the_first_experts_are_chosen() -> None:
    assert choose(torch.zeros(3, 8), 4).tolist() == [[0, 1, 2, 3]] * 3
    assert choose(torch.tensor([[1.0, 3.0, 2.0, 3.0]]), 3).tolist() == [[1, 3, 2]]


def test_losses_are_the_formulas() -> None:
    """E Σ share · mean probability, and the mean square of the logits' log-sum-exp; nothing in evaluation."""
    ours = channel("moe[experts=8,top_k=2,balance=0.01,z_loss=0.001]").train()
    x = torch.randn(3, 20, 64)
    _, _, stream = ours.forward_with(x, None, Stream(losses=(torch.tensor(1.0),)))
    probability = torch.softmax(x.view(60, 64) @ ours.router.weight.T, -1)
    share = torch.zeros(8)
    for row in probability:
        for e in row.sort(descending=True).indices[:2].tolist():
            share[e] += 1 / 120
    size = (x.view(60, 64) @ ours.router.weight.T).exp().sum(-1).log() ** 2
    expected = 0.01 * 8 * (share * probability.mean(0)).sum() + 0.001 * size.mean()
    assert len(stream.losses) == 2 and stream.losses[0] == 1
    torch.testing.assert_close(stream.losses[1], expected)
    assert channel("moe[balance=0]").train().forward_with(x, None, Stream())[2].losses == ()
    assert channel("moe[router=sigmoid]").train().forward_with(x, None, Stream())[2].losses == ()


def skewed() -> Tensor:
    """Tokens with much in common, which one router's first look sends to the same few experts."""
    return torch.randn(4, 128, 64) + 2 * torch.randn(64)


def loads(ours: MoEChannel, x: Tensor) -> Tensor:
    """Tokens of each expert over their mean."""
    counts = torch.bincount(ours.route(x.flatten(0, 1))[1].flatten(), minlength=ours.spec.experts).float()
    return counts / counts.mean()


def test_the_bias_brings_loads_to_the_mean() -> None:
    ours = channel("moe[experts=16,top_k=2,router=sigmoid,balance=0.01]").train()
    x = skewed()
    before = loads(ours, x)
    assert before.max() > 4
    for _ in range(300):
        ours.forward_with(x, None, Stream())
        old, seen = ours.bias.clone(), ours.load.clone()
        ours.after_step()
        torch.testing.assert_close(ours.bias - old, 0.01 * torch.sign(64.0 - seen))
        assert not ours.load.any()
    after = loads(ours, x)
    assert after.max() < 1.35 and after.min() > 0.65
    # Without a forward pass between, nothing moves; in evaluation nothing is counted.
    old = ours.bias.clone()
    ours.eval().forward_with(x, None, Stream())
    ours.after_step()
    assert torch.equal(ours.bias, old)
    assert "bias" in ours.state_dict() and "bias" not in dict(ours.named_parameters())


def test_the_loss_brings_loads_to_the_mean() -> None:
    ours = channel("moe[experts=16,top_k=2,balance=0.01]").train().requires_grad_(True)
    x = skewed()
    before = loads(ours, x)
    optimiser = torch.optim.Adam(ours.parameters(), lr=1e-2)
    for _ in range(100):
        _, _, stream = ours.forward_with(x, None, Stream())
        optimiser.zero_grad()
        stream.losses[0].backward()
        optimiser.step()
    assert before.max() > 4 and loads(ours, x).max() < 2


def test_every_expert_learns_in_time() -> None:
    ours = channel("moe[experts=16,top_k=2,router=sigmoid,balance=0.01]").train().requires_grad_(True)
    moved = torch.zeros(16, dtype=torch.bool)
    for _ in range(200):
        ours.zero_grad()
        y, _, _ = ours.forward_with(torch.randn(1, 16, 64) + 1, None, Stream())
        y.square().sum().backward()
        moved |= ours.experts.down.grad.abs().amax(dim=(1, 2)) > 0
        ours.after_step()
    assert moved.all()


PUBLISHED = {
    # Text, width, parameters of a layer, parameters that a single token reads.
    "Jamba": ("moe[hidden=14336,renormalise=false]", 4096, 16 * 176160768 + 16 * 4096, 2 * 176160768),
    "Kimi Linear": (
        "moe[experts=256,top_k=8,shared=1,hidden=1024,router=sigmoid,scale=2.446]",
        2304,
        257 * 7077888 + 256 * 2304,
        9 * 7077888,
    ),
    "Qwen3-Next": (
        "moe[experts=512,top_k=10,shared=1,shared_gate=true,hidden=512]",
        2048,
        513 * 3145728 + 513 * 2048,
        11 * 3145728 + 2048,
    ),
    "MiniMax-01": ("moe[experts=32,hidden=9216]", 6144, 32 * 169869312 + 32 * 6144, 2 * 169869312),
    "Ring-mini": (
        "moe[experts=256,top_k=8,shared=1,hidden=512,router=sigmoid,scale=2.5]",
        2048,
        257 * 3145728 + 256 * 2048,
        9 * 3145728,
    ),
    "Granite 4": (
        "moe[experts=72,top_k=10,shared=2,hidden=768]",
        4096,
        74 * 9437184 + 72 * 4096,
        12 * 9437184,
    ),
    "dense 5120": ("swiglu[hidden=5120]", 2048, 3 * 2048 * 5120, 3 * 2048 * 5120),
    "dense 11008": ("geglu[hidden=11008]", 3840, 3 * 3840 * 11008, 3 * 3840 * 11008),
    "dense 3456": ("relu2[hidden=3456]", 2048, 2 * 2048 * 3456, 2 * 2048 * 3456),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_can_be_written(name: str) -> None:
    text, width, params, seen = PUBLISHED[name]
    cost = price(text, Frame(width=width))
    assert cost.params == params
    with torch.device("meta"):
        made = channel(text, Frame(width=width))
    assert sum(weight.numel() for weight in made.parameters()) == params
    router = width * made.spec.experts if isinstance(made, MoEChannel) else 0
    assert cost.flops_decode == cost.flops_prefill == 2 * (seen + router)
    assert cost.active_params == pytest.approx(seen + router)


@pytest.mark.parametrize("batch", [1, 4, 64])
def test_idle_experts_are_those_that_a_batch_misses(batch: int) -> None:
    """16 experts of 768 parameters, two a token drawn evenly: the mean of many draws."""
    frame = Frame(width=16, batch=batch)
    cost = MoE(hidden=16).cost(frame)
    drawn = torch.rand(4000, batch, 16).argsort(-1)[..., :2]
    touched = torch.zeros(4000, 16).scatter_(1, drawn.flatten(1), 1.0).sum(1).mean().item()
    assert cost.idle_params == pytest.approx(768 * (16 - touched), rel=0.05, abs=40)


def test_an_expert_that_nobody_chose_is_not_read() -> None:
    ours = channel("moe[experts=64,top_k=1,hidden=16]")
    x = torch.randn(1, 64)
    chosen = ours.route(x)[1].item()
    expected = ours(x)
    for e in set(range(64)) - {chosen}:
        ours.experts.down[e] = torch.nan
        ours.experts.gate_up[e] = torch.nan
    assert torch.equal(ours(x), expected)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="top_k=10 is more than its 8 experts"):
        MoE(experts=8, top_k=10).sized(FRAME)
    with pytest.raises(ValueError, match="shared_gate=true has nothing to weigh"):
        MoE(shared_gate=True).sized(FRAME)
    with pytest.raises(ValueError, match="experts=7 is not valid: choose one of"):
        MoE(experts=7)


def test_a_written_width_shrinks_with_the_width_and_comes_before_the_ratio() -> None:
    target, proxy = Frame(width=2048), Frame(width=64)
    small = shrink(MoE(experts=256, top_k=8, hidden=1024), target, proxy)
    assert (small.experts, small.top_k, small.hidden) == (256, 8, 32)
    for text in ("swiglu", "geglu", "relu2", "mlp"):
        spec = channel_of(read(f"full/{text}[hidden=5120,ratio=2]").layers[0].channel)
        matrices = 2 if text in ("relu2", "mlp") else 3
        assert spec.cost(target).params == matrices * 2048 * 5120
        assert shrink(spec, target, proxy).cost(proxy).params == matrices * 64 * 160
        plain = channel_of(read(f"full/{text}[ratio=2]").layers[0].channel)
        assert plain.cost(target).params == matrices * 2048 * 4096
        assert shrink(plain, target, proxy) == plain
