"""How a call chooses its implementation, and that this folder's tests run on poisoned memory."""

import pytest
import torch

import kernels.backend
from kernels.backend import is_poisoned, resolve, working_dtype
from kernels.configurations import Configuration


def test_fresh_memory_is_poisoned():
    assert torch.empty(64).isnan().all()
    assert torch.ones(3).new_empty(5).isnan().all()


def test_backends_resolve():
    assert resolve("auto", "op") == "chunked"
    assert resolve("chunked", "op") == "chunked"
    assert resolve("reference", "op") == "reference"


def test_an_operator_without_a_kernel_says_so():
    with pytest.raises(ValueError, match=r"op: there is no Triton kernel yet .*backend='auto'"):
        resolve("triton", "op")


def test_triton_without_gpu_or_interpreter_says_so(monkeypatch):
    monkeypatch.setattr(kernels.backend, "interprets", lambda: False)
    with pytest.raises(
        ValueError, match=r"needs a GPU, not the device 'cpu' .*TRITON_INTERPRET=1.*backend='auto'"
    ):
        resolve("triton", "scalar_decay", torch.ones(1), widths={"K": 16, "V": 16})


def test_triton_without_the_package_says_so(monkeypatch):
    monkeypatch.setattr(kernels.backend, "has_triton", lambda: False)
    with pytest.raises(ValueError, match="needs the package triton"):
        resolve("triton", "scalar_decay", torch.ones(1), widths={"K": 16, "V": 16})


def test_bfloat16_is_not_interpreted():
    with pytest.raises(ValueError, match="interpreter computes wrongly in bfloat16"):
        resolve("triton", "scalar_decay", torch.ones(1, dtype=torch.bfloat16), widths={"K": 16, "V": 16})


def test_complex_numbers_go_to_kernels_that_take_them():
    narrow, wide = torch.ones(1, dtype=torch.complex64), torch.ones(1, dtype=torch.complex128)
    widths = {"K": 16, "V": 16}
    with pytest.raises(ValueError, match=r"torch.complex64, but .* float32, float16 and bfloat16; use"):
        resolve("triton", "scalar_decay", narrow, widths=widths)
    with pytest.raises(ValueError, match=r"torch.complex128, but .* and bfloat16, and complex64; use"):
        resolve("triton", "scalar_decay", wide, widths=widths, complex_numbers=True)
    assert resolve("triton", "scalar_decay", narrow, widths=widths, complex_numbers=True) == "triton"


def test_auto_takes_triton_on_a_gpu_it_has_configurations_for(monkeypatch):
    """No GPU is needed: a tensor of the meta device stands in for one."""
    x = torch.ones(1, device="meta")
    monkeypatch.setattr(kernels.backend, "_on_gpu", lambda _: True)
    monkeypatch.setattr(kernels.backend, "architecture", lambda _: "sm_90")
    assert resolve("auto", "scalar_decay", x, widths={"K": 64, "V": 64}) == "triton"
    assert resolve("auto", "scalar_decay", x, widths={"K": 64, "V": 64}, missing="why not") == "chunked"
    assert resolve("auto", "scalar_decay", x, widths={"K": 4096, "V": 64}) == "chunked"
    assert resolve("auto", "scalar_decay", x.double(), widths={"K": 64, "V": 64}) == "chunked"
    assert resolve("auto", "op", x) == "chunked"
    assert resolve("chunked", "scalar_decay", x, widths={"K": 64, "V": 64}) == "chunked"


def test_unknown_backend_is_named():
    with pytest.raises(ValueError, match=r"op: backend='cuda' .*auto, reference, chunked, triton"):
        resolve("cuda", "op")


def test_poison_is_seen_in_every_dtype():
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        clean = torch.full((300, 300), 3.0, dtype=dtype)
        assert not is_poisoned(clean)
        clean[7, 5] = torch.nan
        assert is_poisoned(clean)


def test_states_are_never_narrower_than_float32():
    assert working_dtype(torch.ones(1, dtype=torch.bfloat16), None) == torch.float32
    assert working_dtype(torch.ones(1), torch.ones(1, dtype=torch.float64)) == torch.float64


def test_a_row_for_half_precision_is_not_for_float32_and_stands_above_one_for_any():
    own = {"kernel": "forward", "num_warps": 4, "num_stages": 1, "blocks": {}}
    rows = [Configuration(**own, widths=(size,), dtype=kind) for size, kind in ((64, "any"), (128, "half"))]
    assert [rows[1].takes(dtype) for dtype in ("bfloat16", "float16", "float32")] == [True, True, False]
    assert min(rows, key=Configuration.rank) is rows[1]
    assert not rows[1].serves("forward", (64,), "float32", "sm_90")
