"""Documents packed one after another in a single row: cu_seqlens, checked, walked and told by chunks.

Letters: N documents, T time, C tokens of a chunk.
"""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def require_documents(operator: str, cu_seqlens: Tensor | None, batch: int, time: int) -> int:
    """How many documents there are, the batch where none are packed; ValueError where cu_seqlens cannot be.

    cu_seqlens [N + 1] holds where each document begins, and T at its end. Elsewhere than on a CPU its values are
    trusted, because reading them would stall the device.
    """
    if cu_seqlens is None:
        return batch
    if batch != 1:
        raise ValueError(
            f"{operator}: cu_seqlens packs documents in one row, but there are {batch} rows; pass one row"
        )
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{operator}: cu_seqlens is {cu_seqlens.dtype} of shape {list(cu_seqlens.shape)}, but must be whole "
            "numbers [N + 1], int32 or int64"
        )
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        starts = cu_seqlens.tolist()
        if starts[0] != 0 or starts[-1] != time or min(b - a for a, b in _pairs(starts)) < 1:
            raise ValueError(
                f"{operator}: cu_seqlens={starts} must rise from 0 to the {time} tokens of the row, with at least "
                "one token a document"
            )
    return len(cu_seqlens) - 1


def by_document(
    run: Callable[..., tuple[Tensor, Tensor]],
    timed: Sequence[Tensor | None],
    state: Tensor | None,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor]:
    """Each document alone: run(*timed of it, its state) → outputs joined along time, last states along the batch."""
    outputs, states = [], []
    for n, (start, end) in enumerate(_pairs(cu_seqlens.tolist())):
        own = (None if x is None else x[:, start:end] for x in timed)
        output, last = run(*own, None if state is None else state[n : n + 1])
        outputs.append(output)
        states.append(last)
    return torch.cat(outputs, dim=1), torch.cat(states)


def chunk_offsets(cu_seqlens: Tensor | None, batch: int, time: int, chunk: int) -> tuple[Tensor | None, int]:
    """Where each document's chunks begin [N + 1], and how many chunks there are at most; asks the device nothing."""
    if cu_seqlens is None:
        return None, batch * -(-time // chunk)
    counts = torch.div(cu_seqlens.diff() + chunk - 1, chunk, rounding_mode="floor")
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return offsets, time // chunk + len(cu_seqlens) - 1


def chunk_owners(offsets: Tensor | None, chunks: int) -> Tensor | None:
    """The document [chunks] of each chunk, of those behind the last one the last; asks the device nothing."""
    if offsets is None:
        return None
    return torch.searchsorted(offsets[1:-1], torch.arange(chunks, device=offsets.device), right=True)


def _pairs(starts: list[int]) -> list[tuple[int, int]]:
    return list(itertools.pairwise(starts))
