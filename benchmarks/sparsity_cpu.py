"""Sparse mixers with about 128 visible keys on one CPU thread, against full attention over 2,048 tokens: work and memory.

Forward and backward of the whole layer and of its operators alone, at the inputs that it gives them. Each is taken in
turn with full attention's, in time of the processor and not of the clock, so that what else the machine does counts
for little; the ratios are medians over the rounds.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.common import save
from benchmarks.mixers_cpu import backward, calls_of
from search_space.cost import build_mixer
from search_space.frame import Frame
from search_space.spec import Mixer
from search_space.vocabulary import read

TIME, WIDTHS, ROUNDS = 2048, (256, 512), 7
MOST_OVER_FULL = 1 / 3

PROMISED = (
    "window[size=128]",
    "longformer[size=128,prefix=0]",
    "longformer[size=112,prefix=16]",
    "longformer[size=112,prefix=16,dilation=2]",
    "bigbird[block=32,first=1,near=2,random=1]",
    "bigbird[block=16,first=1,near=4,random=3]",
    "moba[block=64,top_k=2]",
    "moba[block=32,top_k=4]",
    "fixed[stride=128,summary=4]",
    "fixed[stride=64,summary=4]",
)
"""Each token sees 128 keys where they are there; of the fixed pattern 96 on the average."""

REPORTED = (
    "strided[stride=128]",
    "strided[stride=128,mode=head]",
    "nsa[block=32,stride=32,selected=64,window=32]",
    "mosa[size=128]",
    "dsa[top_k=128]",
    "infini[segment=256]",
    "transformer_xl[segment=64,memory=96]",
    "compressive[segment=64,memory=64,slots=32]",
)
"""Others with as many, for which no ratio is promised."""


class Largest(TorchDispatchMode):
    """Notes the elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


def seconds(run: Callable[[], None]) -> float:
    """Processor time of a call."""
    began = time.process_time()
    run()
    return time.process_time() - began


def layer_pass(mixer: Mixer, x: Tensor) -> Callable[[], None]:
    """Forward and backward of the whole layer."""
    return lambda: mixer(x)[0].sum().backward()


def operator_pass(mixer: Mixer, x: Tensor) -> Callable[[], None] | None:
    """Forward and backward of what the layer asks of its operators; None where it asks nothing."""
    calls = calls_of(mixer, x)

    def run() -> None:
        for function, values, named in calls:
            backward(function(*values, **named))

    return run if calls else None


def compared(
    own: Callable[[], None] | None, full: Callable[[], None], rounds: int = ROUNDS
) -> tuple[float | None, float | None]:
    """Milliseconds of the shortest of several rounds, and the median of the ratios to full attention's."""
    if own is None:
        return None, None
    own()
    full()
    times = [(seconds(full), seconds(own)) for _ in range(rounds)]
    ratio = statistics.median(mine / theirs for theirs, mine in times)
    return round(min(mine for _, mine in times) * 1e3, 1), round(ratio, 3)


def measure(text: str, width: int) -> dict[str, Any]:
    """One layer at one width beside full attention."""
    frame = Frame(width=width, train_length=TIME, context=TIME, batch=1, dtype="float32")
    torch.manual_seed(0)
    x = torch.randn(1, TIME, width, requires_grad=True)
    mixer, full = (build_mixer(read(f"{layer}/none").layers[0], frame) for layer in (text, "full"))
    full_operator = operator_pass(full, x)
    assert full_operator is not None
    layer_ms, layer_over_full = compared(layer_pass(mixer, x), layer_pass(full, x))
    operators_ms, operators_over_full = compared(operator_pass(mixer, x), full_operator)
    with Largest() as largest:
        layer_pass(mixer, x)()
    row = {
        "layer": text,
        "width": width,
        "promised": text in PROMISED,
        "layer_ms": layer_ms,
        "layer_over_full": layer_over_full,
        "operators_ms": operators_ms,
        "operators_over_full": operators_over_full,
        "largest_tensor_over_square": round(largest.elements / TIME**2, 2),
    }
    print(f"{text:46} width {width}: layer {layer_over_full}, operators {operators_over_full}", flush=True)
    return row


def main() -> None:
    """Measure all layers at all widths, and save."""
    torch.set_num_threads(1)
    rows = [measure(text, width) for width in WIDTHS for text in (*PROMISED, *REPORTED)]

    def within(column: str) -> dict[str, list[str]]:
        return {
            str(width): [
                row["layer"]
                for row in rows
                if row["width"] == width and row[column] is not None and row[column] <= MOST_OVER_FULL
            ]
            for width in WIDTHS
        }

    save(
        "sparsity_cpu",
        {
            "shape": {"B": 1, "T": TIME},
            "rounds": ROUNDS,
            "operators_within_a_third_of_full_attention": within("operators_over_full"),
            "layers_within_a_third_of_full_attention": within("layer_over_full"),
            "holding_a_square": [
                f"{row['layer']} at width {row['width']}"
                for row in rows
                if row["largest_tensor_over_square"] >= 1
            ],
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
