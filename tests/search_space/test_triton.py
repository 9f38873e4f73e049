"""Every mixer's promises through the Triton kernels: in the interpreter where there is no GPU, at tiny sizes."""

from importlib import import_module
from pkgutil import iter_modules

import pytest
import torch
from torch import Tensor

import kernels
from kernels.backend import why_not_triton
from kernels.configurations import path_of
from search_space.cost import build_mixer
from search_space.frame import Frame
from search_space.layout import Branch, Layer
from search_space.spec import Mixer
from search_space.vocabulary import VOCABULARY

FRAME = Frame(width=32, train_length=24, context=32, dtype="float32", vocabulary=32)
LENGTH = 20
SERVED = {
    "linear",
    "performer",
    "lolcats",
    "retnet",
    "lightning",
    "mamba2",
    "mamba3",
    "loglinear",
    "loglinear[base=gated_delta]",
    "mlstm",
    "gla",
    "hgrn2",
    "rwkv6",
    "deltanet",
    "gated_delta",
    "strided",
    "fixed",
    "longformer",
    "bigbird",
    "linformer",
    "moba",
    "nsa",
    "memory_tokens",
    "tree",
    "kda",
    "rwkv7",
    "mamba",
    "mingru",
    "rglru",
    "shortconv",
    "sru",
    "dsa",
    "full",
    "window",
    "differential",
    "cross_layer",
    "mla",
    "mosa",
    "infini",
    "s4d",
}
"""Words that a kernel must serve; the others run on torch's own operations on a GPU too."""
OPERATORS = {
    found.name: import_module(f"kernels.{found.name}.ops")
    for found in iter_modules(kernels.__path__)
    if found.ispkg
}
BRANCHES = {
    str(branch): branch
    for branch in (
        *(Branch(word) for word in VOCABULARY),
        # Other settings that are served by other kernels.
        Branch("loglinear", (("base", "gated_delta"),)),
    )
}
every_word = pytest.mark.parametrize("word", list(BRANCHES))


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Operators answer through Triton wherever they have a kernel; the names of those that did."""
    names: set[str] = set()

    def choose(backend, operator, *tensors, widths=None, kernel="forward", missing=None, **about):
        if (
            backend == "auto"
            and not missing
            and why_not_triton(operator, tensors, widths or {}, kernel, **about) is None
        ):
            names.add(operator)
            return "triton"
        return "chunked"

    for ops in OPERATORS.values():
        monkeypatch.setattr(ops, "resolve", choose)
    return names


def build(word: str, shake) -> Mixer:
    torch.manual_seed(3)
    mixer = build_mixer(Layer((BRANCHES[word],), Branch("none")), FRAME)
    shake(mixer)
    return mixer


def tokens(batch: int = 1) -> Tensor:
    return torch.randn(batch, LENGTH, FRAME.width, generator=torch.Generator().manual_seed(5))


def run(mixer: Mixer) -> list[Tensor]:
    """Output and gradients of the input and of every parameter."""
    x = tokens().requires_grad_()
    y, _ = mixer(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(6))
    parameters = list(mixer.parameters())
    gradients = torch.autograd.grad((y * weights).sum(), [x, *parameters], allow_unused=True)
    return [y.detach(), *(g if g is not None else torch.zeros(1) for g in gradients)]


@every_word
def test_outputs_and_gradients_are_those_of_the_chunk_forms(word, used, shake, monkeypatch):
    through_triton = run(build(word, shake))
    assert used or word not in SERVED
    for ops in OPERATORS.values():
        monkeypatch.setattr(ops, "resolve", lambda *_, **__: "chunked")
    expected = run(build(word, shake))
    largest = max(g.square().mean().sqrt().item() for g in expected[1:])
    for place, (got, wanted) in enumerate(zip(through_triton, expected, strict=True)):
        assert got.isfinite().all()
        size = max(wanted.square().mean().sqrt().item(), 1e-2 * largest)
        error = (got - wanted).square().mean().sqrt().item()
        assert error <= 1e-4 * size, f"{place}: {error / size:.1e}"


@every_word
@torch.no_grad()
def test_no_token_sees_a_later_one(word, used, shake):
    mixer, x = build(word, shake).eval(), tokens()
    before, _ = mixer(x)
    changed = x.clone()
    changed[:, 13:] += 1.0
    after, _ = mixer(changed)
    torch.testing.assert_close(after[:, :13], before[:, :13], rtol=0, atol=1e-5)
    assert used or word not in SERVED


@every_word
@torch.no_grad()
def test_steps_and_cut_prefills_are_one_prefill(word, used, shake):
    mixer, x = build(word, shake).eval(), tokens()
    whole, _ = mixer(x, mixer.start(1, LENGTH))
    part, state = mixer(x[:, :7], mixer.start(1, LENGTH))
    outputs = [part]
    for t in (7, 8, 9):
        y, state = mixer.step(x[:, t], state)
        outputs.append(y[:, None])
    rest, _ = mixer(x[:, 10:], state)
    near = (torch.cat([*outputs, rest], 1) - whole).square().mean(-1).sqrt() / whole.square().mean().sqrt()
    assert near.max() <= 1e-3, near
    assert used or word not in SERVED


def test_every_operator_with_kernels_serves_a_mixer(monkeypatch, shake):
    """What no layer asks for is served by tests alone, and is not worth its kernels."""
    asked: set[str] = set()

    def choose(_, operator, *__, **___):
        asked.add(operator.removesuffix("_step"))
        return "chunked"

    for ops in OPERATORS.values():
        monkeypatch.setattr(ops, "resolve", choose)
    for word in VOCABULARY:
        run(build(word, shake))
    with_kernels = {name for name in OPERATORS if path_of(name).exists()}
    assert with_kernels - {"linear_cross_entropy"} <= asked
