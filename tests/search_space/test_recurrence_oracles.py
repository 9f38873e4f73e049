"""Elementwise recurrences against the transformers package: the same weights must give the same outputs."""

import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from search_space.frame import Frame
from search_space.mixers.mamba import Mamba, MambaMixer
from search_space.mixers.rglru import RGLRU, RGLRUMixer

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

Far = Callable[[Tensor, Tensor], float]
FRAME = Frame(width=64, train_length=128, context=128, dtype="float32")
LENGTH = 75
BOUND = 1e-5


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def imported(model: str, *names: str) -> Any:
    """Parts of one model's module and, last, its configuration."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        modelling = import_module(f"transformers.models.{model}.modeling_{model}")
        configuration = import_module(f"transformers.models.{model}.configuration_{model}")
    return [getattr(modelling, name) for name in names[:-1]] + [getattr(configuration, names[-1])]


def randomise(module: nn.Module) -> nn.Module:
    for name, weight in module.named_parameters():
        if name in ("A_log", "rg_lru.recurrent_param"):
            weight.uniform_(-4.0, 1.0)
        elif weight.dim() >= 2:
            weight.copy_(torch.randn_like(weight) / weight[0].numel() ** 0.5)
        else:
            weight.copy_(1 + 0.3 * torch.randn_like(weight))
    return module.eval()


def same_every_way(mixer: Any, wanted: Tensor, x: Tensor, far: Far) -> None:
    """Whole, stepped, and stepped behind a prefill."""
    assert far(mixer(x)[0], wanted) < BOUND
    for prefix in (0, 31):
        state, rows = mixer.start(x.shape[0], LENGTH), []
        if prefix:
            y, state = mixer(x[:, :prefix], state)
            rows = list(y.unbind(1))
        for t in range(prefix, x.shape[1]):
            y, state = mixer.step(x[:, t], state)
            rows.append(y)
        assert far(torch.stack(rows, dim=1), wanted) < BOUND


def copy_mamba(ours: MambaMixer, theirs: Any) -> None:
    ours.enter.weight.copy_(theirs.in_proj.weight)
    ours.taps.copy_(theirs.conv1d.weight[:, 0])
    ours.taps_bias.copy_(theirs.conv1d.bias)
    ours.select.weight.copy_(theirs.x_proj.weight)
    ours.step_up.weight.copy_(theirs.dt_proj.weight)
    ours.step_bias.copy_(theirs.dt_proj.bias)
    ours.log_rate.copy_(theirs.A_log)
    ours.skip.copy_(theirs.D)
    ours.out.weight.copy_(theirs.out_proj.weight)


@pytest.mark.parametrize(("expand", "taps"), [(2.0, 4), (1.5, 2)])
def test_mamba_is_the_mixer_of_the_same_name(expand: float, taps: int, far: Far) -> None:
    theirs_class, config_class = imported("mamba", "MambaMixer", "MambaConfig")
    config = config_class(
        hidden_size=64,
        state_size=24,
        time_step_rank=16,
        conv_kernel=taps,
        num_hidden_layers=1,
    )
    # Their configuration takes whole numbers alone; their layer takes what follows from them.
    config.intermediate_size = int(64 * expand)
    theirs = randomise(theirs_class(config, 0))
    ours = Mamba(state=24, expand=expand, rank=16, taps=taps).build(FRAME)
    assert isinstance(ours, MambaMixer)
    copy_mamba(ours, theirs)
    x = torch.randn(2, LENGTH, 64)
    same_every_way(ours, theirs(x), x, far)


def test_mamba_with_norms_is_jambas(far: Far) -> None:
    theirs_class, config_class = imported("jamba", "JambaMambaMixer", "JambaConfig")
    config = config_class(
        hidden_size=64, mamba_d_state=16, mamba_d_conv=4, mamba_expand=2, mamba_dt_rank=8, num_hidden_layers=1
    )
    theirs = randomise(theirs_class(config, 0))
    ours = Mamba(state=16, rank=8, norms=True).build(FRAME)
    assert isinstance(ours, MambaMixer)
    copy_mamba(ours, theirs)
    for norm, other in zip(
        ours.norms, (theirs.dt_layernorm, theirs.b_layernorm, theirs.c_layernorm), strict=True
    ):
        norm.weight.copy_(other.weight)
    x = torch.randn(2, LENGTH, 64)
    same_every_way(ours, theirs(x), x, far)


def test_jambas_layer_has_as_many_parameters() -> None:
    theirs_class, config_class = imported("jamba", "JambaMambaMixer", "JambaConfig")
    with torch.device("meta"):
        theirs = theirs_class(config_class(hidden_size=4096), 0)
    cost = Mamba(state=16, norms=True).cost(Frame(width=4096))
    assert cost.params == sum(weight.numel() for weight in theirs.parameters())


def copy_rglru(ours: RGLRUMixer, theirs: Any) -> None:
    ours.gate.load_state_dict(theirs.linear_y.state_dict())
    ours.enter.load_state_dict(theirs.linear_x.state_dict())
    ours.taps.copy_(theirs.conv_1d.weight[:, 0])
    ours.taps_bias.copy_(theirs.conv_1d.bias)
    unit = theirs.rg_lru
    ours.heads_weight.copy_(torch.stack([unit.input_gate_weight, unit.recurrent_gate_weight]))
    ours.heads_bias.copy_(torch.stack([unit.input_gate_bias, unit.recurrent_gate_bias]).flatten(1))
    ours.rate.copy_(unit.recurrent_param)
    ours.out.load_state_dict(theirs.linear_out.state_dict())


@pytest.mark.parametrize(("heads", "head_dim"), [(4, 16), (3, 32)])
def test_rglru_is_recurrent_gemmas_block(heads: int, head_dim: int, far: Far) -> None:
    theirs_class, config_class = imported(
        "recurrent_gemma", "RecurrentGemmaRecurrentBlock", "RecurrentGemmaConfig"
    )
    config = config_class(
        hidden_size=64,
        lru_width=heads * head_dim,
        num_attention_heads=heads,
        num_hidden_layers=1,
    )
    # In float64, because they damp by 1 - exp(2 log a), which loses digits where a is near one.
    theirs = randomise(theirs_class(config, 0)).double()
    ours = RGLRU(heads=heads, head_dim=head_dim).build(FRAME)
    assert isinstance(ours, RGLRUMixer)
    copy_rglru(ours, theirs)
    x = torch.randn(2, LENGTH, 64)
    places = torch.arange(LENGTH)[None].expand(2, -1)
    wanted, _ = theirs(x.double(), places, None, use_cache=False)
    same_every_way(ours, wanted, x, far)


@pytest.mark.parametrize(("width", "inner", "heads"), [(2560, 2560, 10), (4096, 5632, 22)])
def test_recurrent_gemmas_block_has_as_many_parameters(width: int, inner: int, heads: int) -> None:
    theirs_class, config_class = imported(
        "recurrent_gemma", "RecurrentGemmaRecurrentBlock", "RecurrentGemmaConfig"
    )
    config = config_class(hidden_size=width, lru_width=inner, num_attention_heads=heads, num_hidden_layers=1)
    with torch.device("meta"):
        theirs = theirs_class(config, 0)
    cost = RGLRU(heads=heads).cost(Frame(width=width))
    assert cost.params == sum(weight.numel() for weight in theirs.parameters())
