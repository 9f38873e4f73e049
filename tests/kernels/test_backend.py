"""How a call chooses its implementation, and that this folder's tests run on poisoned memory."""

import pytest
import torch

from kernels.backend import is_poisoned, resolve, working_dtype


def test_fresh_memory_is_poisoned():
    assert torch.empty(64).isnan().all()
    assert torch.ones(3).new_empty(5).isnan().all()


def test_backends_resolve():
    assert resolve("auto", "op") == "chunked"
    assert resolve("chunked", "op") == "chunked"
    assert resolve("reference", "op") == "reference"


def test_triton_is_answered_with_the_way_out():
    with pytest.raises(ValueError, match=r"op: there is no Triton kernel yet .*backend='auto'"):
        resolve("triton", "op")


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
