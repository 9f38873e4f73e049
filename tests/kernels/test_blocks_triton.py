"""Attention over chosen blocks in Triton, beyond what every kernel owes: odd sizes, many runs, empty rows, caches."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.block_attention.ops import block_attention, block_attention_step
from kernels.fused_blocks import by_bucket, cut_runs
from kernels.prefix_attention.ops import prefix_attention
from kernels.routed_attention.ops import routed_attention, routed_attention_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(time, keys, batch=1, heads=6, groups=2, key=16, value=8, dtype=torch.float32):
    """q, k and v with three heads a group."""
    shapes = ((batch, time, heads, key), (batch, keys, groups, key), (batch, keys, groups, value))
    return [torch.randn(shape).to(DEVICE, dtype) for shape in shapes]


def random_lists(rows, blocks, count, lists):
    """[lists, rows, count], a quarter of them -1."""
    order = torch.rand(lists, rows, blocks).argsort(-1)[..., :count]
    return order.masked_fill(torch.rand(order.shape) < 0.25, -1).to(DEVICE)


def random_blocks(time, blocks, count, choosers, batch=1):
    """[batch, time, choosers, count], a quarter of them -1."""
    order = torch.rand(batch, time, choosers, blocks).argsort(-1)[..., :count]
    return order.masked_fill(torch.rand(order.shape) < 0.25, -1).to(DEVICE)


def derive(call, backend, inputs, dtype):
    """Outputs and gradients; the sum of nothing is written as nought."""
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    outputs = [x.masked_fill(x == -torch.inf, 0.0) for x in call(backend, *leaves)]
    asked = [x for x in outputs if x.requires_grad]
    torch.manual_seed(1)
    cotangents = [torch.randn(x.shape).to(x) for x in asked]
    return [x.detach() for x in outputs] + list(torch.autograd.grad(asked, leaves, cotangents))


def check(call, inputs, near):
    """Triton against the reference in float64, with all gradients."""
    expected = derive(call, "reference", inputs, torch.float64)
    actual = derive(call, "triton", inputs, torch.float32)
    for number, (a, b) in enumerate(zip(actual, expected, strict=True)):
        near(a, b, 1e-5, floor=1e-2, name=f"number {number}")


@pytest.fixture
def short_runs(monkeypatch):
    """Runs of 32 rows, so that a block of keys has several."""
    from kernels import configurations

    found = configurations.find

    def find(*arguments):
        row = found(*arguments)
        if row is not None and "RUN" in row.blocks:
            return replace(row, blocks={**row.blocks, "RUN": 32, "BLOCK_T": min(32, row.blocks["BLOCK_T"])})
        return row

    monkeypatch.setattr("kernels.launch.find", find)


@pytest.mark.parametrize("lists", [1, 2, 6])
def test_every_kind_of_lists(near, lists):
    inputs = draw(26, 30)
    index = random_lists(5, 6, 3, lists)
    sizes = {"block": 7, "key_block": 5, "first": 4}
    check(lambda backend, *x: block_attention(*x, index, backend=backend, **sizes), inputs, near)


@pytest.mark.parametrize("choosers", [2, 6])
@pytest.mark.parametrize(("block", "keys"), [(1, 12), (70, 80)])
def test_blocks_of_one_token_and_larger_than_a_tile(near, choosers, block, keys):
    inputs = draw(8, keys)
    blocks = random_blocks(8, -(-keys // block), 2, choosers)
    check(lambda backend, *x: routed_attention(*x, blocks, block=block, backend=backend), inputs, near)


@pytest.mark.usefixtures("short_runs")
@pytest.mark.parametrize("lists", [1, 6])
def test_many_runs_of_listed_blocks(near, lists):
    inputs = draw(40, 40)
    index = torch.arange(3, device=DEVICE).expand(lists, 5, 3)
    sizes = {"block": 8, "key_block": 16}
    check(lambda backend, *x: block_attention(*x, index, backend=backend, **sizes), inputs, near)


@pytest.mark.usefixtures("short_runs")
@pytest.mark.parametrize("choosers", [2, 6])
def test_many_runs_of_named_blocks(near, choosers):
    inputs = draw(40, 40)
    blocks = torch.arange(3, device=DEVICE).expand(1, 40, choosers, 3)
    check(lambda backend, *x: routed_attention(*x, blocks, block=16, backend=backend), inputs, near)


@pytest.mark.usefixtures("short_runs")
def test_many_runs_of_a_prefix(near):
    inputs = draw(40, 20)
    visible = (torch.arange(40, device=DEVICE) - 3).clamp(0, 20)
    check(lambda backend, *x: prefix_attention(*x, visible, backend=backend), inputs, near)


def test_runs_cover_every_row_once():
    bucket = torch.tensor([3, 0, 4, 3, 3, 1, 3, 0, 4])
    order, offsets = by_bucket(bucket, 4)
    assert order.tolist() == [1, 7, 5, 0, 3, 4, 6, 2, 8]
    assert offsets.tolist() == [0, 2, 3, 3, 7]
    owners, starts = cut_runs(offsets, 3, 4, len(bucket))
    assert starts.tolist() == [0, 2, 3, 3, 6]
    assert owners[:6].tolist() == [0, 0, 1, 3, 3, 3]
    assert (owners[6:] == 4).all() and len(owners) == 9 * 3 // 4 + 4


@pytest.mark.parametrize("given", [1.0, torch.nan, torch.inf])
def test_rows_that_see_nothing_give_no_gradient(given):
    """Whatever gradient the sum of nothing is handed."""
    q, k, v = draw(12, 12)
    nothing = torch.full((1, 12, 2, 1), -1, device=DEVICE)
    nothing[:, ::2] = 0
    index = torch.tensor([[0], [-1], [1]], device=DEVICE)
    for call, empty in (
        (lambda *x: block_attention(*x, index, block=4, key_block=6, backend="triton"), slice(4, 8)),
        (lambda *x: routed_attention(*x, nothing, block=5, backend="triton"), slice(1, None, 2)),
    ):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        output, sums = call(*leaves)
        assert output[:, empty].abs().max() == 0 and (sums[:, empty] == -torch.inf).all()
        cotangent = torch.ones_like(sums)
        cotangent[:, empty] = given
        ones = torch.zeros_like(output)
        ones[:, empty] = 1.0
        d_q, d_k, d_v = torch.autograd.grad([output, sums], leaves, [ones, cotangent])
        assert d_q.isfinite().all() and d_q[:, empty].abs().max() == 0
        assert d_k.isfinite().all() and d_k.abs().max() > 0 and d_v.abs().max() == 0


def test_one_of_two_gradients_is_enough(near):
    inputs = draw(10, 10)
    index = torch.tensor([[0], [1]], device=DEVICE)
    blocks = (torch.arange(10, device=DEVICE) // 5).view(1, 10, 1, 1).expand(1, 10, 2, 1)
    calls = (
        lambda backend, *x: block_attention(*x, index, block=5, key_block=5, backend=backend),
        lambda backend, *x: routed_attention(*x, blocks, block=5, backend=backend),
    )
    for call in calls:
        for place in (0, 1):
            results = []
            for backend in ("reference", "triton"):
                leaves = [x.clone().requires_grad_() for x in inputs]
                asked = call(backend, *leaves)[place]
                results.append(torch.autograd.grad(asked.sin().sum(), leaves, materialize_grads=True))
            for a, b in zip(results[1], results[0], strict=True):
                near(a, b, 1e-5, floor=1e-3)


@pytest.mark.parametrize("kinds", [(torch.float32, torch.float16), (torch.float16, torch.float16)], ids=str)
def test_a_step_reads_a_narrow_strided_cache_where_it_lies(near, kinds):
    """Longer than one program reads, and with memory that must not be touched."""
    keys, narrow = kinds
    q, k, v = draw(1, 400)
    q, k, v = q[:, 0], k.to(keys)[:, :300], v.to(narrow)[:, :300]
    slots = torch.randperm(300, device=DEVICE)[:140]
    blocks = torch.tensor([[[3, 14, -1, 7, 1, 12, 9, 0, 5], [2, 13, 4, -1, 8, 11, 6, 10, 1]]], device=DEVICE)
    bound = {"length": 290, "block": 20}
    with torch.no_grad():
        expected = block_attention_step(q.double(), k.double(), v.double(), slots, backend="reference")
        named = routed_attention_step(
            q.double(), k.double(), v.double(), blocks, backend="reference", **bound
        )
        for x in (k, v):
            untouched = torch.ones(300, dtype=torch.bool, device=DEVICE)
            untouched[slots] = False
            part = x.clone().masked_fill(untouched.view(1, -1, 1, 1), torch.nan)
            k, v = (part, v) if x is k else (k, part)
        actual = block_attention_step(q, k, v, slots, backend="triton")
        for a, b in zip(actual, expected, strict=True):
            near(a, b, 5e-3)
        k, v = (x.nan_to_num(0.0) for x in (k, v))
        again = routed_attention_step(
            q.double(), k.double(), v.double(), blocks, backend="reference", **bound
        )
        assert actual[0].dtype == narrow and named[0].shape == again[0].shape
        for a, b in zip(
            routed_attention_step(q, k, v, blocks, backend="triton", **bound), again, strict=True
        ):
            near(a, b, 5e-3)


def test_a_step_over_nothing_is_nought():
    q, k, v = draw(1, 5)
    with torch.no_grad():
        for slots in (torch.tensor([-1, -1]), torch.zeros(0, dtype=torch.long), torch.full((2, 1), -1)):
            output, total = block_attention_step(q[:, 0], k, v, slots.to(DEVICE), backend="triton")
            assert output.abs().max() == 0 and (total == -torch.inf).all()


def test_a_step_that_is_to_be_derived_is_left_to_torch(near):
    q, k, v = (x.requires_grad_() for x in draw(1, 30))
    slots = torch.arange(0, 30, 2, device=DEVICE)
    blocks = torch.tensor([[[1], [0]]], device=DEVICE)
    for call in (
        lambda backend: block_attention_step(q[:, 0], k, v, slots, backend=backend),
        lambda backend: routed_attention_step(q[:, 0], k, v, blocks, block=16, length=30, backend=backend),
    ):
        (one,), (other,) = (
            torch.autograd.grad(call(backend)[0].sum(), [k]) for backend in ("triton", "reference")
        )
        near(one, other, 1e-5)


class _Questions(TorchDispatchMode):
    """Counts the operations that make a program wait for its device."""

    def __init__(self):
        super().__init__()
        self.asked = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket._qualified_op_name in (
            "aten::_local_scalar_dense",
            "aten::nonzero",
            "aten::bincount",
            "aten::repeat_interleave",
            "aten::masked_select",
            "aten::index_add_",
            "aten::scatter_add_",
        ):
            self.asked[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_lists_are_turned_round_without_asking_the_device(monkeypatch):
    """But for the arguments' checks, which are left out where they would stall it."""
    for name in ("block_attention", "routed_attention"):
        monkeypatch.setattr(f"kernels.{name}.ops.torch.compiler.is_compiling", lambda: True)
    index, blocks = random_lists(4, 4, 2, 2), random_blocks(16, 4, 2, 2)
    for call in (
        lambda *x: block_attention(*x, index, block=4, key_block=4, backend="triton")[0],
        lambda *x: routed_attention(*x, blocks, block=4, backend="triton")[0],
    ):
        leaves = [x.requires_grad_() for x in draw(16, 16)]
        with _Questions() as questions:
            call(*leaves).sum().backward()
        assert not questions.asked
